"""Reading and writing audio files: the only module that knows soundfile and soxr.

Inside the package, audio is a float32 NumPy array with full scale 1.0, mono `(samples,)` unless a shape says otherwise.
The rules:

- every format that libsndfile decodes can be read (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, …);
- channels are averaged to mono;
- soxr converts sample rates at its high-quality (HQ) setting;
- a missing, empty, truncated or undecodable file, and NaN or infinite samples, raise `AudioError`.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

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
"""Extensions (lower case) of files that can be written, and libsndfile's name for each format."""

EXTENSIONS = tuple(FORMATS)
"""Extensions (lower case) of audio files in a corpus."""

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1000, 768_000
"""In Hz; a rate outside this range means a damaged header."""

MAX_STRAY_BYTES = 65_536
"""Bytes beyond the audio of a WAV file that may be a tag; more are audio that the header leaves out."""
MAX_OGG_PAGE_BYTES = 65_307
"""RFC 3533."""

BLOCK = 65_536
"""Samples per channel that are read or written at a time: libsndfile's Vorbis encoder overflows its stack on more."""

MAX_WAV_BYTES = 2**32 - 2**16
"""Longer sound does not fit the 32-bit sizes of WAV; it becomes RF64 (EBU Tech 3306), which has 64-bit ones."""

UNRECOGNIZED_FORMAT, UNSUPPORTED_ENCODING = 1, 4
"""libsndfile's error numbers for a file that is not one of its formats (sndfile.h)."""

UNKNOWN_LENGTH_BYTES = 0x7FFF0000
"""A writer that cannot seek back puts a length of at least this into the header."""

Mono = Float[np.ndarray, "_samples"]
"""Mono audio. Because of the underscore, two arguments may differ in length."""

Block = Float[np.ndarray, "_block channels"]
"""A piece of a recording, in the order of a file: one row per point in time."""

_SIZE_MISMATCH = re.compile(r"^ *(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
_STRAY_BYTES = re.compile(r"^Length : (\d+).*^\*\*\* Unknown chunk marker [^\n]* at position (\d+)", re.M | re.S)


def read_audio(
    path: str | Path, sample_rate: int | None = None, *, channel: int | None = None, max_samples: int | None = None
) -> tuple[Mono, int]:
    """Read an audio file as mono float32; return `(samples, rate in Hz)`.

    `sample_rate` converts the samples to that rate. `channel`, counted from 0, selects one channel instead of the
    average, and `max_samples` reads no further than that. Raises `AudioError` if the file is unusable.
    """
    path = require_file(path)
    return decode_audio(path, str(path), sample_rate, channel=channel, max_samples=max_samples)


def decode_audio(
    source: Path | io.BufferedIOBase,
    name: str,
    sample_rate: int | None = None,
    *,
    channel: int | None = None,
    max_samples: int | None = None,
) -> tuple[Mono, int]:
    """Do what `read_audio` does for an existing file or an open stream; error messages start with `name`."""
    with open_audio(source, name) as file:
        rate = file.samplerate
        expected = file.frames if max_samples is None else min(max_samples, file.frames)
        channels = file.read(expected, dtype="float32", always_2d=True)
        require_ogg_end(source, name)
    if len(channels) < expected:
        raise AudioError(f"{name}: truncated ({len(channels)} of {expected} samples can be decoded); copy it again")
    if channel is not None and channel >= channels.shape[1]:
        raise AudioError(f"{name}: has no channel {channel}, only {channels.shape[1]}")
    samples = to_mono(channels.T) if channel is None else np.ascontiguousarray(channels[:, channel])
    require_finite(samples, name)
    if sample_rate is not None and sample_rate != rate:
        samples, rate = resample(samples, rate, sample_rate), sample_rate
    return samples, rate


def probe_audio(source: Path | io.BufferedIOBase, name: str) -> tuple[int, int]:
    """Return `(samples per channel, rate in Hz)` from the header, without decoding.

    Raises `AudioError` if the header is unreadable or the file has no samples. Damage after the header goes unnoticed.
    """
    with open_audio(require_file(source) if isinstance(source, Path) else source, name) as file:
        if not file.frames:
            raise AudioError(f"{name}: holds no samples")
        return file.frames, file.samplerate


def require_file(path: str | Path) -> Path:
    """Return `path` if it is a file and not empty; raise `AudioError` otherwise."""
    path = Path(path)
    if path.is_dir():
        raise AudioError(f"{path}: is a folder; name an audio file")
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    return path


def write_audio(
    path: str | Path, samples: Mono, sample_rate: int, *, subtype: str | None = None, durable: bool = True
) -> None:
    """Write mono `samples` to `path`, all or nothing, in the format that its extension names.

    `subtype` is libsndfile's name for the sample format ("PCM_16", "FLOAT", …); None means the format's default,
    which is PCM_16 for WAV and FLAC. Integer formats clip at ±1. PCM_16 rounds to the nearest value, whereas
    libsndfile rounds toward −1. Raises `AudioError` for an unknown extension, NaN samples or a sample rate that the
    format does not support, and `StorageError` if the disk is full.
    """
    path = Path(path)
    encoded = encode_audio(samples, sample_rate, path.suffix, name=str(path), subtype=subtype)
    atomic_write(path, encoded, durable=durable)


def encode_audio(
    samples: Mono, sample_rate: int, extension: str, *, name: str = "audio", subtype: str | None = None
) -> bytes:
    """Return the bytes that `write_audio` writes to a file with this `extension`; error messages start with `name`."""
    require_finite(samples, f"{name} (to be written)")
    buffer = io.BytesIO()
    with encode_blocks(buffer, sample_rate, extension, name=name, subtype=subtype, samples=len(samples)) as write:
        write(samples[:, None])
    return buffer.getvalue()


@contextlib.contextmanager
def encode_blocks(
    stream: io.BufferedIOBase,
    sample_rate: int,
    extension: str,
    *,
    name: str = "audio",
    channels: int = 1,
    subtype: str | None = None,
    samples: int = 0,
) -> Iterator[Callable[[Block], None]]:
    """Yield a function that appends blocks to an audio file in `stream`, in the format of an extension.

    The file is complete at the end of the context. Equal blocks give equal bytes, except for the random serial number
    of an Ogg stream. `samples` is the number to come per channel. Raises what `write_audio` raises, and the `OSError`
    of the stream.
    """
    kind = _format_of(name, extension)
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:  # some rates crash libsndfile
        raise AudioError(f"{name}: cannot be written at {sample_rate} Hz; choose a common sample rate")
    if extension.lower() == ".opus":
        subtype = subtype or "OPUS"
    is_pcm16 = (subtype or soundfile.default_subtype(kind)) == "PCM_16"
    if kind == "WAV" and 4 * samples * channels > MAX_WAV_BYTES:
        kind = "RF64"
    target = _ErrorKeeper(stream, f"{name}: cannot be encoded at {sample_rate} Hz")
    with target.explained():
        file = soundfile.SoundFile(target, "w", sample_rate, channels, subtype, format=kind)
    try:
        yield functools.partial(_write_block, file, target, is_pcm16)
    except BaseException:  # the error of the caller is the one to tell
        with contextlib.suppress(soundfile.LibsndfileError):
            file.close()
        raise
    with target.explained():
        file.close()
    _erase_time(stream)


def _write_block(file: soundfile.SoundFile, target: "_ErrorKeeper", is_pcm16: bool, block: Block) -> None:
    with target.explained():
        for first in range(0, len(block), BLOCK):
            part = block[first : first + BLOCK]
            file.write(to_pcm16(part) if is_pcm16 else part)


class _ErrorKeeper:
    """A stream for libsndfile, which loses the errors of the streams it writes to."""

    def __init__(self, stream: io.BufferedIOBase, complaint: str) -> None:
        self.stream = stream
        self.complaint = complaint
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        return self._keep(self.stream.write, data)

    def seek(self, place: int, whence: int) -> int:
        return self._keep(self.stream.seek, place, whence)

    def tell(self) -> int:
        return self._keep(self.stream.tell)

    def read(self, size: int) -> bytes:
        return self.stream.read(size)

    def _keep(self, call: Callable[..., int], *arguments: Any) -> int:
        if self.error is None:  # after an error libsndfile goes on, and even writes when it is freed
            try:
                return call(*arguments)
            except OSError as error:
                self.error = error
        return 0

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise the error of the stream, if there was one, and `AudioError` for what libsndfile cannot encode."""
        try:
            yield
        except (soundfile.LibsndfileError, AssertionError, ValueError) as error:
            self._check()
            raise AudioError(f"{self.complaint} ({_reason(error)}); use .wav or .flac") from error
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error


def _erase_time(stream: io.BufferedIOBase) -> None:
    """Set the time of writing in a PEAK chunk of a WAV header to 0, so that equal sound gives equal files."""
    stream.seek(0)
    header = stream.read(256)
    place = header.find(b"PEAK") if header[:4] in (b"RIFF", b"RF64") else -1
    if place >= 0:
        stream.seek(place + 12)
        stream.write(bytes(4))
    stream.seek(0, io.SEEK_END)


def to_pcm16(samples: Float[np.ndarray, "*shape"]) -> Int16[np.ndarray, "*shape"]:
    """Round `samples` to the nearest 16-bit value, with ±1 as ±32768, and clip."""
    return np.clip(np.rint(samples * np.float32(32768)), -32768, 32767).astype(np.int16)


def pcm16_round_trip(samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Return `samples` as `soundfile` reads them back after writing them to a 16-bit file.

    Data sets written by soundfile hold these values: libsndfile rounds toward −1, whereas `to_pcm16` rounds to the
    nearest value, and clips at ±1. float32 and float64 samples can differ in the last bit.
    """
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 8000, format="WAV", subtype="PCM_16")
    buffer.seek(0)
    return np.asarray(soundfile.read(buffer, dtype="float32")[0])


def require_writable_format(path: str | Path) -> None:
    """Raise `AudioError` if the extension of `path` names no format that can be written."""
    _format_of(str(path), Path(path).suffix)


def resample(samples: Mono, from_rate: int, to_rate: int) -> Float[np.ndarray, "resampled"]:
    """Convert `samples` from one sample rate in Hz to another; the length scales with it, to within a sample."""
    if from_rate == to_rate or samples.size == 0:
        return samples
    return np.ascontiguousarray(soxr.resample(samples, from_rate, to_rate, quality="HQ"))


def resample_blocks(blocks: Iterable[Mono], from_rate: int, to_rate: int) -> Iterator[Mono]:
    """Yield what `resample` returns for the whole of the mono `blocks`, in blocks."""
    for (column,) in resample_columns((block[:, None] for block in blocks), 1, from_rate, to_rate):
        yield column


def resample_columns(blocks: Iterable[Block], channels: int, from_rate: int, to_rate: int) -> Iterator[list[Mono]]:
    """Convert each channel of a recording from one sample rate in Hz to another, in blocks, as `resample` does."""
    if from_rate == to_rate:
        yield from ([np.ascontiguousarray(column) for column in block.T] for block in blocks)
        return
    streams = [soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32", quality="HQ") for _ in range(channels)]
    for block in blocks:
        pairs = zip(streams, block.T, strict=True)
        yield [stream.resample_chunk(np.ascontiguousarray(column)) for stream, column in pairs]
    yield [stream.resample_chunk(np.zeros(0, np.float32), last=True) for stream in streams]


def to_mono(channels: Float[np.ndarray, "channels samples"]) -> Mono:
    """Average the channels."""
    if len(channels) == 2:  # NumPy's mean over two neighbors in memory is slow
        return np.asarray((channels[0] + channels[1]) / 2)
    return np.ascontiguousarray(channels[0] if len(channels) == 1 else channels.mean(axis=0))


def require_finite(samples: Float[np.ndarray, "*any"], name: str) -> None:
    """Raise `AudioError`, naming `name`, for an empty array or one with NaN or infinite samples."""
    if samples.size == 0:
        raise AudioError(f"{name}: holds no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; export it again as integer PCM")


def require_sample_rate(sample_rate: int, name: str) -> None:
    """Raise `AudioError`, naming `name`, for a rate in Hz that no recording has."""
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(f"{name}: has a sample rate of {sample_rate} Hz; give one from 1000 to 768000 Hz")


def require_not_silent(samples: Float[np.ndarray, "*any"], name: str) -> None:
    """Raise `AudioError`, naming `name`, if all samples are equal: digital silence, with or without DC."""
    if samples.size and not np.ptp(samples) > 0:
        raise AudioError(f"{name}: is silent (all samples are {samples.flat[0]:g}); give a recording of speech")


def _format_of(name: str, extension: str) -> str:
    kind = FORMATS.get(extension.lower())
    if kind is None:
        raise AudioError(f"{name}: unknown extension {extension!r}; use .wav, .flac, .ogg or .mp3")
    return kind


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")


def require_ogg_end(source: Path | io.BufferedIOBase, name: str) -> None:
    """Raise `AudioError` for a truncated Ogg file, which libsndfile reads without an error."""
    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as stream:
        stream.seek(0)
        if stream.read(4) != b"OggS":
            return
        stream.seek(max(0, stream.seek(0, io.SEEK_END) - MAX_OGG_PAGE_BYTES))
        if not _has_last_ogg_page(stream.read()):
            raise AudioError(f"{name}: truncated (its last Ogg page is missing); copy it again")


def _has_last_ogg_page(tail: bytes) -> bool:
    """Check whether the last page in `tail` is complete and marked as the last one of the file (RFC 3533)."""
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    is_marked = bool(page[5] & 4)
    return is_marked and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


@contextlib.contextmanager
def open_audio(source: Path | io.BufferedIOBase, name: str) -> Iterator[soundfile.SoundFile]:
    """Open what libsndfile can decode; its errors become an `AudioError` that starts with `name`."""
    try:
        with soundfile.SoundFile(source) as file:
            _require_full_length(file.extra_info, name)
            if not MIN_SAMPLE_RATE <= file.samplerate <= MAX_SAMPLE_RATE:
                raise AudioError(f"{name}: has a sample rate of {file.samplerate} Hz in its header; export it again")
            yield file
    except (soundfile.LibsndfileError, OSError, MemoryError, TypeError, ValueError) as error:
        reason = _reason(error) or "damaged"
        raise AudioError(f"{name}: cannot be decoded ({reason}); give WAV, FLAC, Ogg, Opus or MP3") from error


def is_unknown_format(error: AudioError) -> bool:
    """Check whether `open_audio` failed because libsndfile does not know the format; another decoder may know it."""
    return getattr(error.__cause__, "code", None) in (UNRECOGNIZED_FORMAT, UNSUPPORTED_ENCODING)


def _require_full_length(log: str, name: str) -> None:
    """Raise `AudioError` if, by libsndfile's log, a WAV or AIFF file is not as long as its header says.

    libsndfile itself reads what is there, or what the header says. Writers that cannot seek back leave 0 or about 2 or
    4 GiB as the length, so such a header says nothing. A few bytes beyond the audio are usual.
    """
    stray = _STRAY_BYTES.search(log)
    if stray is not None and int(stray[1]) - int(stray[2]) > MAX_STRAY_BYTES:
        more = int(stray[1]) - int(stray[2])
        raise AudioError(f"{name}: its header leaves out the last {more} bytes; repair it, or export the audio again")
    found = _SIZE_MISMATCH.search(log)
    if found is None:
        return
    expected, actual = int(found[1]), int(found[2])
    if actual < expected < UNKNOWN_LENGTH_BYTES:
        raise AudioError(f"{name}: truncated ({actual} of {expected} bytes of audio); copy it again")
