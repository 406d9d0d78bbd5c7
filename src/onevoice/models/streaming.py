"""Runs a causal band-split network step by step, with its state as a value.

A step takes one or more hops of samples and the state, and returns as many samples and the next state. It changes
nothing in place, so a state can be kept, copied and used again. The output is one hop late: the first hop that a stream
returns is from before its start, and one hop of zeros at the end brings out the last samples. Without these two, the
hops of all steps add up to the estimate of the network for the whole, however the samples were divided.

- The state has fixed shapes. It holds what the next frame needs: the last hop of samples, the second half of the last
  window, the powers of the frames that set the level, the inputs of each convolution, and keys and values of each
  attention. Each is a plain copy of past values and no running sum, so errors do not add up over time.
- The spectrum is a matrix product here, with the matrices of the Fourier transform, because exported graphs cannot
  hold complex numbers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from onevoice.errors import ConfigError
from onevoice.models.bandsplit import BandSplitExtractor, compress
from onevoice.models.bandsplit_blocks import Attention, Bands, Film, Heads, Spectrum, TimeBlock
from onevoice.models.base import Embedding, Network, Wave

State = dict[str, Tensor]
"""The state of a stream by names; `Step.start` makes the first one."""


class VoiceTensors(NamedTuple):
    """What a step needs of a voice."""

    films: Float[Tensor, "batch blocks bands twice"]
    """Scales and shifts for each block."""
    keys: Heads
    """For the attention to the voice."""
    values: Heads

    @classmethod
    def of(cls, model: BandSplitExtractor, embedding: Embedding) -> "VoiceTensors":
        """Return them for a speaker embedding."""
        films, frames = model.split_embedding(embedding)
        attention = model.voice_attention
        return cls(torch.cat(films, dim=1), *attention.keys_and_values(attention.norm(frames)))


def require_causal(model: Network) -> BandSplitExtractor:
    """Return the network if it can run in steps. Raises `ConfigError`."""
    if not isinstance(model, BandSplitExtractor) or not model.config.causal:
        raise ConfigError(
            f"these weights need the whole recording ({model.config.name} without model.causal); a stream needs a "
            "causal network, such as one trained with configs/causal_pool.json"
        )
    return model


def run_blocks(
    model: BandSplitExtractor,
    frames: Bands,
    voice: VoiceTensors,
    convolve: Callable[[int, Bands, Film], Bands],
    attend: Callable[[int, Bands], Bands],
) -> Bands:
    """Run all blocks, with the caller's way to convolve along time and to attend to other frames, by block number."""
    for index, film in enumerate(voice.films.unbind(1)):
        frames = model.full[index](convolve(index, frames, film[:, None]))
        if model.config.attends(index):
            frames = attend(index, frames)
        frames = model.feed[index](frames)
        if index == 1:
            attention = model.voice_attention
            queries = attention.split(attention.queries(attention.norm(frames)))
            frames = attention.gather(frames, queries, voice.keys, voice.values, None)
    return frames


class Fourier(nn.Module):
    """The spectrum of a band-split network as matrix products; equals its `_spectrum` and `_waveform`.

    Both matrices have the square root of a Hann window in them.
    """

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, model: BandSplitExtractor) -> None:
        super().__init__()
        window, bins, self.hop = model.config.window, model.config.bins, model.config.hop
        like, scale = next(model.parameters()), math.sqrt(self.hop)
        shape = torch.hann_window(window, dtype=torch.float64).sqrt()
        analysis = torch.fft.rfft(torch.diag(shape))[:, :bins] / scale
        parts = torch.view_as_complex(torch.eye(2 * bins, dtype=torch.float64).reshape(-1, bins, 2))
        synthesis = torch.fft.irfft(F.pad(parts, (0, self.hop + 1 - bins)), window) * shape * scale
        self.register_buffer("analysis", torch.view_as_real(analysis).flatten(1).to(like), persistent=False)
        self.register_buffer("synthesis", synthesis.to(like), persistent=False)

    def analyze(self, hops: Float[Tensor, "batch _hops hop"]) -> Spectrum:
        """Return the bins of the windows over two neighboring hops each."""
        spectrum = torch.cat([hops[:, :-1], hops[:, 1:]], dim=2) @ self.analysis
        return spectrum.reshape(*spectrum.shape[:2], -1, 2)

    def synthesize(self, bins: Spectrum, mask: Spectrum) -> Float[Tensor, "batch frames window"]:
        """Return the windows of masked bins, which overlap by a hop."""
        (real, imaginary), (mask_real, mask_imaginary) = bins.unbind(3), mask.unbind(3)
        masked = [real * mask_real - imaginary * mask_imaginary, real * mask_imaginary + imaginary * mask_real]
        return torch.stack(masked, dim=3).flatten(2) @ self.synthesis


class Step(nn.Module):
    """One step of a causal band-split network."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = require_causal(model)
        self.fourier = Fourier(self.model)

    @property
    def hop(self) -> int:
        """Samples come and go in multiples of it."""
        return self.model.config.hop

    def prepare(self, embedding: Embedding) -> VoiceTensors:
        """Return what the steps need of a speaker embedding."""
        return VoiceTensors.of(self.model, embedding)

    def start(self, batch: int = 1) -> State:
        """Return the state at the start of a stream: silence."""
        config, like = self.model.config, self.fourier.analysis
        shapes: dict[str, tuple[int, ...]]
        shapes = {"input": (self.hop,), "overlap": (self.hop,), "powers": (config.level_frames - 1,)}
        for index, block in enumerate(self.model.time):
            assert isinstance(block, TimeBlock)
            shapes[f"convolution_{index}"] = block.reach, config.band_count, config.hidden
        for name in self.model.attention:
            head = config.heads, config.attention_frames + 1
            shapes[f"keys_{name}"] = *head, config.band_count * config.key_dim
            shapes[f"values_{name}"] = *head, config.band_count * config.channels // config.heads
        state = {name: like.new_zeros(batch, *shape) for name, shape in shapes.items()}
        return {"frames": torch.zeros(1, dtype=torch.int64, device=like.device), **state}

    def forward(self, samples: Wave, voice: VoiceTensors, state: State) -> tuple[Wave, State]:
        """Return the next samples, one hop behind `samples`, and the next state."""
        model, after = self.model, dict(state)
        hops = torch.cat([state["input"], samples], dim=1).reshape(len(samples), -1, self.hop)
        after["input"] = hops[:, -1]
        bins = self.fourier.analyze(hops)
        frames = run_blocks(
            model,
            model.split(self._compress(bins, state, after)),
            voice,
            lambda index, frames, film: self._convolve(index, frames, film, state, after),
            lambda index, frames: self._attend(str(index), frames, state, after),
        )
        first, second = self.fourier.synthesize(bins, model.mask(frames)).chunk(2, dim=2)
        overlap = torch.cat([state["overlap"][:, None], second], dim=1)
        after["overlap"] = overlap[:, -1]
        after["frames"] = state["frames"] + bins.shape[1]
        return (overlap[:, :-1] + first).flatten(1), after

    def _compress(self, bins: Spectrum, state: State, after: State) -> Spectrum:
        powers = torch.cat([state["powers"], bins.square().sum(3).mean(2)], dim=1)
        after["powers"] = powers[:, bins.shape[1] :]
        return compress(bins, self.model.past_level(powers, state["frames"]))

    def _convolve(self, index: int, frames: Bands, film: Film, state: State, after: State) -> Bands:
        block, name = self.model.time[index], f"convolution_{index}"
        assert isinstance(block, TimeBlock)
        inputs = torch.cat([state[name], block.inputs(frames, film, None)], dim=1)
        after[name] = inputs[:, frames.shape[1] :]
        return block.convolve(frames, inputs)

    def _attend(self, name: str, frames: Bands, state: State, after: State) -> Bands:
        """Attend to the frames within reach. Frame t of the stream is in slot t mod (reach + 1) of the state."""
        attention = self.model.attention[name]
        assert isinstance(attention, Attention)
        normed, count, before = attention.norm(frames), frames.shape[1], state["frames"]
        queries, new = attention.split(attention.queries(normed)), attention.keys_and_values(normed)
        old = state[f"keys_{name}"], state[f"values_{name}"]
        slots = attention.reach + 1
        slot, ahead = (torch.arange(size, device=frames.device) for size in (slots, count))
        kept = min(count, slots)
        place = ((before + ahead) % slots)[-kept:]
        updated = [held.index_copy(2, place, added[:, :, -kept:]) for held, added in zip(old, new, strict=True)]
        after[f"keys_{name}"], after[f"values_{name}"] = updated
        if count == 1:  # the new frame takes the slot of the only one that is out of reach, so all others are within
            keys, values = updated
            allowed = (slot <= before)[None]
        else:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
            age = ahead[:, None] + torch.cat([(before - 1 - slot) % slots + 1, -ahead])
            has_come = torch.cat([slot < before, torch.ones_like(ahead, dtype=torch.bool)])
            allowed = (age >= 0) & (age <= attention.reach) & has_come
        bias = torch.zeros(allowed.shape, dtype=keys.dtype, device=keys.device).masked_fill(~allowed, -math.inf)
        return attention.gather(frames, queries, keys, values, bias)
