"""The building blocks of time-domain extractors: encoder, decoder, norms and the temporal block.

Tensors are (batch, channels, frames). A `mask` is (batch, 1, frames) with 1 for valid frames and 0 for padding,
or None where all frames are valid, which is the fast path of training.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.models.base import Lengths, Wave

Frames = Float[Tensor, "batch channels frames"]
Mask = Float[Tensor, "batch 1 frames"]


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each frame (cLN of Conv-TasNet, arXiv 1809.07454)."""

    def forward(self, frames: Frames) -> Frames:
        """Normalise every frame by itself."""
        return super().forward(frames.transpose(1, 2)).transpose(1, 2)


class GlobalNorm(nn.Module):
    """Global layer normalisation over channels and valid frames (gLN, arXiv 1809.07454, eq. 8–9)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, frames: Frames, mask: Mask | None = None) -> Frames:
        """Normalise each item over its valid frames; padded frames come out as zero."""
        if mask is None:
            return F.group_norm(frames, 1, self.weight, self.bias, self.eps)
        count = mask.sum((1, 2), keepdim=True) * frames.shape[1]
        mean = (frames * mask).sum((1, 2), keepdim=True) / count
        centred = (frames - mean) * mask
        variance = centred.square().sum((1, 2), keepdim=True) / count
        scale = self.weight[:, None] * torch.rsqrt(variance + self.eps)
        return centred * scale + self.bias[:, None] * mask


class TemporalBlock(nn.Module):
    """Residual block: 1x1 conv, PReLU, gLN, dilated depthwise conv, PReLU, gLN, 1x1 conv (SpEx+, Fig. 2).

    With `speaker_dim` the speaker embedding is appended to every frame of the input. The product of the first
    1x1 convolution with that constant part is computed once per item and added, not repeated per frame.
    """

    def __init__(self, channels: int, hidden: int, kernel_size: int, dilation: int, speaker_dim: int = 0) -> None:
        super().__init__()
        self.expand = nn.Conv1d(channels + speaker_dim, hidden, 1)
        self.expand_prelu = nn.PReLU()
        self.expand_norm = GlobalNorm(hidden)
        self.depthwise = nn.Conv1d(
            hidden,
            hidden,
            kernel_size,
            groups=hidden,
            dilation=dilation,
            padding=dilation * (kernel_size - 1) // 2,
        )
        self.depthwise_prelu = nn.PReLU()
        self.depthwise_norm = GlobalNorm(hidden)
        self.project = nn.Conv1d(hidden, channels, 1)

    def forward(
        self,
        frames: Frames,
        embedding: Float[Tensor, "batch speaker_dim"] | None = None,
        mask: Mask | None = None,
    ) -> Frames:
        """Return the frames plus what the block makes of them."""
        if embedding is None:
            hidden = self.expand(frames)
        else:
            channels = frames.shape[1]
            speaker_part = F.linear(embedding, self.expand.weight[:, channels:, 0], self.expand.bias)
            hidden = F.conv1d(frames, self.expand.weight[:, :channels]) + speaker_part[:, :, None]
        hidden = self.expand_norm(self.expand_prelu(hidden), mask)
        hidden = self.depthwise_norm(self.depthwise_prelu(self.depthwise(hidden)), mask)
        residual: Tensor = self.project(hidden)
        return frames + residual


class SpeechEncoder(nn.Module):
    """Multi-scale speech encoder: convolutions with ReLU over windows that share hop and left edge (SpEx+, eq. 2).

    The waveform is padded with zeros at its end so that every sample lies in a frame and every window is whole:
    frame t of window L covers samples [t·hop, t·hop + L).
    """

    def __init__(self, filters: int, windows: Sequence[int], hop: int) -> None:
        super().__init__()
        self.windows, self.hop = tuple(windows), hop
        self.scales = nn.ModuleList(nn.Conv1d(1, filters, window, stride=hop) for window in windows)

    def frames(self, samples: int) -> int:
        """Return the number of frames that cover `samples` samples."""
        return max(0, -(-(samples - self.windows[0]) // self.hop)) + 1

    def samples(self, frames: int) -> int:
        """Return the number of samples that `frames` frames of the short window span."""
        return (frames - 1) * self.hop + self.windows[0]

    def mask(self, audio: Wave, length: Lengths | None) -> Mask | None:
        """Return the mask of the frames that cover each item's valid samples; None when all rows are full."""
        if length is None:
            return None
        beyond = (length.to(audio.device) - self.windows[0] + self.hop - 1).clamp(min=0)
        count = torch.div(beyond, self.hop, rounding_mode="floor") + 1
        index = torch.arange(self.frames(audio.shape[1]), device=audio.device)
        return (index < count[:, None]).to(audio.dtype)[:, None]

    def forward(self, audio: Wave) -> list[Frames]:
        """Return the non-negative frames of each scale, (batch, filters, frames)."""
        count = self.frames(audio.shape[1])
        coded = []
        for window, scale in zip(self.windows, self.scales, strict=True):
            needed = (count - 1) * self.hop + window
            padded = F.pad(audio, (0, max(0, needed - audio.shape[1])))
            coded.append(F.relu(scale(padded[:, None, :needed])))
        return coded


class SpeechDecoder(nn.Module):
    """Transposed convolution of one scale back to samples, in the alignment of `SpeechEncoder` (SpEx+, eq. 5)."""

    def __init__(self, filters: int, window: int, hop: int) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        bound = 1.0 / math.sqrt(window)
        self.weight = nn.Parameter(torch.empty(filters, window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))

    def forward(self, frames: Frames, samples: int) -> Wave:
        """Overlap and add the frames; return the first `samples` samples.

        A matrix product gives every frame's window, `fold` sums them: the transposed convolution with one
        output channel, several times as fast on a CPU as the library's own.
        """
        windows = torch.einsum("bnt,nw->bwt", frames, self.weight)
        length = (frames.shape[2] - 1) * self.hop + self.window
        audio = F.fold(windows, (1, length), (1, self.window), stride=(1, self.hop))
        return audio[:, 0, 0, :samples] + self.bias
