"""The sizes of the band-split network, and its blocks: each maps frames of shape (batch, frames, bands, channels)."""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.config import STRICT
from onevoice.models.base import NetworkConfig
from onevoice.models.layers import RMSNorm, by_convolution, pointwise
from onevoice.units import to_samples

Bands = Float[Tensor, "batch frames bands channels"]
Heads = Float[Tensor, "batch heads _frames _size"]
Voice = Float[Tensor, "batch _frames bands channels"]
Hidden = Float[Tensor, "batch _frames bands hidden"]
Film = Float[Tensor, "batch 1 bands twice"]
Valid = Float[Tensor, "batch frames 1 1"]
Spectrum = Float[Tensor, "batch frames covered 2"]
MANY = 2**15
"""Number of inputs from which a convolution by oneDNN is faster than a matrix product, in spite of its preparation."""


@dataclass(frozen=True, config=STRICT)
class BandSplitConfig(NetworkConfig):
    """The sizes of the band-split network."""

    name: Literal["bandsplit"] = "bandsplit"
    """Selects the network."""
    window_seconds: PositiveFloat = 0.032
    """Length of the STFT window in seconds; the hop is half of it."""
    bands: tuple[tuple[PositiveInt, PositiveInt], ...] = ((12, 4), (8, 8), (3, 36), (1, 37))
    """Bands from low to high frequencies, as pairs of a count and the bins of each. Higher bins are left out."""
    channels: PositiveInt = 48
    """Channels of each band."""
    hidden: PositiveInt = 96
    """Channels inside the gated convolutions."""
    feed_forward: PositiveInt = 72
    """Channels inside the gated layers that work on each vector by itself."""
    shared: PositiveInt = 16
    """Channels that each band contributes to the full-band layers."""
    blocks: Annotated[int, Field(ge=2)] = 6
    """Number of blocks."""
    dilations: tuple[PositiveInt, ...] = (1, 2, 4)
    """Frames between the taps of the convolutions, repeated over the blocks."""
    taps: PositiveInt = 5
    """Taps of the convolutions along time, odd."""
    attention_every: PositiveInt = 2
    """Every so many blocks, the frames attend to each other."""
    attention_seconds: PositiveFloat = 2.5
    """How far attention reaches to each side, in seconds."""
    heads: PositiveInt = 4
    """Attention heads; must divide `channels`."""
    key_dim: PositiveInt = 4
    """What each band contributes to the queries and keys of each head."""
    voice_frames: PositiveInt = 96
    """Number of frames of an enrollment that the mixture attends to."""
    causal: bool = False
    """Reach only into the past, for streams; `normalize_level` must be false then."""
    level_seconds: PositiveFloat = 3.0
    """With `causal`: seconds of the past whose level scales a frame."""

    def __post_init__(self) -> None:
        """Check the values that depend on each other."""
        if self.taps % 2 == 0:
            raise ValueError(f"taps must be odd, not {self.taps}")
        if self.hop * 2 != self.window:
            raise ValueError(f"window_seconds must give an even number of samples, not {self.window}")
        if self.bins > self.hop + 1:
            raise ValueError(f"bands cover {self.bins} bins, but a window of {self.window} samples has {self.hop + 1}")
        if self.channels % self.heads:
            raise ValueError(f"heads must divide channels = {self.channels}, not {self.heads}")
        if self.causal and self.normalize_level:
            raise ValueError(
                "normalize_level must be false with causal; the level of the whole is not known in a stream"
            )

    @property
    def window(self) -> int:
        """The STFT window in samples."""
        return to_samples(self.window_seconds, self.sample_rate)

    @property
    def hop(self) -> int:
        """The hop in samples."""
        return self.window // 2

    @property
    def band_count(self) -> int:
        """The number of bands."""
        return sum(count for count, _ in self.bands)

    @property
    def bins(self) -> int:
        """The number of bins that the bands cover."""
        return sum(count * width for count, width in self.bands)

    @property
    def features(self) -> int:
        """The size of a frame in the full-band layers."""
        return self.band_count * self.shared

    @property
    def attention_frames(self) -> int:
        """How many frames attention reaches to each side."""
        return round(self.attention_seconds * self.sample_rate / self.hop)

    def attends(self, block: int) -> bool:
        """Return True if a block, counted from 0, has attention."""
        return block % self.attention_every == self.attention_every - 1

    @property
    def level_frames(self) -> int:
        """With `causal`: frames of the past whose level scales a frame."""
        return max(1, round(self.level_seconds * self.sample_rate / self.hop))

    @property
    def context_seconds(self) -> float:
        """How far from an output sample, to each side, the input can influence it, in seconds."""
        reach = self.taps - 1 if self.causal else self.taps // 2
        frames = self.causal * self.level_frames + sum(
            self.dilations[block % len(self.dilations)] * reach + self.attends(block) * self.attention_frames
            for block in range(self.blocks)
        )
        return (frames * self.hop + self.window) / self.sample_rate

    @property
    def latency_seconds(self) -> float | None:
        """With `causal`: how much later than an input sample the output may change because of it, in seconds."""
        return self.window / self.sample_rate if self.causal else None


def dense(
    frames: Float[Tensor, "batch *axes inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "batch *axes outputs"]:
    """Return the product of every vector with `weight`, plus `bias`; of many without gradients, `by_convolution`."""
    if frames.numel() < MANY:
        return F.linear(frames, weight, bias)
    multiply = pointwise if torch.is_grad_enabled() or frames.device.type != "cpu" else by_convolution
    return multiply(frames.reshape(1, -1, frames.shape[-1]), weight, bias).reshape(*frames.shape[:-1], -1)


class Dense(nn.Linear):
    """A matrix product over the last axis of frames."""

    def forward(self, frames: Float[Tensor, "batch *axes inputs"]) -> Float[Tensor, "batch *axes outputs"]:
        """Multiply every vector by the weights."""
        return dense(frames, self.weight, self.bias)


class GatedDense(Dense):
    """Two matrix products over the last axis of frames; the SiLU of the second scales the first (arXiv 2002.05202)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, 2 * outputs)

    def forward(self, frames: Float[Tensor, "batch *axes inputs"]) -> Float[Tensor, "batch *axes outputs"]:
        """Return the gated product; without gradients, from two products in place, which are contiguous."""
        if torch.is_grad_enabled():
            value, gate = super().forward(frames).chunk(2, dim=-1)
            return value * F.silu(gate)
        (of_value, of_gate), (bias, gate_bias) = self.weight.chunk(2), self.bias.chunk(2)
        return F.silu(dense(frames, of_gate, gate_bias), inplace=True).mul_(dense(frames, of_value, bias))


class BandSplit(nn.Module):
    """Maps the bins of each band to the channels of the band, each band by its own matrix."""

    def __init__(self, bands: tuple[tuple[int, int], ...], channels: int) -> None:
        super().__init__()
        self.bands = bands
        self.weights = nn.ParameterList(
            torch.randn(count, 2 * width, channels) / math.sqrt(2 * width) for count, width in bands
        )

    def forward(self, spectrum: Spectrum) -> Bands:
        """Return the frames of the bands."""
        groups, first = [], 0
        for (count, width), weight in zip(self.bands, self.weights, strict=True):
            bins = spectrum[:, :, first : first + count * width]
            groups.append(torch.einsum("btki,kic->btkc", bins.reshape(*bins.shape[:2], count, 2 * width), weight))
            first += count * width
        return torch.cat(groups, dim=2)


class BandMask(nn.Module):
    """Maps the channels of each band to a complex mask for its bins, each band by its own matrix."""

    def __init__(self, bands: tuple[tuple[int, int], ...], channels: int) -> None:
        super().__init__()
        self.bands = bands
        self.norm = RMSNorm(channels)
        self.weights = nn.ParameterList(
            0.3 * torch.randn(count, channels, 2 * width) / math.sqrt(channels) for count, width in bands
        )
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(sum(count * width for count, width in bands)))
        """Begins as a mask that lets the mixture through."""

    def forward(self, frames: Bands) -> Spectrum:
        """Return real and imaginary part of the mask of each bin."""
        frames, groups, first = self.norm(frames), [], 0
        for (count, _), weight in zip(self.bands, self.weights, strict=True):
            part = frames[:, :, first : first + count]
            groups.append(torch.einsum("btkc,kci->btki", part, weight).flatten(2))
            first += count
        mask: Tensor = torch.cat(groups, dim=2).to(self.bias.dtype) + self.bias
        return mask.reshape(*mask.shape[:2], -1, 2)


class TimeBlock(nn.Module):
    """Gated dilated convolution along time inside each band: norm, FiLM, gated matrix, taps per channel, matrix."""

    def __init__(self, config: BandSplitConfig, dilation: int) -> None:
        super().__init__()
        self.dilation, self.reach = dilation, dilation * (config.taps - 1)
        self.past = self.reach if config.causal else self.reach // 2
        """Frames before a frame that it depends on."""
        self.norm = RMSNorm(config.channels)
        self.expand = GatedDense(config.channels, config.hidden)
        self.taps = nn.Parameter(torch.randn(config.taps, config.hidden) / math.sqrt(config.taps))
        self.project = Dense(config.hidden, config.channels)

    def forward(self, frames: Bands, film: Film | None, valid: Valid | None) -> Bands:
        """Return the frames plus the result."""
        around = (0, 0, 0, 0, self.past, self.reach - self.past)
        return self.convolve(frames, F.pad(self.inputs(frames, film, valid), around))

    def inputs(self, frames: Bands, film: Film | None, valid: Valid | None) -> Hidden:
        """Return what the convolution gets; `film` holds the scale of each channel, then its shift."""
        if film is None:
            inputs = self.norm(frames)
        else:
            scale, shift = film.chunk(2, dim=3)
            inputs = self.norm(frames, 1 + scale, shift)
        gated: Tensor = self.expand(inputs)
        return gated if valid is None else gated * valid.to(gated.dtype)

    def convolve(self, frames: Bands, padded: Hidden) -> Bands:
        """Return the frames plus the result, from the inputs of `reach` more frames than there are.

        The gradients of shifted products, which a compiler fuses, are faster than those of torch's convolution.
        """
        taps, count = self.taps.to(padded.dtype), frames.shape[1]
        if torch.is_grad_enabled():
            shifts = (padded[:, index * self.dilation :][:, :count] for index in range(len(taps)))
            convolved = sum(shift * tap for shift, tap in zip(shifts, taps.unbind(), strict=True))
        else:
            kernels, dilation = taps.t()[:, None, :, None], (self.dilation, 1)
            images = padded.permute(0, 3, 1, 2)  # in memory, channels are last
            convolved = F.conv2d(images, kernels, dilation=dilation, groups=len(kernels)).permute(0, 2, 3, 1)
        result: Tensor = frames + self.project(convolved).to(frames.dtype)
        return result


class FullBand(nn.Module):
    """Mixes the bands of each frame by one matrix."""

    def __init__(self, config: BandSplitConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.channels)
        self.gather = Dense(config.channels, config.shared)
        self.mix = Dense(config.band_count * config.shared, config.band_count * config.shared)
        self.spread = Dense(config.shared, config.channels)

    def forward(self, frames: Bands) -> Bands:
        """Return the frames plus the result."""
        joined = F.silu(self.gather(self.norm(frames))).flatten(2)
        mixed = F.relu(self.mix(joined)).reshape(*frames.shape[:3], -1)
        result: Tensor = frames + self.spread(mixed).to(frames.dtype)
        return result


class FeedForward(nn.Module):
    """Works on each vector by itself: norm, gated matrix, matrix."""

    def __init__(self, config: BandSplitConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.channels)
        self.expand = GatedDense(config.channels, config.feed_forward)
        self.project = Dense(config.feed_forward, config.channels)

    def forward(self, frames: Bands) -> Bands:
        """Return the frames plus the result."""
        result: Tensor = frames + self.project(self.expand(self.norm(frames))).to(frames.dtype)
        return result


class Attention(nn.Module):
    """Each frame attends to the frames within reach, or to the frames of the voice; a frame joins all its bands."""

    def __init__(self, config: BandSplitConfig) -> None:
        super().__init__()
        self.heads, self.reach, self.causal = config.heads, config.attention_frames, config.causal
        self.norm = RMSNorm(config.channels)
        self.queries = Dense(config.channels, config.heads * config.key_dim)
        self.keys = Dense(config.channels, config.heads * config.key_dim, bias=False)
        self.values = Dense(config.channels, config.channels)
        self.project = Dense(config.channels, config.channels)

    def forward(self, frames: Bands, voice: Voice | None, valid: Valid | None) -> Bands:
        """Return the frames plus what each one gathers; `valid` is for attention to frames within reach."""
        normed = self.norm(frames)
        queries = self.split(self.queries(normed))
        keys, values = self.keys_and_values(normed if voice is None else self.norm(voice))
        if voice is not None:
            return self.gather(frames, queries, keys, values, None)
        count, parts = frames.shape[1], []
        size = count if count <= 2 * self.reach else max(self.reach, 1)
        for first in range(0, count, size):  # one turn, unless the recording is long
            last = min(first + size, count)
            begin, end = max(0, first - self.reach), last if self.causal else min(last + self.reach, count)
            bias = self._bias(range(first, last), range(begin, end), valid, frames.device)
            near = keys[:, :, begin:end], values[:, :, begin:end]
            parts.append(self.gather(frames[:, first:last], queries[:, :, first:last], *near, bias))
        return torch.cat(parts, dim=1)

    def keys_and_values(self, normed: Voice) -> tuple[Heads, Heads]:
        """Return the keys and values of normalized frames."""
        return self.split(self.keys(normed)), self.split(self.values(normed))

    def gather(self, frames: Bands, queries: Heads, keys: Heads, values: Heads, bias: Tensor | None) -> Bands:
        """Return the frames plus what their queries find; `bias` is added to the scores."""
        scores = _wide(queries @ keys.transpose(2, 3)) * queries.shape[3] ** -0.5
        weights = torch.softmax(scores if bias is None else scores + bias, dim=3).to(values.dtype)
        batch, count, bands, _ = frames.shape
        found = (weights @ values).reshape(batch, self.heads, count, bands, -1).permute(0, 2, 3, 1, 4).flatten(3)
        result: Tensor = frames + self.project(found).to(frames.dtype)
        return result

    def split(self, frames: Hidden) -> Heads:
        """Return for each head what the bands of a frame contribute, side by side."""
        return frames.reshape(*frames.shape[:3], self.heads, -1).permute(0, 3, 1, 2, 4).flatten(3)

    def _bias(
        self, queries: range, keys: range, valid: Valid | None, device: torch.device
    ) -> Float[Tensor, "#batch 1 queries keys"] | None:
        """Return −inf for pairs out of reach and for padded frames, 0 for all others; None if there is no such pair."""
        all_near = queries[-1] - keys[0] <= self.reach and keys[-1] - queries[0] <= self.reach
        if valid is None and all_near and not self.causal:
            return None
        query, key = (torch.arange(each.start, each.stop, device=device) for each in (queries, keys))
        distance = query[:, None] - key
        allowed = ((distance <= self.reach) & (distance >= (0 if self.causal else -self.reach)))[None, None]
        if valid is not None:
            allowed = allowed & (valid[:, None, None, keys.start : keys.stop, 0, 0] > 0)
        return torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -math.inf)


def _wide(values: Tensor) -> Tensor:
    """Return values in float32, unless they are wider already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
