"""Metrics against formulas, independent implementations and the libraries called directly."""

import importlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pesq as pesq_library
import pystoi
import pytest
import torch
import torchmetrics.functional.audio as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from voices import Voice

from onevoice.errors import AudioError, MetricError, MissingDependencyError
from onevoice.evaluation import metrics, scoring
from onevoice.evaluation.metrics import CEILING_DB, FLOOR_DB


def voices(sample_rate: int = 8000, seconds: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Return a target and an interferer in float64."""
    return tuple(Voice.number(n).say(0, seconds, sample_rate).astype(np.float64) for n in (0, 1))


def at_ratio(target: np.ndarray, ratio_db: float, seed: int = 0) -> np.ndarray:
    """Return target + noise that is orthogonal to it, without DC, and `ratio_db` below it."""
    centered = target - target.mean()
    noise = np.random.default_rng(seed).standard_normal(len(target))
    noise -= noise.mean()
    noise -= (noise @ centered) / (centered @ centered) * centered
    noise *= np.linalg.norm(centered) / np.linalg.norm(noise) * 10 ** (-ratio_db / 20)
    return centered + noise


@pytest.mark.parametrize("ratio_db", [-50.0, -20.0, 0.0, 7.3, 40.0, 95.0])
def test_si_sdr_is_the_ratio_the_signal_was_built_with(ratio_db: float) -> None:
    target, _ = voices()
    assert metrics.si_sdr(at_ratio(target, ratio_db), target) == pytest.approx(ratio_db, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(1e-200, 1e30),
    target_scale=st.floats(1e-200, 1e30),
    sign=st.sampled_from([-1, 1]),
    dc=st.floats(-10, 10),
)
def test_si_sdr_ignores_scale_polarity_and_dc(scale: float, target_scale: float, sign: int, dc: float) -> None:
    target, _ = voices(seconds=0.5)
    estimate = at_ratio(target, 12.0)
    assert metrics.si_sdr(sign * scale * (estimate + dc), target_scale * (target - dc)) == pytest.approx(12, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_si_sdr_equals_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    target, estimate = rng.standard_normal((2, 3000)) + rng.standard_normal((2, 1))
    estimate += target * rng.uniform(-2, 2)
    expected = oracle.scale_invariant_signal_distortion_ratio(
        torch.from_numpy(estimate), torch.from_numpy(target), zero_mean=True
    )
    assert metrics.si_sdr(estimate, target) == pytest.approx(float(expected), abs=1e-8)


def test_float32_is_scored_in_float64() -> None:
    target, _ = voices()
    estimate = at_ratio(target, 60.0).astype(np.float32)
    exact = metrics.si_sdr(estimate.astype(np.float64), target.astype(np.float32).astype(np.float64))
    assert metrics.si_sdr(estimate, target.astype(np.float32)) == exact


def test_improvement_is_against_the_mixture() -> None:
    target, _ = voices()
    estimate, mixture = at_ratio(target, 9.0), at_ratio(target, -3.0, seed=1)
    assert metrics.si_sdr_improvement(estimate, mixture, target) == pytest.approx(12.0, abs=1e-6)
    assert metrics.si_sdr_improvement(mixture, mixture, target) == 0.0


def distortion_ratio_by_least_squares(estimate: np.ndarray, target: np.ndarray, taps: int = 512) -> float:
    """BSSEval by its definition: a projection on all delays of the target, with a dense solver."""
    delays = np.zeros((len(target) + taps - 1, taps))
    for delay in range(taps):
        delays[delay : delay + len(target), delay] = target
    padded = np.pad(estimate, (0, taps - 1))
    wanted = delays @ np.linalg.lstsq(delays, padded, rcond=None)[0]
    return float(10 * np.log10(wanted @ wanted / np.sum((padded - wanted) ** 2)))


def test_sdr_equals_a_projection_on_delayed_targets() -> None:
    rng = np.random.default_rng(3)
    target = rng.standard_normal(1500)
    estimate = np.convolve(target, rng.standard_normal(40))[:1500] + 2 * rng.standard_normal(1500)
    expected = distortion_ratio_by_least_squares(estimate, target)
    assert metrics.sdr(estimate, target) == pytest.approx(expected, abs=1e-6)
    assert abs(metrics.sdr(target, estimate) - expected) > 0.1


def test_sdr_equals_torchmetrics_on_voices_and_ignores_scale() -> None:
    target, interferer = voices()
    estimate = target + 0.3 * interferer
    expected = oracle.signal_distortion_ratio(torch.from_numpy(estimate), torch.from_numpy(target))
    value = metrics.sdr(estimate, target)
    assert value == pytest.approx(float(expected), abs=1e-3)
    assert metrics.sdr(-0.01 * estimate, target) == pytest.approx(value, abs=1e-6)


def test_sdr_allows_a_short_filter_and_si_sdr_does_not() -> None:
    target, _ = voices()
    late = np.pad(target, (200, 0))[: len(target)]
    assert metrics.sdr(late, target) > metrics.si_sdr(late, target) + 20


@pytest.mark.parametrize(("sample_rate", "mode"), [(8000, "nb"), (16000, "wb")])
def test_pesq_and_stoi_pass_the_target_in_the_order_of_the_library(sample_rate: int, mode: str) -> None:
    target, interferer = voices(sample_rate)
    estimate = target + 0.5 * interferer
    value = metrics.pesq(estimate, target, sample_rate)
    assert value == pesq_library.pesq(sample_rate, target, estimate, mode)
    assert value != pesq_library.pesq(sample_rate, estimate, target, mode)
    assert 1 < value < metrics.pesq(target, target, sample_rate) < 4.7
    assert metrics.stoi(estimate, target, sample_rate) == metrics.stoi(estimate, target, sample_rate, False)
    for extended in (False, True):
        value = metrics.stoi(estimate, target, sample_rate, extended)
        assert value == pytest.approx(pystoi.stoi(target, estimate, sample_rate, extended=extended), abs=1e-9)
        assert abs(value - pystoi.stoi(estimate, target, sample_rate, extended=extended)) > 1e-3
        assert metrics.stoi(target, target, sample_rate, extended) == pytest.approx(1.0)


def test_pesq_has_two_rates() -> None:
    with pytest.raises(AudioError, match="44100 Hz; resample"):
        metrics.pesq(*voices(44100, 0.5), 44100)


def bursts(count: int, speech_seconds: float, pause_seconds: float, sample_rate: int = 8000) -> np.ndarray:
    rng = np.random.default_rng(0)
    burst = 0.1 * rng.standard_normal(round(speech_seconds * sample_rate))
    return np.tile(np.concatenate([burst, 1e-6 * rng.standard_normal(round(pause_seconds * sample_rate))]), count)


def test_pesq_refuses_what_would_overflow_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pesq_library, "pesq", lambda *_: pytest.fail("called: the process may die"))
    target = bursts(60, 0.25, 0.25)
    with pytest.raises(MetricError, match="utterances"):
        metrics.pesq(target + 0.01 * bursts(60, 0.4, 0.1), target, 8000)


def test_pesq_takes_long_natural_speech() -> None:
    target, interferer = voices(8000, 30.0)
    estimate = target + 0.1 * interferer
    assert metrics.pesq(estimate, target, 8000) == pesq_library.pesq(8000, target, estimate, "nb")


@pytest.mark.parametrize(
    ("speech", "pause", "count", "expected"),
    [
        (0.25, 0.25, 48, 48),  # each burst is an utterance
        (0.25, 0.15, 60, 1),  # pauses up to 0.2 s join
        (0.15, 0.35, 48, 0),  # bursts under 0.2 s do not count
        (0.25, 0.25, 8, 10),  # short: the bound for 4 s, without looking at the signal
    ],
)
def test_utterance_bound(speech: float, pause: float, count: int, expected: int) -> None:
    assert metrics._max_utterances(bursts(count, speech, pause), 8000) == expected


def test_utterances_are_counted_at_every_threshold() -> None:
    """Half of the bursts 20 dB down, or pauses only 30 dB down: each needs another threshold."""
    target = bursts(48, 0.25, 0.25).reshape(48, -1)
    quiet = target * np.where(np.arange(48) % 2, 1.0, 0.1)[:, None]
    assert metrics._max_utterances(quiet.ravel(), 8000) == 48
    noisy = target.ravel() + 0.003 * np.random.default_rng(1).standard_normal(target.size)
    assert metrics._max_utterances(noisy, 8000) == 48


def test_utterances_are_counted_every_3_db() -> None:
    """Half of the bursts lie just above a threshold and the pauses just below it, so no other threshold counts all."""
    sign = np.where(np.arange(60 * 4000) % 2, 1.0, -1.0).reshape(60, 4000)
    for below_peak_db in range(3, 42, 3):
        level = np.full((60, 4000), below_peak_db + 0.5)
        level[:, :2000] = np.where(np.arange(60) % 2, 0.0, below_peak_db - 0.5)[:, None]
        assert metrics._max_utterances((sign * 10 ** (-level / 20)).ravel(), 8000) == 60


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ((60, 50), 1),  # gaps of up to 50 frames are closed
        ((60, 51), 60),
        ((50, 60), 60),  # an utterance has 50 frames or more
        ((49, 60), 0),
        ((60, 43, 4, 43), 60),  # bursts of up to 4 frames are dropped
        ((60, 43, 5, 43), 1),
    ],
)
def test_utterances_by_their_frames_of_4_ms(frames: tuple[int, ...], expected: int) -> None:
    """Runs of frames, in turn at full scale and 80 dB below."""
    level = np.repeat(np.resize([1.0, 1e-4], len(frames)), np.array(frames) * 32)
    assert metrics._max_utterances(np.tile(level, 60), 8000) == expected


def test_utterances_are_counted_only_in_signals_with_room_for_46(monkeypatch: pytest.MonkeyPatch) -> None:
    """46 utterances of 50 frames and 45 gaps of 51 are 4595 frames."""
    loud = np.random.default_rng(0).uniform(0.5, 1.0, 4595 * 32)
    assert metrics._max_utterances(loud[:-1], 8000) == 45
    monkeypatch.setattr(pesq_library, "pesq", lambda *_: 2.0)
    assert metrics.pesq(loud[:-1], loud[:-1], 8000) == 2.0
    assert metrics._max_utterances(loud * np.where(np.arange(len(loud)) < 100 * 32, 1.0, 0.0), 8000) == 1


def test_clicks_do_not_join_utterances() -> None:
    target = bursts(48, 0.25, 0.36).reshape(48, -1)
    target[:, 3360:3456] += 0.1  # 12 ms in the middle of a pause
    assert metrics._max_utterances(target.ravel(), 8000) == 48


@pytest.mark.parametrize(
    ("library", "function", "result", "message"),
    [
        ("fast_bss_eval", "sdr", np.linalg.LinAlgError("singular"), r"SDR cannot be solved .*singular"),
        ("fast_bss_eval", "sdr", np.array([np.nan]), "SDR is not a number"),
        ("pesq", "pesq", np.nan, "PESQ refused: its result is not a number"),
        ("pesq", "pesq", RuntimeError(b"No utterances"), "PESQ refused: No utterances"),
        ("pesq", "pesq", ValueError("too long"), "PESQ refused: too long"),
        ("pesq", "pesq", RuntimeError(), "PESQ refused: "),
        ("pystoi", "stoi", np.nan, "STOI refused: its result is not a number"),
    ],
)
def test_failures_of_a_library_are_refusals(
    library: str, function: str, result: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> object:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(importlib.import_module(library), function, fail)
    target, interferer = voices()
    name = {"fast_bss_eval": "sdr", "pesq": "pesq", "pystoi": "stoi"}[library]
    values, refusals = metrics.compute_metrics(target + interferer, target, target, 8000, [name])
    assert values == {name: None}
    assert re.match(message, refusals[name])


def test_a_perfect_estimate_reaches_the_ceiling() -> None:
    target, _ = voices()
    for estimate in (target, -0.1 * target):
        assert metrics.si_sdr(estimate, target) == CEILING_DB == 100.0
        assert metrics.sdr(estimate, target) == pytest.approx(CEILING_DB, abs=0.1)


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_a_silent_estimate_is_a_total_failure(level: float) -> None:
    target, interferer = voices()
    silent = np.full_like(target, level)
    assert metrics.si_sdr(silent, target) == FLOOR_DB == -60.0
    assert metrics.sdr(silent, target) == FLOOR_DB
    assert metrics.stoi(silent, target, 8000) == metrics.stoi(silent, target, 8000, extended=True) == 0.0
    with pytest.raises(MetricError, match="estimate is silent"):
        metrics.pesq(silent, target, 8000)
    values, refusals = metrics.compute_metrics(silent, target, target + interferer, 8000)
    assert values["pesq"] is None
    assert set(refusals) == {"pesq"}
    assert values["si_sdr_improvement"] < 1.0


def test_an_orthogonal_estimate_scores_the_floor() -> None:
    assert metrics.si_sdr(np.array([0.0, 0.0, 1.0, -1.0]), np.array([1.0, -1.0, 0.0, 0.0])) == FLOOR_DB


def test_an_estimate_without_the_target_scores_above_silence() -> None:
    target, _ = voices()
    noise = np.random.default_rng(0).standard_normal(len(target))
    assert FLOOR_DB < metrics.si_sdr(noise, target) < -20


def test_a_silent_target_leaves_every_metric_undefined() -> None:
    mixture, _ = voices()
    values, refusals = metrics.compute_metrics(mixture, np.zeros_like(mixture), mixture, 8000)
    assert set(values) == set(refusals) == set(metrics.METRICS)
    assert set(values.values()) == {None}
    with pytest.raises(MetricError, match="target is silent"):
        metrics.si_sdr(mixture, np.full_like(mixture, 0.5))


def test_too_short_is_refused_and_not_scored_as_a_bad_value() -> None:
    target, interferer = voices()
    estimate = target + interferer
    values, refusals = metrics.compute_metrics(estimate[:500], target[:500], estimate[:500], 8000)
    assert {name for name, value in values.items() if value is None} == set(refusals)
    assert set(refusals) == {"sdr", "pesq", "stoi", "estoi"}
    assert np.isfinite(metrics.sdr(estimate[4000:4512], target[4000:4512]))  # as long as the filter
    with pytest.raises(MetricError, match="512 samples or more, not 511"):
        metrics.sdr(estimate[4000:4511], target[4000:4511])
    for length in (2, 40, 250, 3199):
        with pytest.raises(MetricError, match=r"STOI needs 0\.4 s of speech or more$"):
            metrics.stoi(estimate[4000 : 4000 + length], target[4000 : 4000 + length], 8000)
    half_second = slice(4000, 8000)
    assert 0 < metrics.stoi(estimate[half_second], target[half_second], 8000) < 1
    pauses = np.zeros_like(target)
    pauses[:1600] = target[:1600]
    with pytest.raises(MetricError, match="too much silence"):
        metrics.stoi(estimate, pauses, 8000)


def test_extended_stoi_of_gaps_is_reproducible_and_leaves_global_randomness_alone() -> None:
    target, interferer = voices()
    estimate = target + interferer
    estimate[len(estimate) // 2 :] = 0
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = metrics.stoi(estimate, target, 8000, extended=True)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    np.random.seed(6)  # noqa: NPY002
    assert metrics.stoi(estimate, target, 8000, extended=True) == first


@pytest.mark.parametrize("name", list(metrics.METRICS))
def test_signals_that_do_not_belong_together_are_an_error(name: metrics.MetricName) -> None:
    target, _ = voices()
    broken = target.copy()
    broken[7] = np.nan
    for estimate, message in ((target[:-1], "samples"), (broken, "NaN")):
        with pytest.raises(AudioError, match=message):
            metrics.compute_metrics(estimate, target, target, 8000, [name])
    with pytest.raises(AudioError, match="target: holds NaN"):
        metrics.compute_metrics(target, broken, target, 8000, [name])
    with pytest.raises(AudioError, match="no samples"):
        metrics.compute_metrics(target[:0], target[:0], target[:0], 8000, [name])


def test_attenuation() -> None:
    mixture, _ = voices()
    assert metrics.attenuation_db(mixture, 0.1 * mixture) == pytest.approx(20.0)
    assert metrics.attenuation_db(mixture, 2 * mixture) == pytest.approx(-6.0206, abs=1e-4)
    assert metrics.attenuation_db(mixture, 0 * mixture) == CEILING_DB
    with pytest.raises(MetricError, match="mixture is silent"):
        metrics.attenuation_db(0 * mixture, mixture)
    with pytest.raises(AudioError, match="samples"):
        metrics.attenuation_db(mixture, mixture[1:])
    broken = np.where(np.arange(len(mixture)) == 7, np.nan, mixture)
    with pytest.raises(AudioError, match="estimate: holds NaN"):
        metrics.attenuation_db(mixture, broken)
    with pytest.raises(AudioError, match="mixture: holds NaN"):
        metrics.attenuation_db(broken, mixture)


def test_a_score_has_each_metric_and_can_be_pickled() -> None:
    target, interferer = voices()
    mixture, estimate = target + interferer, target + 0.2 * interferer
    trial = scoring.EstimatedTrial("a", estimate, target, mixture)
    score = scoring.score_trial(trial, 8000, tuple(metrics.METRICS))
    assert (score.name, score.seconds, score.refusals, score.attenuation_db) == ("a", 2.0, {}, None)
    assert score.values == {
        "si_sdr": metrics.si_sdr(estimate, target),
        "si_sdr_improvement": metrics.si_sdr(estimate, target) - metrics.si_sdr(mixture, target),
        "sdr": metrics.sdr(estimate, target),
        "pesq": metrics.pesq(estimate, target, 8000),
        "stoi": metrics.stoi(estimate, target, 8000),
        "estoi": metrics.stoi(estimate, target, 8000, extended=True),
    }
    assert metrics.compute_metrics(estimate, target, mixture, 8000) == (score.values, {})
    assert pickle.loads(pickle.dumps(trial)).name == "a"
    assert pickle.loads(pickle.dumps(score)) == score
    assert pickle.loads(pickle.dumps(scoring.score_trial)) is scoring.score_trial
    assert list(scoring.score_trial(trial, 8000, ["stoi"]).values) == ["stoi"]


@pytest.mark.parametrize(("package", "name"), [("fast_bss_eval", "sdr"), ("pesq", "pesq"), ("pystoi", "stoi")])
def test_a_missing_package_names_its_extra(
    package: str, name: metrics.MetricName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    target, interferer = voices()
    with pytest.raises(MissingDependencyError, match=rf'{package} is not installed; pip install "onevoice\[eval\]"'):
        metrics.compute_metrics(target + interferer, target, target, 8000, [name])


def test_importing_metrics_brings_no_heavy_package() -> None:
    heavy = "{'torch', 'pesq', 'pystoi', 'fast_bss_eval', 'scipy'}"
    code = f"import sys, onevoice.evaluation.scoring; sys.exit(len({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
