"""Reads trials: from a config section to checked trials, and from trials to batches.

Folders of trials have one of two layouts, at any sample rate:

- flat: `NAME-mixed.wav`, `NAME-ref.wav` and `NAME-target.wav` side by side, as `onevoice mix` writes them;
- folders: `mix/`, `refs/` and `targets/`, whose files share their names, with or without those endings.

If the files of a kind share no name with the mixtures and are as many, they are paired in sorted order, as in the
original system. The target speaker is taken from `manifest.jsonl` if there is one, otherwise from the part of the name
before its first underscore (of the target's file, if paired in order). Mixture and target may differ by a few samples;
the shorter one is padded. A trial with a silent target is one in which the target is absent.

Cuts, order and padding are functions of seed, epoch and trial; the number of processes changes nothing.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from onevoice.audio import EXTENSIONS, Mono, read_audio, require_not_silent, resample
from onevoice.config import to_dict
from onevoice.errors import AudioError, CorpusError, OnevoiceError, WorkerError
from onevoice.mixing.folder import SUFFIXES
from onevoice.rng import derive
from onevoice.trials.config import FolderTrials, LibriMixTrials, TrialsConfig, TrialSet, Wsj0Trials
from onevoice.trials.librimix_trials import list_librimix
from onevoice.trials.trial import (
    Trial,
    TrialAudio,
    TrialList,
    check_files,
    differ_slightly,
    note_padding,
    require_few_missing,
)
from onevoice.trials.wsj0 import list_wsj0
from onevoice.units import to_samples

ProcessShare = tuple[int, int]
"""The number of a process, from 0, and the number of processes; each takes its share of every batch."""
WHOLE_BATCH: ProcessShare = (0, 1)

FOLDERS = {"mixture": "mix", "enrollment": "refs", "target": "targets"}


class TrialBatch(TypedDict):
    """Padded trials. `audio`, `ref` and their lengths are what a network takes."""

    audio: Float[Tensor, "batch samples"]
    audio_length: NotRequired[Int[Tensor, " batch"]]
    """Not set if every mixture fills its row."""
    ref: Float[Tensor, "batch ref_samples"]
    ref_length: NotRequired[Int[Tensor, " batch"]]
    target: Float[Tensor, "batch samples"]
    speaker: Int[Tensor, " batch"]
    name: list[str]


@dataclass(frozen=True)
class Item:
    """One trial as arrays, before batching."""

    name: str
    mixture: Mono
    target: Mono
    enrollment: Mono
    speaker: int
    """Class of the target speaker; −1 if it is none of the training speakers."""


def open_trials(config: TrialsConfig) -> TrialList:
    """Return the trials that a config section names, after reading the header of every file.

    Trials with something missing or wrong are skipped and named in `left_out`, up to the fraction `max_missing`, which
    is checked once for the lists and once for the files. Raises `CorpusError` above that fraction or if no trial is
    left, `ConfigError` for contradicting settings, and `MissingDependencyError` if the data set needs a package that
    is not installed.
    """
    if isinstance(config, FolderTrials):
        trials, notes = _read_folder(Path(config.folder), config.limit)
        return TrialList(trials, [], None, notes + note_padding(config.folder, trials))
    candidates, unlisted, notes = list_wsj0(config) if isinstance(config, Wsj0Trials) else list_librimix(config)
    name = place_of(config)
    require_few_missing(name, unlisted, len(candidates) + len(unlisted), config.max_missing)
    trials, broken = check_files(candidates[: config.limit])
    require_few_missing(name, broken, len(trials) + len(broken), config.max_missing)
    if not trials:
        raise CorpusError(f"{name}: holds no trials; check the settings of the data set")
    return TrialList(trials, unlisted + broken, config.sample_rate, notes + note_padding(name, trials))


def find_trials(folder: str | Path, limit: int | None = None) -> list[Trial]:
    """List the first `limit` trials of a folder, by name; `CorpusError` if there are none or files are missing."""
    return _read_folder(Path(folder), limit)[0]


def _read_folder(folder: Path, limit: int | None) -> tuple[list[Trial], list[str]]:
    """Return the trials of a folder, and a line for each kind of file that is paired in order."""
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder of trials")
    in_folders = all((folder / name).is_dir() for name in FOLDERS.values())
    files = {
        kind: _files_by_name(folder / FOLDERS[kind] if in_folders else folder, suffix, needs_suffix=not in_folders)
        for kind, suffix in SUFFIXES.items()
    }
    names = sorted(files["mixture"])
    if not names:
        raise CorpusError(
            f"{folder}: holds no trials; expected NAME-mixed.wav, NAME-ref.wav and NAME-target.wav, "
            "or folders mix, refs and targets"
        )
    speakers = {name: name.split("_")[0] for name in names}
    notes = []
    for kind in ("enrollment", "target"):
        missing = [name for name in names if name not in files[kind]]
        if not missing:
            continue
        place = f"{FOLDERS[kind]}/{missing[0]}" if in_folders else f"{missing[0]}{SUFFIXES[kind]}"
        if len(missing) < len(names) or len(files[kind]) != len(names):
            raise CorpusError(
                f"{folder}: the {kind} is missing for {len(missing)} of {len(names)} trials, first {missing[0]!r}; "
                f"add the files (expected {place}.wav), or remove these trials"
            )
        paired = dict(zip(names, sorted(files[kind].items()), strict=True))
        _require_same_speakers(folder, kind, {name: other for name, (other, _) in paired.items()})
        if kind == "target":
            speakers = {name: other.split("_")[0] for name, (other, _) in paired.items()}
        files[kind] = {name: file for name, (_, file) in paired.items()}
        notes.append(
            f"{folder}: no {kind} has the name of its mixture (expected {place}.wav); {len(names)} are paired in "
            f"sorted order, first {files['mixture'][names[0]].name} with {files[kind][names[0]].name}"
        )
    speakers |= _manifest_speakers(folder / "manifest.jsonl")
    trials = [Trial(name, speakers[name], **{kind: files[kind][name] for kind in files}) for name in names[:limit]]
    return trials, notes


def _require_same_speakers(folder: Path, kind: str, paired: dict[str, str]) -> None:
    """Raise `CorpusError` if a pair has other speakers, where names are TARGET_INTERFERER_…, both numbers."""
    for mixture, other in paired.items():
        ids = [re.match(r"(\d+)_(\d+)(?!\d)", name) for name in (mixture, other)]
        if ids[0] and ids[1] and ids[0].groups() != ids[1].groups():
            raise CorpusError(
                f"{folder}: in sorted order, mixture {mixture!r} meets {kind} {other!r}, which names other speakers; "
                "give the three files of a trial one name"
            )


def place_of(config: TrialsConfig) -> str:
    """Return the folder or file that stands for a set of trials in messages."""
    if isinstance(config, FolderTrials):
        return config.folder
    if isinstance(config, Wsj0Trials):
        return config.lists
    if isinstance(config, LibriMixTrials):
        return config.root
    return config.metadata


def to_record(config: TrialsConfig) -> dict[str, Any]:
    """Return a set of trials as JSON values for a record, without the keys of `TrialSet` that are null."""
    unset = {field.name for field in fields(TrialSet) if getattr(config, field.name) is None}
    return {key: value for key, value in to_dict(config).items() if key not in unset}


def load_audio(audio: TrialAudio, sample_rate: int) -> Mono:
    """Read or render audio and convert it to `sample_rate` in Hz; `AudioError` for anything unusable."""
    if isinstance(audio, Path):
        return read_audio(audio, sample_rate)[0]
    samples, rate = audio.render()
    return resample(samples, rate, sample_rate)


def load_trial(trial: Trial, sample_rate: int) -> tuple[Mono, Mono, Mono]:
    """Return mixture, target and enrollment at `sample_rate` in Hz. A silent target means that the target is absent.

    If mixture and target differ by a few samples, the shorter one is padded with zeros. Raises `AudioError` if one of
    them is unusable, if mixture or enrollment is silent, or if mixture and target differ by more.
    """
    mixture, target, enrollment = (
        load_audio(audio, sample_rate) for audio in (trial.mixture, trial.target, trial.enrollment)
    )
    if not differ_slightly(len(mixture) / sample_rate, len(target) / sample_rate):
        raise AudioError(f"{trial.target}: has {len(target)} samples, its mixture {len(mixture)}; they must match")
    length = max(len(mixture), len(target))
    mixture, target = (np.pad(each, (0, length - len(each))) for each in (mixture, target))
    require_not_silent(mixture, str(trial.mixture))
    require_not_silent(enrollment, str(trial.enrollment))
    return mixture, target, enrollment


class TrialDataset(Dataset[Item]):
    """Trials as arrays at one sample rate. Indexed by `(epoch, index)`, so that cuts differ between epochs.

    `segment_seconds` cuts mixture and target to a random part of at most that length, and `enrollment_seconds` cuts
    the enrollment. The cuts depend only on the seed, the epoch and the name of the trial.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        sample_rate: int,
        speakers: Sequence[str] = (),
        segment_seconds: float | None = None,
        enrollment_seconds: float | None = None,
        seed: int = 0,
    ) -> None:
        self.trials = list(trials)
        self.sample_rate = sample_rate
        self.classes = {name: index for index, name in enumerate(speakers)}
        self.segment = None if segment_seconds is None else to_samples(segment_seconds, sample_rate)
        self.enrollment = None if enrollment_seconds is None else to_samples(enrollment_seconds, sample_rate)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        trial = self.trials[index]
        mixture, target, enrollment = load_trial(trial, self.sample_rate)
        if self.segment is not None or self.enrollment is not None:
            rng = derive(self.seed, "crop", epoch, trial.name)
            part = _random_part(rng, len(mixture), self.segment)
            mixture, target = mixture[part], target[part]
            enrollment = enrollment[_random_part(rng, len(enrollment), self.enrollment)]
        return Item(trial.name, mixture, target, enrollment, self.classes.get(trial.speaker, -1))


def share_of_batch(batch: Int[np.ndarray, " batch"], share: ProcessShare) -> Int[np.ndarray, " part"]:
    """Return the items of a batch that belong to one of several processes: every `count`-th item.

    With this choice the first halves of all shares together are the first half of the batch, so which items meet in a
    part of the batch (`training.accumulate`) does not depend on the number of processes.
    """
    number, count = share
    return batch[number::count]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(epoch, index)` keys for one epoch, for the steps start ≤ step < stop.

    With `shuffle`, the order depends only on (seed, epoch), so that a resumed epoch continues with its remaining
    batches; an incomplete last batch is dropped, so that every step has the same weight. Without `shuffle`, all items
    come in their own order. Each batch holds only the `share` of one of several processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        epoch: int,
        start: int = 0,
        stop: int | None = None,
        *,
        shuffle: bool = True,
        share: ProcessShare = WHOLE_BATCH,
    ) -> None:
        full_batches, rest = divmod(size, batch_size)
        count = full_batches + (rest > 0 and (full_batches == 0 or not shuffle))
        self.steps = range(start, count if stop is None else min(stop, count))
        self.order = derive(seed, "order", epoch).permutation(size) if shuffle else np.arange(size)
        self.epoch, self.batch_size, self.share = epoch, batch_size, share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            batch = self.order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in share_of_batch(batch, self.share).tolist()]


def collate(items: Sequence[Item]) -> TrialBatch:
    """Pad items with zeros to the longest of the batch."""
    audio, audio_length = pad([item.mixture for item in items])
    ref, ref_length = pad([item.enrollment for item in items])
    return {
        "audio": audio,
        "audio_length": audio_length,
        "ref": ref,
        "ref_length": ref_length,
        "target": pad([item.target for item in items])[0],
        "speaker": torch.tensor([item.speaker for item in items]),
        "name": [item.name for item in items],
    }


def pad(signals: Sequence[Mono]) -> tuple[Float[Tensor, "batch samples"], Int[Tensor, " batch"]]:
    """Stack signals into a tensor, with zeros after the shorter ones; return it with the lengths."""
    length = torch.tensor([len(signal) for signal in signals])
    padded = torch.zeros(len(signals), int(length.max()))
    for row, signal in zip(padded, signals, strict=True):
        row[: len(signal)] = torch.from_numpy(signal)
    return padded, length


def read_batches(loader: Iterable[TrialBatch]) -> Iterator[TrialBatch]:
    """Yield the batches of a `DataLoader`, and turn a traceback from one of its processes back into our one-line error.

    Raises `WorkerError` if one of its processes dies.
    """
    try:
        yield from loader
    except OnevoiceError as error:
        kind = type(error)
        *_, last = str(error).strip().splitlines()
        error.__traceback__ = None  # its frames would keep the loader's processes, and so this one, from ending
        raise kind(last.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from None
    except RuntimeError as error:
        dead = dead_worker_error(error)
        if dead is None:
            raise
        raise dead from error


def dead_worker_error(error: Exception) -> WorkerError | None:
    """Return the error to raise if `error` means that a process of a `DataLoader` died, otherwise None.

    While such a process is dead, any call of torch may raise this error.
    """
    if "DataLoader worker" not in str(error):
        return None
    number = re.search(r"pid\(?s?\)? ?(\d+)", str(error))
    return WorkerError(
        f"a process that reads the data died{f' (pid {number[1]})' if number else ''}: it was killed, memory ran out, "
        "or /dev/shm of a container is too small; set data.workers=0, or give the container more shared memory"
    )


def _files_by_name(folder: Path, suffix: str, *, needs_suffix: bool) -> dict[str, Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    return {path.stem.removesuffix(suffix): path for path in paths if path.stem.endswith(suffix) or not needs_suffix}


def _manifest_speakers(manifest: Path) -> dict[str, str]:
    """Return the target speakers by the names of the trials; empty if there is no manifest."""
    if not manifest.exists():
        return {}
    speakers: dict[str, str] = {}
    try:
        for line in manifest.read_bytes().splitlines():
            row = json.loads(line)
            speakers[row["name"]] = row["target_speaker"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorpusError(
            f"{manifest}: line {len(speakers) + 1} is not a row of `onevoice mix`; let that command finish, or remove "
            "the file"
        ) from error
    return speakers


def _random_part(rng: np.random.Generator, length: int, max_length: int | None) -> slice:
    if max_length is None or length <= max_length:
        return slice(0, length)
    start = int(rng.integers(length - max_length + 1))
    return slice(start, start + max_length)
