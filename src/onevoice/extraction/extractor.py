"""Using a trained network: arrays or files in, one voice out, at the sample rate and level of the recording.

Rules for every use of a model:

- Channels are averaged. Mixture and enrollment are converted to the network's sample rate, and the estimate is
  converted back to the mixture's.
- The enrollment must last at least `MIN_ENROLLMENT_SECONDS` and must not be silent; the mixture must not be silent.
- The level of the network's estimate is arbitrary (SI-SDR ignores it). So the estimate is scaled by the gain that
  leaves the smallest residual, ⟨mixture, estimate⟩ / ⟨estimate, estimate⟩. Then mixture = estimate + residual, and the
  two are orthogonal. A silent estimate stays silent.
- A network trained with `loss.level` has a level of its own and turns its estimate down if the voice is absent. Then
  the gain is at most `MAX_GAIN`, so that the estimate is not turned up again.
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
"""Shorter enrollments raise an error; 3 s or more of clean speech are best."""
MAX_GAIN = 2.0
"""Largest gain (6 dB) for the estimate of a network with a level of its own."""

Samples = TypeVar("Samples", np.ndarray, Tensor)


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
        """The device that the network is on."""
        return next(self.model.parameters()).device

    def extract(
        self, mixture: Samples, sample_rate: int, enrollment: Samples, enrollment_sample_rate: int | None = None
    ) -> Samples:
        """Return the enrolled voice in `mixture`: mono, `(samples,)`, at the mixture's rate, type and device.

        Both signals are `(samples,)` or `(channels, samples)` with full scale 1.0. Rates are in Hz; the enrollment's is
        the mixture's by default. Raises `AudioError` for empty, silent, NaN or too short input.
        """
        sound = _as_mono(mixture, "mixture")
        voice = _as_mono(enrollment, "enrollment")
        estimate = self._extract(sound, sample_rate, voice, enrollment_sample_rate or sample_rate)
        if isinstance(mixture, Tensor):
            return torch.from_numpy(estimate).to(mixture.device, mixture.dtype)
        return estimate.astype(mixture.dtype) if np.issubdtype(mixture.dtype, np.floating) else estimate

    @torch.inference_mode()
    def estimate(self, batch: Batch) -> Float[Tensor, "batch samples"]:
        """Return the network's first estimate for a padded batch, at the network's rate and level."""
        estimate: Tensor = self.model(to_network(batch, self.device))["predicted_audio"][0]
        return estimate.float().cpu()

    def _extract(self, mixture: Mono, rate: int, enrollment: Mono, enrollment_rate: int) -> Mono:
        check_enrollment(enrollment, enrollment_rate, "enrollment")
        require_not_silent(mixture, "mixture")
        network_rate = self.sample_rate
        batch: Batch = {
            "audio": torch.from_numpy(resample(mixture, rate, network_rate))[None],
            "ref": torch.from_numpy(resample(enrollment, enrollment_rate, network_rate))[None],
        }
        estimate = resample(self.estimate(batch)[0].numpy(), network_rate, rate)
        max_gain = MAX_GAIN if self.card.config.has_level else math.inf
        return match_level(fit_length(estimate, len(mixture)), mixture, max_gain)


def load(checkpoint: str | Path | None = None, config: ModelConfig | None = None, device: str = "auto") -> Extractor:
    """Load weights by published name, path or hub address (`checkpoint.resolve`); None means the default weights.

    `config` describes the model of a `.pth` file; other files describe themselves. Raises `CheckpointError`, and
    `ConfigError` for a device that is not available.
    """
    return Extractor(*load_model(resolve(checkpoint), config, pick_device(device)))


def extract_file(
    extractor: Extractor,
    mixture: str | Path,
    enrollment: str | Path,
    output: str | Path,
    residual: str | Path | None = None,
) -> None:
    """Extract the enrolled voice from the file `mixture` and write it to `output`, mono, at the mixture's rate.

    WAV is written as 32-bit float: nothing clips, and output + residual is the mixture up to float32 rounding. Other
    formats get their usual sample type. `residual` receives mixture − estimate. Raises `AudioError`, `ConfigError` and
    `StorageError`.
    """
    if residual is not None and Path(residual).absolute() == Path(output).absolute():
        raise ConfigError(f"{residual}: is both the output and the residual; give them two names")
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
    """Raise an `AudioError` that names `name` if the enrollment is too short or silent."""
    seconds = len(samples) / sample_rate
    if seconds < MIN_ENROLLMENT_SECONDS:
        raise AudioError(
            f"{name}: lasts {seconds:.2f} s; an enrollment needs at least {MIN_ENROLLMENT_SECONDS} s of the voice, "
            "and 3 s or more are better"
        )
    require_not_silent(samples, name)


def match_level(estimate: Mono, mixture: Mono, max_gain: float = math.inf) -> Mono:
    """Scale `estimate` by the gain within ±`max_gain` that leaves the least energy in `mixture − gain · estimate`."""
    wide = estimate.astype(np.float64)
    energy = float(wide @ wide)
    gain = float(mixture.astype(np.float64) @ wide) / energy if energy > 0 else 0.0
    gain = max(-max_gain, min(gain, max_gain))  # negative for an estimate of inverted polarity
    return (gain * wide).astype(np.float32)


def fit_length(samples: Mono, length: int) -> Mono:
    """Cut `samples` or pad them with zeros to `length`; converting the rate back and forth may be off by a sample."""
    return samples[:length] if len(samples) >= length else np.pad(samples, (0, length - len(samples)))


def _as_mono(samples: np.ndarray | Tensor, name: str) -> Mono:
    array = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else samples
    if np.issubdtype(array.dtype, np.integer):
        raise AudioError(f"{name}: has integer samples ({array.dtype}); divide by their full scale to get ±1.0 floats")
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: has shape {array.shape}; give (samples,) or (channels, samples)")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise AudioError(f"{name}: has shape {array.shape}, more channels than samples; transpose it")
    array = np.ascontiguousarray(array, dtype=np.float32)
    require_finite(array, name)
    return array if array.ndim == 1 else to_mono(array)
