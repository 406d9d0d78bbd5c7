"""Using a trained network: arrays or files in, one voice out, at the rate and level of the recording.

Decided here, once, for every way of using a model:

- channels are averaged; any sample rate is converted to the network's and the estimate back to the mixture's;
- the enrollment must be sound of at least `MIN_ENROLLMENT_SECONDS`, and the mixture must not be digital silence;
- the network's estimate has an arbitrary level (SI-SDR does not see it), so it is scaled by the gain that leaves
  the least residual, ⟨mixture, estimate⟩ / ⟨estimate, estimate⟩; mixture = estimate + residual then holds with
  the two orthogonal. A silent estimate stays silent.
- a network that was trained with `loss.level` says by its level that the voice is absent; then the gain is at most
  `MOST_GAIN`, so that what it has turned down is not turned up again.
"""

import math
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from onevoice.audio import Mono, read_audio, require_finite, require_not_silent, resample, to_mono, write_audio
from onevoice.errors import AudioError, ConfigError, OnevoiceError
from onevoice.extraction.checkpoint import Card, load_model, resolve
from onevoice.models import Batch, ModelConfig, Network, to_network
from onevoice.models.base import pick_device

MIN_ENROLLMENT_SECONDS = 0.5
"""Shorter enrollments are refused; 3 s and more of clean speech are advised."""
MOST_GAIN = 2.0
"""Largest gain (6 dB) that is given to the estimate of a network that has learned its level."""

Sound = TypeVar("Sound", np.ndarray, Tensor)


class Extractor:
    """A trained network, ready to extract voices."""

    def __init__(self, model: Network, card: Card) -> None:
        self.model = model.eval()
        self.card = card

    @property
    def sample_rate(self) -> int:
        """The rate in Hz at which the network works; other rates are converted."""
        return self.card.config.sample_rate

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def extract(
        self, mixture: Sound, sample_rate: int, enrollment: Sound, enrollment_sample_rate: int | None = None
    ) -> Sound:
        """Return the enrolled voice of `mixture`, as mono `(samples,)` of the mixture's rate, type and device.

        Both are `(samples,)` or `(channels, samples)` of full scale 1.0; the enrollment's rate is the mixture's
        unless given. Raises `AudioError` for empty, silent, NaN or too short input.
        """
        sound = _as_mono(mixture, "mixture")
        voice = _as_mono(enrollment, "enrollment")
        estimate = self._extract(sound, sample_rate, voice, enrollment_sample_rate or sample_rate)
        if isinstance(mixture, Tensor):
            return torch.from_numpy(estimate).to(mixture.device, mixture.dtype)
        return estimate.astype(mixture.dtype) if np.issubdtype(mixture.dtype, np.floating) else estimate

    @torch.inference_mode()
    def estimate(self, batch: Batch) -> Float[Tensor, "batch samples"]:
        """Return the first estimate of the network for a padded batch at its rate, at the network's own level."""
        estimate: Tensor = self.model(to_network(batch, self.device))["predicted_audio"][0]
        return estimate.float().cpu()

    def _extract(self, mixture: Mono, rate: int, enrollment: Mono, enrollment_rate: int) -> Mono:
        check_enrollment(enrollment, enrollment_rate, "enrollment")
        require_not_silent(mixture, "mixture")
        own = self.sample_rate
        batch: Batch = {
            "audio": torch.from_numpy(resample(mixture, rate, own))[None],
            "ref": torch.from_numpy(resample(enrollment, enrollment_rate, own))[None],
        }
        estimate = resample(self.estimate(batch)[0].numpy(), own, rate)
        most = MOST_GAIN if self.card.config.has_level else math.inf
        return match_level(fit_length(estimate, len(mixture)), mixture, most)


def load(checkpoint: str | Path | None = None, config: ModelConfig | None = None, device: str = "auto") -> Extractor:
    """Load weights for use: a published name, a path or `hf://OWNER/REPO` (`checkpoint.resolve`), or the default.

    `config` names the model for `.pth` files, which do not. Raises `CheckpointError`, and `ConfigError` for a device
    that torch does not know or has not got.
    """
    return Extractor(*load_model(resolve(checkpoint), config, pick_device(device)))


def extract_file(
    extractor: Extractor,
    mixture: str | Path,
    enrollment: str | Path,
    output: str | Path,
    residual: str | Path | None = None,
) -> None:
    """Extract the enrolled voice of one file into another, at the mixture's rate, mono.

    WAV is written as 32-bit float, so that nothing clips and output + residual is the mixture to float32
    rounding; other formats in their usual sample type. `residual` receives what is left, under another name. Raises
    `AudioError`, `ConfigError`, `StorageError`.
    """
    if residual is not None and Path(residual).absolute() == Path(output).absolute():
        raise ConfigError(f"{residual}: is to be output and residual at once; give them two names")
    samples, rate = read_audio(mixture)
    voice, voice_rate = read_audio(enrollment)
    require_not_silent(samples, str(mixture))
    check_enrollment(voice, voice_rate, str(enrollment))
    estimate = extractor.extract(samples, rate, voice, voice_rate)
    written: list[Path] = []
    for path, sound in ((residual, samples - estimate), (output, estimate)):
        if path is not None:
            try:
                write_audio(path, sound, rate, subtype="FLOAT" if Path(path).suffix.lower() == ".wav" else None)
            except OnevoiceError:
                for whole in written:
                    whole.unlink()
                raise
            written.append(Path(path))


def check_enrollment(samples: Mono, sample_rate: int, name: str) -> None:
    """Raise `AudioError` naming `name` for an enrollment that is too short or silent."""
    seconds = len(samples) / sample_rate
    if seconds < MIN_ENROLLMENT_SECONDS:
        raise AudioError(
            f"{name}: lasts {seconds:.2f} s; an enrollment needs at least {MIN_ENROLLMENT_SECONDS} s of the voice, "
            "better 3 s or more"
        )
    require_not_silent(samples, name)


def match_level(estimate: Mono, mixture: Mono, most: float = math.inf) -> Mono:
    """Scale `estimate` by the gain, of size up to `most`, that leaves least energy in `mixture − gain · estimate`."""
    wide = estimate.astype(np.float64)
    energy = float(wide @ wide)
    gain = float(mixture.astype(np.float64) @ wide) / energy if energy > 0 else 0.0
    gain = max(-most, min(gain, most))  # negative for an estimate upside down
    return (gain * wide).astype(np.float32)


def fit_length(samples: Mono, length: int) -> Mono:
    """Cut `samples`, or pad them with zeros, to `length`; converting rates back and forth is off by a sample."""
    return samples[:length] if len(samples) >= length else np.pad(samples, (0, length - len(samples)))


def _as_mono(sound: np.ndarray | Tensor, name: str) -> Mono:
    array = sound.detach().cpu().numpy() if isinstance(sound, Tensor) else sound
    if np.issubdtype(array.dtype, np.integer):
        raise AudioError(f"{name}: has integer samples ({array.dtype}); divide by their full scale to get ±1.0 floats")
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: has shape {array.shape}; give (samples,) or (channels, samples)")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise AudioError(f"{name}: has shape {array.shape}, more channels than samples; transpose it")
    array = np.ascontiguousarray(array, dtype=np.float32)
    require_finite(array, name)
    return array if array.ndim == 1 else to_mono(array)
