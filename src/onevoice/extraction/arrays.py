"""Arrays and tensors that users give, as mono sound, and the result in the same form."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from onevoice.audio import Mono, require_finite, to_mono
from onevoice.errors import AudioError

CANCELLATION = 0.1
"""Channels cancel if their mean has less than this share of the power that independent channels would leave."""


def channels_cancel(powers: Float[np.ndarray, " channels"], mean_power: float) -> bool:
    """Check whether channels cancel in their mean, as a recording with inverted polarity in one channel does.

    Takes the power of each channel and of their mean. Independent channels leave the sum of their powers, divided by
    the square of their number.
    """
    return len(powers) > 1 and mean_power < CANCELLATION * float(powers.sum()) / len(powers) ** 2


def mix_down(channels: Float[np.ndarray, "channels samples"]) -> Mono:
    """Average the channels; if they cancel each other, return the loudest one."""
    mean = to_mono(channels)
    powers = np.square(channels, dtype=np.float64).mean(axis=1)
    if channels_cancel(powers, float(np.square(mean, dtype=np.float64).mean())):
        return np.ascontiguousarray(channels[int(powers.argmax())])
    return mean


def as_mono(samples: Any, name: str) -> Mono:
    """Return `(samples,)` or `(channels, samples)` of floats as mono; raise an `AudioError` that names `name`."""
    array = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else samples
    if not isinstance(array, np.ndarray):
        raise AudioError(f"{name}: is a {type(samples).__name__}; give a NumPy array or a tensor")
    if np.issubdtype(array.dtype, np.integer):
        raise AudioError(f"{name}: has integer samples ({array.dtype}); divide by their full scale to get ±1.0 floats")
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: has shape {array.shape}; give (samples,) or (channels, samples)")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise AudioError(f"{name}: has shape {array.shape}, more channels than samples; transpose it")
    array = np.ascontiguousarray(array, dtype=np.float32)
    require_finite(array, name)
    return array if array.ndim == 1 else mix_down(array)


def as_given(estimate: Mono, given: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Return the estimate in the type, and on the device, of the mixture."""
    if isinstance(given, Tensor):
        return torch.from_numpy(estimate).to(given.device, given.dtype)
    return estimate.astype(given.dtype) if np.issubdtype(given.dtype, np.floating) else estimate
