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


def require_causal(model: Network) -> BandSplitExtractor:
    """Return the network if it can run in steps. Raises `ConfigError`."""
    if not isinstance(model, BandSplitExtractor) or not model.config.causal:
        raise ConfigError(
            f"these weights need the whole recording ({model.config.name} without model.causal); a stream needs a "
            "causal network, such as one trained with configs/causal_pool.json"
        )
    return model


class Step(nn.Module):
    """One step of a causal band-split network."""

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = require_causal(model)
        like = next(model.parameters())
        for name, matrix in fourier_matrices(self.model.config.window, self.model.config.bins).items():
            self.register_buffer(name, matrix.to(like), persistent=False)

    @property
    def hop(self) -> int:
        """Samples come and go in multiples of it."""
        return self.model.config.hop

    def prepare(self, embedding: Embedding) -> VoiceTensors:
        """Return what the steps need of a speaker embedding."""
        films, frames = self.model.split_embedding(embedding)
        attention = self.model.voice_attention
        return VoiceTensors(torch.cat(films, dim=1), *attention.keys_and_values(attention.norm(frames)))

    def start(self, batch: int = 1) -> State:
        """Return the state at the start of a stream: silence."""
        config, like = self.model.config, self.analysis
        shapes: dict[str, tuple[int, ...]]
        shapes = {"input": (self.hop,), "overlap": (self.hop,), "powers": (config.level_frames - 1,)}
        for index, block in enumerate(self.model.time):
            assert isinstance(block, TimeBlock)
            shapes[f"convolution_{index}"] = block.reach, config.band_count, config.hidden
        for name in self.model.attention:
            head = config.heads, config.attention_frames
            shapes[f"keys_{name}"] = *head, config.band_count * config.key_dim
            shapes[f"values_{name}"] = *head, config.band_count * config.channels // config.heads
        state = {name: like.new_zeros(batch, *shape) for name, shape in shapes.items()}
        return {"frames": torch.zeros(1, dtype=torch.int64, device=like.device), **state}

    def forward(self, samples: Wave, voice: VoiceTensors, state: State) -> tuple[Wave, State]:
        """Return the next samples, one hop behind `samples`, and the next state."""
        model, after = self.model, dict(state)
        blocks = torch.cat([state["input"], samples], dim=1).reshape(len(samples), -1, self.hop)
        after["input"] = blocks[:, -1]
        spectrum = torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2) @ self.analysis
        bins = spectrum.reshape(*spectrum.shape[:2], -1, 2)
        frames = model.split(self._compress(bins, state, after))
        for index, film in enumerate(voice.films.unbind(1)):
            frames = self._convolve(index, frames, film[:, None], state, after)
            frames = model.full[index](frames)
            if model.config.attends(index):
                frames = self._attend(str(index), frames, state, after)
            frames = model.feed[index](frames)
            if index == 1:
                attention = model.voice_attention
                queries = attention.split(attention.queries(attention.norm(frames)))
                frames = attention.gather(frames, queries, voice.keys, voice.values, None)
        mask_real, mask_imaginary = model.mask(frames).unbind(3)
        real, imaginary = bins.unbind(3)
        masked = [real * mask_real - imaginary * mask_imaginary, real * mask_imaginary + imaginary * mask_real]
        windows = torch.stack(masked, dim=3).flatten(2) @ self.synthesis
        first, second = windows.chunk(2, dim=2)
        overlap = torch.cat([state["overlap"][:, None], second], dim=1)
        after["overlap"] = overlap[:, -1]
        limit = max(model.config.level_frames, model.config.attention_frames)
        after["frames"] = (state["frames"] + bins.shape[1]).clamp(max=limit)
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
        attention = self.model.attention[name]
        assert isinstance(attention, Attention)
        normed, count, reach = attention.norm(frames), frames.shape[1], attention.reach
        new = attention.keys_and_values(normed)
        keys, values = (
            torch.cat([state[f"{of}_{name}"], x], dim=2) for of, x in zip(("keys", "values"), new, strict=True)
        )
        after[f"keys_{name}"], after[f"values_{name}"] = keys[:, :, count:], values[:, :, count:]
        # Query i is at place reach + i among the keys, and the keys before reach − frames are from before the start.
        query, key = (torch.arange(size, device=frames.device) for size in (count, reach + count))
        ahead = key - query[:, None]
        allowed = (ahead >= 0) & (ahead <= reach) & (key >= reach - state["frames"])
        bias = torch.zeros_like(ahead, dtype=keys.dtype).masked_fill(~allowed, -math.inf)
        return attention.gather(frames, attention.split(attention.queries(normed)), keys, values, bias)


def fourier_matrices(window: int, bins: int) -> dict[str, Tensor]:
    """Return the matrices from a window of samples to real and imaginary parts of its bins, and back, in float64.

    Both have the square root of a Hann window in them. They equal `BandSplitExtractor._spectrum` and `_waveform`.
    """
    shape = torch.hann_window(window, dtype=torch.float64).sqrt()
    scale = math.sqrt(window // 2)
    analysis = torch.fft.rfft(torch.diag(shape))[:, :bins] / scale
    parts = torch.view_as_complex(torch.eye(2 * bins, dtype=torch.float64).reshape(-1, bins, 2))
    synthesis = torch.fft.irfft(F.pad(parts, (0, window // 2 + 1 - bins)), window) * shape * scale
    return {"analysis": torch.view_as_real(analysis).flatten(1), "synthesis": synthesis}
