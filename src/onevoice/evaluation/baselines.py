"""Baselines to stand beside a network: the mixture itself, and two ideal masks as upper bounds.

The masks see the target, so no extractor can use them. They multiply the STFT of the mixture X = S + N, with the target
S at the scale of the mixture and all else N = X − S, per time and frequency:

    irm   ideal ratio mask          M = (|S|² / (|S|² + |N|²))^½, Wang, Narayanan and Wang, "On training targets for
                                    supervised speech separation", IEEE/ACM TASLP 22(12), 2014, with β = 0.5
    psm   phase-sensitive mask      M = |S| / |X| · cos(∠S − ∠X) = Re(S X*) / |X|², between 0 and 1, Erdogan et al.,
                                    "Phase-sensitive and recognition-boosted speech separation using deep recurrent
                                    neural networks", ICASSP 2015

The STFT has a periodic Hann window of 32 ms with a hop of 8 ms and zeros at both ends, and is inverted by overlap-add
with the same window, divided by the sum of its squares. A network may be better than both masks, as they keep the phase
of the mixture and have this resolution.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from onevoice.units import to_samples

WINDOW_SECONDS = 0.032
HOP_SECONDS = 0.008

BaselineName = Literal["mixture", "irm", "psm"]
Spectrum = Complex[Tensor, "frequencies frames"]
Mask = Float[Tensor, "frequencies frames"]


def estimate_baseline(
    name: BaselineName, mixture: Float[Tensor, " samples"], target: Float[Tensor, " samples"], sample_rate: int
) -> Float[Tensor, " samples"]:
    """Return the estimate of a baseline for one trial."""
    if name == "mixture":
        return mixture
    window = torch.hann_window(to_samples(WINDOW_SECONDS, sample_rate), dtype=torch.float64)
    samples, hop = len(window), to_samples(HOP_SECONDS, sample_rate)
    mixed, wanted = (
        torch.stft(wave.double(), samples, hop, window=window, pad_mode="constant", return_complex=True)
        for wave in (mixture, target)
    )
    mask = MASKS[name](mixed, wanted)
    return torch.istft(mask * mixed, samples, hop, window=window, length=len(mixture)).float()


def ratio_mask(mixed: Spectrum, wanted: Spectrum) -> Mask:
    """Return the ideal ratio mask from the spectrum of mixture and target; 0 where both parts are 0."""
    power, rest = wanted.abs().square(), (mixed - wanted).abs().square()
    return (power / (power + rest)).nan_to_num(0.0).sqrt()


def phase_sensitive_mask(mixed: Spectrum, wanted: Spectrum) -> Mask:
    """Return the truncated phase-sensitive mask from the spectrum of mixture and target; 0 where the mixture is 0."""
    return ((wanted * mixed.conj()).real / mixed.abs().square()).nan_to_num(0.0).clamp(0.0, 1.0)


MASKS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"irm": ratio_mask, "psm": phase_sensitive_mask}
