"""The trials of a LibriMix, generated or rendered on the fly: which targets, with which enrollment."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onevoice.errors import ConfigError
from onevoice.trials.checks import Asked, Listed, require_folder
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
from onevoice.trials.librimix import SOURCE_RATE, LibriMixSound, read_csv, read_metadata, require_resampler
from onevoice.trials.trials import Sound, Trial

LibriMixConfig = LibriMixTrials | LibriMixMetadataTrials


@dataclass(frozen=True)
class Shelf:
    """The mixtures of one LibriMix, in their official order, and how to get at the sounds."""

    mixtures: dict[str, Mixture]
    sound: Callable[[str, str], Sound]
    """Of a folder's name (s1, mix_clean, …) and a mixture_ID."""
    parts: tuple[str, ...]
    """The parts of LibriSpeech that the utterances are from."""


@dataclass(frozen=True)
class Target:
    """Source `number` of a mixture, counted from 1."""

    mixture: Mixture
    number: int

    @property
    def utterance(self) -> str:
        """The utterance that is to be extracted."""
        return self.mixture.utterances[self.number - 1]

    @property
    def key(self) -> tuple[str, str]:
        """What a map calls it."""
        return self.mixture.id, self.utterance


def ask_librimix(config: LibriMixConfig) -> Listed:
    """Return the trials in the order of the metadata, and a line for each that cannot be: what its map lacks.

    An enrollment that a map takes from the target's own utterance is kept, since published numbers rest on such
    maps (71 of the 6,000 lines of the public one for the test part of Libri2Mix), and noted.
    Raises `CorpusError` for folders and lists that are not there or cannot be read, `ConfigError` for settings that
    contradict each other, `MissingDependencyError` at 8 kHz without scipy.
    """
    shelf = _generated(config) if isinstance(config, LibriMixTrials) else _rendered(config)
    targets = [Target(mixture, k + 1) for mixture in shelf.mixtures.values() for k in range(len(mixture.utterances))]
    enrollments = _enrollments(config, shelf, [target.key for target in targets])
    known = {target.key for target in targets}
    problems = [_unknown(key, choice.place, shelf) for key, choice in enrollments.items() if key not in known]
    if config.targets == "first" or config.mixture == "mix_single":
        targets = [target for target in targets if target.number == 1]
    if config.targets == "mapped":
        targets = [target for target in targets if target.key in enrollments]
    asked: list[Asked] = []
    own = 0
    for target in targets:
        try:
            trial, other = _ask(config, shelf, target, enrollments)
        except _UnusableError as problem:
            problems.append(str(problem))
            continue
        asked.append(trial)
        own += other == target.utterance
    note = f"{own} of {len(asked)} enrollments are of the target's own utterance, as the enrollment map says"
    return Listed(asked, problems, [note] if own else [])


def enrollment_map(config: LibriMixConfig) -> EnrollmentMap:
    """Return the map that a LibriMix config reads or draws; `enrollment.write_map` records it."""
    shelf = _generated(config) if isinstance(config, LibriMixTrials) else _rendered(config)
    keys = [(mixture.id, utterance) for mixture in shelf.mixtures.values() for utterance in mixture.utterances]
    return _enrollments(config, shelf, keys)


class _UnusableError(Exception):
    """Why one target has no trial."""


def _generated(config: LibriMixTrials) -> Shelf:
    rate = f"wav{config.sample_rate // 1000}k"
    folder = require_folder(Path(config.root) / rate / config.mode / config.part, "a generated LibriMix as root")
    metadata = folder.parent / "metadata" / f"mixture_{config.part}_{config.mixture}.csv"
    if metadata.exists():
        ids = [row["mixture_ID"] for row in read_csv(metadata)[1]]
    else:
        mixtures = require_folder(folder / config.mixture, f"a LibriMix that was generated with {config.mixture}")
        ids = sorted(path.stem for path in mixtures.glob("*.wav"))
    first, *rest = config.part.split("-")
    return Shelf(
        {name: Mixture(name, tuple(name.split("_"))) for name in ids},
        lambda kind, mixture_id: folder / kind / f"{mixture_id}.wav",
        ("-".join([first, "clean", *rest]),),
    )


def _rendered(config: LibriMixMetadataTrials) -> Shelf:
    require_resampler(config.sample_rate)
    librispeech = require_folder(config.librispeech_dir, "the folder of LibriSpeech as librispeech_dir")
    wham = None
    if config.mixture != "mix_clean":
        if config.wham_dir is None:
            raise ConfigError(f"mixture: {config.mixture} has noise; name the folder wham_noise as wham_dir")
        wham = require_folder(config.wham_dir, "the folder wham_noise as wham_dir")
    rows = {row.mixture_id: row for row in read_metadata(config.metadata, librispeech, wham)}
    files = [source.file for row in rows.values() for source in row.sources]
    return Shelf(
        {name: Mixture(name, tuple(source.file.stem for source in row.sources)) for name, row in rows.items()},
        lambda kind, mixture_id: LibriMixSound(rows[mixture_id], config.sample_rate, config.mode, kind),
        tuple(sorted({file.relative_to(librispeech).parts[0] for file in files})),
    )


def _enrollments(config: LibriMixConfig, shelf: Shelf, keys: Sequence[tuple[str, str]]) -> EnrollmentMap:
    if isinstance(config.enrollment, EnrollmentMapFile):
        return read_map(config.enrollment.file)
    if config.targets == "mapped":
        raise ConfigError("targets: 'mapped' are those of an enrollment map; set enrollment to a map, or choose 'all'")
    return draw(keys, _pool(config, config.enrollment, shelf), config.enrollment.seed)


def _pool(config: LibriMixConfig, enrollment: EnrollmentDraw, shelf: Shelf) -> dict[str, str]:
    if enrollment.pool == "mixtures":
        return mixture_pool(list(shelf.mixtures.values()))
    librispeech = _librispeech(config, "enrollment.pool is 'librispeech'")
    return {name: file for part in shelf.parts for name, file in librispeech_pool(librispeech, part).items()}


def _ask(config: LibriMixConfig, shelf: Shelf, target: Target, enrollments: EnrollmentMap) -> tuple[Asked, str]:
    """Return the trial of one target and the utterance that its enrollment is of."""
    mixture_id, utterance = target.key
    if target.key not in enrollments:
        drawn = isinstance(config.enrollment, EnrollmentDraw)
        why = "its speaker has no other utterance" if drawn else "the enrollment map has no line for it"
        raise _UnusableError(f"{utterance} in {mixture_id}: {why}")
    place, entry = enrollments[target.key].place, enrollments[target.key].enrollment
    enrollment, rate, other = _resolve(config, shelf, entry, place)
    if speaker_of(other) != speaker_of(utterance):
        raise _UnusableError(f"{place}: the enrollment {entry} is not of speaker {speaker_of(utterance)}")
    trial = Trial(
        f"{mixture_id}_s{target.number}",
        speaker_of(utterance),
        mixture=shelf.sound(config.mixture, mixture_id),
        enrollment=enrollment,
        target=shelf.sound(f"s{target.number}", mixture_id),
    )
    files = [
        *_files(trial.mixture, config.sample_rate),
        *_files(trial.target, config.sample_rate),
        *_files(enrollment, rate),
    ]
    return Asked(trial, tuple(dict.fromkeys(files))), other


def _resolve(config: LibriMixConfig, shelf: Shelf, entry: str, place: str) -> tuple[Sound, int, str]:
    """Return the sound that a map's entry names, the rate in Hz of its file, and the utterance in it."""
    source = re.fullmatch(r"s([1-9])/([^/]+?)(?:\.wav)?", entry)
    if source is None:
        return _librispeech(config, f"{place} names {entry}") / entry, SOURCE_RATE, Path(entry).stem
    number, mixture = int(source[1]), shelf.mixtures.get(source[2])
    if mixture is None or number > len(mixture.utterances):
        raise _UnusableError(f"{place}: the enrollment {entry} is not in this LibriMix")
    return shelf.sound(f"s{number}", mixture.id), config.sample_rate, mixture.utterances[number - 1]


def _files(sound: Sound, rate: int) -> Iterator[tuple[Path, int]]:
    if isinstance(sound, LibriMixSound):
        yield from ((file, SOURCE_RATE) for file in sound.files())
    elif isinstance(sound, Path):
        yield sound, rate


def _librispeech(config: LibriMixConfig, why: str) -> Path:
    if config.librispeech_dir is None:
        raise ConfigError(f"librispeech_dir: is needed, because {why}")
    return require_folder(config.librispeech_dir, "the folder of LibriSpeech as librispeech_dir")


def _unknown(key: tuple[str, str], place: str, shelf: Shelf) -> str:
    mixture, utterance = key
    if mixture not in shelf.mixtures:
        return f"{place}: mixture {mixture!r} is not in this LibriMix"
    return f"{place}: mixture {mixture!r} has no utterance {utterance!r}"
