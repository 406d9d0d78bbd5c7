"""The batches of training: from trials on disk, or from mixtures drawn at every step.

A `Source` gives the batches of any epoch, from any step of it on, as a function of (seed, epoch, step) alone.
"""

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from onevoice.corpus.pack import PackedCorpus
from onevoice.errors import ConfigError
from onevoice.mixing.draw import Planner
from onevoice.mixing.render import Renderer
from onevoice.processes import ignore_stop_requests, keep_freed_memory
from onevoice.training.experiment import DataConfig, DynamicTrials
from onevoice.trials import TrialsConfig, open_trials
from onevoice.trials.reading import (
    WHOLE_BATCH,
    EpochSampler,
    ProcessShare,
    TrialBatch,
    TrialDataset,
    collate,
    read_batches,
    share_of_batch,
)

Key = tuple[int, int]


class Source(ABC):
    """Training batches."""

    speakers: list[str]
    """Names of the training speakers, in the order of the classifier."""
    steps_per_epoch: int
    steps_per_pass: int
    """Steps of one pass over the data, or for drawn mixtures over `examples_per_epoch`."""
    notes: Sequence[str] = ()
    """Oddities of the data that a user should know."""
    digest: str
    """Tells whether two runs use the same data, wherever it is stored."""

    @abstractmethod
    def batches(self, epoch: int, start: int, stop: int) -> Iterable[TrialBatch]:
        """Return the batches of the steps start ≤ step < stop of an epoch."""


def open_source(
    data: DataConfig,
    sample_rate: int,
    seed: int,
    device: torch.device,
    share: ProcessShare = WHOLE_BATCH,
    steps_per_epoch: int | None = None,
) -> Source:
    """Open the training data of a config; of each batch it gives the `share` of one of several processes.

    `steps_per_epoch` is None for one pass. Raises `CorpusError` or `ConfigError` when it does not serve.
    """
    if isinstance(data.train, DynamicTrials):
        return DynamicSource(data.train, data, sample_rate, seed, device, share, steps_per_epoch)
    return TrialSource(data.train, data, sample_rate, seed, device, share, steps_per_epoch)


class ValidationTrials:
    """The validation trials in batches, in their order, or the `share` of one process; iterate as often as needed."""

    def __init__(
        self, data: DataConfig, sample_rate: int, seed: int, device: torch.device, share: ProcessShare = WHOLE_BATCH
    ) -> None:
        part = data.validation
        opened = open_trials(part)
        self.notes = opened.notes
        self.names = [trial.name for trial in opened.trials]
        trials = TrialDataset(
            opened.trials,
            sample_rate,
            (),
            part.segment_seconds,
            part.enrollment_seconds,
            seed,
        )
        count = len(EpochSampler(len(trials), data.validation_batch_size, 0, 0, shuffle=False))
        start, stop = (count * (share[0] + side) // share[1] for side in (0, 1))
        sampler = EpochSampler(len(trials), data.validation_batch_size, 0, 0, start, stop, shuffle=False)
        self.loader = _loader(trials, sampler, data, device)

    def __iter__(self) -> Iterator[TrialBatch]:
        return read_batches(self.loader)


class TrialSource(Source):
    """Trials that exist, in a new random order in each pass. An epoch begins with a pass, and ends within its last."""

    def __init__(
        self,
        chosen: TrialsConfig,
        data: DataConfig,
        sample_rate: int,
        seed: int,
        device: torch.device,
        share: ProcessShare = WHOLE_BATCH,
        steps_per_epoch: int | None = None,
    ) -> None:
        opened = open_trials(chosen)
        trials, self.notes = opened.trials, opened.notes
        self.speakers = sorted({trial.speaker for trial in trials})
        self.dataset = TrialDataset(
            trials, sample_rate, self.speakers, chosen.segment_seconds, chosen.enrollment_seconds, seed
        )
        self.data, self.seed, self.device, self.share = data, seed, device, share
        self.digest = hashlib.sha256("\n".join(trial.name for trial in trials).encode()).hexdigest()
        self.steps_per_pass = len(EpochSampler(len(trials), data.batch_size, seed, 0))
        self.steps_per_epoch = steps_per_epoch or self.steps_per_pass
        if len(trials) < data.batch_size and share[1] > 1:
            raise ConfigError(
                f"data.batch_size: {data.batch_size} is more than the {len(trials)} trials that {share[1]} processes "
                "share; lower it"
            )

    def batches(self, epoch: int, start: int, stop: int) -> Iterable[TrialBatch]:
        """Return the batches of the steps start ≤ step < stop of an epoch."""
        steps = self.steps_per_pass
        first_pass = epoch * -(-self.steps_per_epoch // steps)
        samplers = (
            EpochSampler(
                len(self.dataset), self.data.batch_size, self.seed, first_pass + number,
                max(0, start - number * steps), stop - number * steps, share=self.share,
            )
            for number in range(start // steps, -(-stop // steps))
        )  # fmt: skip
        keys = itertools.chain.from_iterable(samplers)
        return read_batches(_loader(self.dataset, keys, self.data, self.device))


class DynamicSource(Source):
    """Mixtures drawn from packed speech, rendered in worker processes or, with `on_device`, where the network is."""

    def __init__(
        self,
        trials: DynamicTrials,
        data: DataConfig,
        sample_rate: int,
        seed: int,
        device: torch.device,
        share: ProcessShare = WHOLE_BATCH,
        steps_per_epoch: int | None = None,
    ) -> None:
        speech = _open_pack(trials.pack, sample_rate, "data.train.pack")
        self.planner = Planner(
            speech,
            trials.mixing,
            None
            if trials.noise is None
            else (trials.noise, _open_pack(trials.noise.pack, sample_rate, "data.train.noise.pack")),
            None
            if trials.reverb is None
            else (trials.reverb, _open_pack(trials.reverb.pack, sample_rate, "data.train.reverb.pack")),
            trials.channel,
            seed,
        )
        self.speakers = list(speech.speakers)
        packs = (speech, *(part[1] for part in (self.planner.noise, self.planner.reverb) if part is not None))
        self.digest = hashlib.sha256(json.dumps([pack.header["sha256"] for pack in packs]).encode()).hexdigest()
        self.data, self.seed, self.device, self.share = data, seed, device, share
        self.steps_per_pass = max(1, trials.examples_per_epoch // data.batch_size)
        self.steps_per_epoch = steps_per_epoch or self.steps_per_pass
        self.renderer = Renderer(self.planner, device) if trials.on_device else None

    def batches(self, epoch: int, start: int, stop: int) -> Iterable[TrialBatch]:
        """Return the batches of the steps start ≤ step < stop of an epoch."""
        size = self.data.batch_size
        if self.renderer is not None:
            renderer = self.renderer
            return (
                draw_batch(
                    self.planner, renderer, epoch, share_of_batch(np.arange(k * size, (k + 1) * size), self.share)
                )
                for k in range(start, stop)
            )
        sampler = EpochSampler(stop * size, size, self.seed, epoch, start, shuffle=False, share=self.share)
        return read_batches(_loader(DynamicDataset(self.planner), sampler, self.data, self.device))


class DynamicDataset(Dataset[Any]):
    """Rendered batches for a `DataLoader`; each worker opens the packs itself."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.renderer: Renderer | None = None

    def __getitems__(self, keys: Sequence[Key]) -> TrialBatch:
        if self.renderer is None:
            self.renderer = Renderer(self.planner)
        return draw_batch(self.planner, self.renderer, keys[0][0], np.array([index for _, index in keys]))


def draw_batch(planner: Planner, renderer: Renderer, epoch: int, index: np.ndarray) -> TrialBatch:
    """Draw and render the trials `index` of an epoch."""
    sound = renderer(planner.draw(epoch, index))
    names = [f"trial {number} of epoch {epoch}" for number in index.tolist()]
    return {"audio": sound.audio, "target": sound.target, "ref": sound.ref, "ref_length": sound.ref_length,
            "speaker": sound.speaker, "name": names}  # fmt: skip


def _loader(
    dataset: Dataset[Any], sampler: Iterable[list[Key]], data: DataConfig, device: torch.device
) -> "DataLoader[TrialBatch]":
    """Read the batches of a sampler in `data.workers` processes."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=data.workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, so that worker start-up leaves torch's generator alone
    )


def _start_worker(number: int) -> None:
    ignore_stop_requests()
    keep_freed_memory()


def _collate(items: Any) -> TrialBatch:
    """Batch single trials; a dynamic data set gives whole batches already."""
    return cast(TrialBatch, items) if isinstance(items, dict) else collate(items)


def _open_pack(path: str, sample_rate: int, key: str) -> PackedCorpus:
    pack = PackedCorpus.open(path)
    if pack.sample_rate != sample_rate:
        raise ConfigError(
            f"{key}: {path} is packed at {pack.sample_rate} Hz and the model works at {sample_rate} Hz; "
            f"pack it again with --sample-rate {sample_rate}"
        )
    return pack
