"""Sound in and out of files: the only module that knows soundfile and soxr.

Inside the package sound is a float32 NumPy array of full scale 1.0, mono `(samples,)` unless a shape says
otherwise. Decided once, here:

- every format that libsndfile decodes is read (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, …);
- channels are averaged to mono;
- rates are converted by soxr at its high quality (HQ) setting;
- a missing, empty, truncated or undecodable file and NaN or infinite samples raise `AudioError`.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float, Int16

from onevoice.errors import AudioError
from onevoice.files import atomic_write

FORMATS = {
    ".wav": "WAV",
    ".flac": "FLAC",
    ".opus": "OGG",
    ".ogg": "OGG",
    ".oga": "OGG",
    ".mp3": "MP3",
    ".aiff": "AIFF",
    ".aif": "AIFF",
    ".w64": "W64",
    ".caf": "CAF",
}
"""File endings (lower case) that can be written, with libsndfile's word for each."""

EXTENSIONS = tuple(FORMATS)
"""File endings (lower case) that are taken for sound when folders are searched."""

LARGEST_OGG_PAGE = 65_307
"""In bytes (RFC 3533)."""

LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Sample rates in Hz outside this range are taken for a damaged header."""

STREAMED_BYTES = 0x7FFF0000
"""A length in a header from which on it is the mark of a stream whose length was not known."""

Mono = Float[np.ndarray, "_samples"]
"""Mono sound; lengths of several arguments need not agree (the underscore)."""

_SHORTER = re.compile(r"^ *(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)


def read_audio(
    path: str | Path, sample_rate: int | None = None, *, channel: int | None = None, most: int | None = None
) -> tuple[Mono, int]:
    """Read a sound file as mono float32 and return `(samples, rate in Hz)`.

    `channel` takes that channel, counted from 0, instead of the average of all; `most` reads at most so many
    samples from the start. With `sample_rate` the samples are converted to that rate. Raises `AudioError` for
    anything unusable.
    """
    path = require_file(path)
    return decode_audio(path, str(path), sample_rate, channel=channel, most=most)


def decode_audio(
    source: Path | io.BufferedIOBase,
    name: str,
    sample_rate: int | None = None,
    *,
    channel: int | None = None,
    most: int | None = None,
) -> tuple[Mono, int]:
    """Do the same for an existing file or an open stream; `name` opens the message of an error."""
    with _opened(source, name) as file:
        announced, rate = file.frames if most is None else min(most, file.frames), file.samplerate
        channels = file.read(announced, dtype="float32", always_2d=True)
        _require_ogg_end(source, name)
    if len(channels) < announced:
        raise AudioError(f"{name}: truncated ({len(channels)} of {announced} samples can be decoded); copy it again")
    if channel is not None and channel >= channels.shape[1]:
        raise AudioError(f"{name}: has no channel {channel}, only {channels.shape[1]}")
    samples = to_mono(channels.T) if channel is None else np.ascontiguousarray(channels[:, channel])
    require_finite(samples, name)
    if sample_rate is not None and sample_rate != rate:
        samples, rate = resample(samples, rate, sample_rate), sample_rate
    return samples, rate


def probe_audio(source: Path | io.BufferedIOBase, name: str) -> tuple[int, int]:
    """Return `(samples per channel, rate in Hz)` as the header says, without decoding.

    Raises `AudioError` when there is no such header or no sound behind it; damage further on goes unseen.
    """
    with _opened(require_file(source) if isinstance(source, Path) else source, name) as file:
        if not file.frames:
            raise AudioError(f"{name}: holds no samples")
        return file.frames, file.samplerate


def require_file(path: str | Path) -> Path:
    """Return `path` when it is a file with something in it; raise `AudioError` otherwise."""
    path = Path(path)
    if path.is_dir():
        raise AudioError(f"{path}: is a folder; name a sound file")
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    return path


def write_audio(
    path: str | Path, samples: Mono, sample_rate: int, *, subtype: str | None = None, durable: bool = True
) -> None:
    """Write mono `samples` to `path` in the format its ending names, whole or not at all.

    `subtype` is libsndfile's word for the sample format ("PCM_16", "FLOAT", …); None takes the usual one of
    the format, which is PCM_16 for WAV and FLAC. Integer formats clip at ±1; PCM_16 is rounded to the nearest
    value, where libsndfile would round towards −1. Raises `AudioError` for an unknown ending, NaN samples or a
    rate the format does not know, `StorageError` when the disk is full.
    """
    path = Path(path)
    require_finite(samples, f"{path} (to be written)")
    kind = _format_of(path)
    if not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:  # libsndfile does not survive all of them
        raise AudioError(f"{path}: cannot be written at {sample_rate} Hz; choose a usual sample rate")
    if path.suffix.lower() == ".opus":
        subtype = subtype or "OPUS"
    is_pcm16 = (subtype or soundfile.default_subtype(kind)) == "PCM_16"
    buffer = io.BytesIO()
    try:
        data = to_pcm16(samples) if is_pcm16 else samples
        soundfile.write(buffer, data, sample_rate, format=kind, subtype=subtype)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise AudioError(
            f"{path}: cannot be encoded at {sample_rate} Hz ({_reason(error)}); use .wav or .flac"
        ) from error
    atomic_write(path, buffer.getvalue(), durable=durable)


def to_pcm16(samples: Mono) -> Int16[np.ndarray, "samples"]:
    """Round `samples` to the nearest of the 65,536 values of 16-bit PCM, ±1 being ±32768; clip beyond."""
    return np.clip(np.rint(samples * np.float32(32768)), -32768, 32767).astype(np.int16)


def through_pcm16(samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Return `samples` as they come back from the 16-bit file that `soundfile.write` makes of them.

    That is what data sets written by soundfile hold: libsndfile cuts to 16 bits towards −1, where `to_pcm16`
    rounds to the nearest, and clips at ±1. float32 and float64 samples can differ in the last bit.
    """
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 8000, format="WAV", subtype="PCM_16")
    buffer.seek(0)
    return np.asarray(soundfile.read(buffer, dtype="float32")[0])


def require_writable_format(path: str | Path) -> None:
    """Raise `AudioError` when `path` does not end in a format that can be written."""
    _format_of(Path(path))


def resample(samples: Mono, from_rate: int, to_rate: int) -> Float[np.ndarray, "resampled"]:
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
        raise AudioError(f"{name}: is silent (all samples are {samples.flat[0]:g}); give a recording of speech")


def _format_of(path: Path) -> str:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise AudioError(f"{path}: unknown ending {path.suffix!r}; end the name in .wav, .flac, .ogg or .mp3")
    return kind


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")


def _require_ogg_end(source: Path | io.BufferedIOBase, name: str) -> None:
    """Raise `AudioError` for Ogg that ends too early; libsndfile reads what is left of it without a word."""
    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as stream:
        stream.seek(0)
        if stream.read(4) != b"OggS":
            return
        stream.seek(max(0, stream.seek(0, io.SEEK_END) - LARGEST_OGG_PAGE))
        if not _ends_ogg(stream.read()):
            raise AudioError(f"{name}: truncated (its last Ogg page is missing); copy it again")


def _ends_ogg(tail: bytes) -> bool:
    """Say whether the last page of an Ogg file is whole and marked as the last (RFC 3533)."""
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


@contextlib.contextmanager
def _opened(source: Path | io.BufferedIOBase, name: str) -> Iterator[soundfile.SoundFile]:
    try:
        with soundfile.SoundFile(source) as file:
            _require_whole(file.extra_info, name)
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise AudioError(f"{name}: has a sample rate of {file.samplerate} Hz in its header; export it again")
            yield file
    except (soundfile.LibsndfileError, OSError, MemoryError, TypeError, ValueError) as error:
        reason = _reason(error) or "damaged"
        raise AudioError(f"{name}: cannot be decoded ({reason}); give WAV, FLAC, Ogg, Opus or MP3") from error


def _require_whole(log: str, name: str) -> None:
    """Raise `AudioError` when libsndfile's log says that a WAV or AIFF file is shorter than its header announces.

    libsndfile itself goes on with what is there. Headers of writers that could not seek back, with 0 or about 2 or
    4 GiB in place of the length, announce nothing.
    """
    found = _SHORTER.search(log)
    if found is None:
        return
    announced, there = int(found[1]), int(found[2])
    if there < announced < STREAMED_BYTES:
        raise AudioError(f"{name}: truncated ({there} of {announced} bytes of sound are there); copy it again")
