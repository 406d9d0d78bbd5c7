"""Estimates of any other toolkit: a folder of audio files that are named by trial, judged like those of a network.

The estimate of trial NAME is NAME.wav or NAME.flac (or -estimate before the ending), mono, at the rate of the trials,
and as long as its mixture. Up to 10 ms may be missing at the end, as framing leaves them; they are taken as zeros, and
up to 10 ms more are cut off; a note says so. Nothing else is changed.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from onevoice.audio import probe_audio, read_audio
from onevoice.errors import AudioError, ConfigError, CorpusError
from onevoice.evaluation.run import Estimates, Estimator
from onevoice.trials import TrialsConfig, open_trials
from onevoice.trials.export import own_rate
from onevoice.trials.reading import TrialBatch
from onevoice.trials.trial import PADDED_SECONDS, Trial, differ_slightly

ENDINGS = (".wav", ".flac")
SUFFIX = "-estimate"


@dataclass(frozen=True)
class EstimateFolder:
    """A checked folder of estimates."""

    estimator: Estimator
    files_hash: str
    """Hash of the names, sizes and times of the files."""


def open_estimates(folder: Path, config: TrialsConfig, sample_rate: int | None = None) -> EstimateFolder:
    """Return the estimates in `folder` for a set of trials, after reading the header of every file.

    `sample_rate` in Hz is where estimates are judged, by default the rate of the trials; trials are converted to it,
    estimates must have it. Raises `CorpusError` if estimates are missing, `AudioError` for an unreadable file, another
    rate or another length, and `ConfigError` for trials that are cut.
    """
    if config.segment_seconds is not None or config.enrollment_seconds is not None:
        raise ConfigError("segment_seconds, enrollment_seconds: estimates are of whole trials; remove these keys")
    opened = open_trials(config)
    rate = sample_rate or own_rate(opened)
    found = _files_by_trial(folder)
    names = [trial.name for trial in opened.trials]
    missing = [name for name in names if name not in found]
    if missing:
        raise CorpusError(
            f"{folder}: {len(missing)} of {len(names)} trials have no estimate, the first is {missing[0]!r}; expected "
            f"{missing[0]}.wav"
        )
    files = {name: found[name] for name in names}
    padded = [trial.name for trial in opened.trials if _is_padded(files[trial.name], trial, rate)]
    extra = sorted(found.keys() - files.keys())
    notes = []
    if extra and config.limit is None:
        notes.append(f"{folder}: {len(extra)} files belong to no trial, the first is {found[extra[0]].name}")
    if padded:
        notes.append(
            f"{folder}: {len(padded)} of {len(names)} estimates differ from their mixtures in length by up to "
            f"{PADDED_SECONDS:g} s; zeros are added, or the end is cut off (first {padded[0]!r})"
        )
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return EstimateFolder(Estimator(functools.partial(_read, files), rate, notes=tuple(notes)), digest.hexdigest())


def _files_by_trial(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder; name the folder of the estimates")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS):
        name = path.stem.removesuffix(SUFFIX)
        if name in found:
            raise CorpusError(f"{folder}: {found[name].name} and {path.name} are of one trial; remove one of them")
        found[name] = path
    return found


def _is_padded(file: Path, trial: Trial, rate: int) -> bool:
    """Check the header of an estimate; return whether its length differs slightly from that of its mixture."""
    samples, own = probe_audio(file, str(file))
    if own != rate:
        raise AudioError(
            f"{file}: is at {own} Hz, but is judged at {rate} Hz; give estimates at that rate, or choose another with "
            "--sample-rate"
        )
    if not isinstance(trial.mixture, Path):
        return False
    mixture, mixture_rate = probe_audio(trial.mixture, str(trial.mixture))
    _require_length(file, samples / rate, mixture / mixture_rate)
    return round(mixture * rate / mixture_rate) != samples


def _require_length(file: Path, seconds: float, expected_seconds: float) -> None:
    if not differ_slightly(seconds, expected_seconds):
        raise AudioError(
            f"{file}: lasts {seconds:.3f} s, but its mixture {expected_seconds:.3f} s; give estimates as long as their "
            "mixtures"
        )


def _read(files: Mapping[str, Path], batch: TrialBatch) -> Estimates:
    return [
        _fitted(files[name], length) for name, length in zip(batch["name"], batch["audio_length"].tolist(), strict=True)
    ]


def _fitted(file: Path, length: int) -> Float[np.ndarray, "_samples"]:
    """Return the samples of an estimate, with zeros at the end or cut to `length`."""
    samples, rate = read_audio(file)
    _require_length(file, len(samples) / rate, length / rate)
    return np.pad(samples[:length], (0, max(length - len(samples), 0)))
