"""The model contract: what every network of the zoo takes, returns and promises.

A network is a `Network` built from one frozen config. `forward(batch)` takes a `Batch` and returns a `Prediction`.
The promises, tested for every network in `tests/test_models.py`:

- each estimate has exactly the length of the mixture, for any length;
- the speaker embedding, and in evaluation mode the estimate, depend neither on padding (where lengths are given)
  nor on the other items of the batch;
- `embed` gives the speaker embedding alone, and `extract` takes one, so that one enrollment serves many mixtures;
- with `normalize_level` the mixture's gain and offset scale the estimate and nothing else, and the
  enrollment's do not matter at all; silence in, silence out.
"""

from abc import ABC, abstractmethod
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from onevoice.config import STRICT

Wave = Float[Tensor, "batch samples"]
Lengths = Int[Tensor, " batch"]
Embedding = Float[Tensor, "batch speaker_dim"]


class Batch(TypedDict):
    """One batch. Items are padded at the end with anything; the lengths say what is valid.

    A missing length says that every item fills its row.
    """

    audio: Float[Tensor, "batch samples"]
    """The mixture."""
    ref: Float[Tensor, "batch ref_samples"]
    """The enrollment: another recording of the target."""
    audio_length: NotRequired[Int[Tensor, " batch"]]
    ref_length: NotRequired[Int[Tensor, " batch"]]


class Prediction(TypedDict):
    """What a network makes of a batch."""

    predicted_audio: tuple[Wave, ...]
    """Estimates of the target, the one for users first; SpEx+ has three."""
    predicted_logits: Float[Tensor, "batch num_classes"]
    """Speaker logits over the training speakers, for the training loss only."""


@dataclass(frozen=True, config=STRICT)
class NetworkConfig:
    """What the config of every network has; the defaults of the sizes are each network's own."""

    name: str = ""
    """The name under which the zoo knows the network."""
    sample_rate: PositiveInt = 16_000
    """The rate in Hz at which the network works."""
    num_classes: NonNegativeInt = 101
    """Training speakers that the classifier tells apart; training puts the number found in the data for 0."""
    normalize_level: bool = True
    """Centre inputs and bring them to unit power first; False is the published network to the letter."""


class Network(nn.Module, ABC):
    """A target speaker extractor: mixture and enrollment in, estimates and speaker logits out."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.compiled = False
        """Train through `torch.compile` where no mixture is padded: faster steps, after a wait for each new length."""

    def forward(self, batch: Batch) -> Prediction:
        """Extract the target of each item. See the module's docstring for what is promised."""
        embedding = self.embed(batch["ref"], batch.get("ref_length"))
        return {
            "predicted_audio": self.extract(batch["audio"], embedding, batch.get("audio_length")),
            "predicted_logits": self.classify(embedding),
        }

    def embed(self, ref: Wave, ref_length: Lengths | None = None) -> Embedding:
        """Return the speaker embedding of each enrollment."""
        if self.config.normalize_level:
            ref, _ = normalize_level(ref, ref_length)
        else:
            ref = zero_padding(ref, ref_length)
        return self._embed(ref, ref_length)

    def extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None = None) -> tuple[Wave, ...]:
        """Return the estimates for mixtures and speaker embeddings; padded samples come out as zero."""
        if not self.config.normalize_level:
            estimates = self._extract(zero_padding(audio, audio_length), embedding, audio_length)
        else:
            audio, level = normalize_level(audio, audio_length)
            estimates = tuple(level * estimate for estimate in self._extract(audio, embedding, audio_length))
        return tuple(zero_padding(estimate, audio_length) for estimate in estimates)

    @abstractmethod
    def classify(self, embedding: Embedding) -> Float[Tensor, "batch num_classes"]:
        """Return the speaker logits of an embedding."""

    @abstractmethod
    def _embed(self, ref: Wave, ref_length: Lengths | None) -> Embedding:
        """Embed enrollments whose padding is zero."""

    @abstractmethod
    def _extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None) -> tuple[Wave, ...]:
        """Extract from mixtures whose padding is zero."""


def to_network(batch: Batch, device: torch.device) -> Batch:
    """Move what a network takes to `device`, and nothing else that a batch may hold.

    Lengths that say nothing are left out, which is the fast path.
    """
    inputs: Batch = {
        "audio": batch["audio"].to(device, non_blocking=True),
        "ref": batch["ref"].to(device, non_blocking=True),
    }
    if _matters(batch.get("audio_length"), batch["audio"]):
        inputs["audio_length"] = batch["audio_length"].to(device, non_blocking=True)
    if _matters(batch.get("ref_length"), batch["ref"]):
        inputs["ref_length"] = batch["ref_length"].to(device, non_blocking=True)
    return inputs


def _matters(length: Tensor | None, signal: Tensor) -> bool:
    """Say whether some row is padded; lengths on an accelerator are not looked at, which would stall it."""
    if length is None:
        return False
    return length.device.type != "cpu" or bool((length < signal.shape[1]).any())


def normalize_level(audio: Wave, length: Lengths | None = None) -> tuple[Wave, Float[Tensor, "batch one"]]:
    """Centre each item and bring it to unit mean square over its valid samples; padding becomes zero.

    Returns the normalised audio and the level (RMS amplitude) of each item; silence stays silence, of level 0.
    """
    valid = valid_mask(audio.shape[1], length, audio)
    count = audio.new_full((1, 1), audio.shape[1]) if valid is None else valid.sum(1, keepdim=True)
    if valid is not None:
        audio = audio.where(valid > 0, 0.0)
    audio = audio - audio.sum(1, keepdim=True) / count
    if valid is not None:
        audio = audio * valid
    level = (audio.square().sum(1, keepdim=True) / count).sqrt()
    return audio / level.clamp(min=torch.finfo(audio.dtype).tiny ** 0.5), level


def zero_padding(audio: Wave, length: Lengths | None) -> Wave:
    """Set the samples beyond each item's length to zero, whatever they hold (NaN too)."""
    valid = valid_mask(audio.shape[1], length, audio)
    return audio if valid is None else audio.where(valid > 0, 0.0)


def valid_mask(size: int, length: Lengths | None, like: Tensor) -> Float[Tensor, "batch size"] | None:
    """Return 1 for positions before each item's length and 0 beyond, in the dtype of `like`; None for None."""
    if length is None:
        return None
    return (torch.arange(size, device=like.device) < length.to(like.device)[:, None]).to(like.dtype)
