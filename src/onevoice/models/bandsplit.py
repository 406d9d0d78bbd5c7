"""A band-split network: gated convolutions along time, full-band layers, and attention of bounded reach.

The spectrum of the mixture is cut into bands, each with its own linear map to a vector per frame (band split, Luo and
Yu, arXiv 2209.15174). A block then works along time inside each band, across all bands inside each frame, in some
blocks between frames (full-band self-attention, Wang et al., TF-GridNet, arXiv 2211.12433), and on each vector by
itself. After the second block the frames attend to the voice. The last layer gives a complex mask per bin.

- The enrollment has its own band split and one block. Its voice has a fixed size: its mean frame, which scales and
  shifts the frames of every block (FiLM, arXiv 1709.07871), and frames picked from it evenly, for the attention.
- No statistic covers the whole recording but its level, and attention reaches `attention_seconds`. So an output sample
  depends on `context_seconds` of input around it, and long recordings can be processed in windows.
- With `causal`, convolutions and attention reach only into the past, and frames are scaled by the level of the last
  `level_seconds` instead of the level of the whole. Output then waits for one window: `latency_seconds`.
- Frames are (batch, frames, bands, channels), and every layer is a matrix product over the last axis or over all bands
  of a frame, so nothing is copied between layouts. Under autocast the frames stay in the low precision.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.models.bandsplit_blocks import (
    Attention,
    BandMask,
    Bands,
    BandSplit,
    BandSplitConfig,
    FeedForward,
    Film,
    FullBand,
    Spectrum,
    TimeBlock,
    Valid,
    Voice,
)
from onevoice.models.base import (
    Embedding,
    Lengths,
    Network,
    Wave,
    compile_once,
    pad_to_whole_seconds,
    valid_mask,
)
from onevoice.models.layers import RMSNorm

FLOOR = 1e-4
"""The smallest magnitude that compression distinguishes; a bin of unit-power sound has about 0.1 to 10."""
LEVEL_FLOOR = 1e-8
"""With `causal`: the least power of a bin that the level of the past can be; sound of full scale has about 1."""


class BandSplitExtractor(Network):
    """Band split, blocks that work along each axis in turn, and a complex mask."""

    config: BandSplitConfig
    config_class = BandSplitConfig

    def __init__(self, config: BandSplitConfig) -> None:
        super().__init__(config)
        channels, dilations = config.channels, config.dilations
        self.split, self.voice_split = (BandSplit(config.bands, channels) for _ in range(2))
        self.voice_time, self.voice_full = TimeBlock(config, dilations[0]), FullBand(config)
        self.voice_feed, self.voice_norm = FeedForward(config), RMSNorm(channels)
        numbers = range(config.blocks)
        self.time = nn.ModuleList(TimeBlock(config, dilations[index % len(dilations)]) for index in numbers)
        self.full = nn.ModuleList(FullBand(config) for _ in numbers)
        self.feed = nn.ModuleList(FeedForward(config) for _ in numbers)
        self.attention = nn.ModuleDict({str(index): Attention(config) for index in numbers if config.attends(index)})
        self.voice_attention = Attention(config)
        self.film = nn.ModuleList(nn.Linear(channels, 2 * channels) for _ in numbers)
        self.mask = BandMask(config.bands, channels)
        self.classifier = nn.Linear(config.band_count * channels, config.num_classes)

    def classify(self, embedding: Embedding) -> Float[Tensor, "batch num_classes"]:
        """Return the logits of the training speakers, from the mean frame of the enrollment."""
        logits: Tensor = self.classifier(embedding[:, : self.classifier.in_features])
        return logits

    def split_embedding(self, embedding: Embedding) -> tuple[list[Film], Voice]:
        """Return the scales and shifts for each block, and the frames of the voice."""
        frames = embedding.reshape(len(embedding), -1, self.config.band_count, self.config.channels)
        return [film(frames[:, :1]) for film in self.film], frames[:, 1:]

    def _embed(self, ref: Wave, ref_length: Lengths | None) -> Embedding:
        if self.compiled and self.training:
            ref, ref_length = pad_to_whole_seconds(ref, ref_length, self.config.sample_rate)
        valid = self._valid(ref, ref_length)
        frames = self._step(BandSplit)(self.voice_split, self._compress(self._spectrum(ref)))
        return self.embed_frames(frames, valid).to(ref.dtype)

    def embed_frames(self, frames: Bands, valid: Valid | None) -> Embedding:
        """Return the speaker embedding from the frames of the voice's own band split."""
        frames = self._run_block(self._step(TimeBlock), self.voice_time, frames, None, valid)
        frames = self._run_block(self._step(FullBand), self.voice_full, frames)
        frames = self._run_block(self._step(FeedForward), self.voice_feed, frames)
        normed = self.voice_norm(frames)
        mean = normed.mean(1) if valid is None else (normed * valid).sum(1) / valid.sum(1)
        # Pick frames at the middle of equal parts of each enrollment.
        count = normed.new_full((len(normed),), frames.shape[1]) if valid is None else valid.sum((1, 2, 3))
        middle = (torch.arange(self.config.voice_frames, device=frames.device) + 0.5) / self.config.voice_frames
        flat = frames.flatten(2)
        picks = (middle * count[:, None]).long()[:, :, None].expand(-1, -1, flat.shape[2])
        return torch.cat([mean.flatten(1), flat.gather(1, picks).flatten(1)], dim=1)

    def _extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None) -> tuple[Wave, ...]:
        valid = self._valid(audio, audio_length)
        films, voice = self.split_embedding(embedding)
        spectrum = self._spectrum(audio)
        frames = self._step(BandSplit)(self.split, self._compress(spectrum))
        for index, film in enumerate(films):
            frames = self._run_block(self._step(TimeBlock), self.time[index], frames, film, valid)
            frames = self._run_block(self._step(FullBand), self.full[index], frames)
            if self.config.attends(index):
                frames = self._run_block(self._step(Attention), self.attention[str(index)], frames, None, valid)
            frames = self._run_block(self._step(FeedForward), self.feed[index], frames)
            if index == 1:
                own = voice.to(frames.dtype)
                frames = self._run_block(self._step(Attention), self.voice_attention, frames, own, None)
        masked = self.apply_mask(spectrum, self._step(BandMask)(self.mask, frames))
        return (self._waveform(masked, audio.shape[1]),)

    def apply_mask(self, spectrum: Complex[Tensor, "batch frames bins"], mask: Spectrum) -> Tensor:
        """Return the masked spectrum; bins above the bands become zero."""
        bins = self.config.bins
        return F.pad(spectrum[:, :, :bins] * torch.view_as_complex(mask), (0, spectrum.shape[2] - bins))

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
        """Return real and imaginary part of the bins in the bands, with the square root of their magnitude.

        With `causal`, first scale each frame to unit power by the level of its past.
        """
        bins = torch.view_as_real(spectrum[:, :, : self.config.bins])
        if not self.config.causal:
            return compress(bins, None)
        powers = bins.square().sum(3).mean(2)
        return compress(bins, self.past_level(F.pad(powers, (self.config.level_frames - 1, 0)), 0))

    def past_level(
        self, powers: Float[Tensor, "batch _all_frames"], before: int | Int[Tensor, " 1"]
    ) -> Float[Tensor, "batch frames 1 1"]:
        """Return the level of the past of each frame, from the powers of `level_frames` − 1 more frames.

        `before` counts the frames heard before the first one; powers older than that are zero.
        """
        reach = self.config.level_frames
        total = F.avg_pool1d(powers[:, None], reach, 1).transpose(1, 2) * reach
        seen = (before + torch.arange(1, total.shape[1] + 1, device=powers.device)).clamp(max=reach)
        return (total / seen[:, None] + LEVEL_FLOOR)[..., None]

    def _frame_count(self, samples: int) -> int:
        return -(-samples // self.config.hop) + 1

    def _valid(self, audio: Wave, length: Lengths | None) -> Valid | None:
        """Return 1 for the frames of each item's own samples and 0 for the rest; None if all rows are full."""
        count = None if length is None else torch.div(length - 1, self.config.hop, rounding_mode="floor") + 2
        valid = valid_mask(self._frame_count(audio.shape[1]), count, audio)
        return None if valid is None else valid[:, :, None, None]


def compress(bins: Spectrum, power: Float[Tensor, "batch frames 1 1"] | None) -> Spectrum:
    """Return bins with the square root of their magnitude, after scaling each frame to unit power if one is given."""
    energy = bins.square().sum(3, keepdim=True)
    if power is not None:
        bins, energy = bins * power**-0.5, energy / power
    compressed: Tensor = bins * (energy + FLOOR**2) ** -0.25
    return compressed
