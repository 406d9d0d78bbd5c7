"""Lists of JSON rows that grow line by line and survive being killed: what manifests and packs are recorded in."""

import json
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from onevoice.files import storage_errors

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
