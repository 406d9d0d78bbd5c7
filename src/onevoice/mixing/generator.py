"""Training and test mixtures from a corpus, written to a folder: the law over many trials, in processes, resumable.

    MixtureGenerator(scan("LibriSpeech/dev-clean"), "data/train", nfiles=5000).generate_mixes(snr_levels=[0, 5])

What is written, and that a run can be interrupted at any moment: `onevoice.mixing.folder`. What a trial is:
`onevoice.mixing.law`. Each trial depends on (seed, index) alone, never on the number of workers.
"""

import contextlib
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from onevoice.audio import write_audio
from onevoice.corpus.listing import Speaker
from onevoice.errors import ConfigError, CorpusError
from onevoice.files import Row
from onevoice.mixing.folder import GIVEN_UP, SUFFIXES, Outcome, all_outcomes, close_folder, open_folder
from onevoice.mixing.law import (
    SILENT_FILE,
    UNREADABLE,
    Draw,
    Mixed,
    MixingLaw,
    Rejection,
    Rendered,
    Unusable,
    draw_trial,
    load_source,
    render,
)

LAW_VERSION = 1
MAX_ATTEMPTS = 100
"""Draws per trial before it is given up."""
CACHED_SOURCES = 64
"""Decoded utterances that each worker keeps, for small corpora: about 1 MB each at 15 s and 16 kHz."""


@runtime_checkable
class SpeakerFiles(Protocol):
    """Anything with the name of a speaker and the paths of their files; `corpus.Speaker` is one."""

    @property
    def id(self) -> str:
        """Name of the speaker."""

    @property
    def files(self) -> Sequence[str | Path]:
        """Paths of the utterances."""


@dataclass
class Summary:
    """Counts of a run. `replaced` counts draws passed over by reason, `unusable` says what is wrong with a file."""

    asked: int
    trials: int = 0
    given_up: int = 0
    mixtures: int = 0
    mixture_seconds: float = 0.0
    peak_limited: int = 0
    replaced: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return summary_line(self)


class MixtureGenerator:
    """Draws and writes mixtures with their targets and enrollments.

    `speakers_files` are the speakers (`corpus.scan`), in any order; `nfiles` is the number of trials, each of which
    gives one mixture in test mode and one per segment otherwise. Raises `CorpusError` when the speakers do not
    suffice (two, one of them with two files), `ConfigError` for values out of range.
    """

    def __init__(
        self,
        speakers_files: Iterable[SpeakerFiles],
        out_folder: str | Path,
        nfiles: int = 5000,
        test: bool = False,
        randomState: int = 42,  # noqa: N803 - the name of the original system
        *,
        sample_rate: int = 16000,
    ) -> None:
        if nfiles < 1:
            raise ConfigError(f"nfiles (--count): {nfiles} trials are too few; ask for at least 1")
        self.speakers = _checked(speakers_files)
        self.folder = Path(out_folder)
        self.count = nfiles
        self.test = test
        self.seed = randomState
        self.sample_rate = sample_rate

    def generate_mixes(
        self,
        snr_levels: Sequence[int | float] = (0, 5),
        num_workers: int = 2,
        update_steps: int = 10,
        trim_db: int | float | None = None,
        vad_db: int | float | None = 20,
        audioLen: int | float = 3,  # noqa: N803 - the name of the original system
    ) -> Summary:
        """Write all trials to the folder, or those that an interrupted run has left, and return the counts.

        `snr_levels` in dB are drawn from with equal chance; `num_workers` processes; the progress bar on standard
        error moves every `update_steps` trials; `trim_db` and `vad_db` see `MixingLaw`; segments of `audioLen`
        seconds. Broken and silent files are passed over and named in the summary.

        Raises `CorpusError` when the folder holds a run with other settings or nothing could be mixed,
        `StorageError` when the disk is full, `ConfigError` for values out of range.
        """
        for name, value in (("num_workers (--workers)", num_workers), ("update_steps", update_steps)):
            if value < 1:
                raise ConfigError(f"{name}: {value} must be 1 or more")
        law = MixingLaw(
            sample_rate=self.sample_rate,
            snr_levels=tuple(float(level) for level in snr_levels),
            full_length=self.test,
            trim_db=None if trim_db is None else float(trim_db),
            vad_db=None if vad_db is None else float(vad_db),
            segment_seconds=float(audioLen),
        )
        root = _common_folder(self.speakers)
        settings = self._settings(law, root)
        open_folder(self.folder, settings)
        make = functools.partial(TrialWriter, self.speakers, root, self.folder, law, self.seed)
        summary = Summary(self.count)
        with contextlib.closing(all_outcomes(self.folder, self.count, make, num_workers, update_steps)) as outcomes:
            for outcome in outcomes:
                _count(summary, outcome)
        close_folder(self.folder, settings, asdict(summary))
        if not summary.mixtures:
            raise CorpusError(f"{root}: no mixture could be made; {summary_line(summary)}")
        return summary

    def _settings(self, law: MixingLaw, root: Path) -> Row:
        return {
            "law_version": LAW_VERSION,
            "corpus": root.as_posix(),
            "corpus_digest": _digest(self.speakers, root),
            "trials": self.count,
            "seed": self.seed,
            **asdict(law),
            "snr_levels": list(law.snr_levels),
        }


class TrialWriter:
    """What one process does: draw trial `index`, render it, write its files, and say what became of it."""

    def __init__(self, speakers: Sequence[Speaker], root: Path, folder: Path, law: MixingLaw, seed: int) -> None:
        self.speakers, self.root, self.folder, self.law, self.seed = speakers, root, folder, law, seed
        self.load = functools.lru_cache(CACHED_SOURCES)(functools.partial(load_source, law=law))

    def __call__(self, index: int) -> Outcome:
        """Write trial `index`, from the first of its draws that can be rendered."""
        outcome = Outcome(index)
        for attempt in range(MAX_ATTEMPTS):
            draw = draw_trial(self.speakers, self.seed, index, attempt, self.law.snr_levels)
            try:
                rendered = render(draw, self.law, self.load)
            except Unusable as unusable:
                outcome.skipped += [self._skip(draw, rejection) for rejection in unusable.rejections]
                continue
            outcome.skipped += [self._skip(draw, rejection) for rejection in rendered.passed_over]
            outcome.rows = [self._write(draw, rendered, mixed) for mixed in rendered.mixed]
            return outcome
        outcome.skipped.append({"index": index, "attempt": MAX_ATTEMPTS, "reason": GIVEN_UP})
        return outcome

    def _write(self, draw: Draw, rendered: Rendered, mixed: Mixed) -> Row:
        segment = "" if mixed.segment is None else f"_{mixed.segment}"
        name = f"{draw.target_speaker}_{draw.interferer_speaker}_{draw.index:06d}{segment}"
        sounds = {"mixture": mixed.mixture, "target": mixed.target, "enrollment": rendered.enrollment.samples}
        for kind, samples in sounds.items():
            path = self.folder / f"{name}{SUFFIXES[kind]}"
            write_audio(path, samples, self.law.sample_rate, subtype="PCM_16", durable=False)
        return {
            "name": name,
            "index": draw.index,
            "attempt": draw.attempt,
            "seed": self.seed,
            "segment": mixed.segment,
            "mixtures": len(rendered.mixed),
            "target_speaker": draw.target_speaker,
            "interferer_speaker": draw.interferer_speaker,
            "target": self._relative(draw.target),
            "interferer": self._relative(draw.interferer),
            "enrollment": self._relative(rendered.enrollment_file),
            "snr_db": draw.snr_db,
            "target_gain_db": round(mixed.target_gain_db, 4),
            "interferer_gain_db": round(mixed.interferer_gain_db, 4),
            "enrollment_gain_db": round(rendered.enrollment.gain_db, 4),
            "peak_limited": mixed.peak_limited,
            "sample_rate": self.law.sample_rate,
            "start": mixed.start,
            "samples": len(mixed.mixture),
            "enrollment_samples": len(rendered.enrollment.samples),
        }

    def _skip(self, draw: Draw, rejection: Rejection) -> Row:
        return {
            "index": draw.index,
            "attempt": draw.attempt,
            "reason": rejection.reason,
            "file": self._relative(rejection.file),
            "detail": rejection.detail,
        }

    def _relative(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.root)).as_posix()


def summary_line(summary: Summary) -> str:
    """Return the counts in one line: what was written, what was passed over and why, which files are unusable."""
    hours = summary.mixture_seconds / 3600
    parts = [f"{summary.trials} of {summary.asked} trials, {summary.mixtures} mixtures ({hours:.2f} h)"]
    if summary.given_up:
        parts.append(f"{summary.given_up} trials given up after {MAX_ATTEMPTS} draws")
    if summary.replaced:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(summary.replaced.items()))
        parts.append(f"passed over and drawn again: {reasons}")
    if summary.unusable:
        shown = [f"{file} ({why})" for file, why in sorted(summary.unusable.items())[:3]]
        more = ["…"] if len(summary.unusable) > len(shown) else []
        parts.append(f"{len(summary.unusable)} unusable files: {', '.join(shown + more)}")
    return "; ".join(parts)


def _count(summary: Summary, outcome: Outcome) -> None:
    for row in outcome.rows:
        summary.mixtures += 1
        summary.mixture_seconds += row["samples"] / row["sample_rate"]
        summary.peak_limited += row["peak_limited"]
    summary.trials += bool(outcome.rows)
    for row in outcome.skipped:
        if row["reason"] == GIVEN_UP:
            summary.given_up += 1
            continue
        summary.replaced[row["reason"]] = summary.replaced.get(row["reason"], 0) + 1
        if row["reason"] in (UNREADABLE, SILENT_FILE):
            summary.unusable[row["file"]] = row["detail"]


def _checked(speakers_files: Iterable[SpeakerFiles]) -> list[Speaker]:
    """Return the speakers sorted, each file once, after checking that trials can be drawn from them at all."""
    speakers = sorted(
        (Speaker(str(each.id), tuple(sorted({Path(file) for file in each.files}))) for each in speakers_files),
        key=lambda speaker: speaker.id,
    )
    speakers = [speaker for speaker in speakers if speaker.files]
    if len(speakers) < 2:
        raise CorpusError(f"{len(speakers)} speakers with files are too few; a mixture needs at least 2")
    if max(len(speaker.files) for speaker in speakers) < 2:
        raise CorpusError("no speaker has 2 files; target and enrollment must be different files of one speaker")
    for name, count in Counter(speaker.id for speaker in speakers).items():
        if count > 1:
            raise CorpusError(f"speaker {name!r} stands twice; give each speaker once, with all files")
        if not name or set(name) & set("/\\\0"):
            raise CorpusError(f"speaker {name!r}: cannot be part of a file name; rename it")
    return speakers


def _common_folder(speakers: Sequence[Speaker]) -> Path:
    """Return the deepest folder that holds all files; rows name sources relative to it."""
    folders = {os.path.abspath(file.parent) for speaker in speakers for file in speaker.files}  # noqa: PTH100
    return Path(os.path.commonpath(folders))


def _digest(speakers: Sequence[Speaker], root: Path) -> str:
    """Return a hash of who has which files of which sizes, wherever the corpus lies."""
    digest = hashlib.blake2b(digest_size=16)
    for speaker in speakers:
        for file in speaker.files:
            size = file.stat().st_size if file.exists() else -1
            digest.update(f"{speaker.id}\0{os.path.relpath(file, root)}\0{size}\n".encode())
    return digest.hexdigest()
