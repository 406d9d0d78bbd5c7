"""MultiLoss against its formula, and SI-SDR against signals with a known value and an outside implementation."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from onevoice.config import from_dict
from onevoice.errors import ConfigError
from onevoice.models import Prediction
from onevoice.training.loss import UNKNOWN_SPEAKER, MultiLoss, level_error, si_sdr, suppression


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("known_db", [-20.0, -3.0, 0.0, 7.5, 30.0])
def test_si_sdr_of_a_signal_built_to_have_it(known_db: float) -> None:
    target, error = noise(2, 4000), noise(2, 4000, seed=1)
    target, error = target - target.mean(1, keepdim=True), error - error.mean(1, keepdim=True)
    error -= (error * target).sum(1, keepdim=True) / target.square().sum(1, keepdim=True) * target
    error *= target.norm(dim=1, keepdim=True) / error.norm(dim=1, keepdim=True) * 10 ** (-known_db / 20)
    torch.testing.assert_close(si_sdr(3 * (target + error) + 2, target), torch.full((2,), known_db), atol=1e-3, rtol=0)


def test_si_sdr_agrees_with_torchmetrics() -> None:
    estimate, target = noise(4, 3000) + 0.3, noise(4, 3000, seed=1) + 0.2
    estimate = estimate + target
    oracle = scale_invariant_signal_distortion_ratio(estimate, target, zero_mean=True)
    torch.testing.assert_close(si_sdr(estimate, target), oracle, atol=1e-4, rtol=0)


def test_padding_is_ignored() -> None:
    estimate, target = noise(2, 1000) + 0.5, noise(2, 1000, seed=1) + 0.5
    alone = si_sdr(estimate[:1, :600], target[:1, :600])
    padded = si_sdr(estimate, target, torch.tensor([600, 1000]))
    torch.testing.assert_close(padded[:1], alone)
    torch.testing.assert_close(padded[1:], si_sdr(estimate, target)[1:])


def test_silence_is_finite_with_a_finite_gradient() -> None:
    estimate = noise(1, 500).requires_grad_()
    for first, second in (
        (estimate, torch.zeros(1, 500)),
        (estimate * 0, noise(1, 500)),
        (estimate, estimate.detach()),
    ):
        value = si_sdr(first, second).sum()
        (gradient,) = torch.autograd.grad(value, estimate)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_limited_si_sdr_follows_its_formula() -> None:
    target, error = noise(1, 4000), noise(1, 4000, seed=1)
    for level in (1.0, 0.1, 0.001, 0.0):
        plain = si_sdr(target + level * error, target).double()
        expected = -10 * torch.log10(10 ** (-plain / 10) + 10**-3.0)
        limited = si_sdr(target + level * error, target, limit_db=30.0).double()
        torch.testing.assert_close(limited, expected, atol=1e-3, rtol=0)


def test_estimates_of_an_absent_target_are_suppressed() -> None:
    mixture = noise(2, 800, seed=4)
    for gain in (1.0, 0.1, 0.0):
        expected = torch.full((2,), -10 * math.log10(gain**2 + 0.001))
        torch.testing.assert_close(suppression(gain * mixture, mixture), expected)
    predicted = prediction(batch=2)
    target = torch.stack([noise(800, seed=5), torch.zeros(800)])
    unknown = torch.full((2,), UNKNOWN_SPEAKER)
    terms = MultiLoss()(predicted, target, unknown, None, mixture)
    parts = [
        (si_sdr(e[:1], target[:1])[0] + suppression(e[1:], mixture[1:])[0]) / 2 for e in predicted["predicted_audio"]
    ]
    torch.testing.assert_close(terms.total, -(0.8 * parts[0] + 0.1 * parts[1] + 0.1 * parts[2]))
    torch.testing.assert_close(terms.si_sdr, si_sdr(predicted["predicted_audio"][0][:1], target[:1])[0])
    assert MultiLoss()(predicted, target * 0, unknown).total == 0


def prediction(batch: int = 3, classes: int = 4) -> Prediction:
    return {
        "predicted_audio": tuple(noise(batch, 800, seed=k) for k in range(3)),
        "predicted_logits": noise(batch, classes, seed=9),
    }


def test_the_formula_of_the_paper() -> None:
    predicted, target, speaker = prediction(), noise(3, 800, seed=5), torch.tensor([0, 3, 1])
    short, middle, long = (
        scale_invariant_signal_distortion_ratio(e, target, zero_mean=True).mean() for e in predicted["predicted_audio"]
    )
    expected = -(0.8 * short + 0.1 * middle + 0.1 * long) + 0.5 * F.cross_entropy(
        predicted["predicted_logits"], speaker
    )
    terms = MultiLoss()(predicted, target, speaker)
    torch.testing.assert_close(terms.total, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(terms.si_sdr, short, atol=1e-4, rtol=0)


def with_estimates(count: int) -> Prediction:
    return {**prediction(), "predicted_audio": tuple(noise(3, 800, seed=k) for k in range(count))}


@pytest.mark.parametrize(
    ("settings", "weights"),
    [({}, (1.0,)), ({"alpha": 0.3, "beta": 0.2}, (0.5, 0.3, 0.2)), ({"weights": (0.9, 0.4)}, (0.9, 0.4)),
     ({"weights": (0.5,)}, (0.5,)), ({"weights": (0.4, 0.3, 0.2, 0.1)}, (0.4, 0.3, 0.2, 0.1))],
)  # fmt: skip
def test_every_estimate_has_its_weight(settings: dict[str, Any], weights: tuple[float, ...]) -> None:
    predicted, target, unknown = with_estimates(len(weights)), noise(3, 800, seed=5), torch.full((3,), UNKNOWN_SPEAKER)
    ratios = [si_sdr(estimate, target).mean() for estimate in predicted["predicted_audio"]]
    expected = -sum(weight * ratio for weight, ratio in zip(weights, ratios, strict=True))
    terms = MultiLoss(**settings)(predicted, target, unknown)
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.si_sdr, ratios[0])


@pytest.mark.parametrize(
    ("count", "weights", "given"), [(2, None, "null"), (4, None, "null"), (3, (0.5, 0.5), "2 weights")]
)
def test_a_missing_weight_is_an_error(count: int, weights: tuple[float, ...] | None, given: str) -> None:
    predicted, target = with_estimates(count), noise(3, 800, seed=5)
    with pytest.raises(
        ConfigError, match=rf"loss\.weights: the network gives {count} .* is {given}; set {count} weights"
    ):
        MultiLoss(weights=weights)(predicted, target, torch.zeros(3, dtype=torch.long))


def test_the_level_is_the_distance_of_energies_in_db() -> None:
    target, weight = noise(3, 800, seed=5), 0.05
    louder = torch.tensor([2.0, 0.1, 1.0])[:, None] * target
    expected = torch.tensor([20 * math.log10(2), 20.0, 0.0])
    torch.testing.assert_close(level_error(louder, target), expected, atol=1e-4, rtol=0)
    junk = torch.cat([louder, torch.full((3, 10), torch.nan)], 1)
    padded = level_error(junk, F.pad(target, (0, 10)), torch.full((3,), 800))
    torch.testing.assert_close(padded, expected, atol=1e-4, rtol=0)
    predicted, unknown = prediction(), torch.full((3,), UNKNOWN_SPEAKER)
    plain, with_level = (MultiLoss(level=w)(predicted, target, unknown).total for w in (0.0, weight))
    distances = [level_error(estimate, target).mean() for estimate in predicted["predicted_audio"]]
    penalty = weight * (0.8 * distances[0] + 0.1 * distances[1] + 0.1 * distances[2])
    torch.testing.assert_close(with_level - plain, penalty, atol=1e-5, rtol=1e-4)


def test_unknown_speakers_add_no_cross_entropy() -> None:
    predicted, target = prediction(), noise(3, 800, seed=5)
    some = MultiLoss()(predicted, target, torch.tensor([2, UNKNOWN_SPEAKER, UNKNOWN_SPEAKER]))
    expected = F.cross_entropy(predicted["predicted_logits"][:1], torch.tensor([2]))
    torch.testing.assert_close(some.cross_entropy, expected)
    none = MultiLoss()(predicted, target, torch.full((3,), UNKNOWN_SPEAKER))
    assert none.cross_entropy == 0
    assert none.total.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.6, "beta": 0.5}, "below 1"),
        ({"lambda": 1}, "'lambd'"),
        ({"weights": [0, 0]}, "weights: one must be above 0"),
        ({"weights": [-0.1, 1]}, r"weights\.0: "),
    ],
)
def test_wrong_weights(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(MultiLoss, change)
