"""The training loss: SI-SDR of every estimate with speaker classification (SpEx+, arXiv 2005.04686, eq. 6–8)."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from onevoice.config import STRICT, Fraction
from onevoice.errors import ConfigError
from onevoice.models.base import GivenWave, Lengths, Prediction, Wave, as_waves, valid_mask, zero_padding

UNKNOWN_SPEAKER = -1
"""The class index of a speaker that the classifier does not know; such items add no cross-entropy."""
MAX_SUPPRESSION_DB = 30.0
"""The loss gains nothing from suppressing the estimate of an absent target further than this."""


class LossTerms(NamedTuple):
    """The loss and its parts, each a scalar tensor."""

    total: Float[Tensor, ""]
    si_sdr: Float[Tensor, ""]
    """Mean SI-SDR of the first estimate in dB over the items whose target speaks; higher is better."""
    cross_entropy: Float[Tensor, ""]
    """Mean cross-entropy in nats over the items whose speaker is known; 0 if there are none."""


def si_sdr(
    estimate: Wave, target: Wave, length: Lengths | None = None, limit_db: float | None = None, eps: float = 1e-8
) -> Float[Tensor, " batch"]:
    """Return the SI-SDR of each item in dB, differentiable; higher is better.

    Both signals are centered over their valid samples; padding is ignored. `limit_db` is the value of a perfect
    estimate (Wisdom et al., arXiv 2006.12701, eq. 2). `eps` keeps silence finite.
    Source: Le Roux et al., "SDR – half-baked or well done?", arXiv 1811.02508, eq. 3–5.
    """
    estimate, target = estimate.float(), target.float()
    valid = valid_mask(target.shape[1], length, target)
    count = target.shape[1] if valid is None else valid.sum(1, keepdim=True)
    estimate, target = (_center(signal, valid, count) for signal in (estimate, target))
    scale = (estimate * target).sum(1, keepdim=True) / (target.square().sum(1, keepdim=True) + eps)
    projection = scale * target
    signal_energy = projection.square().sum(1)
    error_energy = (estimate - projection).square().sum(1)
    if limit_db is not None:
        error_energy = error_energy + 10 ** (-limit_db / 10) * signal_energy
    return 10 * (torch.log10(signal_energy + eps) - torch.log10(error_energy + eps))


def _center(signal: Wave, valid: Wave | None, count: Tensor | int) -> Wave:
    signal = signal if valid is None else signal * valid
    signal = signal - signal.sum(1, keepdim=True) / count
    return signal if valid is None else signal * valid


def suppression(
    estimate: Wave, mixture: Wave, length: Lengths | None = None, limit_db: float = MAX_SUPPRESSION_DB
) -> Float[Tensor, " batch"]:
    """Return how far each estimate lies below its mixture in dB, at most `limit_db`; for items with an absent target.

    −10 log10(|e|² / |x|² + 10^(−limit_db / 10)). The limit keeps these items from outweighing those whose target
    speaks.
    """
    estimate, mixture = zero_padding(estimate.float(), length), zero_padding(mixture.float(), length)
    ratio = estimate.square().sum(1) / mixture.square().sum(1).clamp(min=1e-8)
    return -10 * torch.log10(ratio + 10 ** (-limit_db / 10))


def level_error(
    estimate: Wave, target: Wave, length: Lengths | None = None, eps: float = 1e-8
) -> Float[Tensor, " batch"]:
    """Return the distance in dB between the energies of each estimate and its target, |10 log10(|e|² / |s|²)|."""
    energies = [zero_padding(signal.float(), length).square().sum(1) + eps for signal in (estimate, target)]
    return (10 * torch.log10(energies[0] / energies[1])).abs()


@dataclass(frozen=True, config=STRICT)
class MultiLoss:
    """−(w₁ SI-SDR₁ + w₂ SI-SDR₂ + …) + lambd · cross-entropy, with one weight per estimate of the network.

    For SpEx+, −((1−alpha−beta) SI-SDR_short + alpha SI-SDR_middle + beta SI-SDR_long) + lambd · cross-entropy.
    If the target of an item is silent, `suppression` replaces SI-SDR. For the other items, `level` times `level_error`
    is subtracted from SI-SDR. `MultiLoss(0.5)` sets `lambd`, as in the original system; all else goes by name.
    """

    lambd: NonNegativeFloat = 0.5
    """Weight of the speaker classification; with 0 there is none."""
    _: KW_ONLY
    alpha: Fraction = 0.1
    """Weight of the second of three estimates: SpEx+'s middle decoder."""
    beta: Fraction = 0.1
    """Weight of the third of three estimates: SpEx+'s long decoder."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """One weight per estimate of the network. Null: 1 for one estimate; 1 − alpha − beta, alpha, beta for three."""
    limit_db: PositiveFloat | None = None
    """SI-SDR in dB of a perfect estimate; needed if mixtures can be the target alone. Null is the paper's loss."""
    level: NonNegativeFloat = 0.0
    """Weight of the level error per dB. SI-SDR ignores the level, so without this weight a network can learn silence
    for absent targets by turning down everything. If a share p of the items has an absent target, weights above
    p / (1 − p) make sure that this costs more than it gains."""

    def __post_init__(self) -> None:
        """Check that the first estimate has a weight, and the estimates in total."""
        if self.alpha + self.beta >= 1:
            raise ValueError(f"alpha + beta must be below 1, not {self.alpha + self.beta:g}")
        if self.weights is not None and not sum(self.weights):
            raise ValueError(f"weights: one must be above 0, not {list(self.weights)}")

    def __call__(
        self,
        prediction: Prediction,
        target: GivenWave,
        speaker: Int[Tensor, " batch"],
        length: Lengths | None = None,
        mixture: GivenWave | None = None,
    ) -> LossTerms:
        """Return the loss of a batch. `speaker` holds class indices, `UNKNOWN_SPEAKER` for an unknown speaker.

        Only items with an absent target need `mixture`; without it, they add nothing. Raises `ConfigError` unless
        there is one weight per estimate.
        """
        target = as_waves(target, "target")
        mixture = None if mixture is None else as_waves(mixture, "mixture")
        present = target.abs().amax(1) > 0
        estimates = prediction["predicted_audio"]
        ratios = [si_sdr(estimate, target, length, self.limit_db) for estimate in estimates]
        gain = target.new_zeros(())
        for weight, estimate, ratio in zip(self.weights_of(len(estimates)), estimates, ratios, strict=True):
            absent = target.new_zeros(len(target)) if mixture is None else suppression(estimate, mixture, length)
            speaking = ratio - self.level * level_error(estimate, target, length) if self.level else ratio
            gain = gain + weight * torch.where(present, speaking, absent).mean()
        logits = prediction["predicted_logits"].float()
        if self.lambd:
            known = (speaker != UNKNOWN_SPEAKER).sum().clamp(min=1)
            cross_entropy = F.cross_entropy(logits, speaker, ignore_index=UNKNOWN_SPEAKER, reduction="sum") / known
        else:
            cross_entropy = logits.sum() * 0.0  # the classifier keeps its place in the gradient of a group
        mean_si_sdr = (ratios[0] * present).sum() / present.sum().clamp(min=1)
        return LossTerms(self.lambd * cross_entropy - gain, mean_si_sdr, cross_entropy)

    def weights_of(self, count: int) -> tuple[float, ...]:
        """Return the weights of `count` estimates. Raises `ConfigError` if the config does not give that many."""
        defaults = {1: (1.0,), 3: (1 - self.alpha - self.beta, self.alpha, self.beta)}
        weights = defaults.get(count, ()) if self.weights is None else self.weights
        if len(weights) != count:
            given = "null" if self.weights is None else f"{len(weights)} weights"
            raise ConfigError(
                f"loss.weights: the network gives {count} estimates and this is {given}; set {count} weights, "
                "the first for the estimate that users get"
            )
        return weights
