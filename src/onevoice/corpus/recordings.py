"""Recordings: audio files and members of tar shards, and the utterances they hold.

A tar shard, here or at an address, is read in place: its members are listed once with their offsets and sizes, and each
is then read at its offset. A `Recording` is a plain value without an open file, so it can be sent to any process.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onevoice.addresses import open_bytes, read_range
from onevoice.audio import Mono, decode_audio, probe_audio, require_file
from onevoice.errors import AudioError, CorpusError

COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")
"""Extensions of archives whose members can only be read after unpacking."""


@dataclass(frozen=True)
class Recording:
    """One audio file: a whole file, or `size` bytes of a tar shard starting at `offset`.

    `name` identifies it in messages and indexes, and does not depend on where the corpus is mounted.
    """

    path: Path
    name: str
    offset: int = 0
    size: int | None = None

    def read(self, sample_rate: int | None = None) -> tuple[Mono, int]:
        """Return `(mono samples, rate in Hz)`, converted to `sample_rate` if given; `AudioError` if unusable."""
        return decode_audio(self._bytes(), self.name, sample_rate)

    def probe(self) -> tuple[int, int]:
        """Return `(samples, rate in Hz)` from the header, or raise `AudioError`."""
        return probe_audio(self._bytes(), self.name)

    def size_bytes(self) -> int:
        """Return the size of the audio file in bytes; −1 if it is missing."""
        if self.size is not None:
            return self.size
        return self.path.stat().st_size if self.path.is_file() else -1

    def fault(self, error: AudioError) -> "Fault":
        """Return `error` as a fault of this recording, with the file named only once."""
        return Fault(self.name, str(error).removeprefix(f"{self.path}: ").removeprefix(f"{self.name}: "))

    def _bytes(self) -> Path | io.BytesIO:
        if self.size is None:
            return require_file(self.path)
        if self.size == 0:
            raise AudioError(f"{self.name}: the file is empty (0 bytes)")
        try:
            return io.BytesIO(read_range(self.path, self.offset, self.size))
        except OSError as error:
            raise AudioError(f"{self.name}: cannot be read ({error.strerror}); copy the shard again") from error


@dataclass(frozen=True)
class Utterance:
    """One recording of one speaker. `id` is `speaker/name` and unique in a corpus.

    `gender` is "female", "male" or None if unknown. `seconds` and `sample_rate` in Hz are None until the file has been
    inspected.
    """

    id: str
    speaker: str
    recording: Recording
    gender: str | None = None
    seconds: float | None = None
    sample_rate: int | None = None


@dataclass(frozen=True)
class Fault:
    """Something that cannot be used, the reason, and how many utterances it counts for in the broken share."""

    name: str
    reason: str
    utterances: int = 1

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class Listing:
    """The contents of one source: utterances, faults, and how many files are ignored, with an example per reason."""

    utterances: list[Utterance] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def ignore(self, name: str, reason: str) -> None:
        """Count `name` as a file that is not meant to be read."""
        self.ignored[reason] += 1
        self.examples.setdefault(reason, name)


def tar_members(path: Path) -> Iterator[Recording | Fault]:
    """Yield the regular members of an uncompressed tar in order, and what is wrong with it.

    A truncated shard yields its complete members and then one `Fault`. Nobody knows how many members are missing, so
    it counts for as many utterances as were found. Raises `CorpusError` if the file is not an uncompressed tar.
    """
    found = 0
    try:
        with open_bytes(path) as shard, tarfile.open(fileobj=shard, mode="r:") as tar:
            end = shard.seek(0, io.SEEK_END)
            shard.seek(tar.offset)
            for member in _members(tar):
                name = f"{path.name}:{member.name}"
                if member.offset_data + member.size > end:
                    break
                if member.isreg() and not member.issparse():
                    found += 1
                    yield Recording(path, name, member.offset_data, member.size)
                elif not member.isdir():
                    yield Fault(name, "is a link or a special file; a shard must hold the audio itself")
            complete = tar.offset < end and _has_end_mark(shard, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise CorpusError(f"{path}: cannot be read as an uncompressed tar ({error}); copy or build it again") from error
    if not complete:
        yield Fault(path.name, f"the shard is truncated after {found} complete members; copy it again", max(found, 1))


def require_uncompressed(path: Path) -> None:
    """Raise `CorpusError` for a compressed archive, whose members can only be read after unpacking."""
    if path.suffix.lower() in COMPRESSED:
        raise CorpusError(f"{path}: is compressed and cannot be read in place; unpack it, or decompress it to a .tar")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members up to the end or to the first damaged one."""
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:
            if tar.offset == 0:
                raise
            return
        if member is None:
            return
        yield member


def _has_end_mark(shard: Any, offset: int) -> bool:
    """Check whether the end mark of a tar, a block of zeros, is at `offset`."""
    shard.seek(offset)
    return bool(shard.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE))
