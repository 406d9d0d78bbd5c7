"""The journal of an evaluation: rows on disk as they come, so that a killed evaluation resumes with the same command.

`RESULT.journal.jsonl` lies beside the result until that is complete. Its first line says what is evaluated, and each
further line is one row, in the order of the trials. A half-written last line is dropped. Because a row is kept whole,
with the seconds of the network, the finished result does not depend on interruptions.

A shard of an evaluation writes nothing but its journal, `RESULT.journal.I-of-N.jsonl`. The command without a shard
takes the rows of all shards over.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from onevoice.errors import ConfigError, StorageError
from onevoice.evaluation.results import TrialRow
from onevoice.files import (
    Shard,
    append_whole,
    lock,
    require_unlocked,
    shard_path,
    shard_paths,
    storage_errors,
    to_json_lines,
    whole_rows,
)

SUFFIX = ".journal.jsonl"


class Journal:
    """The rows of one evaluation, which `identity` describes: JSON values that differ for any other evaluation."""

    def __init__(self, output: Path, identity: Mapping[str, Any], shard: Shard | None = None) -> None:
        whole = output.with_suffix(SUFFIX)
        self.path = shard_path(whole, shard)
        self.parts = [] if shard is not None else shard_paths(whole)
        self.identity = json.loads(json.dumps(identity))  # as it comes back
        self.problem: str | None = None
        """Why rows are no longer kept, such as a full disk; the evaluation itself continues."""
        self._stream: FileIO | None = None

    def resume(self, names: Sequence[str]) -> list[TrialRow]:
        """Return the rows that a killed evaluation of the trials `names`, or its shards, left; [] if there are none.

        Raises `ConfigError` if a journal belongs to another evaluation, or to a shard that is still running.
        """
        for part in self.parts:
            require_unlocked(part)
        rows = {row.name: row for path in (*self.parts, self.path) for row in self._read(path, names)}
        return list(rows.values())

    def _read(self, path: Path, names: Sequence[str]) -> list[TrialRow]:
        found = whole_rows(path)
        before = next(found, None)
        if before is None:
            return []
        differing = [key for key in self.identity if before.get(key) != self.identity[key]]
        if differing:
            raise ConfigError(
                f"{path}: belongs to an unfinished evaluation of something else ({', '.join(differing)} differ); "
                "remove it to start over, or choose another --output"
            )
        try:
            rows = [TrialRow(**row) for row in found]
        except TypeError as error:
            raise ConfigError(f"{path}: is damaged ({error}); remove it to start over") from error
        own = {row.name for row in rows}
        if [row.name for row in rows] != [name for name in names if name in own]:
            raise ConfigError(f"{path}: its trials are not those of this evaluation; remove it to start over")
        return rows

    def append(self, row: TrialRow) -> None:
        """Append a row, which is then on the disk. If it cannot be written, give up the journal and set `problem`."""
        if self.problem is not None:
            return
        try:
            with storage_errors(self.path):
                stream = self._stream or self._open()
                append_whole(stream, to_json_lines([asdict(row)]))
                os.fsync(stream.fileno())
        except StorageError as error:
            self.problem = str(error)
            self.close()
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; it stays for a later `resume`."""
        if self._stream is not None:
            self._stream.close()

    def remove(self) -> None:
        """Remove the file, and those of shards, once the result is complete."""
        self.close()
        for path in (self.path, *self.parts):
            path.unlink(missing_ok=True)

    def _open(self) -> FileIO:
        """Open the file for appending, after its last complete line; a new one begins with the identity."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("ab", buffering=0)
        lock(self._stream.fileno(), self.path)
        whole = to_json_lines(whole_rows(self.path)) or to_json_lines([self.identity])
        self._stream.truncate(0)
        append_whole(self._stream, whole)
        return self._stream
