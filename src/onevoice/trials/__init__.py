"""The field's test and training sets, read without conversion: a config in, trials out.

    open_protocol(LibriMixProtocol("/data/Libri2Mix", part="test", sample_rate=8000)).trials

`render_protocol` writes any of them to a folder of plain trials.
"""

from onevoice.trials.config import (
    EnrollmentDraw,
    EnrollmentMapFile,
    FolderProtocol,
    LibriMixMetadataProtocol,
    LibriMixProtocol,
    ProtocolConfig,
    ProtocolFile,
    Wsj0Protocol,
    load_protocol,
)
from onevoice.trials.enrollment import read_map, write_map
from onevoice.trials.export import RenderSummary, render_protocol
from onevoice.trials.librimix_trials import enrollment_map
from onevoice.trials.opening import TrialList, open_protocol, place_of

__all__ = [
    "EnrollmentDraw",
    "EnrollmentMapFile",
    "FolderProtocol",
    "LibriMixMetadataProtocol",
    "LibriMixProtocol",
    "ProtocolConfig",
    "ProtocolFile",
    "RenderSummary",
    "TrialList",
    "Wsj0Protocol",
    "enrollment_map",
    "load_protocol",
    "open_protocol",
    "place_of",
    "read_map",
    "render_protocol",
    "write_map",
]
