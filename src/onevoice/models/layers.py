"""The building blocks of time-domain extractors: encoder, decoder, norms and the temporal block.

Frames are (batch, frames, channels), so that a 1x1 convolution is a matrix product; the layers of the temporal block
alone take (batch, channels, frames). A mask has 1 for valid frames and 0 for padding and a channel axis of size 1; it
is None where all frames are valid, which is the fast path of training.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.models.base import Lengths, Wave
from onevoice.models.fused import BlockWeights, Frames, compiled, pointwise, temporal_block

Mask = Float[Tensor, "batch frames 1"]
ChannelsFirst = Float[Tensor, "batch channels frames"]
MaskFirst = Float[Tensor, "batch 1 frames"]


class Pointwise(nn.Conv1d):
    """A 1x1 convolution over channels-last frames, with the parameters of a `Conv1d`."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, frames: Frames) -> Float[Tensor, "batch frames out"]:
        """Multiply every frame by the weights."""
        return pointwise(frames, self.weight[:, :, 0], self.bias)


class GlobalNorm(nn.Module):
    """Global layer normalisation over channels and valid frames (gLN, arXiv 1809.07454, eq. 8–9)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, frames: ChannelsFirst, mask: MaskFirst | None = None) -> ChannelsFirst:
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
        frames: ChannelsFirst | Frames,
        embedding: Float[Tensor, "batch speaker_dim"] | None = None,
        mask: MaskFirst | None = None,
        channels_last: bool = False,
    ) -> ChannelsFirst | Frames:
        """Return the frames plus what the block makes of them.

        With `channels_last`, frames are (batch, frames, channels) and all valid, and the compiled block is used.
        """
        if channels_last:
            return self._compiled(frames, embedding)
        if embedding is None:
            hidden = self.expand(frames)
        else:
            offset = self._speaker_part(embedding)
            hidden = F.conv1d(frames, self.expand.weight[:, : -embedding.shape[1]]) + offset[:, :, None]
        hidden = self.expand_norm(self.expand_prelu(hidden), mask)
        hidden = self.depthwise_norm(self.depthwise_prelu(self.depthwise(hidden)), mask)
        residual: Tensor = self.project(hidden)
        return frames + residual

    def _speaker_part(self, embedding: Float[Tensor, "batch speaker_dim"]) -> Float[Tensor, "batch hidden"]:
        """Return what the speaker adds to every frame of the first product, with its bias."""
        return F.linear(embedding, self.expand.weight[:, -embedding.shape[1] :, 0], self.expand.bias)

    def _compiled(
        self, frames: Float[Tensor, "batch frames channels"], embedding: Float[Tensor, "batch speaker_dim"] | None
    ) -> Float[Tensor, "batch frames channels"]:
        device = frames.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else frames.dtype
        assert self.expand.bias is not None
        assert self.depthwise.bias is not None
        assert self.project.bias is not None
        with torch.autocast(device, enabled=False):
            offset = self.expand.bias[None] if embedding is None else self._speaker_part(embedding.to(frames.dtype))
            weights = BlockWeights(
                self.expand.weight[:, : frames.shape[2]],
                self.expand_prelu.weight,
                self.expand_norm.weight,
                self.expand_norm.bias,
                self.depthwise.weight[:, 0].T.contiguous(),
                self.depthwise.bias,
                self.depthwise_prelu.weight,
                self.depthwise_norm.weight,
                self.depthwise_norm.bias,
                self.project.weight,
                self.project.bias,
            )
            dilation, eps = self.depthwise.dilation[0], self.expand_norm.eps
            block: Callable[..., Tensor] = compiled(temporal_block)
            return block(frames, offset, weights, dilation, eps, precision)


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
        return (index < count[:, None]).to(audio.dtype)[:, :, None]

    def forward(self, audio: Wave) -> list[Frames]:
        """Return the non-negative frames of each scale."""
        count = self.frames(audio.shape[1])
        padded = F.pad(audio, (0, max(0, (count - 1) * self.hop + self.windows[-1] - audio.shape[1])))
        coded = []
        for window, scale in zip(self.windows, self.scales, strict=True):
            assert isinstance(scale, nn.Conv1d)
            windows = padded.unfold(1, window, self.hop)[:, :count]
            coded.append(F.relu(pointwise(windows, scale.weight[:, 0], scale.bias)))
        return coded


class SpeechDecoder(nn.Module):
    """Transposed convolution of one scale back to samples, in the alignment of `SpeechEncoder` (SpEx+, eq. 5)."""

    def __init__(self, filters: int, window: int, hop: int) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        bound = 1.0 / math.sqrt(window)
        self.level = hop / (window * filters)
        """What makes the sum over filters and overlapping windows a mean: about the level of the encoder's input."""
        self.weight = nn.Parameter(torch.empty(filters, window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))

    def forward(self, frames: Frames, samples: int) -> Wave:
        """Overlap and add the frames; return the first `samples` samples.

        A matrix product gives every frame's window, cut into hops; hop j of frame t belongs to hop t + j of the sum.
        """
        hops = -(-self.window // self.hop)
        weight = F.pad(self.weight, (0, hops * self.hop - self.window))
        parts = pointwise(frames, weight.T).to(self.weight.dtype).reshape(*frames.shape[:2], hops, self.hop)
        shifted = (F.pad(parts[:, :, j], (0, 0, j, hops - 1 - j)) for j in range(hops))
        return functools.reduce(torch.add, shifted).flatten(1)[:, :samples] + self.bias
