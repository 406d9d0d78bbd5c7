"""Trials that exist: folders of trials and the data sets of the field, read without conversion.

A config section comes in, and trials or batches of them go out; `export_trials` writes them to a folder.

    open_trials(LibriMixTrials("/data/Libri2Mix", part="test", sample_rate=8000)).trials

This room knows nothing about networks, training or scores.
"""

from onevoice.trials.config import FolderTrials, LibriMixTrials, TrialsConfig, load_trials_config
from onevoice.trials.export import export_trials
from onevoice.trials.reading import open_trials, place_of, to_record

__all__ = [
    "FolderTrials",
    "LibriMixTrials",
    "TrialsConfig",
    "export_trials",
    "load_trials_config",
    "open_trials",
    "place_of",
    "to_record",
]
