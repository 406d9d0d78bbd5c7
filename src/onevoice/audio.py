"""Sound in and out of files: the only module that knows soundfile and soxr.

Inside the package sound is a float32 NumPy array of full scale 1.0, mono `(samples,)` unless a shape says
otherwise. Decided once, here:

- every format that libsndfile decodes is read (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, …);
- channels are averaged to mono;
- rates are converted by soxr at its high quality (HQ) setting;
- a missing, empty, truncated or undecodable file and NaN or infinite samples raise `AudioError`.
"""

import io
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float

from onevoice.errors import AudioError
from onevoice.files import atomic_write

EXTENSIONS = (".wav", ".flac", ".opus", ".ogg", ".mp3", ".aiff", ".aif", ".w64", ".caf")
"""File endings (lower case) that are taken for sound when folders are searched."""

Mono = Float[np.ndarray, "samples"]


def read_audio(path: str | Path, sample_rate: int | None = None) -> tuple[Mono, int]:
    """Read a sound file as mono float32 and return `(samples, rate in Hz)`.

    With `sample_rate` the samples are converted to that rate. Raises `AudioError` for anything unusable.
    """
    path = Path(path)
    if path.is_dir():
        raise AudioError(f"{path}: is a folder; name a sound file")
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    try:
        with soundfile.SoundFile(path) as file:
            announced, rate = file.frames, file.samplerate
            channels = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, MemoryError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise AudioError(f"{path}: cannot be decoded ({reason}); give WAV, FLAC, Ogg, Opus or MP3") from error
    if len(channels) < announced:
        raise AudioError(
            f"{path}: truncated ({len(channels)} of {announced} samples can be decoded); copy it again"
        )
    samples = to_mono(channels.T)
    require_finite(samples, str(path))
    if sample_rate is not None and sample_rate != rate:
        samples, rate = resample(samples, rate, sample_rate), sample_rate
    return samples, rate


def write_audio(
    path: str | Path, samples: Mono, sample_rate: int, *, subtype: str | None = None, durable: bool = True
) -> None:
    """Write mono `samples` to `path` in the format its ending names, whole or not at all.

    `subtype` is libsndfile's word for the sample format ("PCM_16", "FLOAT", …); None takes the usual one of
    the format, which is PCM_16 for WAV and FLAC. Integer formats clip at ±1. Raises `AudioError` for an
    unknown ending, NaN samples or a rate the format does not know, `StorageError` when the disk is full.
    """
    path = Path(path)
    require_finite(samples, f"{path} (to be written)")
    kind = _format_of(path)
    if path.suffix.lower() == ".opus":
        subtype = subtype or "OPUS"
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, samples, sample_rate, format=kind, subtype=subtype)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise AudioError(f"{path}: cannot be encoded as {kind} at {sample_rate} Hz ({error})") from error
    atomic_write(path, buffer.getvalue(), durable=durable)


def require_writable_format(path: str | Path) -> None:
    """Raise `AudioError` when `path` does not end in a format that can be written."""
    _format_of(Path(path))


def resample(samples: Mono, from_rate: int, to_rate: int) -> Mono:
    """Convert `samples` between rates in Hz; the length follows in proportion, give or take a sample."""
    if from_rate == to_rate or samples.size == 0:
        return samples
    return np.ascontiguousarray(soxr.resample(samples, from_rate, to_rate, quality="HQ"))


def to_mono(channels: Float[np.ndarray, "channels samples"]) -> Mono:
    """Average the channels."""
    return np.ascontiguousarray(channels[0] if len(channels) == 1 else channels.mean(axis=0))


def require_finite(samples: Float[np.ndarray, "*any"], name: str) -> None:
    """Raise `AudioError` naming `name` for an empty array or one with NaN or infinity."""
    if samples.size == 0:
        raise AudioError(f"{name}: holds no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; export it again as integer PCM")


def require_sound(samples: Float[np.ndarray, "*any"], name: str) -> None:
    """Raise `AudioError` naming `name` when all samples are equal: digital silence, with or without DC."""
    if samples.size and not np.ptp(samples) > 0:
        raise AudioError(
            f"{name}: is silent (all samples are {samples.flat[0]:g}); give a recording of speech"
        )


def _format_of(path: Path) -> str:
    ending = path.suffix.lower().lstrip(".")
    kind = {"aif": "AIFF", "oga": "OGG", "opus": "OGG"}.get(ending, ending.upper())
    if kind not in soundfile.available_formats():
        raise AudioError(f"{path}: unknown ending {path.suffix!r}; end the name in .wav, .flac, .ogg or .mp3")
    return kind
