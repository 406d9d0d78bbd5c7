"""Where speech lies: files and members of tar shards, and the utterances they hold.

A tar is read in place: its members are listed once, by name, offset and size, and each is then read by its offset.
A `Recording` is a plain value without an open file, so it can be sent to any process.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from onevoice.audio import Mono, decode_audio, probe_audio, require_file
from onevoice.errors import AudioError, CorpusError

COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")
"""Endings of archives in which no member can be reached without unpacking."""


@dataclass(frozen=True)
class Recording:
    """One sound file: a whole file, or `size` bytes of a tar shard from `offset` on.

    `name` is what messages and indexes call it; it does not depend on where the corpus is mounted.
    """

    path: Path
    name: str
    offset: int = 0
    size: int | None = None

    def read(self, sample_rate: int | None = None) -> tuple[Mono, int]:
        """Return `(mono samples, rate in Hz)`, converted to `sample_rate` if given; `AudioError` if unusable."""
        return decode_audio(self._bytes(), self.name, sample_rate)

    def probe(self) -> tuple[int, int]:
        """Return `(samples, rate in Hz)` as the header says, or raise `AudioError`."""
        return probe_audio(self._bytes(), self.name)

    def size_bytes(self) -> int:
        """Return the size of the sound file in bytes; −1 when it is missing."""
        if self.size is not None:
            return self.size
        return self.path.stat().st_size if self.path.is_file() else -1

    def fault(self, error: AudioError) -> "Fault":
        """Return `error` as the fault of this recording, without the file named twice."""
        return Fault(self.name, str(error).removeprefix(f"{self.path}: ").removeprefix(f"{self.name}: "))

    def _bytes(self) -> Path | io.BytesIO:
        if self.size is None:
            return require_file(self.path)
        if self.size == 0:
            raise AudioError(f"{self.name}: the file is empty (0 bytes)")
        try:
            with self.path.open("rb") as shard:
                shard.seek(self.offset)
                return io.BytesIO(shard.read(self.size))
        except OSError as error:
            raise AudioError(f"{self.name}: cannot be read ({error.strerror}); copy the shard again") from error


@dataclass(frozen=True)
class Utterance:
    """One recording of one speaker. `id` is `speaker/name` and unique in a corpus.

    `gender` is "female", "male" or None for unknown; `seconds` and `sample_rate` in Hz are None until the file has
    been looked at.
    """

    id: str
    speaker: str
    source: Recording
    gender: str | None = None
    seconds: float | None = None
    sample_rate: int | None = None


@dataclass(frozen=True)
class Fault:
    """Something left out: what, why, and for how many utterances it counts in the share of broken ones."""

    source: str
    reason: str
    utterances: int = 1

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass
class Listing:
    """What a place holds: utterances, what is wrong there, and what was passed over, by reason, with an example."""

    utterances: list[Utterance] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def pass_over(self, name: str, reason: str) -> None:
        """Count `name` as something that is rightly not read."""
        self.passed_over[reason] += 1
        self.examples.setdefault(reason, name)


def tar_members(path: Path) -> Iterator[Recording | Fault]:
    """Yield the regular members of an uncompressed tar in their order, and what is wrong with it.

    A shard that is cut short yields its whole members and at the end one `Fault`, which counts for as many
    utterances as were found before: nobody knows how many are missing. Raises `CorpusError` for what is no tar.
    """
    end, found = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                name = f"{path.name}:{member.name}"
                if member.offset_data + member.size > end:
                    break
                if member.isreg() and not member.issparse():
                    found += 1
                    yield Recording(path, name, member.offset_data, member.size)
                elif not member.isdir():
                    yield Fault(name, "is a link or a special file; a shard must hold the sound itself")
            complete = tar.offset < end and _is_end(path, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise CorpusError(f"{path}: cannot be read as an uncompressed tar ({error}); copy or build it again") from error
    if not complete:
        yield Fault(path.name, f"the shard is cut short after {found} whole members; copy it again", max(found, 1))


def require_uncompressed(path: Path) -> None:
    """Raise `CorpusError` for a compressed archive, in which no member can be reached without unpacking."""
    if path.suffix.lower() in COMPRESSED:
        raise CorpusError(f"{path}: is compressed and cannot be read in place; unpack it, or decompress it to a .tar")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members up to the end or the first that is damaged."""
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


def _is_end(path: Path, offset: int) -> bool:
    """Say whether a block of zeros, the end mark of a tar, stands at `offset`."""
    with path.open("rb") as shard:
        shard.seek(offset)
        return shard.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
