"""From the config of a protocol to its trials."""

from dataclasses import dataclass, field

from onevoice.errors import CorpusError
from onevoice.trials.checks import require_few, sort_out
from onevoice.trials.config import FolderTrials, LibriMixTrials, TrialsConfig, Wsj0Trials
from onevoice.trials.librimix_trials import ask_librimix
from onevoice.trials.trials import Trial, find_trials
from onevoice.trials.wsj0 import ask_wsj0


@dataclass(frozen=True)
class TrialList:
    """The trials of a protocol in its order, and one line for each that had to be left out."""

    trials: list[Trial]
    left_out: list[str]
    sample_rate: int | None
    """Rate in Hz of the sounds; None where each file has its own."""
    notes: list[str] = field(default_factory=list)
    """What is odd about the data set and belongs beside every number from it."""


def open_trials(config: TrialsConfig) -> TrialList:
    """Return the trials that a config names, the first `config.limit` of them, after looking at every file's header.

    What is missing or wrong is left out and named in `left_out`, up to the share `max_missing` of the trials; the
    trials looked at are the base of that share, once for the lists and once for the files. Raises `CorpusError`
    beyond it and when nothing is there at all, `ConfigError` for settings that contradict each other,
    `MissingDependencyError` when the protocol needs a package that is not installed.
    """
    if isinstance(config, FolderTrials):
        return TrialList(find_trials(config.folder, config.limit), [], None)
    asked, unasked, notes = ask_wsj0(config) if isinstance(config, Wsj0Trials) else ask_librimix(config)
    name = place_of(config)
    require_few(name, unasked, len(asked) + len(unasked), config.max_missing)
    trials, broken = sort_out(asked[: config.limit])
    require_few(name, broken, len(trials) + len(broken), config.max_missing)
    if not trials:
        raise CorpusError(f"{name}: holds no trials; check the settings of the protocol")
    return TrialList(trials, unasked + broken, config.sample_rate, notes)


def place_of(config: TrialsConfig) -> str:
    """Return the folder or file that stands for a protocol in messages."""
    if isinstance(config, FolderTrials):
        return config.folder
    if isinstance(config, Wsj0Trials):
        return config.lists
    if isinstance(config, LibriMixTrials):
        return config.root
    return config.metadata
