"""The metrics on a fixed set of signals against outside packages, by algebra, and where they are not defined.

PESQ and STOI come from the packages that everybody uses, so there the proof is that signals, rate and mode arrive as
they should. SI-SDR and SDR have other implementations: torchmetrics and fast_bss_eval.
"""

from functools import cache

import fast_bss_eval
import numpy as np
import pesq as pesq_package
import pystoi
import pytest
import torch
import torchmetrics.functional.audio as torchmetrics
from voices import Voice

from onevoice.audio import read_audio
from onevoice.errors import AudioError, MetricError
from onevoice.evaluation import metrics
from onevoice.evaluation.demo import SAMPLES

SET = [*((rate, ratio) for rate in (8000, 16000) for ratio in (-5.0, 5.0, 25.0)), (16000, None)]
"""Rate in Hz and level of the target over the interferer in dB; None for the recordings in the package."""


@cache
def fixed(rate: int, ratio_db: float | None) -> tuple[np.ndarray, np.ndarray]:
    """An estimate and its target in float32."""
    if ratio_db is None:
        mixture, target = (read_audio(SAMPLES / f"{name}.flac", rate)[0] for name in ("mixture", "target"))
        mixture, target = mixture[: 3 * rate], target[: 3 * rate]
        return mixture + np.float32(3) * target, target
    target, interferer = (Voice.number(n).say(1, 1.5, rate) for n in (2, 3))
    gain = np.float32(10 ** (-ratio_db / 20) * np.linalg.norm(target) / np.linalg.norm(interferer))
    return target + gain * interferer + np.float32(0.01), target


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rate", "ratio_db"), SET)
def test_the_fixed_set_equals_outside_packages(rate: int, ratio_db: float | None, dtype: type) -> None:
    estimate, target = (signal.astype(dtype) for signal in fixed(rate, ratio_db))
    exact = [signal.astype(np.float64) for signal in (estimate, target)]
    tensors = [torch.from_numpy(signal) for signal in exact]
    si_sdr = metrics.si_sdr(estimate, target)
    assert si_sdr == pytest.approx(
        float(torchmetrics.scale_invariant_signal_distortion_ratio(*tensors, zero_mean=True)), abs=1e-4
    )
    zero_mean = [(signal - signal.mean())[None] for signal in exact]
    assert si_sdr == pytest.approx(float(fast_bss_eval.si_sdr(zero_mean[1], zero_mean[0])[0]), abs=1e-4)
    sdr = metrics.sdr(estimate, target)
    assert sdr == pytest.approx(float(torchmetrics.signal_distortion_ratio(*tensors)), abs=1e-3)
    mode = {8000: "nb", 16000: "wb"}[rate]
    assert metrics.pesq(estimate, target, rate) == pytest.approx(
        pesq_package.pesq(rate, exact[1], exact[0], mode), abs=1e-3
    )
    for extended in (False, True):
        expected = pystoi.stoi(exact[1], exact[0], rate, extended=extended)
        assert metrics.stoi(estimate, target, rate, extended) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-3), (np.float64, 1e-9)])
@pytest.mark.parametrize("ratio_db", range(-20, 61, 10))
def test_si_sdr_by_algebra(ratio_db: int, dtype: type, tolerance: float) -> None:
    """Whole periods of two sines are orthogonal, so the ratio of their amplitudes is the SI-SDR, at any scale."""
    time = 2 * np.pi * np.arange(8000) / 8000
    target, rest = np.sin(440 * time), 10 ** (-ratio_db / 20) * np.sin(1000 * time + 0.5)
    assert metrics.si_sdr((0.3 * (target + rest)).astype(dtype), target.astype(dtype)) == pytest.approx(
        ratio_db, abs=tolerance
    )


@pytest.mark.parametrize("ratio_db", [-20, 0, 30])
def test_improvements_by_algebra(ratio_db: int) -> None:
    """An estimate with half of the interferer gains 6.02 dB toward the target and loses as much toward the other."""
    time = 2 * np.pi * np.arange(8000) / 8000
    target, other = np.sin(440 * time), 10 ** (-ratio_db / 20) * np.sin(1000 * time)
    half = 20 * np.log10(2)
    estimate, mixture = target + 0.5 * other, target + other
    assert metrics.si_sdr_improvement(estimate, mixture, target) == pytest.approx(half, abs=1e-9)
    assert metrics.interferer_improvement(estimate, mixture, target) == pytest.approx(-half, abs=1e-9)
    assert metrics.interferer_improvement(estimate, mixture, 0.01 * target) == pytest.approx(-half, abs=1e-9)
    with pytest.raises(MetricError, match="nothing but the target"):
        metrics.interferer_improvement(estimate, target + 1e-5 * other, target)


@pytest.mark.parametrize("name", list(metrics.METRICS))
def test_one_sample_has_no_value(name: metrics.MetricName) -> None:
    one = np.array([0.5])
    values, refusals = metrics.compute_metrics(one, one, one, 8000, [name])
    assert values == {name: None}
    assert "the target is silent" in refusals[name]


@pytest.mark.parametrize(
    ("estimate", "target", "complaint"),
    [
        (np.ones(3) * np.nan, np.arange(3.0), "holds NaN or infinite"),
        (np.arange(3.0), np.array([0.0, np.inf, 1.0]), "holds NaN or infinite"),
        (np.arange(4.0), np.arange(3.0), "the estimate has 4 samples and the target 3"),
        (np.arange(3.0), np.arange(4.0), "samples"),
        (np.zeros(0), np.zeros(0), "samples"),
    ],
)
def test_toward_the_interferer_has_the_same_limits(estimate: np.ndarray, target: np.ndarray, complaint: str) -> None:
    mixture = np.array([1.0, -1.0, 1.0])
    with pytest.raises(AudioError, match=complaint):
        metrics.interferer_improvement(estimate, mixture, target)
