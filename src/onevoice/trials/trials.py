"""Trials as batches of tensors: mixture, target, enrollment, speaker.

A trial names its three sounds: files, or recipes that make them on the fly (`onevoice.trials`). Of folders, two
layouts are read without conversion, at any sample rate:

- flat: `NAME-mixed.wav`, `NAME-ref.wav`, `NAME-target.wav` side by side, as `onevoice mix` writes them;
- folders: `mix/`, `refs/` and `targets/` whose files share their names, with or without those endings.

The target speaker is taken from `manifest.jsonl` where there is one, else from the part of the name before its
first underscore. A silent mixture or enrollment is an error; a silent target says that the target is absent.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from onevoice.audio import EXTENSIONS, Mono, read_audio, require_not_silent, resample
from onevoice.errors import AudioError, CorpusError, OnevoiceError, WorkerError
from onevoice.mixing.folder import SUFFIXES
from onevoice.rng import derive
from onevoice.units import to_samples

Share = tuple[int, int]
"""The number of a process and how many there are; each takes its part of every batch."""
WHOLE: Share = (0, 1)

FOLDERS = {"mixture": "mix", "enrollment": "refs", "target": "targets"}


@runtime_checkable
class Recipe(Protocol):
    """A sound that is made when it is asked for; its `str` names it in messages and lists."""

    def render(self) -> tuple[Mono, int]:
        """Return the samples and their rate in Hz."""


Sound = Path | Recipe
"""A sound file, or how to make what it would hold."""


@dataclass(frozen=True)
class Trial:
    """One mixture with the enrollment of its target and, for training and scoring, the target itself."""

    name: str
    speaker: str
    mixture: Sound
    enrollment: Sound
    target: Sound


class TrialBatch(TypedDict):
    """Padded trials. `audio`, `ref` and their lengths are what a network takes."""

    audio: Float[Tensor, "batch samples"]
    audio_length: NotRequired[Int[Tensor, " batch"]]
    """Missing where every mixture fills its row."""
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


def find_trials(folder: str | Path, limit: int | None = None) -> list[Trial]:
    """List the trials of a folder by name, at most `limit`; `CorpusError` when there are none or files lack."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder of trials")
    in_folders = all((folder / name).is_dir() for name in FOLDERS.values())
    files = {
        kind: _by_name(folder / FOLDERS[kind] if in_folders else folder, suffix, needs_suffix=not in_folders)
        for kind, suffix in SUFFIXES.items()
    }
    names = sorted(files["mixture"])
    if not names:
        raise CorpusError(
            f"{folder}: holds no trials; expected NAME-mixed.wav, NAME-ref.wav and NAME-target.wav, "
            "or folders mix, refs and targets"
        )
    for kind in ("enrollment", "target"):
        lacking = [name for name in names if name not in files[kind]]
        if lacking:
            raise CorpusError(
                f"{folder}: {len(lacking)} of {len(names)} trials lack their {kind}, first {lacking[0]!r}"
            )
    speakers = _manifest_speakers(folder / "manifest.jsonl")
    return [
        Trial(name, speakers.get(name, name.split("_")[0]), *(files[kind][name] for kind in SUFFIXES))
        for name in names[:limit]
    ]


def load_sound(sound: Sound, sample_rate: int) -> Mono:
    """Read or render a sound and convert it to `sample_rate` in Hz; `AudioError` for anything unusable."""
    if isinstance(sound, Path):
        return read_audio(sound, sample_rate)[0]
    samples, rate = sound.render()
    return resample(samples, rate, sample_rate)


def load_trial(trial: Trial, sample_rate: int) -> tuple[Mono, Mono, Mono]:
    """Return mixture, target and enrollment at `sample_rate` in Hz; a silent target says that the target is absent.

    Raises `AudioError` when one of them is unusable, mixture or enrollment is silent, or mixture and target are
    not of one length.
    """
    mixture, target, enrollment = (
        load_sound(sound, sample_rate) for sound in (trial.mixture, trial.target, trial.enrollment)
    )
    if len(mixture) != len(target):
        raise AudioError(f"{trial.target}: has {len(target)} samples, its mixture {len(mixture)}; they must match")
    require_not_silent(mixture, str(trial.mixture))
    require_not_silent(enrollment, str(trial.enrollment))
    return mixture, target, enrollment


class TrialDataset(Dataset[Item]):
    """Trials as arrays at one sample rate. Indexed by `(epoch, index)`, so that crops differ between epochs.

    With `segment_seconds` mixture and target are cut to a random part of at most that length; with
    `enrollment_seconds` the enrollment too. The cut is drawn from (seed, epoch, index) alone.
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
        rng = derive(self.seed, "crop", epoch, trial.name)
        part = _random_part(rng, len(mixture), self.segment)
        ref_part = _random_part(rng, len(enrollment), self.enrollment)
        return Item(trial.name, mixture[part], target[part], enrollment[ref_part], self.classes.get(trial.speaker, -1))


def part_of(batch: Int[np.ndarray, " batch"], share: Share) -> Int[np.ndarray, " part"]:
    """Return what belongs to one of several processes: every `count`-th item.

    So the first half of what each process has is, taken together, the first half of the batch, and it does not depend
    on the number of processes which items meet in a part of the batch (`training.accumulate`).
    """
    number, count = share
    return batch[number::count]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(epoch, index)` keys for one epoch: those of steps start ≤ step < stop.

    With `shuffle` the order is a function of (seed, epoch) alone, so that a resumed epoch goes on with the batches
    that it had left, and an incomplete last batch is left out, so that every step weighs the same; without, the
    items come in their own order, all of them. Of each batch only the `share` of one of several processes is given.
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
        share: Share = WHOLE,
    ) -> None:
        whole, rest = divmod(size, batch_size)
        count = whole + (rest > 0 and (whole == 0 or not shuffle))
        self.steps = range(start, count if stop is None else min(stop, count))
        self.order = derive(seed, "order", epoch).permutation(size) if shuffle else np.arange(size)
        self.epoch, self.batch_size, self.share = epoch, batch_size, share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            chosen = part_of(self.order[step * self.batch_size : (step + 1) * self.batch_size], self.share)
            yield [(self.epoch, index) for index in chosen.tolist()]


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


def read_batches(loader: Iterable[TrialBatch]) -> Iterator[TrialBatch]:
    """Yield the batches of a `DataLoader`; an error in one of its processes, a traceback by then, is one line again."""
    try:
        yield from loader
    except OnevoiceError as error:
        kind = type(error)
        *_, last = str(error).strip().splitlines()
        raise kind(last.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from None
    except RuntimeError as error:
        dead = reader_death(error)
        if dead is None:
            raise
        raise dead from error


def reader_death(error: Exception) -> WorkerError | None:
    """Return what to say where an error of torch, which it raises anywhere, means that a reading process died."""
    if "DataLoader worker" not in str(error):
        return None
    number = re.search(r"pid\(?s?\)? ?(\d+)", str(error))
    return WorkerError(
        f"a process that reads the data died{f' (pid {number[1]})' if number else ''}: killed, too little memory, or "
        "too small a /dev/shm in a container; set data.workers=0, or give the container more shared memory"
    )


def pad(signals: Sequence[Mono]) -> tuple[Float[Tensor, "batch samples"], Int[Tensor, " batch"]]:
    """Stack signals into a tensor, zeros behind the shorter ones; return it with the lengths."""
    length = torch.tensor([len(signal) for signal in signals])
    padded = torch.zeros(len(signals), int(length.max()))
    for row, signal in zip(padded, signals, strict=True):
        row[: len(signal)] = torch.from_numpy(signal)
    return padded, length


def _by_name(folder: Path, suffix: str, *, needs_suffix: bool) -> dict[str, Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    return {path.stem.removesuffix(suffix): path for path in paths if path.stem.endswith(suffix) or not needs_suffix}


def _manifest_speakers(manifest: Path) -> dict[str, str]:
    if not manifest.exists():
        return {}
    speakers: dict[str, str] = {}
    try:
        for line in manifest.read_bytes().splitlines():
            row = json.loads(line)
            speakers[row["name"]] = row["target_speaker"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{manifest}: line {len(speakers) + 1} is not a row of `onevoice mix`; let that finish, or remove the file"
        ) from error
    return speakers


def _random_part(rng: np.random.Generator, length: int, most: int | None) -> slice:
    if most is None or length <= most:
        return slice(0, length)
    start = int(rng.integers(length - most + 1))
    return slice(start, start + most)
