"""The folder that mixtures are written to, and how a run that was interrupted goes on in it.

    mixture.json     the settings and, when the run is complete, its summary
    manifest.jsonl   one row for each written mixture, in the order of the trials: how it was made
    skipped.jsonl    one row for each draw that was not used, and each trial given up: why

A trial's rows are appended after its files are in place, first to `skipped.jsonl`, then to `manifest.jsonl`. So the
folder can be left at any moment: reading stops at the first line that is not whole, a trial whose rows or files are
not all there is rendered again, and the finished folder holds the same bytes as one never interrupted.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from onevoice.errors import CorpusError
from onevoice.files import Row, append_whole, atomic_write, storage_errors, to_json, to_json_lines, whole_rows
from onevoice.processes import ordered_map

SETTINGS = "mixture.json"
MANIFEST = "manifest.jsonl"
SKIPPED = "skipped.jsonl"
GIVEN_UP = "given up"
SUFFIXES = {"mixture": "-mixed.wav", "target": "-target.wav", "enrollment": "-ref.wav"}
WAV_HEADER_BYTES = 44


@dataclass
class Outcome:
    """What became of one trial: a row per mixture, and a row per draw that was not used."""

    index: int
    rows: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)


def open_folder(folder: Path, settings: Row) -> None:
    """Start a run with these settings in `folder`, or find the one begun with them.

    Raises `CorpusError` when another run is in the folder, `StorageError` when it cannot be written.
    """
    path = folder / SETTINGS
    if not path.exists():
        if (folder / MANIFEST).exists():
            raise CorpusError(f"{folder}: holds {MANIFEST} but no {SETTINGS}; choose another folder")
        atomic_write(path, to_json({**settings, "summary": None}))
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings if key != "corpus" and there[key] != settings[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path}: is not the record of a run; choose another folder or remove it") from error
    if differing:
        changes = "; ".join(f"{key} is {there[key]} there and {settings[key]} now" for key in differing)
        raise CorpusError(
            f"{folder}: holds a run with other settings ({changes}); choose another folder, or remove it to start anew"
        )


def close_folder(folder: Path, settings: Row, summary: Row) -> None:
    """Record the summary of a complete run and remove what killed processes may have left half-written."""
    for name in SUFFIXES.values():
        for leftover in folder.glob(f".*{name}.*.part"):
            leftover.unlink(missing_ok=True)
    atomic_write(folder / SETTINGS, to_json({**settings, "summary": summary}))


def recover(folder: Path) -> dict[int, Outcome]:
    """Return the trials in `folder` that are complete: all rows there, and all files of the size they say."""
    outcomes: dict[int, Outcome] = {}
    for row in _own_rows(folder / MANIFEST):
        outcomes.setdefault(row["index"], Outcome(row["index"])).rows.append(row)
    for row in _own_rows(folder / SKIPPED):
        outcomes.setdefault(row["index"], Outcome(row["index"])).skipped.append(row)
    return {index: outcome for index, outcome in outcomes.items() if _is_complete(folder, outcome)}


def all_outcomes(
    folder: Path, count: int, make: Callable[[], Callable[[int], Outcome]], workers: int, update_steps: int = 10
) -> Generator[Outcome, None, None]:
    """Yield the outcome of every trial in order, rendering and recording those that are not yet in `folder`.

    `make()` gives each of the processes what renders a trial by its index and writes its files. The progress bar
    moves every `update_steps` trials.
    """
    there = recover(folder)
    missing = [index for index in range(count) if index not in there]
    first = missing[0] if missing else count
    with (
        contextlib.closing(ordered_map(make, missing, min(workers, max(len(missing), 1)))) as rendered,
        appending(folder, [there[index] for index in range(first)]) as append,
        tqdm(
            desc=str(folder),
            total=count,
            initial=count - len(missing),
            unit="trial",
            miniters=update_steps,
            mininterval=0,
        ) as bar,
    ):
        for index in range(count):
            outcome = there[index] if index in there else next(rendered)
            if index >= first:
                append(outcome)
            bar.update(index not in there)
            yield outcome


@contextlib.contextmanager
def appending(folder: Path, kept: list[Outcome]) -> Iterator[Callable[[Outcome], None]]:
    """Cut the two lists back to the trials `kept`, and give a function that appends one more trial.

    Raises `StorageError` when the disk is full.
    """
    for name, rows in (
        (SKIPPED, [row for outcome in kept for row in outcome.skipped]),
        (MANIFEST, [row for outcome in kept for row in outcome.rows]),
    ):
        atomic_write(folder / name, to_json_lines(rows))
    with contextlib.ExitStack() as stack:
        with storage_errors(folder / MANIFEST):
            skipped = stack.enter_context((folder / SKIPPED).open("ab", buffering=0))
            manifest = stack.enter_context((folder / MANIFEST).open("ab", buffering=0))

        def append(outcome: Outcome) -> None:
            append_whole(skipped, to_json_lines(outcome.skipped))
            append_whole(manifest, to_json_lines(outcome.rows))

        yield append


def _own_rows(path: Path) -> Iterator[Row]:
    """Yield the whole rows of a list up to the first that says no trial."""
    return itertools.takewhile(lambda row: isinstance(row.get("index"), int), whole_rows(path))


def _is_complete(folder: Path, outcome: Outcome) -> bool:
    if not outcome.rows:
        return any(row["reason"] == GIVEN_UP for row in outcome.skipped)
    return len(outcome.rows) == outcome.rows[0]["mixtures"] and all(
        _has_size(folder / f"{row['name']}{suffix}", row["enrollment_samples" if kind == "enrollment" else "samples"])
        for row in outcome.rows
        for kind, suffix in SUFFIXES.items()
    )


def _has_size(path: Path, samples: int) -> bool:
    try:
        return path.stat().st_size == WAV_HEADER_BYTES + 2 * samples
    except FileNotFoundError:
        return False
