"""The ideal masks equal their formulas, written out frame by frame."""

import numpy as np
import pytest
import torch
from voices import Voice

from onevoice.evaluation.baselines import estimate_baseline
from onevoice.evaluation.metrics import si_sdr

WINDOW, HOP = 256, 64
"""32 ms and 8 ms at 8 kHz."""


def masked_frame_by_frame(name: str, mixture: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Overlap-add of masked frames with plain discrete Fourier transforms."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    padded = [np.pad(wave.astype(np.float64), (WINDOW // 2, WINDOW)) for wave in (mixture, target)]
    total, weight = np.zeros_like(padded[0]), np.zeros_like(padded[0])
    for start in range(0, len(mixture) + 1, HOP):
        x, s = (np.fft.rfft(window * wave[start : start + WINDOW]) for wave in padded)
        if name == "irm":
            power, rest = np.abs(s) ** 2, np.abs(x - s) ** 2
            mask = np.sqrt(power / np.maximum(power + rest, 1e-300))
        else:
            mask = np.clip(np.abs(s) / np.maximum(np.abs(x), 1e-300) * np.cos(np.angle(s) - np.angle(x)), 0, 1)
        total[start : start + WINDOW] += window * np.fft.irfft(mask * x)
        weight[start : start + WINDOW] += window**2
    inside = slice(WINDOW // 2, WINDOW // 2 + len(mixture))
    return total[inside] / weight[inside]


@pytest.mark.parametrize("name", ["irm", "psm"])
@pytest.mark.parametrize("samples", [4000, 4031, 100])
def test_a_mask_equals_its_formula(name: str, samples: int) -> None:
    target, interferer = (Voice.number(n).say(0, 1.0)[2000 : 2000 + samples] for n in (0, 1))
    mixture = target + interferer
    estimate = estimate_baseline(name, torch.from_numpy(mixture), torch.from_numpy(target), 8000)  # type: ignore[arg-type]
    assert estimate.dtype == torch.float32
    np.testing.assert_allclose(estimate.numpy(), masked_frame_by_frame(name, mixture, target), atol=1e-6)


@pytest.mark.parametrize("name", ["irm", "psm"])
def test_masks_of_extremes(name: str) -> None:
    """Nothing but the target stays as it is; a silent target leaves silence; zeros in the mixture give zeros."""
    target = torch.from_numpy(Voice.number(0).say(0, 0.5))
    assert si_sdr(estimate_baseline(name, target, target, 8000).numpy(), target.numpy()) > 100 - 1e-6  # type: ignore[arg-type]
    silent = torch.zeros_like(target)
    assert torch.equal(estimate_baseline(name, target, silent, 8000), silent)  # type: ignore[arg-type]
    assert torch.equal(estimate_baseline(name, silent, silent, 8000), silent)  # type: ignore[arg-type]


def test_the_mixture_is_a_baseline() -> None:
    mixture = torch.from_numpy(Voice.number(0).say(0, 0.5))
    assert torch.equal(estimate_baseline("mixture", mixture, 0 * mixture, 8000), mixture)
