"""The speaker encoder: coded enrollment frames in, one embedding per enrollment out (SpEx+, Sec. 2.3).

Whatever the padding or the batch, the embedding of an enrollment is the same: normalisation statistics, pooling
and the final mean see valid frames only, and each length is followed through the pooling exactly.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.models.layers import ChannelNorm, Frames, Mask

POOLING = 3
"""Frames per max pooling window of a residual block."""


class ValidBatchNorm(nn.BatchNorm1d):
    """Batch normalisation whose training statistics are taken over the valid frames of the batch alone."""

    def forward(self, frames: Frames, mask: Mask | None = None) -> Frames:
        """Normalise by the statistics of the batch (training) or the running ones (evaluation)."""
        if not self.training or mask is None:
            return super().forward(frames)
        count = mask.sum()
        mean = (frames * mask).sum((0, 2)) / count
        variance = ((frames - mean[:, None]) * mask).square().sum((0, 2)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (frames - mean[:, None]) * scale[:, None] + self.bias[:, None]

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
        self.conv1 = nn.Conv1d(in_channels, out_channels, 1, bias=False)
        self.norm1 = ValidBatchNorm(out_channels)
        self.prelu1 = nn.PReLU()
        self.conv2 = nn.Conv1d(out_channels, out_channels, 1, bias=False)
        self.norm2 = ValidBatchNorm(out_channels)
        self.prelu2 = nn.PReLU()
        self.skip = (
            nn.Identity() if in_channels == out_channels else nn.Conv1d(in_channels, out_channels, 1, bias=False)
        )

    def forward(
        self, frames: Float[Tensor, "batch in frames"], mask: Mask | None = None
    ) -> Float[Tensor, "batch out pooled"]:
        """Return a third as many frames."""
        hidden = self.prelu1(self.norm1(self.conv1(frames), mask))
        hidden = self.norm2(self.conv2(hidden), mask)
        pooled: Tensor = F.max_pool1d(self.prelu2(hidden + self.skip(frames)), POOLING)
        return pooled


class SpeakerEncoder(nn.Module):
    """cLN, 1x1 conv, three residual blocks, 1x1 conv, mean over the valid frames."""

    def __init__(self, in_channels: int, channels: int, hidden: int, speaker_dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(in_channels)
        self.expand = nn.Conv1d(in_channels, channels, 1)
        self.blocks = nn.ModuleList(
            [
                ResidualBlock(channels, channels),
                ResidualBlock(channels, hidden),
                ResidualBlock(hidden, hidden),
            ]
        )
        self.project = nn.Conv1d(hidden, speaker_dim, 1)

    @property
    def min_frames(self) -> int:
        """The fewest frames that give an embedding: one frame after all pooling."""
        return int(POOLING ** len(self.blocks))

    def forward(self, coded: Frames, mask: Mask | None = None) -> Float[Tensor, "batch speaker_dim"]:
        """Return the embedding of each enrollment of at least `min_frames` valid frames."""
        hidden = self.expand(self.norm(coded))
        for block in self.blocks:
            hidden = block(hidden, mask)
            mask = None if mask is None else -F.max_pool1d(-mask, POOLING)
        frames: Tensor = self.project(hidden)
        return frames.mean(2) if mask is None else (frames * mask).sum(2) / mask.sum(2)
