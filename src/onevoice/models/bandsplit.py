"""A band-split network with gated convolutions along time, full-band layers, and attention of bounded reach.

The spectrum of the mixture is cut into bands, each with its own linear map to a vector per frame (band split, Luo and
Yu, arXiv 2209.15174). A block then works along time inside each band, and across all bands inside each frame; in some
blocks the frames also attend to each other (full-band self-attention, Wang et al., TF-GridNet, arXiv 2211.12433) and
to the voice. The last layer gives a complex mask per bin.

- The enrollment passes through the first layers of the mixture's own path, so that frames of the same voice look alike
  from the start. Its voice has a fixed size: its mean frame, which scales and shifts the frames of every block (FiLM,
  arXiv 1709.07871), and frames picked from it evenly, to which the mixture attends as if they were its own.
- No statistic covers the whole recording but its level, and attention reaches `attention_seconds` to each side. So an
  output sample depends on `context_seconds` of input around it, and long recordings can be processed in windows.
- Frames are (batch, frames, bands, channels), and every layer is a matrix product over the last axis or over all bands
  of a frame, so nothing is copied between layouts. Under autocast the frames stay in the low precision.
"""

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
from jaxtyping import Complex, Float
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.config import STRICT
from onevoice.models.base import (
    Embedding,
    Lengths,
    Network,
    NetworkConfig,
    Wave,
    compile_once,
    pad_to_whole_seconds,
    valid_mask,
)
from onevoice.models.layers import RMSNorm
from onevoice.units import to_samples

Bands = Float[Tensor, "batch frames bands channels"]
Frames = Float[Tensor, "batch frames features"]
Voice = Float[Tensor, "batch voice_frames features"]
Valid = Float[Tensor, "batch frames 1 1"]
Spectrum = Float[Tensor, "batch frames covered 2"]
FLOOR = 1e-4
"""The smallest magnitude that compression distinguishes; a bin of unit-power sound has about 0.1 to 10."""


@dataclass(frozen=True, config=STRICT)
class BandSplitConfig(NetworkConfig):
    """The sizes of the band-split network."""

    name: Literal["bandsplit"] = "bandsplit"
    """Selects the network."""
    window_seconds: PositiveFloat = 0.032
    """Length of the STFT window in seconds; the hop is half of it."""
    bands: tuple[tuple[PositiveInt, PositiveInt], ...] = ((12, 4), (8, 8), (4, 36))
    """Bands from low to high frequencies, as pairs of a count and the bins of each. Higher bins are left out."""
    channels: PositiveInt = 48
    """Channels of each band."""
    hidden: PositiveInt = 96
    """Channels inside the gated convolutions."""
    shared: PositiveInt = 16
    """Channels that each band contributes to the full-band layers and to attention."""
    blocks: PositiveInt = 6
    """Number of blocks."""
    dilations: tuple[PositiveInt, ...] = (1, 2, 4)
    """Frames between the taps of the convolutions, repeated over the blocks."""
    taps: PositiveInt = 3
    """Taps of the convolutions along time, odd."""
    attention_every: PositiveInt = 2
    """Every so many blocks, the frames attend to each other and to the voice."""
    attention_seconds: PositiveFloat = 2.5
    """How far attention reaches to each side, in seconds."""
    heads: PositiveInt = 4
    """Attention heads; must divide the number of bands times `shared`."""
    key_dim: PositiveInt = 32
    """Size of the queries and keys of each head."""
    voice_frames: PositiveInt = 96
    """Number of frames of an enrollment that the mixture attends to."""

    def __post_init__(self) -> None:
        """Check the values that depend on each other."""
        if self.taps % 2 == 0:
            raise ValueError(f"taps must be odd, not {self.taps}")
        if self.hop * 2 != self.window:
            raise ValueError(f"window_seconds must give an even number of samples, not {self.window}")
        if self.bins > self.hop + 1:
            raise ValueError(f"bands cover {self.bins} bins, but a window of {self.window} samples has {self.hop + 1}")
        if self.attention_every > self.blocks:
            raise ValueError(f"attention_every must be at most blocks = {self.blocks}, not {self.attention_every}")
        if self.features % self.heads:
            raise ValueError(f"heads must divide bands × shared = {self.features}, not {self.heads}")

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
    def context_seconds(self) -> float:
        """How far from an output sample, to each side, the input can influence it, in seconds."""
        frames = sum(
            self.dilations[block % len(self.dilations)] * (self.taps // 2) + self.attends(block) * self.attention_frames
            for block in range(self.blocks)
        )
        return (frames * self.hop + self.window) / self.sample_rate


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
    """Gated dilated convolution along time inside each band: norm, FiLM, one matrix for all taps, gate, matrix."""

    def __init__(self, channels: int, hidden: int, taps: int, dilation: int) -> None:
        super().__init__()
        self.taps, self.dilation = taps, dilation
        self.norm = RMSNorm(channels)
        self.expand = nn.Linear(taps * channels, 2 * hidden)
        self.project = _scaled(nn.Linear(hidden, channels))

    def forward(self, frames: Bands, film: Float[Tensor, "batch 1 bands twice"] | None, valid: Valid | None) -> Bands:
        """Return the frames plus the result; `film` holds the scale of each channel, then its shift."""
        inputs = self.norm(frames)
        if film is not None:
            scale, shift = film.chunk(2, dim=3)
            inputs = inputs * (1 + scale) + shift
        inputs = inputs.to(frames.dtype)
        if valid is not None:
            inputs = inputs * valid.to(inputs.dtype)
        reach, count = self.dilation * (self.taps // 2), frames.shape[1]
        padded = F.pad(inputs, (0, 0, 0, 0, reach, reach))
        shifted = [padded[:, tap * self.dilation : tap * self.dilation + count] for tap in range(self.taps)]
        value, gate = self.expand(torch.cat(shifted, dim=3)).chunk(2, dim=3)
        result: Tensor = frames + self.project(value * F.relu(gate)).to(frames.dtype)
        return result


class FullBandBlock(nn.Module):
    """Mixes the bands of each frame by one matrix; with attention, also the frames and the voice."""

    def __init__(self, config: BandSplitConfig, attention: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(config.channels)
        self.gather = nn.Linear(config.channels, config.shared)
        self.attention = Attention(config) if attention else None
        self.mix = nn.Linear(config.features, config.features)
        self.spread = _scaled(nn.Linear(config.shared, config.channels))

    def forward(self, frames: Bands, voice: Voice | None, valid: Valid | None) -> Bands:
        """Return the frames plus the result."""
        hidden = self.join(frames)
        if self.attention is not None and voice is not None:
            hidden = hidden + self.attention(hidden, voice, valid)
        mixed = F.relu(self.mix(hidden)).reshape(*frames.shape[:3], -1)
        result: Tensor = frames + self.spread(mixed).to(frames.dtype)
        return result

    def join(self, frames: Bands) -> Frames:
        """Return what the bands of each frame contribute, side by side."""
        joined: Tensor = self.gather(self.norm(frames)).flatten(2)
        return joined


class Attention(nn.Module):
    """Attention of each frame to the frames within reach and to the frames of the voice, in one softmax."""

    def __init__(self, config: BandSplitConfig) -> None:
        super().__init__()
        self.heads, self.reach = config.heads, config.attention_frames
        keys = config.heads * config.key_dim
        self.queries_and_keys = nn.Linear(config.features, 2 * keys)
        self.project = _scaled(nn.Linear(config.features, config.features))

    def forward(self, frames: Frames, voice: Voice, valid: Valid | None) -> Frames:
        """Return what each frame gathers."""
        queries, keys = (self._split(part) for part in self.queries_and_keys(frames).chunk(2, dim=2))
        voice_keys = self._split(self.queries_and_keys(voice).chunk(2, dim=2)[1])
        values, voice_values = self._split(frames), self._split(voice)
        count, size = frames.shape[1], max(2 * self.reach, 1)
        gathered = []
        for first in range(0, count, size):  # one turn, unless the recording is long
            last = min(first + size, count)
            begin, end = max(0, first - self.reach), min(last + self.reach, count)
            bias = self._bias(first, last, begin, end, voice.shape[1], valid, queries)
            near = torch.cat([voice_keys, keys[:, :, begin:end]], dim=2)
            scores = _wide(queries[:, :, first:last] @ near.transpose(2, 3)) * queries.shape[3] ** -0.5
            weights = torch.softmax(scores if bias is None else scores + bias, dim=3).to(values.dtype)
            gathered.append(weights @ torch.cat([voice_values, values[:, :, begin:end]], dim=2))
        result: Tensor = self.project(torch.cat(gathered, dim=2).transpose(1, 2).flatten(2))
        return result

    def _split(self, frames: Frames) -> Float[Tensor, "batch heads frames size"]:
        return frames.reshape(*frames.shape[:2], self.heads, -1).transpose(1, 2)

    def _bias(
        self, first: int, last: int, begin: int, end: int, voice: int, valid: Valid | None, like: Tensor
    ) -> Float[Tensor, "#batch 1 queries keys"] | None:
        """Return −inf for pairs out of reach and for padded frames, 0 for all others; None if there is no such pair."""
        if valid is None and last - begin - 1 <= self.reach and end - first - 1 <= self.reach:
            return None
        query, key = (torch.arange(*bounds, device=like.device) for bounds in ((first, last), (begin, end)))
        allowed = ((query[:, None] - key).abs() <= self.reach)[None, None]
        if valid is not None:
            allowed = allowed & (valid[:, None, None, begin:end, 0, 0] > 0)
        bias = torch.zeros(allowed.shape, device=like.device).masked_fill(~allowed, -math.inf)
        return F.pad(bias, (voice, 0))


class BandSplitExtractor(Network):
    """Band split, blocks along time and across bands, and a complex mask; the voice comes from the first blocks."""

    config: BandSplitConfig
    config_class = BandSplitConfig

    def __init__(self, config: BandSplitConfig) -> None:
        super().__init__(config)
        channels, features = config.channels, config.features
        self.split = BandSplit(config.bands, channels)
        self.time_blocks = nn.ModuleList(
            TimeBlock(channels, config.hidden, config.taps, config.dilations[index % len(config.dilations)])
            for index in range(config.blocks)
        )
        self.full_blocks = nn.ModuleList(FullBandBlock(config, config.attends(index)) for index in range(config.blocks))
        self.film = nn.ModuleList(nn.Linear(channels, 2 * channels) for _ in range(config.blocks))
        self.mask = BandMask(config.bands, channels)
        self.mean_norm = RMSNorm(channels)
        attending = [index for index in range(config.blocks) if config.attends(index)]
        self.voice_maps = nn.ModuleList(nn.Linear(features, features) for _ in attending[1:])
        """What turns the frames of the voice, as the first attention has them, into those of each later one."""
        self.classifier = nn.Linear(config.band_count * channels, config.num_classes)

    def classify(self, embedding: Embedding) -> Float[Tensor, "batch num_classes"]:
        """Return the logits of the training speakers, from the mean frame of the enrollment."""
        logits: Tensor = self.classifier(embedding[:, : self.classifier.in_features])
        return logits

    def _embed(self, ref: Wave, ref_length: Lengths | None) -> Embedding:
        if self.compiled and self.training:
            ref, ref_length = pad_to_whole_seconds(ref, ref_length, self.config.sample_rate)
        valid = self._valid(ref, ref_length)
        frames = self._step(BandSplit)(self.split, self._compress(self._spectrum(ref)))
        first = self.config.attention_every - 1  # the first block that attends
        for time_block, full_block in zip(self.time_blocks[:first], self.full_blocks[:first], strict=True):
            frames = self._run_block(self._step(TimeBlock), time_block, frames, None, valid)
            frames = self._run_block(self._step(FullBandBlock), full_block, frames, None, valid)
        frames = self._run_block(self._step(TimeBlock), self.time_blocks[first], frames, None, valid)
        mean = self.mean_norm(frames.mean(1) if valid is None else (frames * valid).sum(1) / valid.sum(1))
        joined = cast(FullBandBlock, self.full_blocks[first]).join(frames)
        # Pick frames at the middle of equal parts of each enrollment.
        count = ref.new_full((len(ref),), joined.shape[1]) if valid is None else valid.sum((1, 2, 3))
        middle = (torch.arange(self.config.voice_frames, device=ref.device) + 0.5) / self.config.voice_frames
        picks = (middle * count[:, None]).long()[:, :, None].expand(-1, -1, joined.shape[2])
        return torch.cat([mean.flatten(1), joined.gather(1, picks).flatten(1)], dim=1).to(ref.dtype)

    def _extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None) -> tuple[Wave, ...]:
        valid = self._valid(audio, audio_length)
        mean = embedding[:, : self.classifier.in_features].reshape(len(audio), -1, self.config.channels)
        voice = embedding[:, self.classifier.in_features :].reshape(len(audio), -1, self.config.features)
        voices = iter([voice, *(to_later(voice) for to_later in self.voice_maps)])
        spectrum = self._spectrum(audio)
        frames = self._step(BandSplit)(self.split, self._compress(spectrum))
        time_step, full_step = self._step(TimeBlock), self._step(FullBandBlock)
        for film, time_block, full_block in zip(self.film, self.time_blocks, self.full_blocks, strict=True):
            frames = self._run_block(time_step, time_block, frames, film(mean)[:, None], valid)
            own = None if full_block.attention is None else next(voices)
            frames = self._run_block(full_step, full_block, frames, own, valid)
        mask = torch.view_as_complex(self._step(BandMask)(self.mask, frames))
        masked = F.pad(spectrum[:, :, : self.config.bins] * mask, (0, spectrum.shape[2] - self.config.bins))
        return (self._waveform(masked, audio.shape[1]),)

    def _step(self, kind: type[nn.Module]) -> Callable[..., Tensor]:
        """Return what runs a module of a kind: its layers, or in compiled training one compiled function for all."""
        return compile_once(kind.forward) if self.compiled and self.training else kind.__call__

    def _spectrum(self, audio: Wave) -> Complex[Tensor, "batch frames bins"]:
        """Return the STFT. Frame t covers samples (t − 1)·hop to (t + 1)·hop, so each sample is in two."""
        hop = self.config.hop
        padded = F.pad(audio, (hop, self._frame_count(audio.shape[1]) * hop - audio.shape[1]))
        spectrum: Tensor = torch.fft.rfft(padded.unfold(1, 2 * hop, hop) * self._window(audio))
        return spectrum / math.sqrt(hop)

    def _waveform(self, spectrum: Complex[Tensor, "batch frames bins"], samples: int) -> Wave:
        """Return the inverse of `_spectrum`: the two halves of overlapping windows add up to one."""
        hop = self.config.hop
        windows: Tensor = torch.fft.irfft(spectrum * math.sqrt(hop), 2 * hop)
        windows = windows * self._window(windows)
        overlapped: Tensor = windows[:, :-1, hop:] + windows[:, 1:, :hop]
        return overlapped.flatten(1)[:, :samples]

    def _window(self, like: Tensor) -> Float[Tensor, " window"]:
        window: Tensor = torch.hann_window(self.config.window, dtype=like.dtype, device=like.device).sqrt()
        return window

    def _compress(self, spectrum: Complex[Tensor, "batch frames bins"]) -> Spectrum:
        """Return real and imaginary part of the bins in the bands, with the square root of their magnitude."""
        bins = torch.view_as_real(spectrum[:, :, : self.config.bins])
        compressed: Tensor = bins * (bins.square().sum(3, keepdim=True) + FLOOR**2) ** -0.25
        return compressed

    def _frame_count(self, samples: int) -> int:
        return -(-samples // self.config.hop) + 1

    def _valid(self, audio: Wave, length: Lengths | None) -> Valid | None:
        """Return 1 for the frames of each item's own samples and 0 for the rest; None if all rows are full."""
        count = None if length is None else torch.div(length - 1, self.config.hop, rounding_mode="floor") + 2
        valid = valid_mask(self._frame_count(audio.shape[1]), count, audio)
        return None if valid is None else valid[:, :, None, None]


def _wide(values: Tensor) -> Tensor:
    """Return values in float32, unless they are wider already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _scaled(layer: nn.Linear) -> nn.Linear:
    """Return a layer with smaller initial weights. Residual branches end in one, so that blocks begin near identity."""
    with torch.no_grad():
        layer.weight.mul_(0.3)
    return layer
