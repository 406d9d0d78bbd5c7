"""Lists the trials of a LibriMix, on disk or rendered from its metadata: which targets, with which enrollments."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onevoice.errors import ConfigError
from onevoice.trials.config import EnrollmentDraw, EnrollmentMapFile, LibriMixMetadataTrials, LibriMixTrials
from onevoice.trials.enrollment import (
    EnrollmentMap,
    Mixture,
    draw,
    librispeech_pool,
    mixture_pool,
    read_map,
    speaker_of,
)
from onevoice.trials.librimix import SOURCE_RATE, LibriMixFile, read_csv, read_metadata, require_resampler
from onevoice.trials.trial import Candidate, Listing, Trial, TrialAudio, require_folder

LibriMixConfig = LibriMixTrials | LibriMixMetadataTrials


@dataclass(frozen=True)
class MixtureSet:
    """The mixtures of one LibriMix, in their official order, and how to get their audio."""

    mixtures: dict[str, Mixture]
    """Mixtures by mixture_ID."""
    audio: Callable[[str, str], TrialAudio]
    """Returns the audio for the name of a folder (s1, mix_clean, …) and a mixture_ID."""
    parts: tuple[str, ...]
    """The parts of LibriSpeech that the utterances come from."""


@dataclass(frozen=True)
class Target:
    """Source `number` of a mixture, counted from 1."""

    mixture: Mixture
    number: int

    @property
    def utterance(self) -> str:
        """The utterance to extract."""
        return self.mixture.utterances[self.number - 1]

    @property
    def key(self) -> tuple[str, str]:
        """The key of the target in an enrollment map."""
        return self.mixture.id, self.utterance


def list_librimix(config: LibriMixConfig) -> Listing:
    """List the trials in the order of the metadata.

    An enrollment that a map takes from the target's own utterance is kept and noted, since published numbers depend on
    such maps (71 of the 6,000 lines of the public map for the test part of Libri2Mix).

    Raises `CorpusError` for folders and lists that are missing or unreadable, `ConfigError` for contradicting
    settings, and `MissingDependencyError` at 8 kHz without scipy.
    """
    mixture_set = _open_mixtures(config)
    mixtures = mixture_set.mixtures.values()
    targets = [Target(mixture, k + 1) for mixture in mixtures for k in range(len(mixture.utterances))]
    enrollments = _enrollments(config, mixture_set, [target.key for target in targets])
    known = {target.key for target in targets}
    problems = [_unknown(key, choice.place, mixture_set) for key, choice in enrollments.items() if key not in known]
    if config.targets == "first" or config.mixture == "mix_single":
        targets = [target for target in targets if target.number == 1]
    if config.targets == "mapped":
        targets = [target for target in targets if target.key in enrollments]
    candidates: list[Candidate] = []
    own = 0
    for target in targets:
        try:
            candidate, enrolled_utterance = _candidate(config, mixture_set, target, enrollments)
        except _UnusableError as problem:
            problems.append(str(problem))
            continue
        candidates.append(candidate)
        own += enrolled_utterance == target.utterance
    note = f"{own} of {len(candidates)} enrollments are the target's own utterance, as the enrollment map says"
    return Listing(candidates, problems, [note] if own else [])


def enrollment_map(config: LibriMixConfig) -> EnrollmentMap:
    """Return the map that a LibriMix config reads or draws; `enrollment.write_map` writes it to a file."""
    mixture_set = _open_mixtures(config)
    keys = [(mixture.id, utterance) for mixture in mixture_set.mixtures.values() for utterance in mixture.utterances]
    return _enrollments(config, mixture_set, keys)


class _UnusableError(Exception):
    """The reason why one target has no trial."""


def _open_mixtures(config: LibriMixConfig) -> MixtureSet:
    return _open_generated(config) if isinstance(config, LibriMixTrials) else _open_metadata(config)


def _open_generated(config: LibriMixTrials) -> MixtureSet:
    """Find the mixtures that the official script wrote, by its metadata if it is there, otherwise by their files."""
    rate = f"wav{config.sample_rate // 1000}k"
    folder = require_folder(Path(config.root) / rate / config.mode / config.part, "a generated LibriMix as root")
    metadata = folder.parent / "metadata" / f"mixture_{config.part}_{config.mixture}.csv"
    if metadata.exists():
        ids = [row["mixture_ID"] for row in read_csv(metadata)[1]]
    else:
        mixtures = require_folder(folder / config.mixture, f"a LibriMix that was generated with {config.mixture}")
        ids = sorted(path.stem for path in mixtures.glob("*.wav"))
    first, *rest = config.part.split("-")
    return MixtureSet(
        {name: Mixture(name, tuple(name.split("_"))) for name in ids},
        lambda kind, mixture_id: folder / kind / f"{mixture_id}.wav",
        ("-".join([first, "clean", *rest]),),
    )


def _open_metadata(config: LibriMixMetadataTrials) -> MixtureSet:
    require_resampler(config.sample_rate)
    librispeech = require_folder(config.librispeech_dir, "the folder of LibriSpeech as librispeech_dir")
    wham = None
    if config.mixture != "mix_clean":
        if config.wham_dir is None:
            raise ConfigError(f"mixture: {config.mixture} has noise; name the folder wham_noise as wham_dir")
        wham = require_folder(config.wham_dir, "the folder wham_noise as wham_dir")
    rows = {row.mixture_id: row for row in read_metadata(config.metadata, librispeech, wham)}
    files = [source.file for row in rows.values() for source in row.sources]
    return MixtureSet(
        {name: Mixture(name, tuple(source.file.stem for source in row.sources)) for name, row in rows.items()},
        lambda kind, mixture_id: LibriMixFile(rows[mixture_id], config.sample_rate, config.mode, kind),
        tuple(sorted({file.relative_to(librispeech).parts[0] for file in files})),
    )


def _enrollments(config: LibriMixConfig, mixture_set: MixtureSet, keys: Sequence[tuple[str, str]]) -> EnrollmentMap:
    if isinstance(config.enrollment, EnrollmentMapFile):
        return read_map(config.enrollment.file)
    if config.targets == "mapped":
        raise ConfigError("targets: 'mapped' needs an enrollment map; set enrollment to a map, or choose 'all'")
    return draw(keys, _pool(config, config.enrollment, mixture_set), config.enrollment.seed)


def _pool(config: LibriMixConfig, enrollment: EnrollmentDraw, mixture_set: MixtureSet) -> dict[str, str]:
    if enrollment.pool == "mixtures":
        return mixture_pool(list(mixture_set.mixtures.values()))
    librispeech = _librispeech(config, "enrollment.pool is 'librispeech'")
    return {name: file for part in mixture_set.parts for name, file in librispeech_pool(librispeech, part).items()}


def _candidate(
    config: LibriMixConfig, mixture_set: MixtureSet, target: Target, enrollments: EnrollmentMap
) -> tuple[Candidate, str]:
    """Return the trial of one target, and the utterance of its enrollment."""
    mixture_id, utterance = target.key
    if target.key not in enrollments:
        drawn = isinstance(config.enrollment, EnrollmentDraw)
        reason = "its speaker has no other utterance" if drawn else "the enrollment map has no line for it"
        raise _UnusableError(f"{utterance} in {mixture_id}: {reason}")
    place, entry = enrollments[target.key].place, enrollments[target.key].enrollment
    enrollment, rate, enrolled_utterance = _resolve(config, mixture_set, entry, place)
    if speaker_of(enrolled_utterance) != speaker_of(utterance):
        raise _UnusableError(f"{place}: the enrollment {entry} is not from speaker {speaker_of(utterance)}")
    trial = Trial(
        f"{mixture_id}_s{target.number}",
        speaker_of(utterance),
        mixture=mixture_set.audio(config.mixture, mixture_id),
        enrollment=enrollment,
        target=mixture_set.audio(f"s{target.number}", mixture_id),
    )
    files = [
        *_files(trial.mixture, config.sample_rate),
        *_files(trial.target, config.sample_rate),
        *_files(enrollment, rate),
    ]
    return Candidate(trial, tuple(dict.fromkeys(files))), enrolled_utterance


def _resolve(config: LibriMixConfig, mixture_set: MixtureSet, entry: str, place: str) -> tuple[TrialAudio, int, str]:
    """Return the audio that an entry of a map names, the rate in Hz of its file, and the utterance in it."""
    source = re.fullmatch(r"s([1-9])/([^/]+?)(?:\.wav)?", entry)
    if source is None:
        return _librispeech(config, f"{place} names {entry}") / entry, SOURCE_RATE, Path(entry).stem
    number, mixture = int(source[1]), mixture_set.mixtures.get(source[2])
    if mixture is None or number > len(mixture.utterances):
        raise _UnusableError(f"{place}: the enrollment {entry} is not in this LibriMix")
    return mixture_set.audio(f"s{number}", mixture.id), config.sample_rate, mixture.utterances[number - 1]


def _files(audio: TrialAudio, rate: int) -> Iterator[tuple[Path, int]]:
    if isinstance(audio, LibriMixFile):
        yield from ((file, SOURCE_RATE) for file in audio.files())
    elif isinstance(audio, Path):
        yield audio, rate


def _librispeech(config: LibriMixConfig, reason: str) -> Path:
    if config.librispeech_dir is None:
        raise ConfigError(f"librispeech_dir: is required, because {reason}")
    return require_folder(config.librispeech_dir, "the folder of LibriSpeech as librispeech_dir")


def _unknown(key: tuple[str, str], place: str, mixture_set: MixtureSet) -> str:
    mixture, utterance = key
    if mixture not in mixture_set.mixtures:
        return f"{place}: mixture {mixture!r} is not in this LibriMix"
    return f"{place}: mixture {mixture!r} has no utterance {utterance!r}"
