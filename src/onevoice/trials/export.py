"""Copies any data set to a folder of trials, which every tool can read."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onevoice.audio import probe_audio
from onevoice.cluster import Workers
from onevoice.errors import ConfigError
from onevoice.files import Shard
from onevoice.mixing.folder import MadeMixture, MadeTrial, Outcome, write_trials
from onevoice.trials.config import FolderTrials, LibriMixMetadataTrials, LibriMixTrials, TrialsConfig, Wsj0Trials
from onevoice.trials.reading import load_trial, open_trials, to_record
from onevoice.trials.trial import Trial, TrialAudio, TrialList

RENDER_VERSION = 1


@dataclass
class ExportSummary:
    """What a run wrote, and one line for each trial of the data set that was skipped."""

    trials: int
    mixture_seconds: float
    left_out: list[str]
    notes: list[str]

    def add(self, outcome: Outcome) -> None:
        """Count one more trial."""
        self.trials += len(outcome.rows)
        self.mixture_seconds += sum(row["samples"] / row["sample_rate"] for row in outcome.rows)

    def __str__(self) -> str:
        left_out = [f"{len(self.left_out)} skipped, the first: {self.left_out[0]}"] if self.left_out else []
        return "; ".join([f"{self.trials} trials ({self.mixture_seconds / 3600:.2f} h)", *left_out, *self.notes])


def export_trials(
    config: TrialsConfig,
    out: str | Path,
    *,
    sample_rate: int | None = None,
    workers: Workers = 1,
    shard: Shard | None = None,
) -> ExportSummary:
    """Write a set of trials to `out` as NAME-mixed.wav, NAME-target.wav, NAME-ref.wav and manifest.jsonl.

    Files are 16-bit WAV at `sample_rate` in Hz, by default that of the data set (for a folder, of its first mixture).
    LibriMix keeps every bit of its files. An interrupted run resumes where it stopped. With `shard`,
    only its trials are written.

    Raises what `open_trials` raises, `ConfigError` for a set that cuts its trials, `AudioError` for a file that cannot
    be decoded, `CorpusError` if `out` holds another run, and `StorageError` if it cannot be written.
    """
    if config.segment_seconds is not None or config.enrollment_seconds is not None:
        raise ConfigError("segment_seconds, enrollment_seconds: trials are written whole; remove these keys")
    out = Path(out)
    opened = open_trials(config)
    rate = sample_rate or own_rate(opened)
    roots = _roots(config)
    settings = {
        "render_version": RENDER_VERSION,
        "corpus": to_record(config),
        "sample_rate": rate,
        "trials": len(opened.trials),
        "trials_digest": _digest(opened.trials, roots),
    }
    summary = ExportSummary(0, 0.0, opened.left_out, opened.notes)
    start = functools.partial(TrialCopier, opened.trials, roots, rate)
    write_trials(out, settings, start, summary, workers, shard=shard)
    return summary


class TrialCopier:
    """Makes trial `index` of a data set: its audio unchanged, except for the sample rate."""

    def __init__(self, trials: Sequence[Trial], roots: Sequence[Path], sample_rate: int) -> None:
        self.trials, self.roots, self.sample_rate = trials, roots, sample_rate

    def __call__(self, index: int) -> MadeTrial:
        """Load trial `index`."""
        trial = self.trials[index]
        mixture, target, enrollment = load_trial(trial, self.sample_rate)
        row = {
            "name": trial.name,
            "index": index,
            "mixtures": 1,
            "target_speaker": trial.speaker,
            "mixture": _relative_name(trial.mixture, self.roots),
            "target": _relative_name(trial.target, self.roots),
            "enrollment": _relative_name(trial.enrollment, self.roots),
            "sample_rate": self.sample_rate,
        }
        return MadeTrial([MadeMixture(row, mixture, target, enrollment)], [])


def own_rate(opened: TrialList) -> int:
    """Return the sample rate of a set of trials in Hz; for a folder, that of its first mixture."""
    if opened.sample_rate is not None:
        return opened.sample_rate
    first = opened.trials[0].mixture
    assert isinstance(first, Path), "only folders have no sample rate of their own, and they hold files"
    return probe_audio(first, str(first))[1]


def _roots(config: TrialsConfig) -> tuple[Path, ...]:
    """Return the folders of the data set; the names of its files are relative to them."""
    if isinstance(config, FolderTrials):
        return (Path(config.folder),)
    if isinstance(config, Wsj0Trials):
        return tuple(Path(folder) for folder in config.replace.values())
    own = (Path(config.root),) if isinstance(config, LibriMixTrials) else ()
    assert isinstance(config, LibriMixTrials | LibriMixMetadataTrials)
    return own if config.librispeech_dir is None else (*own, Path(config.librispeech_dir))


def _relative_name(audio: TrialAudio, roots: Sequence[Path]) -> str:
    if not isinstance(audio, Path):
        return str(audio)
    above = next((root for root in roots if audio.is_relative_to(root)), None)
    return (audio if above is None else audio.relative_to(above)).as_posix()


def _digest(trials: Sequence[Trial], roots: Sequence[Path]) -> str:
    """Return a hash of the names, speakers and audio of the trials that does not depend on where the data set is."""
    digest = hashlib.blake2b(digest_size=16)
    for trial in trials:
        names = [_relative_name(audio, roots) for audio in (trial.mixture, trial.target, trial.enrollment)]
        digest.update("\0".join([trial.name, trial.speaker, *names]).encode() + b"\n")
    return digest.hexdigest()
