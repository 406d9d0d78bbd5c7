"""Training and test mixtures from a corpus, written to a folder: the mixing law over many trials, in processes.

    MixtureGenerator(scan("LibriSpeech/dev-clean"), "data/train", nfiles=5000).generate_mixes(snr_levels=[0, 5])

What is written, and how an interrupted run resumes: `onevoice.mixing.folder`. What a trial is: `onevoice.mixing.law`.
Each trial depends on (seed, index) alone, never on the number of workers.
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from onevoice.cluster import Cluster, Workers
from onevoice.corpus.recordings import Recording
from onevoice.errors import ConfigError, CorpusError
from onevoice.files import Row, Shard
from onevoice.mixing.folder import GIVEN_UP, MadeMixture, MadeTrial, Outcome, write_trials
from onevoice.mixing.law import (
    SILENT_FILE,
    UNREADABLE,
    DrawnTrial,
    MixedSegment,
    MixingLaw,
    Rejection,
    RenderedTrial,
    SpeakerRecordings,
    Unusable,
    draw_trial,
    load_utterance,
    render_trial,
)

LAW_VERSION = 1
MAX_ATTEMPTS = 100
"""Draws per trial before it is given up."""
CACHED_UTTERANCES = 64
"""Decoded utterances that each worker keeps, for small corpora: about 1 MB each at 15 s and 16 kHz."""


@runtime_checkable
class SpeakerFiles(Protocol):
    """Anything with the name of a speaker and their sound files, such as `corpus.listing.Speaker`."""

    @property
    def id(self) -> str:
        """Name of the speaker."""

    @property
    def files(self) -> Sequence[str | Path | Recording]:
        """Their sound files: paths, or recordings in tar shards."""


@dataclass
class MixingSummary:
    """Counts of a run. `replaced` counts unused draws by reason, `unusable` says what is wrong with a file."""

    asked: int
    trials: int = 0
    given_up: int = 0
    mixtures: int = 0
    mixture_seconds: float = 0.0
    peak_limited: int = 0
    replaced: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one more trial."""
        for row in outcome.rows:
            self.mixtures += 1
            self.mixture_seconds += row["samples"] / row["sample_rate"]
            self.peak_limited += bool(row.get("peak_limited"))
        self.trials += bool(outcome.rows)
        for row in outcome.skipped:
            if row["reason"] == GIVEN_UP:
                self.given_up += 1
                continue
            self.replaced[row["reason"]] = self.replaced.get(row["reason"], 0) + 1
            if row["reason"] in (UNREADABLE, SILENT_FILE):
                self.unusable[str(row.get("file"))] = str(row.get("detail"))

    def __str__(self) -> str:
        """Return the counts in one line."""
        hours = self.mixture_seconds / 3600
        parts = [f"{self.trials} of {self.asked} trials, {self.mixtures} mixtures ({hours:.2f} h)"]
        if self.given_up:
            parts.append(f"{self.given_up} trials given up after {MAX_ATTEMPTS} draws")
        if self.replaced:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(self.replaced.items()))
            parts.append(f"skipped and drawn again: {reasons}")
        if self.unusable:
            shown = [f"{file} ({why})" for file, why in sorted(self.unusable.items())[:3]]
            more = ["…"] if len(self.unusable) > len(shown) else []
            parts.append(f"{len(self.unusable)} unusable files: {', '.join(shown + more)}")
        return "; ".join(parts)


class MixtureGenerator:
    """Draws and writes mixtures with their targets and enrollments.

    `speakers_files` are the speakers (`corpus.listing.scan`), in any order. `nfiles` is the number of trials; each
    makes one mixture in test mode and one per segment otherwise. Raises `CorpusError` when there are too few speakers
    (it takes two, one of them with two files), `ConfigError` for values out of range.
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
        self.speakers = to_recordings(speakers_files)
        _check_speakers(self.speakers)
        self.folder = Path(out_folder)
        self.count = nfiles
        self.test = test
        self.seed = randomState
        self.sample_rate = sample_rate

    def generate_mixes(
        self,
        snr_levels: Sequence[int | float] = (0, 5),
        num_workers: Workers = 2,
        update_steps: int = 10,
        trim_db: int | float | None = None,
        vad_db: int | float | None = 20,
        audioLen: int | float = 3,  # noqa: N803 - the name of the original system
        *,
        shard: Shard | None = None,
    ) -> MixingSummary:
        """Write all trials to the folder, or those that an interrupted run left, and return the counts.

        Each trial draws one of `snr_levels` in dB, all equally likely. `num_workers` processes do the work. In a
        terminal, a progress bar on standard error moves every `update_steps` trials. For `trim_db` and `vad_db` see
        `MixingLaw`. Segments have `audioLen` seconds. Broken and silent files are skipped and named in the summary.
        With `shard`, only its trials are written (`mixing.folder.write_trials`).

        Raises `CorpusError` when the folder holds a run with other settings or nothing could be mixed,
        `StorageError` when the disk is full, `ConfigError` for values out of range.
        """
        for name, value in (("num_workers (--workers)", num_workers), ("update_steps", update_steps)):
            if not isinstance(value, Cluster) and value < 1:
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
        start = functools.partial(TrialMaker, self.speakers, root, law, self.seed)
        summary = MixingSummary(self.count if shard is None else len(shard.of(range(self.count))))
        write_trials(self.folder, self._settings(law, root), start, summary, num_workers, update_steps, shard)
        if shard is None and not summary.mixtures:
            raise CorpusError(f"{root}: no mixture could be made; {summary}")
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


class TrialMaker:
    """Makes trial `index` by the mixing law, from the first of its draws that can be used."""

    def __init__(self, speakers: Sequence[SpeakerRecordings], root: Path, law: MixingLaw, seed: int) -> None:
        self.speakers, self.root, self.law, self.seed = speakers, root, law, seed
        self.load = functools.lru_cache(CACHED_UTTERANCES)(functools.partial(load_utterance, law=law))

    def __call__(self, index: int) -> MadeTrial:
        """Return the mixtures of trial `index`, or none when all its draws are unusable."""
        skipped: list[Row] = []
        for attempt in range(MAX_ATTEMPTS):
            draw = draw_trial(self.speakers, self.seed, index, attempt, self.law.snr_levels)
            try:
                trial = render_trial(draw, self.law, self.load)
            except Unusable as unusable:
                skipped += [self._skipped(draw, rejection) for rejection in unusable.rejections]
                continue
            skipped += [self._skipped(draw, rejection) for rejection in trial.skipped]
            return MadeTrial([self._mixture(draw, trial, mixed) for mixed in trial.mixed], skipped)
        return MadeTrial([], [*skipped, {"index": index, "attempt": MAX_ATTEMPTS, "reason": GIVEN_UP}])

    def _mixture(self, draw: DrawnTrial, trial: RenderedTrial, mixed: MixedSegment) -> MadeMixture:
        segment = "" if mixed.segment is None else f"_{mixed.segment}"
        row = {
            "name": f"{draw.target_speaker}_{draw.interferer_speaker}_{draw.index:06d}{segment}",
            "index": draw.index,
            "attempt": draw.attempt,
            "seed": self.seed,
            "segment": mixed.segment,
            "mixtures": len(trial.mixed),
            "target_speaker": draw.target_speaker,
            "interferer_speaker": draw.interferer_speaker,
            "target": _place(draw.target, self.root),
            "interferer": _place(draw.interferer, self.root),
            "enrollment": _place(trial.enrollment_recording, self.root),
            "snr_db": draw.snr_db,
            "target_gain_db": round(mixed.target_gain_db, 4),
            "interferer_gain_db": round(mixed.interferer_gain_db, 4),
            "enrollment_gain_db": round(trial.enrollment.gain_db, 4),
            "peak_limited": mixed.peak_limited,
            "sample_rate": self.law.sample_rate,
            "start": mixed.start,
        }
        return MadeMixture(row, mixed.mixture, mixed.target, trial.enrollment.samples)

    def _skipped(self, draw: DrawnTrial, rejection: Rejection) -> Row:
        return {
            "index": draw.index,
            "attempt": draw.attempt,
            "reason": rejection.reason,
            "file": _place(rejection.recording, self.root),
            "detail": rejection.detail,
        }


def to_recordings(speakers_files: Iterable[SpeakerFiles]) -> list[SpeakerRecordings]:
    """Return the speakers with their recordings, both sorted, each recording once; speakers without files are dropped.

    So the trials do not depend on the order in which speakers and files are given.
    """
    speakers = []
    for each in speakers_files:
        found = {file if isinstance(file, Recording) else Recording(Path(file), str(file)) for file in each.files}
        if found:
            ordered = sorted(found, key=lambda recording: (recording.path, recording.name))
            speakers.append(SpeakerRecordings(str(each.id), tuple(ordered)))
    return sorted(speakers, key=lambda speaker: speaker.id)


def _check_speakers(speakers: Sequence[SpeakerRecordings]) -> None:
    """Raise `CorpusError` unless trials can be drawn from these speakers."""
    if len(speakers) < 2:
        raise CorpusError(f"{len(speakers)} speakers with files are too few; a mixture needs at least 2")
    if max(len(speaker.recordings) for speaker in speakers) < 2:
        raise CorpusError("no speaker has 2 files; target and enrollment must be different files of one speaker")
    for name, count in Counter(speaker.id for speaker in speakers).items():
        if count > 1:
            raise CorpusError(f"speaker {name!r} appears twice; give each speaker once, with all files")
        if not name or set(name) & set("/\\\0"):
            raise CorpusError(f"speaker {name!r}: cannot be part of a file name; rename it")


def _common_folder(speakers: Sequence[SpeakerRecordings]) -> Path:
    """Return the deepest folder that holds all files; rows name recordings relative to it."""
    folders = {os.path.abspath(each.path.parent) for speaker in speakers for each in speaker.recordings}  # noqa: PTH100
    return Path(os.path.commonpath(folders))


def _place(recording: Recording, root: Path) -> str:
    """Return the path of a recording from `root`; for a member of a tar shard, `shard.tar:member`."""
    path = Path(os.path.relpath(recording.path, root)).as_posix()
    return path if recording.size is None else f"{path}:{recording.name.removeprefix(f'{recording.path.name}:')}"


def _digest(speakers: Sequence[SpeakerRecordings], root: Path) -> str:
    """Return a hash of the recordings of each speaker and their sizes, wherever the corpus is."""
    digest = hashlib.blake2b(digest_size=16)
    for speaker in speakers:
        for recording in speaker.recordings:
            line = f"{speaker.id}\0{_place(recording, root)}\0{recording.size_bytes()}\n"
            digest.update(line.encode())
    return digest.hexdigest()
