"""The speaker encoder: coded enrollment frames in, one embedding per enrollment out (SpEx+, Sec. 2.3).

Whatever the padding or the batch, the embedding of an enrollment is the same: normalisation statistics, pooling
and the final mean see valid frames only, and each length is followed through the pooling exactly.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onevoice.models.fused import Frames
from onevoice.models.layers import Mask, Pointwise

POOLING = 3
"""Frames per max pooling window of a residual block."""


class ValidBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of channels-last frames; training statistics are those of the valid frames alone."""

    sum_over_processes: Callable[[Tensor], Tensor] | None = None
    """Sums a tensor, differentiably, over the processes that share a batch; None for one process."""

    def forward(self, frames: Frames, mask: Mask | None = None) -> Frames:
        """Normalise by the statistics of the batch (training) or the running ones (evaluation)."""
        if self.training:
            mean, variance, count = self.moments(frames.to(self.weight.dtype), mask)
            self._track(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, variance = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (frames - mean) * scale + self.bias

    def moments(self, frames: Frames, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance of each channel over the valid frames of the batch, and their number."""
        if self.sum_over_processes is not None:
            return self._shared_moments(frames, mask, self.sum_over_processes)
        if mask is None:
            count = frames.new_tensor(frames.shape[0] * frames.shape[1])
            variance, mean = torch.var_mean(frames, (0, 1), correction=0)
            return mean, variance, count
        count = mask.sum()
        mean = (frames * mask).sum((0, 1)) / count
        variance = ((frames - mean) * mask).square().sum((0, 1)) / count
        return mean, variance, count

    def _shared_moments(
        self, frames: Frames, mask: Mask | None, total: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid = frames.new_ones(()) if mask is None else mask
        own = frames.new_tensor([frames.shape[0] * frames.shape[1]]) if mask is None else mask.sum()[None]
        sums = total(torch.cat([(frames * valid).sum((0, 1)), own]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        variance = total(((frames - mean) * valid).square().sum((0, 1))) / count
        return mean, variance, count

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


class ResidualBlock(nn.Module):
    """1x1 conv, BN, PReLU, 1x1 conv, BN, skip connection, PReLU, max pooling over 3 frames (SpEx+, Fig. 2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = Pointwise(in_channels, out_channels, bias=False)
        self.norm1 = ValidBatchNorm(out_channels)
        self.prelu1 = nn.PReLU()
        self.conv2 = Pointwise(out_channels, out_channels, bias=False)
        self.norm2 = ValidBatchNorm(out_channels)
        self.prelu2 = nn.PReLU()
        self.skip = nn.Identity() if in_channels == out_channels else Pointwise(in_channels, out_channels, bias=False)

    def forward(
        self, frames: Float[Tensor, "batch frames in"], mask: Mask | None = None
    ) -> Float[Tensor, "batch pooled out"]:
        """Return a third as many frames."""
        hidden = self.prelu1(self.norm1(self.conv1(frames), mask))
        hidden = self.norm2(self.conv2(hidden), mask)
        return pooled(self.prelu2(hidden + self.skip(frames)))


class SpeakerEncoder(nn.Module):
    """cLN, 1x1 conv, three residual blocks, 1x1 conv, mean over the valid frames."""

    def __init__(self, in_channels: int, channels: int, hidden: int, speaker_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.expand = Pointwise(in_channels, channels)
        self.blocks = nn.ModuleList(
            [
                ResidualBlock(channels, channels),
                ResidualBlock(channels, hidden),
                ResidualBlock(hidden, hidden),
            ]
        )
        self.project = Pointwise(hidden, speaker_dim)

    @property
    def min_frames(self) -> int:
        """The fewest frames that give an embedding: one frame after all pooling."""
        return int(POOLING ** len(self.blocks))

    def forward(self, coded: Frames, mask: Mask | None = None) -> Float[Tensor, "batch speaker_dim"]:
        """Return the embedding of each enrollment of at least `min_frames` valid frames."""
        hidden = self.expand(self.norm(coded))
        for block in self.blocks:
            hidden = block(hidden, mask)
            mask = None if mask is None else -pooled(-mask)
        frames: Tensor = self.project(hidden).to(coded.dtype)
        return frames.mean(1) if mask is None else (frames * mask).sum(1) / mask.sum(1)


def pooled(frames: Float[Tensor, "batch frames any"]) -> Float[Tensor, "batch pooled any"]:
    """Return the maximum of each `POOLING` frames; what is left over at the end falls away.

    Written as `maximum`, as the gradient of `amax` divides by the number of maxima, which is 0 where a compiler
    compares rounded values with exact ones.
    """
    whole = frames.shape[1] // POOLING * POOLING
    return functools.reduce(torch.maximum, (frames[:, first:whole:POOLING] for first in range(POOLING)))
