"""What a protocol asks for against what is there: everything missing or wrong is named, counted and limited."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from onevoice.audio import probe_audio
from onevoice.errors import AudioError, CorpusError
from onevoice.trials.trials import Trial

PROBES_AT_ONCE = 8
"""Headers read at the same time; on network drives most of the time is waiting."""


class Asked(NamedTuple):
    """A trial with every file that is read for it, and the rate in Hz that the file must have."""

    trial: Trial
    files: tuple[tuple[Path, int], ...]


class Listed(NamedTuple):
    """What the lists of a data set say: the trials, a line for each that cannot be one, and what else is odd."""

    asked: list[Asked]
    problems: list[str]
    notes: list[str]


def sort_out(asked: Sequence[Asked]) -> tuple[list[Trial], list[str]]:
    """Return the trials whose files are all there, and for each of the others a line that says what is wrong.

    Only headers are read: a file must be one that can be decoded, hold samples and have its rate; mixture and
    target, where they are files, must be of one length.
    """
    files = list(dict.fromkeys(file for each in asked for file, _ in each.files))
    with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        headers = dict(zip(files, pool.map(_header, files), strict=True))
    trials, problems = [], []
    for each in asked:
        problem = _problem(each, headers)
        if problem is None:
            trials.append(each.trial)
        else:
            problems.append(f"{each.trial.name}: {problem}")
    return trials, problems


def require_few(name: str | Path, problems: Sequence[str], asked: int, max_missing: float) -> None:
    """Raise `CorpusError` when `problems` are more than the share `max_missing` of the trials `asked`."""
    if len(problems) > max_missing * asked:
        raise CorpusError(
            f"{name}: {len(problems)} of {asked} trials are missing or wrong, more than max_missing = {max_missing:g} "
            f"allows; the first: {problems[0]}"
        )


def require_folder(path: str | Path, use: str) -> Path:
    """Return `path` when it is a folder; raise `CorpusError` that says what the folder is for otherwise."""
    if not Path(path).is_dir():
        raise CorpusError(f"{path}: no such folder; name {use}")
    return Path(path)


def _problem(asked: Asked, headers: dict[Path, tuple[int, int] | str]) -> str | None:
    for file, wanted in asked.files:
        header = headers[file]
        if isinstance(header, str):
            return header
        if header[1] != wanted:
            return f"{file}: is at {header[1]} Hz, not {wanted} Hz"
    mixture, target = (
        headers[sound] if isinstance(sound, Path) else None for sound in (asked.trial.mixture, asked.trial.target)
    )
    if mixture is not None and target is not None and mixture[0] != target[0]:
        return f"{asked.trial.target}: has {target[0]} samples, its mixture {mixture[0]}"
    return None


def _header(file: Path) -> tuple[int, int] | str:
    try:
        return probe_audio(file, str(file))
    except AudioError as error:
        return str(error)
