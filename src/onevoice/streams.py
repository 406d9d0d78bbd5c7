"""Recordings of any length, in any format, read and written in blocks.

- libsndfile (`audio`) reads and writes the formats it knows. The ffmpeg program, if there is one, does the rest through
  a pipe: M4A, MP4, WebM, MKV and whatever else has a sound track.
- `-` is standard input or output; its bytes, and those of files with an address, pass through a temporary file.
- Outputs never replace an input, and get their names only when all of them are complete.
"""

import contextlib
import glob
import importlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from onevoice.addresses import as_address, check_addresses, local_copy, upload
from onevoice.audio import (
    BLOCK,
    Block,
    encode_blocks,
    is_unknown_format,
    open_audio,
    require_file,
    require_ogg_end,
    require_writable_format,
)
from onevoice.errors import AudioError, ConfigError, MissingDependencyError, StorageError
from onevoice.files import require_writable, storage_errors

PIPE = "-"
"""The name of standard input and output."""

FFMPEG_FORMATS = {
    ".m4a": "ipod",
    ".mp4": "mp4",
    ".mov": "mov",
    ".mka": "matroska",
    ".mkv": "matroska",
    ".webm": "webm",
    ".aac": "adts",
    ".wma": "asf",
    ".ac3": "ac3",
}
"""Extensions (lower case) that ffmpeg writes, and its name for each format."""

READABLE_BY_FFMPEG = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,"
    "ogg,tta,w64,wav,wv"
)
"""The containers that ffmpeg may read: no playlists, which could name other files of this machine."""

GET_FFMPEG = 'the ffmpeg program, which is not installed: pip install "onevoice[formats]", or apt install ffmpeg'

Process = subprocess.Popen[bytes]
Complaint = Callable[[], str]


@dataclass(frozen=True)
class Source:
    """An audio file that can be read in blocks, any number of times."""

    name: str
    """What messages call it."""
    path: Path
    channels: int
    sample_rate: int
    samples: int | None
    """Samples per channel; None if only decoding tells."""

    def blocks(self) -> Iterator[Block]:
        """Yield the samples. Raises `AudioError` for a file that is truncated, damaged, or not finite."""
        found = 0
        for block in self._known_blocks() if self.samples is not None else self._ffmpeg_blocks():
            if not np.isfinite(block).all():
                raise AudioError(f"{self.name}: holds NaN or infinite samples; export it again as integer PCM")
            found += len(block)
            yield block
        if self.samples is not None and found < self.samples:
            raise AudioError(
                f"{self.name}: truncated ({found} of {self.samples} samples can be decoded); copy it again"
            )

    def _known_blocks(self) -> Iterator[Block]:
        assert self.samples is not None
        with open_audio(self.path, self.name) as file:
            left = self.samples
            while left > 0:
                block = file.read(min(BLOCK, left), dtype="float32", always_2d=True)
                if not len(block):
                    break
                left -= len(block)
                yield block
            require_ogg_end(self.path, self.name)

    def _ffmpeg_blocks(self) -> Iterator[Block]:
        with _decode_with_ffmpeg(self.path, self.name) as (process, complaint, (_, channels)):
            assert process.stdout is not None
            size = 4 * channels
            while data := process.stdout.read(size * BLOCK):
                whole = len(data) // size * size
                yield np.frombuffer(data[:whole], ">f4").reshape(-1, channels).astype(np.float32)
            if process.wait():
                raise AudioError(f"{self.name}: cannot be decoded to its end ({complaint() or 'ffmpeg failed'})")


@contextlib.contextmanager
def open_source(name: str | Path, folder: Path | None = None) -> Iterator[Source]:
    """Look at an audio file, without decoding all of it. `-` is standard input, kept in a temporary file in `folder`.

    Raises `AudioError` if it is missing, empty or unknown, and `MissingDependencyError` if only ffmpeg could tell.
    """
    if str(name) != PIPE:
        with local_copy(name if as_address(name) else _as_path(name), folder) as path:
            yield _look(require_file(path), as_address(name) or str(name))
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".onevoice-") as copy:
        with storage_errors(Path(copy.name)):
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.flush()
        if not copy.tell():
            raise AudioError("standard input: is empty; give it the bytes of an audio file")
        yield _look(Path(copy.name), "standard input")


def is_here(name: str | Path) -> bool:
    """Check whether a name is that of a file on this machine: not standard input or output, and no address."""
    return str(name) != PIPE and as_address(name) is None


def _as_path(name: str | Path) -> Path:
    if "://" in str(name) or str(name).startswith(("https:/", "http:/")):
        raise AudioError(f"{name}: is an address, not a file; download it and name the file")
    return Path(name)


def _look(path: Path, name: str) -> Source:
    try:
        with open_audio(path, name) as file:
            if not file.frames:
                raise AudioError(f"{name}: holds no samples")
            return Source(name, path, file.channels, file.samplerate, file.frames)
    except AudioError as error:
        if not is_unknown_format(error):
            raise
        if find_ffmpeg() is None:
            raise AudioError(f"{name}: cannot be decoded without {GET_FFMPEG}") from error
    with _decode_with_ffmpeg(path, name) as (_, _, (sample_rate, channels)):
        return Source(name, path, channels, sample_rate, None)


def find_ffmpeg() -> str | None:
    """Return the ffmpeg program on the path, or that of the package imageio-ffmpeg; None if there is none."""
    found = shutil.which("ffmpeg")
    if found is not None:
        return found
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


@contextlib.contextmanager
def _decode_with_ffmpeg(path: Path, name: str) -> Iterator[tuple[Process, Complaint, tuple[int, int]]]:
    """Run ffmpeg on the first sound track; yield it as `_run` does, with the rate in Hz and the channels.

    Its output is big-endian float32 samples, after the header of a Sun AU file: six 32-bit numbers, which are magic,
    size of the header, size of the data, encoding (6 is float32), rate, channels.
    """
    program = find_ffmpeg()
    if program is None:
        raise MissingDependencyError(f"{name}: needs {GET_FFMPEG}")
    command = [program, "-v", "error", "-nostdin", "-protocol_whitelist", "file"]
    command += ["-format_whitelist", READABLE_BY_FFMPEG, "-i", f"file:{path}", "-map", "0:a:0", "-vn"]
    command += ["-c:a", "pcm_f32be", "-f", "au", "-"]
    with _run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as (process, complaint):
        assert process.stdout is not None
        header = process.stdout.read(24)
        magic, offset, _, encoding, rate, channels = struct.unpack(">4s5I", header) if len(header) == 24 else (b"",) * 6
        if magic != b".snd" or encoding != 6:
            raise AudioError(f"{name}: cannot be decoded ({complaint() or 'it has no sound'})")
        process.stdout.read(offset - 24)
        yield process, complaint, (rate, channels)


@contextlib.contextmanager
def _run(command: Sequence[str], *, stdin: int, stdout: int) -> Iterator[tuple[Process, Complaint]]:
    """Run a program; yield it, and a function that waits for its end and returns its last line on standard error.

    It is ended with the context. Ctrl-C reaches this process only, so that it can tidy up.
    """
    with tempfile.TemporaryFile() as errors:

        def complaint() -> str:
            process.wait()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or [""]
            return lines[-1].split(": ")[-1].strip().rstrip(".")

        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=errors, start_new_session=True)
        try:
            yield process, complaint
        finally:
            for stream in filter(None, (process.stdin, process.stdout)):
                _close_quietly(stream)
            if process.poll() is None:
                process.kill()
                process.wait()


# Writing --------------------------------------------------------------------------------------------------------


Write = Callable[[Block], None]
FileKey = tuple[str, str]


def check_outputs(
    outputs: Iterable[str | Path | None],
    inputs: Iterable[str | Path],
    force: bool = False,
    texts: Iterable[str | Path | None] = (),
) -> None:
    """Check, before long work, that every output and text can be written, and that none is an input or another output.

    Links and other spellings of a path count as the same file. An existing file needs `force`; files elsewhere are not
    looked at. Raises `ConfigError`, `StorageError`, `MissingDependencyError`, `AudioError` for an unknown extension.
    """
    given: dict[FileKey, Path] = {}
    seen: set[FileKey] = set()
    inputs, asked = list(inputs), [output for output in outputs if output is not None and str(output) != PIPE]
    check_addresses(inputs, asked)
    for path in map(Path, filter(is_here, inputs)):
        given |= dict.fromkeys(_same_file_keys(path)[0], path)
    for each in asked:
        _require_writable_format(Path(each) if as_address(each) else _as_path(each))
    sounds = [Path(each) for each in asked if is_here(each)]
    for path in [*sounds, *(_as_path(text) for text in texts if text is not None)]:
        with storage_errors(path):
            stored, wanted = _same_file_keys(path)
            twins = [given[key] for key in wanted if key in given]
            if twins:
                raise ConfigError(f"{path}: is the input {twins[0]}; write to another file")
            if seen & wanted:
                raise ConfigError(f"{path}: is the name of two outputs; give them two names")
            if os.path.lexists(path) and not path.is_file():
                raise ConfigError(f"{path}: exists and is not a file; write to another place")
            if os.path.lexists(path) and not force:
                raise ConfigError(f"{path}: exists; choose another name, or overwrite it with --force")
        require_writable(path)
        seen |= stored


def _same_file_keys(path: Path) -> tuple[set[FileKey], set[FileKey]]:
    """Return keys to store a path under, and keys that find it: two paths match if they name one file.

    Two files that exist are the same if the disk says so. Otherwise their full names decide, as the output will exist
    later; case counts as equal, as it is on some disks.
    """
    name = str(path.resolve()).casefold()
    if not path.exists():
        return {("missing", name)}, {("missing", name), ("there", name)}
    status = path.stat()
    identity = (str(status.st_dev), str(status.st_ino))
    return {identity, ("there", name)}, {identity, ("missing", name)}


def _require_writable_format(path: Path) -> None:
    if path.suffix.lower() not in FFMPEG_FORMATS:
        require_writable_format(path)
    elif find_ffmpeg() is None:
        raise MissingDependencyError(f"{path}: needs {GET_FFMPEG}")


def keeps_peaks(path: str | Path) -> bool:
    """Check whether a file of this name holds samples beyond ±1: a WAV file does, as 32-bit float."""
    return str(path) == PIPE or Path(path).suffix.lower() == ".wav"


@contextlib.contextmanager
def write_together(
    paths: Sequence[str | Path], sample_rate: int, channels: int, samples: int
) -> Iterator[tuple[Write, ...]]:
    """Yield one function per path that appends blocks to it; all files get their names at the end, or none does.

    WAV is 32-bit float; other formats have their usual sample type. `samples` is the number to come per channel.
    Raises `StorageError` if the disk is full and `AudioError` if a format does not support the rate or the channels.
    """
    temporary = [_temporary_path(path) for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            writers = (
                _write_one(path, part, sample_rate, channels, samples)
                for path, part in zip(paths, temporary, strict=True)
            )
            yield tuple([stack.enter_context(writer) for writer in writers])
        for index, (path, part) in enumerate(zip(paths, temporary, strict=True)):
            try:
                _deliver(part, path)
            except StorageError:
                for whole in filter(is_here, paths[:index]):
                    Path(whole).unlink(missing_ok=True)
                raise
    finally:
        for part in temporary:
            part.unlink(missing_ok=True)


def _temporary_path(path: str | Path) -> Path:
    """Return a hidden name beside `path`; remove what processes that were killed left under such names."""
    if not is_here(path):
        key, suffix = zlib.crc32(str(path).encode()), Path(path).suffix or ".wav"
        return Path(tempfile.gettempdir(), f".onevoice.{os.getpid()}.{key}.part{suffix}")
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part{glob.escape(path.suffix)}"):
            number = left.name.removeprefix(f".{path.name}.").split(".")[0]
            if number.isdigit() and not Path(f"/proc/{number}").exists() and Path("/proc").exists():
                left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")


@contextlib.contextmanager
def _write_one(path: str | Path, part: Path, sample_rate: int, channels: int, samples: int) -> Iterator[Write]:
    name, path = "standard output" if str(path) == PIPE else as_address(path) or str(path), Path(path)
    if path.suffix.lower() in FFMPEG_FORMATS:
        with _encode_with_ffmpeg(path, part, sample_rate, channels) as write_piped:
            yield write_piped
        return
    extension, subtype = path.suffix or ".wav", "FLOAT" if keeps_peaks(path) else None
    options: dict[str, Any] = {"channels": channels, "samples": samples, "subtype": subtype}
    with contextlib.ExitStack() as file, contextlib.ExitStack() as encoder:
        with storage_errors(path):
            stream = part.open("w+b")
            file.callback(_close_quietly, stream)
            encode = encoder.enter_context(encode_blocks(stream, sample_rate, extension, name=name, **options))

        def write(block: Block) -> None:
            with storage_errors(path):
                encode(block)

        yield write
        with storage_errors(path):
            encoder.close()
            stream.flush()
            os.fsync(stream.fileno())


def _close_quietly(stream: IO[bytes]) -> None:
    """Close a stream that is either on the disk already or has told its error."""
    with contextlib.suppress(OSError):
        stream.close()


@contextlib.contextmanager
def _encode_with_ffmpeg(path: Path, part: Path, sample_rate: int, channels: int) -> Iterator[Write]:
    program = find_ffmpeg()
    if program is None:
        raise MissingDependencyError(f"{path}: needs {GET_FFMPEG}")
    command = [program, "-v", "error", "-y", "-f", "f32le", "-ar", str(sample_rate), "-ac", str(channels), "-i", "-"]
    command += ["-fflags", "+bitexact", "-flags:a", "+bitexact", "-map_metadata", "-1"]
    command += ["-f", FFMPEG_FORMATS[path.suffix.lower()], f"file:{part}"]
    with _run(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as (process, complaint):
        assert process.stdin is not None
        stream = process.stdin

        def write(block: Block) -> None:
            try:
                stream.write(np.ascontiguousarray(block, "<f4").tobytes())
            except BrokenPipeError:
                raise AudioError(f"{path}: cannot be encoded ({complaint() or 'ffmpeg ended'})") from None

        yield write
        with contextlib.suppress(BrokenPipeError):
            stream.close()
        if process.wait():
            raise AudioError(f"{path}: cannot be encoded ({complaint() or 'ffmpeg failed'}); use .wav or .flac")


def _deliver(part: Path, path: str | Path) -> None:
    if str(path) == PIPE:
        with part.open("rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    elif address := as_address(path):
        upload(part, address)
    else:
        with storage_errors(Path(path)):
            part.replace(path)
