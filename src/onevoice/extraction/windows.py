"""Runs a network over a recording of any length, in windows with context, in constant memory.

The estimate is made of cores, one per window, one after the other. A window is its core and context on both sides. The
level that the network normalizes by is that of the whole recording.

- If the config of the network has `context_seconds`, the context is at least that. Then each core equals that part of
  the estimate for the whole recording, up to rounding.
- Otherwise a statistic of the whole recording matters (the global norm of SpEx+), and each window has its own. Two
  neighbors are cross-faded after their border. A recording of at most `WHOLE_SECONDS` is one window.
"""

import itertools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onevoice.audio import BLOCK, Block, Mono, resample_columns
from onevoice.models.base import Level, NetworkConfig

WHOLE_SECONDS = 60.0
"""The longest recording that a network with statistics of the whole gets at once, and the longest window."""
CONTEXT_SECONDS = 2.0
"""Context of such a network, to each side."""
FADE_SECONDS = 0.5
"""Length of the cross-fade between windows of such a network."""
EXACT_CORE_SECONDS = 30.0
"""The longest core if the context is known."""

SPOOL_MEMORY = 64 * 2**20
"""Bytes of a spool that are kept in memory; longer ones go to a temporary file."""

FLOAT32 = np.dtype("<f4")

Estimate = Callable[[Float[Tensor, "1 samples"], Level | None], Float[Tensor, "1 samples"]]
"""Returns the estimate for a window; no level means that the window is the whole recording."""


class Spool:
    """Mono samples that are written once, in order, and read in pieces; long ones lie in a temporary file.

    With a path the file stays on disk, so that work that was interrupted goes on where it stopped.
    """

    def __init__(self, folder: Path | None = None, path: Path | None = None) -> None:
        where = None if folder is None else str(folder)
        self._file: Any = (
            tempfile.SpooledTemporaryFile(SPOOL_MEMORY, dir=where)  # noqa: SIM115, it is closed by close()
            if path is None
            else path.open("r+b" if path.exists() else "w+b")
        )
        self.path = path
        self.samples = self._file.seek(0, os.SEEK_END) // FLOAT32.itemsize

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def cut(self, samples: int) -> None:
        """Forget the samples from `samples` on."""
        self.samples = min(samples, self.samples)
        self._file.truncate(self.samples * FLOAT32.itemsize)

    def append(self, samples: Mono) -> None:
        """Add samples at the end."""
        self._file.seek(self.samples * FLOAT32.itemsize)
        self._file.write(np.ascontiguousarray(samples, FLOAT32).tobytes())
        if self.path is not None:
            self._file.flush()
        self.samples += len(samples)

    def append_silence(self, samples: int) -> None:
        """Add zeros at the end."""
        for first in range(0, samples, BLOCK):
            self.append(np.zeros(min(BLOCK, samples - first), np.float32))

    def read(self, first: int, last: int) -> Mono:
        """Return the samples from `first` up to `last`."""
        self._file.seek(first * FLOAT32.itemsize)
        data = self._file.read((min(last, self.samples) - first) * FLOAT32.itemsize)
        return np.frombuffer(data, FLOAT32).astype(np.float32)

    def blocks(self) -> Iterator[Float[np.ndarray, "_samples"]]:
        """Yield all samples."""
        for first in range(0, self.samples, BLOCK):
            yield self.read(first, first + BLOCK)


def fill_spools(
    spools: Sequence[Spool], blocks: Iterable[Block], from_rate: int, to_rate: int
) -> tuple[int, Bool[np.ndarray, " spools"]]:
    """Append each channel of a recording to its spool, at another rate.

    Returns the samples per channel of the recording, and True for each silent channel: one whose samples are all equal.
    Its spool gets zeros, because converting an offset leaves ripples at both ends.
    """
    samples, low, high = 0, np.full(len(spools), np.inf), np.full(len(spools), -np.inf)

    def watched() -> Iterator[Block]:
        nonlocal samples, low, high
        for block in blocks:
            if not len(block):
                continue
            samples += len(block)
            low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
            yield block

    for columns in resample_columns(watched(), len(spools), from_rate, to_rate):
        for spool, column in zip(spools, columns, strict=True):
            spool.append(column)
    is_silent = np.asarray(low >= high)
    for spool in itertools.compress(spools, is_silent):
        length = spool.samples
        spool.cut(0)
        spool.append_silence(length)
    return samples, is_silent


@dataclass(frozen=True)
class Plan:
    """The windows of one recording. All numbers are samples at the rate of the network."""

    samples: int
    core: int
    context: int
    fade: int

    @property
    def count(self) -> int:
        """The number of windows."""
        return -(-self.samples // self.core)

    def bounds(self, index: int) -> tuple[int, int, int, int]:
        """Return the first and last sample of a window, and of its core."""
        first, last = index * self.core, min((index + 1) * self.core, self.samples)
        return max(0, first - self.context), min(last + self.context, self.samples), first, last


def make_plan(config: NetworkConfig, samples: int) -> Plan:
    """Return cores of equal length, as few as the limits above allow, that begin at a frame of the network."""
    rate, hop = config.sample_rate, config.hop
    context = config.context_seconds
    if context is not None:
        longest, around, fade = EXACT_CORE_SECONDS, context, 0
    else:
        longest, around, fade = WHOLE_SECONDS - 2 * CONTEXT_SECONDS, CONTEXT_SECONDS, round(FADE_SECONDS * rate)
    around_samples = (int(around * rate) // hop + 2) * hop
    if samples <= longest * rate + 2 * around_samples:
        return Plan(samples, max(samples, 1), 0, 0)
    count = -(-samples // int(longest * rate))
    core = -(-samples // (count * hop)) * hop
    return Plan(samples, core, around_samples, fade)


def resume_at(plan: Plan, estimate: Spool) -> int:
    """Cut an unfinished estimate to whole windows; return the number of windows that are done."""
    done = plan.count if estimate.samples >= plan.samples else estimate.samples // plan.core
    estimate.cut(min(done * plan.core, plan.samples))
    return done


def estimate_windows(
    estimate: Estimate, plan: Plan, mixture: Spool, level: Level, begin: int = 0, threads: int = 1
) -> Iterator[Mono]:
    """Yield the cores of the estimate from window `begin` on, which gives the same samples as the rest of a whole run.

    Window i is faded into window i + 1 over the first `fade` samples of core i + 1. Several windows run at once, one on
    each of the `threads`. Then no thread waits for another in the middle of a window, as threads that share one do.
    """
    indices = range(max(0, begin - 1) if plan.fade else begin, plan.count)
    sounds = (torch.from_numpy(mixture.read(*plan.bounds(index)[:2]))[None] for index in indices)
    results = _map_ahead(lambda sound: estimate(sound, None if plan.count == 1 else level), sounds, threads)
    tail = np.zeros(0, np.float32)
    for index, estimated in zip(indices, results, strict=True):
        first, _, core_first, core_last = plan.bounds(index)
        result = estimated[0].numpy()
        core = result[core_first - first : core_last - first].copy()
        if len(tail):
            size = min(len(tail), len(core))
            weight = (np.arange(1, size + 1, dtype=np.float32) / np.float32(size + 1)).astype(np.float32)
            core[:size] = core[:size] * weight + tail[:size] * (1 - weight)
        tail = result[core_last - first : core_last - first + plan.fade].copy()
        if index >= begin:
            yield core


def _map_ahead(
    function: Callable[[Tensor], Tensor], items: Iterable[Tensor], threads: int
) -> Iterator[Float[Tensor, "1 _samples"]]:
    """Yield `function` of each item, in order, computed by several threads with one torch thread each."""
    if threads == 1:
        yield from map(function, items)
        return
    before, ahead = torch.get_num_threads(), deque[Future[Tensor]]()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the number is also the default of threads to come


def measure_level(mixture: Spool) -> Level:
    """Return the level of the whole recording."""
    total = sum(float(block.sum(dtype=np.float64)) for block in mixture.blocks())
    count = max(1, mixture.samples)
    mean = total / count
    energy = sum(float(np.square(block - mean, dtype=np.float64).sum()) for block in mixture.blocks())
    return Level(mean, (energy / count) ** 0.5)


def least_residual_gain(estimate: Iterable[Mono], mixture: Iterable[Mono], max_gain: float) -> float:
    """Return the gain within ±`max_gain` that leaves the least energy in `mixture − gain · estimate`.

    It is ⟨mixture, estimate⟩ / ⟨estimate, estimate⟩, negative for an estimate of inverted polarity, and 0 for silence.
    """
    product = energy = 0.0
    for ours, theirs in zip(estimate, mixture, strict=True):
        wide = ours.astype(np.float64)
        product += float(theirs.astype(np.float64) @ wide)
        energy += float(wide @ wide)
    return max(-max_gain, min(product / energy, max_gain)) if energy > 0 else 0.0
