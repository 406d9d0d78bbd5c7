"""The networks as modules for exporters: no complex numbers, no loops over lengths, no choices that depend on values.

Both take sounds at the level at which the network works: centered and with unit power if it has `normalize_level`.
Sounds are whole hops long (`multiple_of`), filled with zeros at the end, and the estimate is as long.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.models.bandsplit import BandSplitExtractor, compress
from onevoice.models.bandsplit_blocks import Attention, Bands, Spectrum
from onevoice.models.base import Embedding, Network, Wave
from onevoice.models.streaming import Fourier, VoiceTensors, run_blocks


def multiple_of(model: Network) -> int:
    """Return the number of samples that must divide the length of a sound."""
    return model.config.hop if isinstance(model, BandSplitExtractor) else 1


class EnrollGraph(nn.Module):
    """An enrollment in, its speaker embedding out."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model
        self.fourier = _fourier(model)

    def forward(self, ref: Wave) -> Embedding:
        """Return the speaker embedding."""
        if self.fourier is None or not isinstance(self.model, BandSplitExtractor):
            return self.model._embed(ref, None)
        frames = self.model.voice_split(_compress(self.model, _analyze(self.fourier, ref)))
        return self.model.embed_frames(frames, None)


class ExtractGraph(nn.Module):
    """A mixture and a speaker embedding in, the first estimate out.

    Attention compares all pairs of frames and masks those out of reach, so memory grows with the square of the length.
    """

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model
        self.fourier = _fourier(model)

    def forward(self, audio: Wave, embedding: Embedding) -> Wave:
        """Return the estimate."""
        model = self.model
        if self.fourier is None or not isinstance(model, BandSplitExtractor):
            return model._extract(audio, embedding, None)[0]
        bins = _analyze(self.fourier, audio)
        voice = VoiceTensors.of(model, embedding)
        frames = run_blocks(
            model,
            model.split(_compress(model, bins)),
            voice,
            lambda index, frames, film: model.time[index](frames, film, None),
            lambda index, frames: _attend(model.attention[str(index)], frames),
        )
        windows = self.fourier.synthesize(bins, model.mask(frames))
        before, after = windows.chunk(2, dim=2)
        return (after[:, :-1] + before[:, 1:]).flatten(1)


def _fourier(model: Network) -> "Fourier | None":
    return Fourier(model) if isinstance(model, BandSplitExtractor) else None


def _analyze(fourier: Fourier, sound: Wave) -> Spectrum:
    hop = fourier.hop
    blocks = F.pad(sound, (hop, hop)).reshape(len(sound), -1, hop)
    return fourier.analyze(blocks)


def _compress(model: BandSplitExtractor, bins: Spectrum) -> Spectrum:
    if not model.config.causal:
        return compress(bins, None)
    powers = F.pad(bins.square().sum(3).mean(2), (model.config.level_frames - 1, 0))
    return compress(bins, model.past_level(powers, 0))


def _attend(attention: nn.Module, frames: Bands) -> Bands:
    assert isinstance(attention, Attention)
    normed = attention.norm(frames)
    queries, (keys, values) = attention.split(attention.queries(normed)), attention.keys_and_values(normed)
    place = torch.arange(frames.shape[1], device=frames.device)
    ahead: Float[Tensor, "frames frames"] = place - place[:, None]
    is_far = (ahead < -attention.reach) | (ahead > (0 if attention.causal else attention.reach))
    bias = torch.zeros_like(ahead, dtype=keys.dtype).masked_fill(is_far, -math.inf)
    return attention.gather(frames, queries, keys, values, bias)
