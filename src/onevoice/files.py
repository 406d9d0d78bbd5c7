"""Writing files so that a file is complete once it has its name, checksums, rows of JSON, and what a file is.

Work that is shared by several commands is split into shards, and each keeps its rows in a file of its own beside those
of the whole.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from onevoice.errors import ConfigError, StorageError

Row = dict[str, Any]
"""One JSON object: a row of a table, or a whole document."""
Item = TypeVar("Item")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` while writing `path` into a one-line `StorageError` that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{path}: cannot be written ({reason}); free space or choose another place") from error


@contextlib.contextmanager
def sole_writer(folder: Path, is_needed: bool = True, shard: "Shard | None" = None) -> Iterator[None]:
    """Keep other processes that call this out of `folder`, which is created; the lock ends with this process.

    Processes with different shards may write together, but not beside one without a shard. Raises `ConfigError` if
    another process has the lock. A file system without locks, or `is_needed=False`, gives none.
    """
    if not is_needed:
        yield
        return
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder, os.O_RDONLY)
    try:
        lock(number, folder, is_shared=shard is not None)
        _close_in_forks()
        _locked.add(number)
        yield
    finally:
        _locked.discard(number)
        os.close(number)


def lock(number: int, path: Path, *, is_shared: bool = False) -> None:
    """Lock an open file or folder until it is closed; raise `ConfigError` if another process has the lock.

    Several processes can have a shared lock.
    """
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(number, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{path}: another process is writing to it; let it finish, or choose another place") from None
    except OSError:  # some network file systems have no locks
        return


def require_unlocked(path: Path) -> None:
    """Raise `ConfigError` if another process has the lock of a file, which may be missing."""
    if path.exists():
        with path.open("rb") as stream:
            lock(stream.fileno(), path)


_locked: set[int] = set()
"""Open folders with a lock. A lock ends when all copies of its number are closed, so forked processes close theirs."""


@functools.cache
def _close_in_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_locks)


def _forget_locks() -> None:
    for number in _locked:
        os.close(number)
    _locked.clear()


def require_writable(path: Path) -> None:
    """Raise `StorageError` if `path` cannot be written; call it before long work whose result goes there."""
    with storage_errors(path):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        probe = folder / _temporary_name(path)
        probe.touch()
        probe.unlink(missing_ok=True)  # another thread may have the same one


def atomic_write(path: Path, data: bytes | Callable[[Path], None], *, durable: bool = True) -> None:
    """Write `data` to a temporary file in the folder of `path`, then rename it to `path`.

    `data` is the content, or a function that writes the content to the path it is given. With `durable`, the bytes
    are flushed to the disk before the rename, so that even a power failure leaves no half-written file; without it,
    only a crash of the process is covered. A missing folder is created.

    Raises `StorageError` if the disk is full or the folder is not writable, and removes the temporary file.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(_temporary_name(path))
        try:
            with temporary.open("wb") as stream:
                if isinstance(data, bytes):
                    stream.write(data)
                else:
                    data(temporary)
                if durable:
                    os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def to_json_lines(rows: Iterable[Row]) -> bytes:
    """Return one line of JSON per row."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def to_json(values: Row) -> bytes:
    """Return a JSON object as indented text."""
    return json.dumps(values, ensure_ascii=False, indent=1).encode() + b"\n"


def checksum(values: Row, content: bytes | memoryview = b"") -> str:
    """Return the SHA-256 of a JSON object, whatever the order of its keys, and of the bytes that belong to it."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    digest.update(content)
    return digest.hexdigest()


CHECKSUM_KEY = "onevoice_sha256"
"""The metadata of a `.safetensors` file that holds the checksum of all the rest."""


def join_tensors(header: Row, content: bytes | memoryview) -> bytes:
    """Return the bytes of a `.safetensors` file, with its checksum, from its header and the bytes of its tensors."""
    metadata = {**header["__metadata__"], CHECKSUM_KEY: checksum(header, content)}
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, content])


def split_tensors(data: bytes) -> tuple[Row, memoryview]:
    """Return the header of a `.safetensors` file, without its checksum, and the bytes of its tensors.

    Raises `ValueError` if they differ from the checksum; files of other programs, and older ones, have none.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8:end]), memoryview(data)[end:]
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    expected = metadata.pop(CHECKSUM_KEY, None) if isinstance(metadata, dict) else None
    if expected is not None and expected != checksum(header, content):
        raise ValueError("its content differs from its checksum")
    return header, content


KINDS = (
    (b"RIFF", "a WAV recording"),
    (b"fLaC", "a FLAC recording"),
    (b"OggS", "an Ogg recording"),
    (b"ID3", "an MP3 recording"),
    (b"\xff\xfb", "an MP3 recording"),
    (b"PK", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x80", "a pickle"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x7fELF", "a program"),
    (b"version https://git-lfs", "a Git LFS pointer, whose file was not downloaded"),
    (b"<", "an HTML or XML page"),
    (b"{", "JSON"),
    (b"[", "JSON"),
)
"""How files begin, and what they then are."""


def describe_file(path: Path) -> str | None:
    """Return what kind of file this is by its first bytes, such as "a WAV recording"; None if they do not tell."""
    with path.open("rb") as stream:
        start = stream.read(1000)
    if not start:
        return "an empty file"
    if start[4:9] == b"\0\0\0\0{":
        return None  # .safetensors: the length of a header in JSON comes first, and may look like anything
    for magic, kind in KINDS:
        if start.startswith(magic):
            return kind
    text = start.decode("utf-8", errors="ignore")
    return "text" if len(text) > 0.99 * len(start) and text.replace("\n", "").replace("\t", "").isprintable() else None


def append_whole(stream: FileIO, data: bytes) -> None:
    """Append `data` to an unbuffered file, all of it or nothing; raise `StorageError` if the disk is full."""
    with storage_errors(Path(stream.name)):
        size = stream.tell()
        try:
            while data:
                data = data[stream.write(data) :]
        except OSError:
            stream.truncate(size)
            raise


def whole_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file up to the first incomplete line; a missing file has none."""
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        row = parse_row(line)
        if row is None:
            return
        yield row


def parse_row(line: bytes) -> Row | None:
    """Return the row of a line; None for a damaged line, also one that cannot be written again."""
    try:
        row = json.loads(line)
        if b"\\ud" in line:
            to_json_lines([row])  # half of a pair of surrogates is no UTF-8
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _temporary_name(path: Path) -> str:
    return f".{path.name}.{os.getpid()}.part"


def package_file(package: str, name: str) -> Path | None:
    """Return a data file of an installed package without importing the package; None if it is not there."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for path in (Path(folder) / name for folder in folders) if path.is_file()), None)


@dataclass(frozen=True)
class Shard:
    """One of `count` equal parts of independent work, counted from 1; each part is a command of its own."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return every `count`-th of the items."""
        return items[self.number - 1 :: self.count]


def parse_shard(text: str | None) -> Shard | None:
    """Return the shard that I/N names; None without one. Raises `ConfigError`."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard: {text!r} is no shard; give I/N, from 1/N to N/N")
    return Shard(int(number), int(count))


def shard_path(path: Path, shard: Shard | None) -> Path:
    """Return the file in which a shard keeps what will be in `path`: NAME.I-of-N.EXTENSION."""
    return path if shard is None else path.with_name(f"{path.stem}.{shard}{path.suffix}")


def shard_paths(path: Path) -> list[Path]:
    """Return the files that shards have left for `path`, of any number of shards."""
    form = re.compile(re.escape(f"{path.stem}.") + r"\d+-of-\d+" + re.escape(path.suffix))
    return sorted(each for each in path.parent.glob("*-of-*") if form.fullmatch(each.name))
