"""Chooses an enrollment for each target of a LibriMix: from a map file, or by a random draw.

Each line of a map is `mixture_ID utterance_ID enrollment`. For the target that speaks the utterance in the mixture,
the enrollment is

- `s2/<mixture_ID>`, with or without `.wav`: source 2 of another mixture of the same LibriMix, as in public maps, or
- a file of LibriSpeech, relative to its folder: `test-clean/1089/134686/1089-134686-0000.flac`.

A draw returns such a map too, so it can be written to a file for any system that reads these maps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onevoice.errors import CorpusError
from onevoice.files import atomic_write
from onevoice.rng import derive

DRAW_VERSION = 1
"""Increases when `draw` changes what it draws."""

Key = tuple[str, str]
"""A target: its mixture_ID and utterance_ID."""


@dataclass(frozen=True)
class Mixture:
    """A mixture and its utterances (speaker-chapter-number of LibriSpeech), in the order of the sources."""

    id: str
    utterances: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The enrollment of one target, and where the map says so, for messages."""

    enrollment: str
    place: str


EnrollmentMap = Mapping[Key, Choice]


def speaker_of(utterance: str) -> str:
    """Return the speaker of a LibriSpeech utterance: the part of its name before the first hyphen."""
    return utterance.split("-")[0]


def read_map(path: str | Path) -> EnrollmentMap:
    """Read a map file; `CorpusError` for an unreadable file, a malformed line, or a target that appears twice."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    found: dict[Key, Choice] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3:
            raise CorpusError(
                f"{path}:{number}: has {len(fields)} fields; each line is mixture_ID, utterance_ID, enrollment"
            )
        mixture, utterance, enrollment = fields
        if (mixture, utterance) in found:
            raise CorpusError(f"{path}:{number}: {utterance} in {mixture} appears twice; remove one line")
        found[mixture, utterance] = Choice(enrollment, f"{path}:{number}")
    return found


def write_map(path: str | Path, enrollments: EnrollmentMap) -> None:
    """Write a map file with one line per target; `StorageError` if it cannot be written."""
    lines = [f"{mixture} {utterance} {choice.enrollment}\n" for (mixture, utterance), choice in enrollments.items()]
    atomic_write(Path(path), "".join(lines).encode())


def mixture_pool(mixtures: Sequence[Mixture]) -> dict[str, str]:
    """Return the source `s<k>/<mixture_ID>` of each utterance; of several, the first by name."""
    pool: dict[str, str] = {}
    for mixture in mixtures:
        for number, utterance in enumerate(mixture.utterances, start=1):
            entry = f"s{number}/{mixture.id}"
            pool[utterance] = min(entry, pool.get(utterance, entry))
    return pool


def librispeech_pool(librispeech_dir: Path, part: str) -> dict[str, str]:
    """Return the paths of one part of LibriSpeech (`test-clean`), relative to `librispeech_dir`, by utterance."""
    files = sorted((librispeech_dir / part).glob("*/*/*.flac"))
    if not files:
        raise CorpusError(f"{librispeech_dir / part}: holds no SPEAKER/CHAPTER/*.flac; name the folder of LibriSpeech")
    return {file.stem: file.relative_to(librispeech_dir).as_posix() for file in files}


def draw(targets: Sequence[Key], pool: Mapping[str, str], seed: int) -> dict[Key, Choice]:
    """Draw another utterance of the speaker for each target, uniformly from `pool` (`DRAW_VERSION` 1).

    Candidates are sorted by name, and the draw for a target depends only on (seed, target, candidates). So it is the
    same for a LibriMix on disk and one rendered on the fly, at any rate and for any mixture type. Targets whose
    speaker has no other utterance are skipped.
    """
    by_speaker: dict[str, list[str]] = {}
    for utterance in sorted(pool):
        by_speaker.setdefault(speaker_of(utterance), []).append(utterance)
    drawn: dict[Key, Choice] = {}
    for mixture, utterance in targets:
        candidates = [other for other in by_speaker.get(speaker_of(utterance), []) if other != utterance]
        if candidates:
            rng = derive(seed, "enrollment", DRAW_VERSION, mixture, utterance)
            chosen = candidates[int(rng.integers(len(candidates)))]
            drawn[mixture, utterance] = Choice(pool[chosen], f"draw {DRAW_VERSION} with seed {seed}")
    return drawn
