"""The section `data` of a config: which trials of which data set, chosen by `kind`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from onevoice.config import STRICT, Fraction, load_config
from onevoice.trials.librimix import MixtureType, Mode, Rate

MAX_MISSING = 0.01


@dataclass(frozen=True, config=STRICT)
class FolderProtocol:
    """Trials on disk, in either layout of `onevoice.trials.trials`; all of them must be whole."""

    folder: str
    kind: Literal["folder"] = "folder"


@dataclass(frozen=True, config=STRICT)
class EnrollmentMapFile:
    """Enrollments by a map file (`onevoice.trials.enrollment`)."""

    file: str
    kind: Literal["map"] = "map"


@dataclass(frozen=True, config=STRICT)
class EnrollmentDraw:
    """Enrollments drawn by seed: another utterance of the speaker, never the target."""

    kind: Literal["draw"] = "draw"
    seed: int = 0
    version: Literal[1] = 1
    """The law of the draw; a release that draws otherwise has another number."""
    pool: Literal["mixtures", "librispeech"] = "mixtures"
    """From the sources of the other mixtures, as the public maps do, or from whole utterances of LibriSpeech."""


EnrollmentConfig = Annotated[EnrollmentMapFile | EnrollmentDraw, Field(discriminator="kind")]
Targets = Literal["all", "first", "mapped"]


@dataclass(frozen=True, config=STRICT)
class LibriMixProtocol:
    """A LibriMix that the official script has written."""

    root: str
    """The folder Libri2Mix or Libri3Mix, which holds wav8k or wav16k."""
    part: str
    """train-360, train-100, dev or test."""
    kind: Literal["librimix"] = "librimix"
    sample_rate: Rate = 16000
    mode: Mode = "min"
    mixture: MixtureType = "mix_clean"
    targets: Targets = "all"
    """Each speaker in turn, the first alone, or those that the enrollment map names."""
    enrollment: EnrollmentConfig = EnrollmentDraw()
    librispeech_dir: str | None = None
    """Needed only for enrollments from LibriSpeech."""
    max_missing: Fraction = MAX_MISSING
    """Share of the trials that may be left out because something of them is missing or wrong."""


@dataclass(frozen=True, config=STRICT)
class LibriMixMetadataProtocol:
    """LibriMix rendered on the fly from its official metadata, equal to the official files bit by bit."""

    metadata: str
    """The CSV with the gains, such as metadata/Libri2Mix/libri2mix_test-clean.csv of the official repository."""
    librispeech_dir: str
    """The folder LibriSpeech, which holds test-clean and the other parts."""
    kind: Literal["librimix_metadata"] = "librimix_metadata"
    wham_dir: str | None = None
    """The folder wham_noise, which holds tr, cv and tt; needed for mix_both and mix_single."""
    sample_rate: Rate = 16000
    mode: Mode = "min"
    mixture: MixtureType = "mix_clean"
    targets: Targets = "all"
    """Each speaker in turn, the first alone, or those that the enrollment map names."""
    enrollment: EnrollmentConfig = EnrollmentDraw()
    max_missing: Fraction = MAX_MISSING
    """Share of the trials that may be left out because something of them is missing or wrong."""


@dataclass(frozen=True, config=STRICT)
class Wsj0Protocol:
    """WSJ0-2mix or WSJ0-2mix-extr by the lists of SpEx+: mix.scp, ref.scp and aux.scp with lines `key path`."""

    lists: str
    """The folder of the three lists of one part, such as data/wsj0_2mix/tt."""
    kind: Literal["wsj0_2mix"] = "wsj0_2mix"
    replace: dict[str, str] = Field(default_factory=dict)
    """Beginnings of the paths in the lists, and the folders on this machine that stand for them."""
    sample_rate: Rate = 8000
    """The rate that the files must have."""
    max_missing: Fraction = MAX_MISSING
    """Share of the trials that may be left out because something of them is missing or wrong."""


ProtocolConfig = Annotated[
    FolderProtocol | LibriMixProtocol | LibriMixMetadataProtocol | Wsj0Protocol, Field(discriminator="kind")
]


@dataclass(frozen=True, config=STRICT)
class ProtocolFile:
    """A JSON file with a protocol alone, under the key that other configs have it under."""

    data: ProtocolConfig


def load_protocol(path: str | Path, overrides: Sequence[str] = ()) -> ProtocolConfig:
    """Read a protocol from `{"data": {"kind": …}}`; raises `ConfigError` as `load_config` does."""
    return load_config(ProtocolFile, path, overrides).data
