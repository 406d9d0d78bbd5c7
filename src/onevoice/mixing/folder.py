"""Trials in a folder: one frame that makes, writes and counts them, and resumes an interrupted run.

    mixture.json     the settings and, when the run is complete, its summary
    manifest.jsonl   one row per written mixture, in the order of the trials: how it was made
    skipped.jsonl    one row per draw that was not used, and one per trial given up: why

Two modules fill such folders: `mixing.generator` draws trials from a corpus, `trials.export` copies a data set.

The rows of a trial are appended after its files are written, first to `skipped.jsonl`, then to `manifest.jsonl`. So a
run can stop at any moment: reading ends at the first incomplete line, a trial with missing rows or files is made again,
and the finished folder holds the same bytes as one that was never interrupted.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from tqdm import tqdm

from onevoice.audio import Mono, write_audio
from onevoice.cluster import Workers
from onevoice.errors import CorpusError
from onevoice.files import (
    Row,
    Shard,
    append_whole,
    atomic_write,
    lock,
    require_unlocked,
    shard_path,
    shard_paths,
    sole_writer,
    storage_errors,
    to_json,
    to_json_lines,
    whole_rows,
)
from onevoice.processes import ordered_map

SETTINGS = "mixture.json"
MANIFEST = "manifest.jsonl"
SKIPPED = "skipped.jsonl"
GIVEN_UP = "given up"
SUFFIXES = {"mixture": "-mixed", "enrollment": "-ref", "target": "-target"}
"""What follows the name of a trial in the names of its three files."""
FIELDS: dict[str, dict[str, type]] = {
    MANIFEST: {
        "index": int,
        "name": str,
        "mixtures": int,
        "samples": int,
        "enrollment_samples": int,
        "sample_rate": int,
    },
    SKIPPED: {"index": int, "reason": str},
}
"""What each row must have to be resumed from."""
WAV_HEADER_BYTES = 44


class MadeMixture(NamedTuple):
    """A mixture to write: its sounds, and its row, which has at least a `name`, a `sample_rate` and an `index`."""

    row: Row
    mixture: Mono
    target: Mono
    enrollment: Mono


class MadeTrial(NamedTuple):
    """A trial to write: its mixtures, and a row for each draw that was not used."""

    mixtures: list[MadeMixture]
    skipped: list[Row]


MakeTrial = Callable[[int], MadeTrial]
"""Makes a trial from its index."""


@dataclass
class Outcome:
    """The record of one trial: a row per written mixture, and a row per draw that was not used."""

    index: int
    rows: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)


@runtime_checkable
class Counts(Protocol):
    """A dataclass that counts the outcomes of a run."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def add(self, outcome: Outcome) -> None:
        """Count one more trial."""


def write_trials(
    folder: Path,
    settings: Row,
    start: Callable[[], MakeTrial],
    counts: Counts,
    workers: Workers,
    update_steps: int = 10,
    shard: Shard | None = None,
) -> None:
    """Write `settings["trials"]` trials to `folder`, or those that an interrupted run left, and count all of them.

    `start()` returns in each process the function that makes a trial. In a terminal, a progress bar moves every
    `update_steps` trials. The finished `counts` become the summary in `mixture.json`.

    A `shard` writes and counts its own trials only, and lists them in files of its own, as manifest.I-of-N.jsonl. The
    run without a shard takes them over, makes what is missing, and leaves the folder as if there were no shards.

    Raises `CorpusError` when the folder holds another run, `StorageError` when it cannot be written.
    """
    with sole_writer(folder, shard=shard):
        open_folder(folder, settings)
        indices = range(settings["trials"])
        make_writer = functools.partial(TrialWriter, folder, start)
        outcomes = _all_outcomes(
            folder, indices if shard is None else shard.of(indices), make_writer, workers, update_steps, shard
        )
        with contextlib.closing(outcomes):
            for outcome in outcomes:
                counts.add(outcome)
        if shard is None:
            close_folder(folder, settings, asdict(counts))


def open_folder(folder: Path, settings: Row) -> None:
    """Start a run with these settings in `folder`, or check that the run in it has the same.

    Raises `CorpusError` when another run is in the folder, `StorageError` when it cannot be written.
    """
    path = folder / SETTINGS
    if not path.exists():
        if (folder / MANIFEST).exists():
            raise CorpusError(f"{folder}: holds {MANIFEST} but no {SETTINGS}; choose another folder")
        atomic_write(path, to_json({**settings, "summary": None}))
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings if key != "corpus" and before[key] != settings[key]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorpusError(f"{path}: is not the record of a run; choose another folder or remove it") from error
    if differing:
        changes = "; ".join(f"{key} was {before[key]} and is now {settings[key]}" for key in differing)
        raise CorpusError(
            f"{folder}: holds a run with other settings ({changes}); choose another folder, or remove it to start over"
        )


def close_folder(folder: Path, settings: Row, summary: Row) -> None:
    """Record the summary of a complete run; remove lists of shards, and half-written files of killed processes."""
    for suffix in SUFFIXES.values():
        for leftover in folder.glob(f".*{suffix}.wav.*.part"):
            leftover.unlink(missing_ok=True)
    for part in [*shard_paths(folder / MANIFEST), *shard_paths(folder / SKIPPED)]:
        part.unlink(missing_ok=True)
    atomic_write(folder / SETTINGS, to_json({**settings, "summary": summary}))


def recover(folder: Path) -> dict[int, Outcome]:
    """Return the complete trials in `folder`: all rows are there, and all files have the size in their row.

    The lists of shards count, too; a trial in two lists is taken from the last.
    """
    outcomes: dict[int, Outcome] = {}
    for manifest in [*shard_paths(folder / MANIFEST), folder / MANIFEST]:
        found: dict[int, Outcome] = {}
        for row in _valid_rows(manifest, MANIFEST):
            found.setdefault(row["index"], Outcome(row["index"])).rows.append(row)
        for row in _valid_rows(manifest.with_name(manifest.name.replace("manifest", "skipped")), SKIPPED):
            found.setdefault(row["index"], Outcome(row["index"])).skipped.append(row)
        outcomes |= found
    return {index: outcome for index, outcome in outcomes.items() if _is_complete(folder, outcome)}


class TrialWriter:
    """The work of one process: makes trials and writes their files as 16-bit WAV."""

    def __init__(self, folder: Path, start: Callable[[], MakeTrial]) -> None:
        self.folder, self.make = folder, start()

    def __call__(self, index: int) -> Outcome:
        """Make and write trial `index`."""
        trial = self.make(index)
        return Outcome(index, [self._write(made) for made in trial.mixtures], trial.skipped)

    def _write(self, made: MadeMixture) -> Row:
        sounds = {"mixture": made.mixture, "target": made.target, "enrollment": made.enrollment}
        for kind, samples in sounds.items():
            path = _wav(self.folder, made.row, kind)
            write_audio(path, samples, made.row["sample_rate"], subtype="PCM_16", durable=False)
        return {**made.row, "samples": len(made.mixture), "enrollment_samples": len(made.enrollment)}


def _all_outcomes(
    folder: Path,
    indices: Sequence[int],
    start: Callable[[], Callable[[int], Outcome]],
    workers: Workers,
    update_steps: int,
    shard: Shard | None,
) -> Generator[Outcome, None, None]:
    """Yield the outcome of every trial in order; make and record those that are not yet in `folder`."""
    done = recover(folder)
    missing = [index for index in indices if index not in done]
    first = indices.index(missing[0]) if missing else len(indices)
    with (
        contextlib.closing(ordered_map(start, missing, workers, _set_aside)) as made,
        _appending(folder, [done[index] for index in indices[:first]], shard) as append,
        tqdm(
            desc=str(folder),
            total=len(indices),
            initial=len(indices) - len(missing),
            unit="trial",
            disable=None,  # without a terminal
            miniters=update_steps,
            mininterval=0,
        ) as bar,
    ):
        for place, index in enumerate(indices):
            outcome = done[index] if index in done else next(made)
            if place >= first:
                append(outcome)
            bar.update(index not in done)
            yield outcome


def _set_aside(index: int, reason: str) -> Outcome:
    """Return the outcome of a trial that took down its workers."""
    return Outcome(index, skipped=[{"index": index, "reason": GIVEN_UP, "detail": reason}])


@contextlib.contextmanager
def _appending(folder: Path, kept: list[Outcome], shard: Shard | None) -> Iterator[Callable[[Outcome], None]]:
    """Cut the two lists back to the trials `kept`, and yield a function that appends one more trial.

    Raises `StorageError` when the disk is full.
    """
    paths = [shard_path(folder / name, shard) for name in (SKIPPED, MANIFEST)]
    require_unlocked(paths[1])
    atomic_write(paths[0], to_json_lines(row for outcome in kept for row in outcome.skipped))
    atomic_write(paths[1], to_json_lines(row for outcome in kept for row in outcome.rows))
    with contextlib.ExitStack() as stack:
        with storage_errors(paths[1]):
            skipped, manifest = (stack.enter_context(path.open("ab", buffering=0)) for path in paths)

        if shard is not None:
            lock(manifest.fileno(), paths[1])

        def append(outcome: Outcome) -> None:
            append_whole(skipped, to_json_lines(outcome.skipped))
            append_whole(manifest, to_json_lines(outcome.rows))

        yield append


def _valid_rows(path: Path, kind: str) -> Iterator[Row]:
    """Yield the complete rows of a list of a kind up to the first that does not describe a trial."""
    return itertools.takewhile(functools.partial(_has_fields, FIELDS[kind]), whole_rows(path))


def _has_fields(fields: dict[str, type], row: Row) -> bool:
    return all(isinstance(row.get(name), kind) for name, kind in fields.items()) and row.get("sample_rate") != 0


def _is_complete(folder: Path, outcome: Outcome) -> bool:
    if not outcome.rows:
        return any(row["reason"] == GIVEN_UP for row in outcome.skipped)
    return len(outcome.rows) == outcome.rows[0]["mixtures"] and all(
        _has_size(_wav(folder, row, kind), row["enrollment_samples" if kind == "enrollment" else "samples"])
        for row in outcome.rows
        for kind in SUFFIXES
    )


def _wav(folder: Path, row: Row, kind: str) -> Path:
    return folder / f"{row['name']}{SUFFIXES[kind]}.wav"


def _has_size(path: Path, samples: int) -> bool:
    try:
        return path.stat().st_size == WAV_HEADER_BYTES + 2 * samples
    except (OSError, ValueError):
        return False
