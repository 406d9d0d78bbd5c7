"""The temporal block as one function that a compiler fuses into four passes over its hidden activation.

Same weights and same result as the layers of `TemporalBlock`, in another order of arithmetic:

- frames are channels last, so that the 1x1 convolutions are plain matrix products and every other step runs along
  memory; the depthwise taps are shifted products;
- a global norm followed by a 1x1 convolution W is r·(W diag(weight)) p + constant, with p what is normalised and r
  one over its deviation per item: the second norm is folded into the weights, and nothing normalised is stored;
- in bfloat16 only the operands of the matrix products and what is kept for the backward pass are rounded;
  statistics and the residual path stay float32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")
Frames = Float[Tensor, "batch frames channels"]
MOST_VARIANTS = 64
"""Compiled variants of one function that are kept: one for each dilation, precision and shape."""


class BlockWeights(NamedTuple):
    """The parameters of a temporal block, in the shapes of its layers but for the taps, turned to lie along memory."""

    expand: Float[Tensor, "hidden channels 1"]
    expand_slope: Float[Tensor, "1"]
    expand_scale: Float[Tensor, " hidden"]
    expand_shift: Float[Tensor, " hidden"]
    taps: Float[Tensor, "taps hidden"]
    taps_bias: Float[Tensor, " hidden"]
    depthwise_slope: Float[Tensor, "1"]
    depthwise_scale: Float[Tensor, " hidden"]
    depthwise_shift: Float[Tensor, " hidden"]
    project: Float[Tensor, "channels hidden 1"]
    project_bias: Float[Tensor, " channels"]


def temporal_block(
    frames: Frames,
    offset: Float[Tensor, "#batch hidden"],
    weights: BlockWeights,
    dilation: int,
    eps: float,
    precision: torch.dtype,
) -> Frames:
    """Return `frames` plus what the block makes of them.

    `offset` is added to every frame after the first product: its bias, and the speaker's part where there is one.
    `precision` is the type of the matrix products' operands.
    """
    w = weights
    product = pointwise(frames.to(precision), w.expand[:, :, 0].to(precision))
    hidden = (product + offset[:, None]).to(precision).to(frames.dtype)
    active = torch.where(hidden > 0, hidden, w.expand_slope * hidden)
    mean, rstd = _statistics(active, eps)
    scale = w.expand_scale * rstd
    normed = active * scale[:, None] + (w.expand_shift - mean * scale)[:, None]
    count, taps = frames.shape[1], len(w.taps)
    reach = dilation * (taps - 1) // 2
    padded = F.pad(normed, (0, 0, reach, reach))
    mixed = w.taps_bias.expand_as(normed)
    for tap in range(taps):
        mixed = mixed + w.taps[tap] * padded[:, tap * dilation : tap * dilation + count]
    active = torch.where(mixed > 0, mixed, w.depthwise_slope * mixed)
    mean, rstd = _statistics(active, eps)
    project = w.project[:, :, 0]
    product = pointwise(active.to(precision), (project * w.depthwise_scale).to(precision))
    constant = project @ w.depthwise_shift + w.project_bias - mean * rstd * (project @ w.depthwise_scale)
    return frames + (product * rstd[:, None] + constant[:, None])


def pointwise(
    frames: Float[Tensor, "batch frames inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "batch frames outputs"]:
    """Return the product of every frame with `weight`, plus `bias`.

    On a CPU in float32 it is written as a convolution, which torch gives to oneDNN, up to twice as fast as its matrix
    product; the dilation of a single tap means nothing, and makes torch do so on one thread too.
    """
    if frames.device.type != "cpu" or frames.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(frames, weight, bias)
    image = frames.transpose(1, 2)[:, :, None]
    return F.conv2d(image, weight[:, :, None, None], bias, dilation=2)[:, :, 0].transpose(1, 2)


@functools.cache
def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """Return `function` through `torch.compile`; the compiler runs at the first call of each variant."""
    import torch._dynamo.config as settings

    settings.cache_size_limit = max(settings.cache_size_limit, MOST_VARIANTS)
    return torch.compile(function, dynamic=False)


def _statistics(active: Frames, eps: float) -> tuple[Float[Tensor, "batch 1"], Float[Tensor, "batch 1"]]:
    """Return mean and 1 / deviation of each item over frames and channels.

    Summed in two stages: compilers add the terms of one stage one by one, which over a million of them costs digits.
    """
    count = active.shape[1] * active.shape[2]
    mean = active.sum(2).sum(1) / count
    variance = active.square().sum(2).sum(1) / count - mean.square()
    return mean[:, None], torch.rsqrt(variance.clamp(min=0) + eps)[:, None]
