"""The model contract: what every network takes, returns and promises, and where it runs.

A network is a `Network` built from one frozen config. `forward(batch)` takes a `Batch` and returns a `Prediction`.
`tests/models/test_models.py` checks these promises for every network:

- Each estimate has exactly the length of the mixture, for any length.
- The speaker embedding, and in evaluation mode the estimate, depend neither on padding (if lengths are given)
  nor on the other items of the batch.
- `embed` returns the speaker embedding alone and `extract` takes one, so that one enrollment serves many mixtures.
- With `normalize_level`, the gain of the mixture scales the estimate and changes nothing else. The offset of the
  mixture and the gain and offset of the enrollment change nothing. Silence in, silence out.
"""

import functools
import importlib.util
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple, NotRequired, TypedDict, TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onevoice.config import STRICT
from onevoice.errors import AudioError, ConfigError

Wave = Float[Tensor, "batch samples"]
GivenWave = Float[Tensor, "*given"]
"""What `as_waves` takes or refuses: (batch, samples) or (batch, 1, samples)."""
Lengths = Int[Tensor, " batch"]
Embedding = Float[Tensor, "batch speaker_dim"]
T = TypeVar("T")
MAX_VARIANTS = 64
"""Compiled variants that torch keeps per function: one for each dilation, precision and shape."""


class Batch(TypedDict):
    """One batch. Items are padded at the end with anything; the lengths tell which samples are valid.

    If a length is missing, every item fills its row.
    """

    audio: Float[Tensor, "batch samples"]
    """The mixture."""
    ref: Float[Tensor, "batch ref_samples"]
    """The enrollment: another recording of the target."""
    audio_length: NotRequired[Int[Tensor, " batch"]]
    ref_length: NotRequired[Int[Tensor, " batch"]]


class Level(NamedTuple):
    """The level of a whole recording, for a network that gets a part of it."""

    mean: float
    rms: float
    """Root mean square of the samples without their mean."""


class Prediction(TypedDict):
    """The output of a network for one batch."""

    predicted_audio: tuple[Wave, ...]
    """Estimates of the target. Users and metrics get the first one; the loss uses all."""
    predicted_logits: Float[Tensor, "batch num_classes"]
    """Speaker logits over the training speakers, used by the training loss only."""


@dataclass(frozen=True, config=STRICT)
class NetworkConfig:
    """The fields that the config of every network has.

    Subclasses inherit the descriptions of these fields because they are part of the types; pydantic does not inherit
    docstrings.
    """

    name: str = ""
    """Selects the network."""
    sample_rate: Annotated[PositiveInt, Field(description="Sample rate in Hz at which the network works.")] = 16_000
    num_classes: Annotated[
        NonNegativeInt,
        Field(description="Number of training speakers the classifier knows; training replaces 0 by the number found."),
    ] = 101
    normalize_level: Annotated[
        bool, Field(description="Center inputs and scale them to unit power; false is the network as published.")
    ] = True
    has_level: Annotated[
        bool, Field(description="The level of the estimate is meaningful; training sets this if loss.level is above 0.")
    ] = False

    @property
    def hop(self) -> int:
        """Samples between frames: the estimate moves with the mixture if that moves by a multiple of it."""
        return 1

    @property
    def context_seconds(self) -> float | None:
        """How far from an output sample, to each side, the input can influence it; None: all of it, by statistics."""
        return None


class Network(nn.Module, ABC):
    """A target speaker extractor: mixture and enrollment in, estimates and speaker logits out."""

    config_class: ClassVar[type[NetworkConfig]]
    """The config that builds this network. The default of its `name` is the name of the network."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.compiled = False
        """Train through `torch.compile` if no mixture is padded: faster steps, after a wait for each new length."""
        self.recompute = False
        """Compute blocks a second time in the backward pass instead of keeping their activations in memory."""

    def forward(self, batch: Batch) -> Prediction:
        """Extract the target of each item; the module docstring lists what holds for the result."""
        embedding = self.embed(batch["ref"], batch.get("ref_length"))
        return {
            "predicted_audio": self.extract(batch["audio"], embedding, batch.get("audio_length")),
            "predicted_logits": self.classify(embedding),
        }

    def embed(self, ref: GivenWave, ref_length: Lengths | None = None) -> Embedding:
        """Return the speaker embedding of each enrollment."""
        ref = as_waves(ref, "ref")
        if self.config.normalize_level:
            ref, _ = normalize_level(ref, ref_length)
        else:
            ref = zero_padding(ref, ref_length)
        return self._embed(ref, ref_length)

    def extract(
        self, audio: GivenWave, embedding: Embedding, audio_length: Lengths | None = None, level: Level | None = None
    ) -> tuple[Wave, ...]:
        """Return the estimates for mixtures and speaker embeddings; padded samples become zero.

        `level` is for windows of a recording: the level of the whole, instead of that of each item.
        """
        audio = as_waves(audio, "audio")
        scale: Tensor | float
        if not self.config.normalize_level:
            audio, scale = zero_padding(audio, audio_length), 1.0
        elif level is None:
            audio, scale = normalize_level(audio, audio_length)
        else:
            audio = (audio - level.mean) / max(level.rms, torch.finfo(audio.dtype).tiny ** 0.5)
            scale = level.rms
        estimates = self._extract(audio, embedding, audio_length)
        return tuple(zero_padding(scale * estimate, audio_length) for estimate in estimates)

    @abstractmethod
    def classify(self, embedding: Embedding) -> Float[Tensor, "batch num_classes"]:
        """Return the speaker logits of an embedding."""

    @abstractmethod
    def _embed(self, ref: Wave, ref_length: Lengths | None) -> Embedding:
        """Embed enrollments whose padding is zero."""

    @abstractmethod
    def _extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None) -> tuple[Wave, ...]:
        """Extract from mixtures whose padding is zero."""

    def _run_block(self, block: Callable[..., T], *inputs: Any) -> T:
        """Run one block of the network. With `recompute`, only its inputs are kept for the backward pass.

        The gradients stay the same, bit for bit if the kernels of the device are deterministic. A step takes about a
        third more arithmetic (arXiv 1604.06174).
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return block(*inputs)
        result: T = checkpoint(block, *inputs, use_reentrant=False)
        return result


@functools.cache
def compile_once(function: Callable[..., T]) -> Callable[..., T]:
    """Return `function` through `torch.compile`; the compiler runs at the first call of each variant."""
    import torch._dynamo.config as settings

    settings.cache_size_limit = max(settings.cache_size_limit, MAX_VARIANTS)
    return torch.compile(function, dynamic=False)


def pick_device(name: str = "auto", key: str = "device") -> torch.device:
    """Return the torch device of a name; "auto" prefers CUDA, then Apple's MPS, then the CPU.

    Raises `ConfigError`, naming `key`, for a device that torch does not know or cannot find.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the errors torch raises for cuda if it was built without it
        raise ConfigError(
            f"{key}: torch finds no device {name!r}; use auto, cpu, or cuda on a machine with one"
        ) from error
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16; the others emulate it, several times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return (
        device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )


def missing_for_compiling(device: torch.device) -> str | None:
    """Return what `torch.compile` needs for a device and cannot find; None if it can work."""
    if device.type == "cpu":
        names = [os.environ.get("CXX", "g++"), "clang++"]
        return None if any(map(shutil.which, names)) else "a C++ compiler (g++ or clang++)"
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton"
    return f"a compiler for {device.type}"


def to_network(batch: Batch, device: torch.device) -> Batch:
    """Move the inputs of a network to `device` and leave everything else in the batch behind.

    Lengths are dropped if no row is padded, because a network is faster without them.
    """
    audio, ref = as_waves(batch["audio"], "audio"), as_waves(batch["ref"], "ref")
    inputs: Batch = {"audio": audio.to(device, non_blocking=True), "ref": ref.to(device, non_blocking=True)}
    if _is_padded(audio, batch.get("audio_length")):
        inputs["audio_length"] = batch["audio_length"].to(device, non_blocking=True)
    if _is_padded(ref, batch.get("ref_length")):
        inputs["ref_length"] = batch["ref_length"].to(device, non_blocking=True)
    return inputs


def as_waves(audio: GivenWave, name: str) -> Wave:
    """Return a batch of audio as (batch, samples); (batch, 1, samples), as the original system has it, is taken too.

    Raises `AudioError`, naming `name`, for any other shape.
    """
    if audio.ndim == 3 and audio.shape[1] == 1:
        return audio.squeeze(1)
    if audio.ndim != 2:
        raise AudioError(f"{name}: has shape {tuple(audio.shape)}; give (batch, samples) or (batch, 1, samples)")
    return audio


def _is_padded(signal: Tensor, length: Tensor | None) -> bool:
    """Return False if every row is known to be full. Lengths on an accelerator are not read, which would stall it."""
    if length is None:
        return False
    return length.device.type != "cpu" or bool((length < signal.shape[1]).any())


def normalize_level(audio: Wave, length: Lengths | None = None) -> tuple[Wave, Float[Tensor, "batch one"]]:
    """Center each item and scale it to unit mean square over its valid samples; padding becomes zero.

    Returns the normalized audio and the level (RMS amplitude) of each item; silence stays silence, with level 0.
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
    """Set the samples beyond each item's length to zero, whatever they are (also NaN)."""
    valid = valid_mask(audio.shape[1], length, audio)
    return audio if valid is None else audio.where(valid > 0, 0.0)


def valid_mask(size: int, length: Lengths | None, like: Tensor) -> Float[Tensor, "batch size"] | None:
    """Return 1 for positions before each item's length and 0 beyond, in the dtype of `like`; None for no lengths."""
    if length is None:
        return None
    return (torch.arange(size, device=like.device) < length.to(like.device)[:, None]).to(like.dtype)


def pad_to_whole_seconds(
    ref: Wave, ref_length: Lengths | None, sample_rate: int
) -> tuple[Float[Tensor, "batch padded"], Lengths]:
    """Pad enrollments to whole seconds, so that the compiler sees few lengths."""
    if ref_length is None:
        ref_length = torch.full((len(ref),), ref.shape[1], device=ref.device)
    return F.pad(ref, (0, -ref.shape[1] % sample_rate)), ref_length
