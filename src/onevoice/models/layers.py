"""The building blocks of extractors: norms, and encoder, decoder and temporal block of those in the time domain.

Frames are (batch, frames, channels), so that a 1x1 convolution is a matrix product. Only the global norm and the layers
of the temporal block take (batch, channels, frames). A mask is 1 for valid frames and 0 for padding, with one channel;
it is None if all frames are valid, which is the fast path of training.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.models.base import Lengths, Wave, compile_once

Frames = Float[Tensor, "batch frames channels"]
Mask = Float[Tensor, "batch frames 1"]
ChannelsFirst = Float[Tensor, "batch channels frames"]
MaskFirst = Float[Tensor, "batch 1 frames"]
NORM_EPS = 1e-5
"""Added to the variance in the global norms."""


def pointwise(
    frames: Float[Tensor, "batch frames inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "batch frames outputs"]:
    """Return the product of every frame with `weight`, plus `bias`; `by_convolution` on a CPU in float32."""
    if frames.device.type != "cpu" or frames.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(frames, weight, bias)
    return by_convolution(frames, weight, bias)


def by_convolution(frames: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same by oneDNN, which torch runs on one thread only if there is a dilation; it changes nothing."""
    image = frames.transpose(1, 2)[:, :, None]
    return F.conv2d(image, weight[:, :, None, None], bias, dilation=2)[:, :, 0].transpose(1, 2)


class Pointwise(nn.Conv1d):
    """A 1x1 convolution over channels-last frames, with the parameters of a `Conv1d`."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, frames: Frames) -> Float[Tensor, "batch frames out"]:
        """Multiply every frame by the weights."""
        return pointwise(frames, self.weight[:, :, 0], self.bias)


class GlobalNorm(nn.Module):
    """Global layer normalization over channels and valid frames (gLN, arXiv 1809.07454, eq. 8–9)."""

    def __init__(self, channels: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, frames: ChannelsFirst, mask: MaskFirst | None = None) -> ChannelsFirst:
        """Normalize each item over its valid frames; padded frames become zero."""
        if mask is None:
            return F.group_norm(frames, 1, self.weight, self.bias, self.eps)
        count = mask.sum((1, 2), keepdim=True) * frames.shape[1]
        mean = (frames * mask).sum((1, 2), keepdim=True) / count
        centered = (frames - mean) * mask
        variance = centered.square().sum((1, 2), keepdim=True) / count
        scale = self.weight[:, None] * torch.rsqrt(variance + self.eps)
        return centered * scale + self.bias[:, None] * mask


class RMSNorm(nn.Module):
    """Scales each vector to a root mean square of 1, then by a learned factor per channel (arXiv 1910.07467)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(
        self, frames: Float[Tensor, "*axes channels"], scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Float[Tensor, "*axes channels"]:
        """Normalize over the channels in the precision of the weights; with `scale`, scale by it and add `shift`."""
        if scale is None and frames.dtype == self.weight.dtype and not torch.is_grad_enabled():
            return F.rms_norm(frames, self.weight.shape, self.weight, 1e-5)  # without gradients faster
        wide = frames.to(self.weight.dtype)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        if scale is None or shift is None:
            return (normed * self.weight).to(frames.dtype)
        return torch.addcmul(shift.to(wide.dtype), normed, self.weight * scale).to(frames.dtype)


class ValidBatchNorm(nn.BatchNorm1d):
    """Batch normalization of channels-last frames; training statistics come from the valid frames only."""

    sum_over_processes: Callable[[Float[Tensor, " values"]], Float[Tensor, " values"]] | None = None
    """Adds up values over the processes of a distributed training; None for a process by itself."""

    def forward(self, frames: Frames, mask: Mask | None = None) -> Frames:
        """Normalize by the statistics of the batch (training) or the running ones (evaluation)."""
        if self.training:
            mean, variance, count = self._measure(frames.to(self.weight.dtype), mask)
            self._track(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, variance = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (frames - mean) * scale + self.bias

    def _measure(self, frames: Frames, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance of each channel over the valid frames of all processes, and their number."""
        if mask is None and self.sum_over_processes is None:
            count = frames.new_tensor(frames.shape[0] * frames.shape[1])
            variance, mean = torch.var_mean(frames, (0, 1), correction=0)
            return mean, variance, count
        total = self.sum_over_processes or _keep
        valid = frames.new_ones(()) if mask is None else mask
        own_count = frames.new_tensor([frames.shape[0] * frames.shape[1]]) if mask is None else mask.sum()[None]
        sums = total(torch.cat([(frames * valid).sum((0, 1)), own_count]))
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


def _keep(values: Tensor) -> Tensor:
    return values


class TemporalBlock(nn.Module):
    """Residual block: 1x1 conv, PReLU, gLN, dilated depthwise conv, PReLU, gLN, 1x1 conv (SpEx+, Fig. 2).

    With `speaker_dim`, the speaker embedding is appended to every frame of the input. The product of the first
    1x1 convolution with that constant part is computed once per item and added to every frame.

    `forward` runs the layers; `forward_compiled` runs `temporal_block` below, with the same weights and result.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        kernel_size: int,
        dilation: int,
        speaker_dim: int = 0,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        self.expand = nn.Conv1d(channels + speaker_dim, hidden, 1)
        self.expand_prelu = nn.PReLU()
        self.expand_norm = GlobalNorm(hidden, norm_eps)
        self.depthwise = nn.Conv1d(
            hidden,
            hidden,
            kernel_size,
            groups=hidden,
            dilation=dilation,
            padding=dilation * (kernel_size - 1) // 2,
        )
        self.depthwise_prelu = nn.PReLU()
        self.depthwise_norm = GlobalNorm(hidden, norm_eps)
        self.project = nn.Conv1d(hidden, channels, 1)

    def forward(
        self,
        frames: ChannelsFirst,
        embedding: Float[Tensor, "batch speaker_dim"] | None = None,
        mask: MaskFirst | None = None,
    ) -> ChannelsFirst:
        """Return the frames plus the output of the block."""
        if frames.device.type == "cpu" and mask is None and not torch.is_grad_enabled():
            return self._forward_on_cpu(frames, embedding)
        if embedding is None:
            hidden = self.expand(frames)
        else:
            offset = self._speaker_part(embedding)
            hidden = F.conv1d(frames, self.expand.weight[:, : -embedding.shape[1]]) + offset[:, :, None]
        hidden = self.expand_norm(self.expand_prelu(hidden), mask)
        hidden = self.depthwise_norm(self.depthwise_prelu(self.depthwise(hidden)), mask)
        residual: Tensor = self.project(hidden)
        return frames + residual

    def forward_compiled(self, frames: Frames, embedding: Float[Tensor, "batch speaker_dim"] | None = None) -> Frames:
        """Return the frames, all of them valid, plus the output of the block."""
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
            run: Callable[..., Tensor] = compile_once(temporal_block)
            return run(frames, offset, weights, dilation, eps, precision)

    def _forward_on_cpu(
        self, frames: ChannelsFirst, embedding: Float[Tensor, "batch speaker_dim"] | None
    ) -> ChannelsFirst:
        """Return the same without gradients, with fewer passes over memory."""
        precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else frames.dtype
        assert self.expand.bias is not None
        assert self.project.bias is not None
        with torch.autocast("cpu", enabled=False):
            offset = self.expand.bias[None] if embedding is None else self._speaker_part(embedding.to(frames.dtype))
            hidden = _product(frames.to(precision), self.expand.weight[:, : frames.shape[1]], offset)
            hidden = self.expand_norm(F.leaky_relu_(hidden, self.expand_prelu.weight.item()))
            hidden = F.leaky_relu_(self._mix_taps(hidden), self.depthwise_prelu.weight.item())
            residual = _product(self.depthwise_norm(hidden), self.project.weight, self.project.bias[None])
            return frames + residual

    def _mix_taps(self, hidden: ChannelsFirst) -> ChannelsFirst:
        """Return the depthwise convolution as a sum of shifted products, which is faster on a CPU."""
        layer = self.depthwise
        assert layer.bias is not None
        count, step, reach = hidden.shape[2], layer.dilation[0], int(layer.padding[0])
        padded, taps = F.pad(hidden, (reach, reach)), layer.weight[:, 0, :, None].to(hidden.dtype).unbind(1)
        mixed = taps[0] * padded[:, :, :count]
        for index, tap in enumerate(taps[1:], 1):
            mixed.addcmul_(tap, padded[:, :, index * step : index * step + count])
        return mixed.add_(layer.bias[:, None].to(hidden.dtype))

    def _speaker_part(self, embedding: Float[Tensor, "batch speaker_dim"]) -> Float[Tensor, "batch hidden"]:
        """Return what the speaker adds to every frame of the first product, plus the bias of that product."""
        return F.linear(embedding, self.expand.weight[:, -embedding.shape[1] :, 0], self.expand.bias)


def _product(
    frames: ChannelsFirst, weight: Float[Tensor, "outputs channels 1"], offset: Float[Tensor, "#batch outputs"]
) -> Float[Tensor, "batch outputs frames"]:
    """Return a 1x1 convolution plus an offset of each item; `pointwise` says why it is written so."""
    if frames.dtype == torch.float32:
        product = F.conv1d(frames, weight, dilation=2)
    else:
        product = weight[:, :, 0].to(frames.dtype) @ frames
    return product.add_(offset[:, :, None].to(product.dtype))


class BlockWeights(NamedTuple):
    """The parameters of a temporal block, in the shapes of its layers; only the taps are transposed."""

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
    """Return `frames` plus the output of the block, in operations that a compiler fuses into four passes.

    `offset` is added to every frame after the first product: its bias, and the part of the speaker if there is one.
    `precision` is the type of the operands of the matrix products. With bfloat16, only these operands and the tensors
    kept for the backward pass are rounded; statistics and the residual path stay float32.
    """
    w = weights
    # First product and PReLU. `hidden` is rounded because it is kept for the backward pass.
    product = pointwise(frames.to(precision), w.expand[:, :, 0].to(precision))
    hidden = (product + offset[:, None]).to(precision).to(frames.dtype)
    active = torch.where(hidden > 0, hidden, w.expand_slope * hidden)
    # First norm, as one scale and one shift per item and channel.
    mean, rstd = _statistics(active, eps)
    scale = w.expand_scale * rstd
    normed = active * scale[:, None] + (w.expand_shift - mean * scale)[:, None]
    # Depthwise convolution: each tap multiplies the frames shifted by its distance.
    count, taps = frames.shape[1], len(w.taps)
    reach = dilation * (taps - 1) // 2
    padded = F.pad(normed, (0, 0, reach, reach))
    mixed = w.taps_bias.expand_as(normed)
    for tap in range(taps):
        mixed = mixed + w.taps[tap] * padded[:, tap * dilation : tap * dilation + count]
    active = torch.where(mixed > 0, mixed, w.depthwise_slope * mixed)
    # The second norm is folded into the second product W, so that the normalized frames are never stored:
    # W norm(active) + bias = rstd · (W diag(scale)) active + constant.
    mean, rstd = _statistics(active, eps)
    project = w.project[:, :, 0]
    product = pointwise(active.to(precision), (project * w.depthwise_scale).to(precision))
    constant = project @ w.depthwise_shift + w.project_bias - mean * rstd * (project @ w.depthwise_scale)
    return frames + (product * rstd[:, None] + constant[:, None])


def _statistics(active: Frames, eps: float) -> tuple[Float[Tensor, "batch 1"], Float[Tensor, "batch 1"]]:
    """Return mean and 1 / deviation of each item over frames and channels.

    The sum has two stages. Within one stage, compilers add the terms one by one, which loses digits over a million
    terms.
    """
    count = active.shape[1] * active.shape[2]
    mean = active.sum(2).sum(1) / count
    variance = active.square().sum(2).sum(1) / count - mean.square()
    return mean[:, None], torch.rsqrt(variance.clamp(min=0) + eps)[:, None]


class SpeechEncoder(nn.Module):
    """Multi-scale speech encoder: convolutions with ReLU over windows that share hop and left edge (SpEx+, eq. 2).

    The waveform is padded with zeros at its end so that every sample lies in a frame and every window is whole:
    frame t of window L covers samples [t·hop, t·hop + L). With `whole_frames`, samples at the end that do not fill a
    short window get no frame.
    """

    def __init__(self, filters: int, windows: Sequence[int], hop: int, whole_frames: bool = False) -> None:
        super().__init__()
        self.windows, self.hop = tuple(windows), hop
        self.extra = 0 if whole_frames else hop - 1
        """Samples to add before counting frames: all but one hop's worth makes the count round up."""
        self.scales = nn.ModuleList(nn.Conv1d(1, filters, window, stride=hop) for window in windows)

    def frames(self, samples: int) -> int:
        """Return the number of frames that cover `samples` samples."""
        return max(0, samples - self.windows[0] + self.extra) // self.hop + 1

    def samples(self, frames: int) -> int:
        """Return the number of samples that `frames` frames of the short window span."""
        return (frames - 1) * self.hop + self.windows[0]

    def mask(self, audio: Wave, length: Lengths | None) -> Mask | None:
        """Return the mask of the frames that cover each item's valid samples; None if no lengths are given."""
        if length is None:
            return None
        beyond = (length.to(audio.device) - self.windows[0] + self.extra).clamp(min=0)
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
    """Transposed convolution of one scale back to samples, aligned with `SpeechEncoder` (SpEx+, eq. 5)."""

    def __init__(self, filters: int, window: int, hop: int) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        bound = 1.0 / math.sqrt(window)
        self.level = hop / (window * filters)
        """Turns the sum over filters and overlapping windows into a mean, near the level of the encoder's input."""
        self.weight = nn.Parameter(torch.empty(filters, window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))

    def forward(self, frames: Frames, samples: int) -> Wave:
        """Overlap and add the frames; return the first `samples` samples, with zeros where no frame reaches.

        A matrix product gives the window of every frame, cut into hops; hop j of frame t is added to hop t + j.
        """
        hops = -(-self.window // self.hop)
        weight = F.pad(self.weight, (0, hops * self.hop - self.window))
        parts = pointwise(frames, weight.T).to(self.weight.dtype).reshape(*frames.shape[:2], hops, self.hop)
        shifted = (F.pad(parts[:, :, j], (0, 0, j, hops - 1 - j)) for j in range(hops))
        reach = (frames.shape[1] - 1) * self.hop + self.window
        signal = functools.reduce(torch.add, shifted).flatten(1)[:, : min(samples, reach)] + self.bias
        return signal if signal.shape[1] == samples else F.pad(signal, (0, samples - signal.shape[1]))
