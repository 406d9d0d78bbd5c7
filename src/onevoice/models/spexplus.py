"""SpEx+ (Ge et al., "SpEx+: A Complete Time Domain Speaker Extraction Network", arXiv 2005.04686)."""

import functools
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
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
    zero_padding,
)
from onevoice.models.layers import (
    NORM_EPS,
    Frames,
    Mask,
    Pointwise,
    SpeechDecoder,
    SpeechEncoder,
    TemporalBlock,
    ValidBatchNorm,
)

POOLING = 3
"""Frames per max pooling window of a residual block."""


@dataclass(frozen=True, config=STRICT)
class SpExPlusConfig(NetworkConfig):
    """The sizes of SpEx+. The defaults are those of the paper, at 16 kHz; letters in brackets are the paper's."""

    name: Literal["spexplus"] = "spexplus"
    """Selects SpEx+."""
    window_seconds: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.0025, 0.01, 0.02)
    """Short, middle and long window in seconds [L1, L2, L3]; the hop is half the short one."""
    filters: PositiveInt = 256
    """Filters of each scale of the speech encoder [N]."""
    channels: PositiveInt = 256
    """Channels between the temporal blocks [O]."""
    hidden: PositiveInt = 512
    """Channels inside a temporal block [P]."""
    kernel_size: PositiveInt = 3
    """Taps of the depthwise convolution [Q], odd."""
    blocks: PositiveInt = 8
    """Temporal blocks in a stack, with dilations 1, 2, 4, … [B]."""
    stacks: PositiveInt = 4
    """Stacks [R]; the speaker embedding enters at the first block of each."""
    speaker_dim: PositiveInt = 256
    """Size of the speaker embedding."""
    norm_eps: PositiveFloat = NORM_EPS
    """Added to the variance in the global norms; 1e-7 in the original system."""
    whole_frames: bool = False
    """Ignore what does not fill the last frame, and the last group of 3 speaker frames, as the original system does."""

    def __post_init__(self) -> None:
        """Check the kernel size and the windows."""
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
        return tuple(round(seconds * self.sample_rate) for seconds in self.window_seconds)

    @property
    def hop(self) -> int:
        """The hop in samples: half the short window."""
        return self.windows[0] // 2


class SpExPlus(Network):
    """Speech encoder shared by mixture and enrollment, speaker encoder, stacks of temporal blocks, three decoders."""

    config_class = SpExPlusConfig
    config: SpExPlusConfig

    def __init__(self, config: SpExPlusConfig) -> None:
        super().__init__(config)
        scales = len(config.windows)
        self.encoder = SpeechEncoder(config.filters, config.windows, config.hop, config.whole_frames)
        self.speaker_encoder = SpeakerEncoder(
            scales * config.filters, config.channels, config.hidden, config.speaker_dim, config.whole_frames
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
                norm_eps=config.norm_eps,
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

    def _embed(self, ref: Wave, ref_length: Lengths | None) -> Embedding:
        compiled = self.compiled and self.training
        if compiled:
            ref, ref_length = pad_to_whole_seconds(ref, ref_length, self.config.sample_rate)
        min_samples = self.encoder.samples(self.speaker_encoder.min_frames)  # 35 ms; pad shorter ones with zeros
        ref = F.pad(ref, (0, max(0, min_samples - ref.shape[1])))
        mask = self.encoder.mask(ref, None if ref_length is None else ref_length.clamp(min=min_samples))
        encode_speaker = compile_once(SpExPlus._encode_speaker) if compiled else SpExPlus._encode_speaker
        return encode_speaker(self, ref, mask)

    def _extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None) -> tuple[Wave, ...]:
        mask = self.encoder.mask(audio, audio_length)
        if self.compiled and self.training and mask is None:
            scales, frames = compile_once(SpExPlus._encode)(self, audio)
            for block, speaker in self._blocks(embedding):
                frames = self._run_block(block.forward_compiled, frames, speaker)
            estimates: tuple[Wave, ...] = compile_once(SpExPlus._decode)(self, scales, frames, None, audio.shape[1])
            return estimates
        scales, frames = self._encode(audio)
        channels_first = frames.transpose(1, 2)  # the fastest layout for the layers of the blocks
        mask_first = None if mask is None else mask.transpose(1, 2)
        for block, speaker in self._blocks(embedding):
            channels_first = self._run_block(block, channels_first, speaker, mask_first)
        estimates = self._decode(scales, channels_first.transpose(1, 2), mask, audio.shape[1])
        if mask is None or not self.config.whole_frames:
            return estimates
        hops = mask[:, :, 0].sum(1).to(torch.int64) - 1  # an item is zero beyond its last frame, without the bias
        reaches = [hops * self.config.hop + window for window in self.config.windows]
        return tuple(map(zero_padding, estimates, reaches))

    def _blocks(self, embedding: Embedding) -> Iterator[tuple[TemporalBlock, Embedding | None]]:
        """Yield every temporal block, with the embedding if the speaker enters there."""
        for index, block in enumerate(self.temporal_blocks):
            assert isinstance(block, TemporalBlock)
            yield block, None if index % self.config.blocks else embedding

    def _encode_speaker(self, ref: Wave, mask: Mask | None) -> Embedding:
        embedding: Tensor = self.speaker_encoder(torch.cat(self.encoder(ref), dim=2), mask)
        return embedding

    def _encode(self, audio: Wave) -> tuple[list[Frames], Float[Tensor, "batch frames bottleneck"]]:
        scales = self.encoder(audio)
        return scales, self.bottleneck(self.norm(torch.cat(scales, dim=2))).to(audio.dtype)

    def _decode(
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


class SpeakerEncoder(nn.Module):
    """Encoded enrollment frames in, one embedding per enrollment out (SpEx+, Sec. 2.3).

    Layers: cLN, 1x1 conv, three residual blocks, 1x1 conv, mean over the valid frames. The embedding does not depend on
    padding or on the rest of the batch: norms, pooling and mean use valid frames only, and the mask follows the
    length through the pooling exactly. With `whole_groups`, the mean leaves out the 1 or 2 last frames that do not
    fill a group of 3.
    """

    def __init__(
        self, in_channels: int, channels: int, hidden: int, speaker_dim: int, whole_groups: bool = False
    ) -> None:
        super().__init__()
        self.whole_groups = whole_groups
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
        """The smallest number of frames that leaves one frame after all pooling."""
        return int(POOLING ** (len(self.blocks) + self.whole_groups))

    def forward(self, coded: Frames, mask: Mask | None = None) -> Float[Tensor, "batch speaker_dim"]:
        """Return the embedding of each enrollment; each has at least `min_frames` valid frames."""
        hidden = self.expand(self.norm(coded))
        for block in self.blocks:
            hidden = block(hidden, mask)
            mask = None if mask is None else -max_pool(-mask)
        frames: Tensor = self.project(hidden).to(coded.dtype)
        if self.whole_groups:
            whole = frames.shape[1] // POOLING * POOLING
            frames = frames[:, :whole].reshape(len(frames), -1, POOLING, frames.shape[2]).mean(2)
            mask = None if mask is None else -max_pool(-mask)
        return frames.mean(1) if mask is None else (frames * mask).sum(1) / mask.sum(1)


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
        return max_pool(self.prelu2(hidden + self.skip(frames)))


def max_pool(frames: Float[Tensor, "batch frames any"]) -> Float[Tensor, "batch pooled any"]:
    """Return the maximum of each `POOLING` frames; leftover frames at the end are dropped.

    This uses `maximum` because the gradient of `amax` divides by the number of maxima, which can be 0 if a compiler
    compares rounded values with exact ones.
    """
    whole = frames.shape[1] // POOLING * POOLING
    return functools.reduce(torch.maximum, (frames[:, first:whole:POOLING] for first in range(POOLING)))
