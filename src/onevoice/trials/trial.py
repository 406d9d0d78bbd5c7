"""One trial, and what the lists of a data set say about it before its files are checked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from onevoice.audio import Mono
from onevoice.errors import CorpusError


@runtime_checkable
class Renderable(Protocol):
    """Audio that is computed on request; its `str` names it in messages and lists."""

    def render(self) -> tuple[Mono, int]:
        """Return the samples and their rate in Hz."""


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
