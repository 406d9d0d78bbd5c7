"""One trial; what the lists of a data set say about trials; and the check that their files are usable."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from onevoice.audio import Mono, probe_audio
from onevoice.errors import AudioError, CorpusError

HEADER_THREADS = 8
"""Threads that read headers; on network drives most of the time is waiting."""


PADDED_SECONDS = 0.01
"""Mixture and target may differ in length by this much; the shorter one is padded with zeros. More is an error."""


@runtime_checkable
class Renderable(Protocol):
    """Audio that is computed on request; its `str` names it in messages and lists."""

    def render(self) -> tuple[Mono, int]:
        """Return the samples and their rate in Hz."""


Header = tuple[int, int] | str
"""Samples and rate in Hz of a file, or what is wrong with it."""
TrialAudio = Path | Renderable
"""An audio file, or a way to compute what the file would hold."""


@dataclass(frozen=True)
class Trial:
    """One mixture with the enrollment of its target and, for training and scoring, the target itself."""

    name: str
    speaker: str
    mixture: TrialAudio
    enrollment: TrialAudio
    target: TrialAudio


class Candidate(NamedTuple):
    """A listed trial whose files have not been checked yet."""

    trial: Trial
    files: tuple[tuple[Path, int], ...]
    """Every file that the trial reads, with the sample rate in Hz that it must have."""


class Listing(NamedTuple):
    """What the lists of a data set say."""

    candidates: list[Candidate]
    problems: list[str]
    """One line for each entry that cannot become a trial."""
    notes: list[str]
    """Oddities of the data set."""


@dataclass(frozen=True)
class TrialList:
    """The trials of a data set, in its order."""

    trials: list[Trial]
    left_out: list[str]
    """One line for each trial that was skipped because something is missing or wrong."""
    sample_rate: int | None
    """Sample rate in Hz; None if each file has its own."""
    notes: list[str] = field(default_factory=list)
    """Oddities of the data set that belong beside every number from it."""


def require_folder(path: str | Path, use: str) -> Path:
    """Return `path` if it is a folder; otherwise raise `CorpusError`, which tells the user to name `use`."""
    if not Path(path).is_dir():
        raise CorpusError(f"{path}: no such folder; name {use}")
    return Path(path)


def require_few_missing(name: str | Path, problems: Sequence[str], total: int, max_missing: float) -> None:
    """Raise `CorpusError` if `problems` are more than the fraction `max_missing` of the `total` trials."""
    if len(problems) > max_missing * total:
        raise CorpusError(
            f"{name}: {len(problems)} of {total} trials are missing or wrong, more than max_missing = {max_missing:g} "
            f"allows; the first: {problems[0]}"
        )


def check_files(candidates: Sequence[Candidate]) -> tuple[list[Trial], list[str]]:
    """Return the trials whose files are usable, and one line for each other trial that says what is wrong.

    Only headers are read. A file must be decodable, hold samples and have its sample rate; a mixture and a target
    that are both files must have the same length, up to `PADDED_SECONDS`.
    """
    headers = _headers(file for candidate in candidates for file, _ in candidate.files)
    trials, problems = [], []
    for candidate in candidates:
        problem = _problem(candidate, headers)
        if problem is None:
            trials.append(candidate.trial)
        else:
            problems.append(f"{candidate.trial.name}: {problem}")
    return trials, problems


def note_padding(name: str | Path, trials: Sequence[Trial]) -> list[str]:
    """Return a line on the trials whose mixture and target differ by a few samples; [] if there are none."""
    pairs = [
        (trial, trial.mixture, trial.target)
        for trial in trials
        if isinstance(trial.mixture, Path) and isinstance(trial.target, Path)
    ]
    headers = _headers(file for _, mixture, target in pairs for file in (mixture, target))
    padded = [trial.name for trial, *files in pairs if _is_padded(*(headers[file] for file in files))]
    if not padded:
        return []
    return [
        f"{name}: in {len(padded)} of {len(trials)} trials, mixture and target differ by up to "
        f"{PADDED_SECONDS:g} s; the shorter one is padded with zeros (first {padded[0]!r})"
    ]


def _headers(files: Iterable[Path]) -> dict[Path, Header]:
    different = list(dict.fromkeys(files))
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return dict(zip(different, pool.map(_header, different), strict=True))


def _is_padded(mixture: Header, target: Header) -> bool:
    """Check whether two readable files have lengths that differ by a few samples."""
    if isinstance(mixture, str) or isinstance(target, str):
        return False
    same = mixture[0] * target[1] == target[0] * mixture[1]
    return not same and differ_slightly(mixture[0] / mixture[1], target[0] / target[1])


def differ_slightly(one_seconds: float, other_seconds: float) -> bool:
    """Check whether two lengths differ by no more than padding may mend."""
    return abs(one_seconds - other_seconds) <= PADDED_SECONDS + 1e-9


def _header(file: Path) -> Header:
    """Return samples and rate in Hz from a file's header, or what is wrong with the file."""
    try:
        return probe_audio(file, str(file))
    except AudioError as error:
        return str(error)


def _problem(candidate: Candidate, headers: dict[Path, Header]) -> str | None:
    for file, sample_rate in candidate.files:
        header = headers[file]
        if isinstance(header, str):
            return header
        if header[1] != sample_rate:
            return f"{file}: is at {header[1]} Hz, not {sample_rate} Hz"
    mixture, target = (
        headers[audio] if isinstance(audio, Path) else None
        for audio in (candidate.trial.mixture, candidate.trial.target)
    )
    if (
        isinstance(mixture, tuple)
        and isinstance(target, tuple)
        and not _is_padded(mixture, target)
        and mixture != target
    ):
        return f"{candidate.trial.target}: has {target[0]} samples, its mixture {mixture[0]}"
    return None
