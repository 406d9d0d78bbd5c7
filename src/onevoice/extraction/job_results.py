"""The results of a job list: a row of JSON per job, written as it or its group ends, so that the same command resumes.

The first line says to which job list the rows belong. A shard keeps its rows in NAME.I-of-N.jsonl; the command without
a shard takes them over, does what is missing, and writes the rows of all jobs in their order.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onevoice.addresses import as_address
from onevoice.errors import ConfigError
from onevoice.extraction.jobs import Failure, Job
from onevoice.extraction.recording import Extraction
from onevoice.files import (
    Row,
    Shard,
    append_whole,
    atomic_write,
    lock,
    require_unlocked,
    shard_path,
    shard_paths,
    storage_errors,
    to_json_lines,
    whole_rows,
)


def row_of(job: Job, result: Extraction | Failure) -> Row:
    """Return the row of a job that has ended."""
    row: Row = {"mixture": job.mixture, "output": job.output}
    if isinstance(result, Failure):
        return {**row, "error": result.message}
    present = None if result.presence is None else round(result.presence.score_db, 2)
    seconds = {"seconds": result.seconds, "elapsed_seconds": round(result.elapsed_seconds, 3)}
    return {**row, **seconds, "presence_db": present, "notes": list(result.notes), "error": None}


class JobResults:
    """The file of the results of `jobs`, all jobs of the list, or the file of one shard of them.

    Raises `ConfigError` if the file belongs to another list, or another process writes to it.
    """

    def __init__(self, path: Path, jobs: Sequence[Job], shard: Shard | None = None) -> None:
        self.path, self.shard, self.jobs = shard_path(path, shard), shard, jobs
        digest = hashlib.sha256(json.dumps([asdict(job) for job in jobs]).encode()).hexdigest()
        self.header: Row = {"jobs": len(jobs), "jobs_sha256": digest}
        self.parts = [] if shard is not None else shard_paths(path)
        self.is_resumed = self.path.exists()
        self._done = {row["output"]: row for part in [*self.parts, self.path] for row in self._read(part)}

    @property
    def done(self) -> int:
        """The number of jobs that are done, of this shard."""
        return len(self._own()) - len(self.left)

    @property
    def left(self) -> list[Job]:
        """The jobs of this shard that are still to do: failed ones are tried again, lost outputs are made again."""
        return [job for job in self._own() if job.output not in self._done or not _is_there(job.output)]

    @contextlib.contextmanager
    def appending(self) -> Iterator[Any]:
        """Yield a function that appends the row of a job. At the end, write the rows in the order of the jobs."""
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = self.path.open("ab", buffering=0)
        with stream:
            lock(stream.fileno(), self.path)
            rows = self._rows()
            stream.truncate(0)
            append_whole(stream, to_json_lines(rows))

            def append(job: Job, result: Extraction | Failure) -> None:
                row = row_of(job, result)
                append_whole(stream, to_json_lines([row]))
                self._done[job.output] = row

            yield append
            atomic_write(self.path, to_json_lines(self._rows()))
        for part in self.parts:
            part.unlink(missing_ok=True)

    def _own(self) -> Sequence[Job]:
        return self.jobs if self.shard is None else self.shard.of(self.jobs)

    def _rows(self) -> list[Row]:
        return [self.header, *(self._done[job.output] for job in self.jobs if job.output in self._done)]

    def _read(self, path: Path) -> list[Row]:
        """Return the rows of jobs that are done. Raises `ConfigError`."""
        require_unlocked(path)
        header, *rows = [*whole_rows(path)] or [self.header]
        if header != self.header or not all(isinstance(row.get("output"), str) for row in rows):
            raise ConfigError(f"{path}: holds something other than the results of this job list; name another file")
        return [row for row in rows if row.get("error") is None]


def _is_there(output: str) -> bool:
    """Check whether an output exists; one elsewhere is taken for granted, since its row is written after it."""
    return as_address(output) is not None or Path(output).is_file()
