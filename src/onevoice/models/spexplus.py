"""SpEx+ (Ge et al., "SpEx+: A Complete Time Domain Speaker Extraction Network", arXiv 2005.04686)."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.config import STRICT
from onevoice.models.base import Embedding, Lengths, Network, NetworkConfig, Wave
from onevoice.models.fused import Frames, compiled
from onevoice.models.layers import Mask, Pointwise, SpeechDecoder, SpeechEncoder, TemporalBlock
from onevoice.models.speaker import SpeakerEncoder
from onevoice.units import to_samples


@dataclass(frozen=True, config=STRICT)
class SpExPlusConfig(NetworkConfig):
    """The sizes of SpEx+. The defaults are the paper's, at 16 kHz; letters in brackets are the paper's."""

    name: Literal["spexplus"] = "spexplus"
    window_seconds: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.0025, 0.01, 0.02)
    """Short, middle and long window [L1, L2, L3]; the hop is half the short one."""
    filters: PositiveInt = 256
    """Filters of each scale of the speech encoder [N]."""
    channels: PositiveInt = 256
    """Channels between the temporal blocks [O]."""
    hidden: PositiveInt = 512
    """Channels inside a temporal block [P]."""
    kernel_size: PositiveInt = 3
    """Taps of the depthwise convolution [Q], odd."""
    blocks: PositiveInt = 8
    """Temporal blocks in a stack, of dilation 1, 2, 4, … [B]."""
    stacks: PositiveInt = 4
    """Stacks [R]; the speaker embedding enters at the first block of each."""
    speaker_dim: PositiveInt = 256
    """Size of the speaker embedding."""

    def __post_init__(self) -> None:
        """Check what concerns several values at once."""
        windows = self.windows
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        if windows[0] < 2 or windows[0] % 2 or sorted(windows) != list(windows):
            even = 2 * max(1, round(windows[0] / 2)) / self.sample_rate
            raise ValueError(
                f"window_seconds must rise and give an even short window, not {windows} samples at "
                f"{self.sample_rate} Hz; the nearest short window is {even:.6g} s"
            )

    @property
    def windows(self) -> tuple[int, ...]:
        """The three windows in samples."""
        return tuple(to_samples(seconds, self.sample_rate) for seconds in self.window_seconds)

    @property
    def hop(self) -> int:
        """The hop in samples: half the short window."""
        return self.windows[0] // 2


class SpExPlus(Network):
    """Multi-scale encoder shared by mixture and enrollment, speaker encoder, temporal stacks, three decoders."""

    config: SpExPlusConfig

    def __init__(self, config: SpExPlusConfig) -> None:
        super().__init__(config)
        scales = len(config.windows)
        self.encoder = SpeechEncoder(config.filters, config.windows, config.hop)
        self.speaker_encoder = SpeakerEncoder(
            scales * config.filters, config.channels, config.hidden, config.speaker_dim
        )
        self.classifier = nn.Linear(config.speaker_dim, config.num_classes)
        self.norm = nn.LayerNorm(scales * config.filters)
        self.bottleneck = Pointwise(scales * config.filters, config.channels)
        self.temporal_blocks = nn.ModuleList(
            TemporalBlock(
                config.channels,
                config.hidden,
                config.kernel_size,
                dilation=2**index,
                speaker_dim=0 if index else config.speaker_dim,
            )
            for _ in range(config.stacks)
            for index in range(config.blocks)
        )
        self.masks = nn.ModuleList(Pointwise(config.channels, config.filters) for _ in range(scales))
        self.decoders = nn.ModuleList(SpeechDecoder(config.filters, window, config.hop) for window in config.windows)

    def classify(self, embedding: Embedding) -> Float[Tensor, "batch num_classes"]:
        """Return the logits of the training speakers."""
        logits: Tensor = self.classifier(embedding)
        return logits

    @property
    def _fused(self) -> bool:
        return self.compiled and self.training

    def _embed(self, ref: Wave, ref_length: Lengths | None) -> Embedding:
        if self._fused:
            ref, ref_length = _to_whole_seconds(ref, ref_length, self.config.sample_rate)
        fewest = self.encoder.samples(self.speaker_encoder.min_frames)  # 35 ms: less is taken as padded by zeros
        ref = F.pad(ref, (0, max(0, fewest - ref.shape[1])))
        mask = self.encoder.mask(ref, None if ref_length is None else ref_length.clamp(min=fewest))
        speaker_part = compiled(SpExPlus._speaker_part) if self._fused else SpExPlus._speaker_part
        return speaker_part(self, ref, mask)

    def _extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None) -> tuple[Wave, ...]:
        mask = self.encoder.mask(audio, audio_length)
        fused = self._fused and mask is None
        first, last = SpExPlus._first_part, SpExPlus._last_part
        if fused:
            first, last = compiled(first), compiled(last)
        scales, frames = first(self, audio)
        if not fused:
            frames, turned = frames.transpose(1, 2), None if mask is None else mask.transpose(1, 2)
        for index, block in enumerate(self.temporal_blocks):
            speaker = None if index % self.config.blocks else embedding
            frames = block(frames, speaker, channels_last=True) if fused else block(frames, speaker, turned)
        return last(self, scales, frames if fused else frames.transpose(1, 2), mask, audio.shape[1])

    def _speaker_part(self, ref: Wave, mask: Mask | None) -> Embedding:
        embedding: Tensor = self.speaker_encoder(torch.cat(self.encoder(ref), dim=2), mask)
        return embedding

    def _first_part(self, audio: Wave) -> tuple[list[Frames], Float[Tensor, "batch frames bottleneck"]]:
        scales = self.encoder(audio)
        return scales, self.bottleneck(self.norm(torch.cat(scales, dim=2))).to(audio.dtype)

    def _last_part(
        self,
        scales: list[Frames],
        frames: Float[Tensor, "batch frames bottleneck"],
        mask: Mask | None,
        samples: int,
    ) -> tuple[Wave, ...]:
        estimates = []
        for coded, to_mask, decoder in zip(scales, self.masks, self.decoders, strict=True):
            masked = coded * F.relu(to_mask(frames))
            estimate = decoder(masked if mask is None else masked * mask, samples)
            estimates.append(estimate * decoder.level if self.config.normalize_level else estimate)
        return tuple(estimates)


def _to_whole_seconds(
    ref: Wave, ref_length: Lengths | None, sample_rate: int
) -> tuple[Float[Tensor, "batch padded"], Lengths]:
    """Pad enrollments to whole seconds, so that the compiler meets few lengths."""
    if ref_length is None:
        ref_length = torch.full((len(ref),), ref.shape[1], device=ref.device)
    return F.pad(ref, (0, -ref.shape[1] % sample_rate)), ref_length
