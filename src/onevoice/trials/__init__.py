"""The field's test and training sets, read without conversion: a config in, trials out.

    open_trials(LibriMixTrials("/data/Libri2Mix", part="test", sample_rate=8000)).trials

`export_trials` writes any of them to a folder of plain trials.
"""

from onevoice.trials.config import (
    EnrollmentDraw,
    EnrollmentMapFile,
    FolderTrials,
    LibriMixMetadataTrials,
    LibriMixTrials,
    TrialsConfig,
    TrialsFile,
    Wsj0Trials,
    load_trials_config,
    to_record,
)
from onevoice.trials.enrollment import read_map, write_map
from onevoice.trials.export import ExportSummary, export_trials
from onevoice.trials.librimix_trials import enrollment_map
from onevoice.trials.opening import TrialList, open_trials, place_of

__all__ = [
    "EnrollmentDraw",
    "EnrollmentMapFile",
    "ExportSummary",
    "FolderTrials",
    "LibriMixMetadataTrials",
    "LibriMixTrials",
    "TrialList",
    "TrialsConfig",
    "TrialsFile",
    "Wsj0Trials",
    "enrollment_map",
    "export_trials",
    "load_trials_config",
    "open_trials",
    "place_of",
    "read_map",
    "to_record",
    "write_map",
]
