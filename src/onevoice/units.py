"""Conversions that all modules share: decibels, powers and lengths.

Names of levels end in `_db`: 20 log10 of an amplitude ratio, or 10 log10 of a power ratio. A level in dBFS is the root
mean square relative to a full-scale amplitude of 1.0.
"""

import numpy as np
from jaxtyping import Float


def db_to_amplitude(level_db: float) -> float:
    """Return the amplitude ratio of a level in dB: 10^(level_db / 20)."""
    return float(10.0 ** (level_db / 20.0))


def power(samples: Float[np.ndarray, "*channels samples"]) -> float:
    """Return the mean square of `samples`; 0 for an empty array."""
    return float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0


def rms_dbfs(samples: Float[np.ndarray, "*channels samples"]) -> float:
    """Return the root-mean-square level in dB relative to an amplitude of 1; −inf for silence."""
    value = power(samples)
    return float(10.0 * np.log10(value)) if value > 0 else -np.inf


def to_samples(seconds: float, sample_rate: int) -> int:
    """Return a duration in seconds as a number of samples, rounded to the nearest."""
    return round(seconds * sample_rate)
