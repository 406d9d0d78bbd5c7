"""Levels of mono sound at any rate: loudness in LUFS, gains for an SNR, and where a recording is silent.

Loudness follows ITU-R BS.1770-4 with the pair of biquads that pyloudnorm uses by default. The K-weighting is applied in
the frequency domain over short overlapping blocks (overlap-save), which is faster than a compiled filter.

Silence is relative: a frame is sound when its energy is less than `top_db` below that of the loudest frame. Frames have
2048 samples and start every 512, centered, as in librosa.
"""

from functools import lru_cache
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Complex, Float, Int
from numpy.lib.stride_tricks import as_strided

from onevoice.audio import Mono
from onevoice.units import db_to_amplitude

BLOCK_SECONDS = 0.4
STEP = 0.25
"""Blocks start every quarter of a block: 75 % overlap."""
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
DECAY_SECONDS = 0.08
"""Memory of the K-weighting: its 38 Hz high-pass has decayed below 1e-7 by then."""

FRAME = 2048
HOP = 512

Number = TypeVar("Number")
"""A float, an array or a tensor."""


def snr_gain(reference_energy: Number, energy: Number, snr_db: Number) -> Number:
    """Return the gain g for which 10 log10(reference_energy / (g² · energy)) = snr_db.

    A positive `snr_db` makes the reference the louder one. Works elementwise on arrays and tensors.
    """
    gain: Number = (reference_energy / energy) ** 0.5 * 10.0 ** (-snr_db / 20.0)  # type: ignore[operator]
    return gain


def loudness_gain(samples: Mono, sample_rate: int, target_lufs: float) -> float:
    """Return the gain that brings `samples` to `target_lufs`; infinite for silence."""
    loudness = integrated_loudness(samples, sample_rate)
    return db_to_amplitude(target_lufs - loudness) if np.isfinite(loudness) else np.inf


def integrated_loudness(samples: Mono, sample_rate: int) -> float:
    """Return the gated loudness of `samples` in LUFS (equations 1–7 of ITU-R BS.1770-4); −inf for silence.

    A 997 Hz sine of full scale measures −3.01 LUFS, and a gain of g dB adds g as long as the absolute gate of
    −70 LUFS passes the same blocks. Sound shorter than a block of 400 ms is measured as one block of its own length.
    """
    powers = _block_powers(_k_weighted(samples, sample_rate), sample_rate)
    audible = powers[_lufs(powers) >= ABSOLUTE_GATE_LUFS]
    if not audible.size:
        return -np.inf
    gate = max(float(_lufs(audible.mean())) + RELATIVE_GATE_LU, ABSOLUTE_GATE_LUFS)
    return float(_lufs(audible[_lufs(audible) > gate].mean()))


def trim_silence(samples: Mono, top_db: float) -> Float[np.ndarray, "shorter"]:
    """Cut off what lies before the first and after the last frame of sound; empty for silence."""
    frames = np.flatnonzero(_is_sound(samples, top_db))
    if not frames.size:
        return samples[:0]
    return samples[frames[0] * HOP : (frames[-1] + 1) * HOP]


def remove_silence(samples: Mono, top_db: float) -> Float[np.ndarray, "shorter"]:
    """Join the runs of sound and drop the silence between them; empty for silence."""
    pieces = [samples[first:last] for first, last in sound_intervals(samples, top_db)]
    return np.concatenate(pieces) if pieces else samples[:0]


def sound_intervals(samples: Mono, top_db: float) -> Int[np.ndarray, "intervals 2"]:
    """Return the first sample and the last sample + 1 of each run of frames of sound, in order."""
    changes = np.diff(_is_sound(samples, top_db).astype(np.int8), prepend=0, append=0)
    edges = np.flatnonzero(changes).reshape(-1, 2) * HOP
    return np.minimum(edges, len(samples))


def _lufs(mean_square: Float[np.ndarray, "*blocks"] | np.floating) -> Float[np.ndarray, "*blocks"]:
    with np.errstate(divide="ignore"):
        return np.asarray(-0.691 + 10.0 * np.log10(mean_square))


def _block_powers(weighted: Mono, sample_rate: int) -> Float[np.ndarray, "blocks"]:
    """Return the mean square of each 400 ms block; edges and the number of blocks as in pyloudnorm."""
    squares = np.square(weighted)
    seconds = len(squares) / sample_rate
    if seconds < BLOCK_SECONDS:
        return np.array([squares.mean() if len(squares) else 0.0])
    number = np.arange(int(np.round((seconds - BLOCK_SECONDS) / (BLOCK_SECONDS * STEP)) + 1))
    first = (BLOCK_SECONDS * (number * STEP) * sample_rate).astype(int)
    last = np.minimum((BLOCK_SECONDS * (number * STEP + 1) * sample_rate).astype(int), len(squares))
    # Blocks overlap, so sum each square once: between two neighboring edges.
    edges = np.unique(np.concatenate((first, last)))
    total = np.zeros(len(edges))
    np.cumsum(np.add.reduceat(squares[: edges[-1]], edges[:-1]), out=total[1:])
    # The energy of a block is the difference of the running sums at its two edges.
    powers: np.ndarray = total[np.searchsorted(edges, last)] - total[np.searchsorted(edges, first)]
    return powers / (BLOCK_SECONDS * sample_rate)


def _k_weighted(samples: Float[np.ndarray, "samples"], sample_rate: int) -> Float[np.ndarray, "samples"]:
    """Filter by overlap-save: each FFT block starts with the last 80 ms before it, which are then dropped."""
    size = 2 ** int(np.ceil(np.log2(sample_rate / 2)))
    overlap = round(DECAY_SECONDS * sample_rate)
    advance = size - overlap
    count = -(-len(samples) // advance)
    padded = np.zeros(overlap + count * advance, samples.dtype)
    padded[overlap : overlap + len(samples)] = samples
    step = padded.strides[0]
    blocks = as_strided(padded, (count, size), (advance * step, step), writeable=False)
    spectra = np.fft.rfft(blocks)
    spectra *= _k_response(sample_rate, size).astype(spectra.dtype)
    return np.fft.irfft(spectra, size)[:, overlap:].reshape(-1)[: len(samples)]


@lru_cache(maxsize=8)
def _k_response(sample_rate: int, size: int) -> Complex[np.ndarray, "frequencies"]:
    """Return the K-weighting at the frequencies of a real FFT of `size`: a shelf of +4 dB, then a high-pass.

    Biquads by R. Bristow-Johnson's Audio EQ Cookbook: shelf at 1500 Hz with Q = 1/√2, high-pass at 38 Hz with
    Q = 1/2. With z⁻¹ on the unit circle a biquad is the ratio of two quadratic polynomials in it.
    """
    delay = np.exp(-2j * np.pi * np.fft.rfftfreq(size))
    response: np.ndarray = np.ones(len(delay), complex)
    for numerator, denominator in (_shelf(sample_rate), _high_pass(sample_rate)):
        response = response * np.polyval(numerator[::-1], delay) / np.polyval(denominator[::-1], delay)
    response.flags.writeable = False
    return response


def _shelf(sample_rate: int) -> tuple[list[float], list[float]]:
    """Return b and a of the cookbook's highShelf: A = 10^(4 dB / 40), ω₀ in radians per sample, α = sin ω₀ / 2Q."""
    amplitude, angle = 10 ** (4.0 / 40), 2 * np.pi * 1500.0 / sample_rate
    plus, minus, cosine = amplitude + 1, amplitude - 1, np.cos(angle)
    root = 2 * np.sqrt(amplitude) * np.sin(angle) / (2 * np.sqrt(0.5))
    above, below = plus + minus * cosine, plus - minus * cosine
    return (
        [amplitude * (above + root), -2 * amplitude * (minus + plus * cosine), amplitude * (above - root)],
        [below + root, 2 * (minus - plus * cosine), below - root],
    )


def _high_pass(sample_rate: int) -> tuple[list[float], list[float]]:
    """Return b and a of the cookbook's HPF; Q = 1/2 makes α = sin ω₀."""
    angle = 2 * np.pi * 38.0 / sample_rate
    half = (1 + np.cos(angle)) / 2
    return [half, -2 * half, half], [1 + np.sin(angle), -2 * np.cos(angle), 1 - np.sin(angle)]


def _is_sound(samples: Mono, top_db: float) -> Bool[np.ndarray, "frames"]:
    """Return for each frame whether it is less than `top_db` below the loudest."""
    count = 1 + len(samples) // HOP
    hops_per_frame = FRAME // HOP
    # Pad by half a frame, so that frames are centered, and sum the squares of each hop once.
    squares = np.zeros((count + hops_per_frame - 1) * HOP)
    np.square(samples, out=squares[FRAME // 2 : FRAME // 2 + len(samples)], dtype=np.float64)
    hops = squares.reshape(-1, HOP).sum(axis=1)
    # A frame is the sum of its four hops.
    energies = sum(hops[offset : offset + count] for offset in range(hops_per_frame))
    return np.asarray(energies > np.max(energies) * 10 ** (-top_db / 10))
