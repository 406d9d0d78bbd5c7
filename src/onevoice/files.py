"""Writing files so that what stands under the final name is always whole."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from onevoice.errors import StorageError


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` while writing `path` into a `StorageError` of one line that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{path}: cannot be written ({reason}); free space or choose another place") from error


def require_writable(path: Path) -> None:
    """Raise `StorageError` when `path` could not be written, before long work is spent on what goes there."""
    with storage_errors(path):
        folder = next(above for above in path.absolute().parents if above.exists())
        probe = folder / f".{path.name}.{os.getpid()}.part"
        probe.touch()
        probe.unlink()


def atomic_write(path: Path, data: bytes | Callable[[Path], None], *, durable: bool = True) -> None:
    """Write `data` under `path` by a temporary file in the same folder and a rename.

    `data` is the content, or a function that writes the content to the path it is given. With `durable` the
    bytes are flushed to the disk before the rename, so that not even a power cut leaves half a file; without,
    only a crash of the process is covered. The folder is made when missing.

    Raises `StorageError` when the disk is full or the place is not writable; nothing is left behind then.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
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


Row = dict[str, Any]


def to_lines(rows: Iterable[Row]) -> bytes:
    """Return rows as lines of JSON."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def to_document(values: Row) -> bytes:
    """Return a JSON object as an indented text."""
    return json.dumps(values, ensure_ascii=False, indent=1).encode() + b"\n"


def whole_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file up to the first line that is torn; none when there is no such file."""
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict):
            return
        yield row


def append_whole(stream: FileIO, data: bytes) -> None:
    """Append `data` to an unbuffered file, all of it or nothing; raises `StorageError` when the disk is full."""
    with storage_errors(Path(stream.name)):
        before = stream.tell()
        try:
            while data:
                data = data[stream.write(data) :]
        except OSError:
            stream.truncate(before)
            raise
