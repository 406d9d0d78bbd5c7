"""The config sections that name a set of trials. `kind` chooses the data set; a section without it is a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag
from pydantic.dataclasses import dataclass

from onevoice.config import FREE, STRICT, Fraction, Location, load_config

Rate = Literal[8000, 16000]
Mode = Literal["min", "max"]
MixtureType = Literal["mix_clean", "mix_both", "mix_single"]
Targets = Literal["all", "first", "mapped"]

MAX_MISSING = 0.01


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrialSet:
    """The keys that every set of trials has, with descriptions that derived sections inherit (unlike docstrings)."""

    segment_seconds: Annotated[
        PositiveFloat | None,
        Field(description="Maximum length of a mixture in seconds, cut at a random place in each epoch; null for all."),
    ] = None
    enrollment_seconds: Annotated[
        PositiveFloat | None,
        Field(description="Maximum length of an enrollment in seconds, cut in the same way; null for all of it."),
    ] = None
    limit: Annotated[
        PositiveInt | None, Field(description="Number of trials to use, from the first one on; null for all.")
    ] = None


@dataclass(frozen=True, config=STRICT)
class FolderTrials(TrialSet):
    """A folder of trials in one of two layouts; every trial must be complete."""

    folder: Location
    """The folder: mix/, refs/ and targets/, or NAME-mixed.wav, NAME-ref.wav and NAME-target.wav."""
    kind: Literal["folder"] = "folder"
    """The data set: a folder of trials."""


@dataclass(frozen=True, config=STRICT)
class EnrollmentMapFile:
    """Enrollments from a map file."""

    file: Location
    """The map file, with lines `mixture_ID utterance_ID enrollment`."""
    kind: Literal["map"] = "map"
    """Where enrollments come from: a map file."""


@dataclass(frozen=True, config=STRICT)
class EnrollmentDraw:
    """Enrollments drawn at random: another utterance of the speaker, never the target."""

    kind: Literal["draw"] = "draw"
    """Where enrollments come from: a random draw."""
    seed: int = 0
    """Seed of the draw."""
    version: Literal[1] = 1
    """Version of the rules of the draw; a release that draws otherwise has another number."""
    pool: Literal["mixtures", "librispeech"] = "mixtures"
    """Draw from the sources of the other mixtures, as the public maps do, or from whole utterances of LibriSpeech."""


EnrollmentConfig = Annotated[EnrollmentMapFile | EnrollmentDraw, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class LibriMixTrials(TrialSet):
    """A LibriMix that the official script has written to disk."""

    root: Location
    """The folder Libri2Mix or Libri3Mix, which holds wav8k or wav16k."""
    part: str
    """The part: train-360, train-100, dev or test."""
    kind: Literal["librimix"] = "librimix"
    """The data set: a generated LibriMix."""
    sample_rate: Rate = 16000
    """Sample rate in Hz, which chooses wav8k or wav16k."""
    mode: Mode = "min"
    """Mixtures as long as the shortest source (min) or the longest (max)."""
    mixture: MixtureType = "mix_clean"
    """The mixture: the voices, the voices with noise (mix_both), or the first voice with noise (mix_single)."""
    targets: Targets = "all"
    """Targets: each speaker in turn, the first one only, or those that the enrollment map names."""
    enrollment: EnrollmentConfig = EnrollmentDraw()
    """Which enrollment goes with which target."""
    librispeech_dir: Location | None = None
    """The folder LibriSpeech; needed only for enrollments from it."""
    max_missing: Annotated[Fraction, FREE] = MAX_MISSING
    """Maximum fraction of trials that may be skipped because a file or list entry is missing or wrong."""


@dataclass(frozen=True, config=STRICT)
class LibriMixMetadataTrials(TrialSet):
    """A LibriMix rendered on the fly from its official metadata, equal to the official files bit for bit."""

    metadata: Location
    """The CSV with the gains, for example metadata/Libri2Mix/libri2mix_test-clean.csv of the official repository."""
    librispeech_dir: Location
    """The folder LibriSpeech, which holds test-clean and the other parts."""
    kind: Literal["librimix_metadata"] = "librimix_metadata"
    """The data set: LibriMix from its metadata."""
    wham_dir: Location | None = None
    """The folder wham_noise, which holds tr, cv and tt; needed for mix_both and mix_single."""
    sample_rate: Rate = 16000
    """Sample rate in Hz of the rendered audio."""
    mode: Mode = "min"
    """Mixtures as long as the shortest source (min) or the longest (max)."""
    mixture: MixtureType = "mix_clean"
    """The mixture: the voices, the voices with noise (mix_both), or the first voice with noise (mix_single)."""
    targets: Targets = "all"
    """Targets: each speaker in turn, the first one only, or those that the enrollment map names."""
    enrollment: EnrollmentConfig = EnrollmentDraw()
    """Which enrollment goes with which target."""
    max_missing: Annotated[Fraction, FREE] = MAX_MISSING
    """Maximum fraction of trials that may be skipped because a file or list entry is missing or wrong."""


@dataclass(frozen=True, config=STRICT)
class Wsj0Trials(TrialSet):
    """WSJ0-2mix or WSJ0-2mix-extr from the lists of SpEx+: mix.scp, ref.scp and aux.scp with lines `key path`."""

    lists: Location
    """The folder of the three lists of one part, for example data/wsj0_2mix/tt."""
    kind: Literal["wsj0_2mix"] = "wsj0_2mix"
    """The data set: lists of WSJ0-2mix."""
    replace: Annotated[dict[str, str], FREE] = Field(default_factory=dict)
    """Path prefixes in the lists, and the folders on this machine to put in their place."""
    sample_rate: Rate = 8000
    """Sample rate in Hz that the files must have."""
    max_missing: Annotated[Fraction, FREE] = MAX_MISSING
    """Maximum fraction of trials that may be skipped because a file or list entry is missing or wrong."""


def kind(values: Any) -> str:
    """Return the `kind` of a set of trials, "folder" by default. Error messages take the key's name from this one."""
    return str(values.get("kind", "folder") if isinstance(values, dict) else getattr(values, "kind", "folder"))


def flatten_trial_set(values: Any) -> Any:
    """Flatten the shape of earlier versions: kind "trials" with either `folder` or another section under `data`."""
    if not isinstance(values, dict) or values.get("kind", "trials") != "trials":
        return values
    folder, data = values.get("folder"), values.get("data")
    rest = {key: value for key, value in values.items() if key not in ("kind", "folder", "data")}
    if isinstance(data, dict) and folder is None:
        return {**rest, **data}
    return {**rest, **{key: value for key, value in (("folder", folder), ("data", data)) if value is not None}}


Folder = Annotated[FolderTrials, Tag("folder")]
LibriMix = Annotated[LibriMixTrials, Tag("librimix")]
LibriMixMetadata = Annotated[LibriMixMetadataTrials, Tag("librimix_metadata")]
Wsj0 = Annotated[Wsj0Trials, Tag("wsj0_2mix")]

TrialsConfig = Annotated[Folder | LibriMix | LibriMixMetadata | Wsj0, Discriminator(kind)]


@dataclass(frozen=True, config=STRICT)
class TrialsFile:
    """A JSON file that names a set of trials, under the same key as other configs."""

    data: TrialsConfig
    """The set of trials."""


def load_trials_config(path: str | Path, overrides: Sequence[str] = ()) -> TrialsConfig:
    """Read a set of trials from `{"data": {"kind": …}}`; raises `ConfigError` as `load_config` does."""
    return load_config(TrialsFile, path, overrides).data
