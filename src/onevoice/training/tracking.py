"""The record of a training run: scalars and sounds, in the run's folder and where else one likes to look.

    tracker = open_tracker(config, folder, run_name, experiment, resume_step)
    with tracker:
        tracker.scalars(step, {"train/loss": 1.2}, epoch=0)
        tracker.audio(step, "trial-0", {"mixture": mixture, "estimate": estimate}, sample_rate)
        tracker.flush()  # and save the checkpoint of this step

Always written, with nothing to install: `metrics.jsonl`, one JSON object per line, and `samples/`, WAV files
of the latest validations. On request TensorBoard event files in `tensorboard/` and Weights & Biases in
`wandb/`, whose packages are imported only then.

A run that was killed and resumed leaves the record of one that was never stopped: what stands there for steps
after the checkpoint is dropped on resuming and written anew. For that, log everything of a step and `flush`
before saving the checkpoint of that step. (Weights & Biases cannot take steps back: there the repeated steps
appear twice, with equal values.)
"""

import importlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from onevoice.audio import write_audio
from onevoice.config import STRICT
from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.files import atomic_write, storage_errors

KEPT_VALIDATIONS = 5
"""`samples/` holds the sounds of this many latest steps."""

SoundKind = Literal["mixture", "enrollment", "target", "estimate"]
Sound = Float[np.ndarray, "_samples"]


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    """Weights & Biases: used when a project is named and the mode is not "disabled"."""

    project: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"
    """Offline needs no network; `wandb sync` sends the run later."""
    entity: str | None = None
    """The team or user; None for the one logged in."""
    name: str | None = None
    """The run's name there; None for the name of the run's folder."""


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """What is recorded besides `metrics.jsonl` and `samples/`."""

    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False
    audio_examples: NonNegativeInt = 3
    """The number of validation trials whose sounds are recorded at each validation."""


class Row(NamedTuple):
    """Scalars of one step. `wall_time` is in seconds since 1970."""

    step: int
    epoch: int
    wall_time: float
    values: dict[str, float]


class Sink:
    """A place that records go to; what a sink does not override, it leaves out."""

    def scalars(self, row: Row) -> None:
        """Record scalars."""

    def audio(self, step: int, name: str, kind: SoundKind, samples: Sound, sample_rate: int) -> None:
        """Record one sound, within ±1."""

    def flush(self) -> None:
        """Bring everything recorded so far to where neither a kill nor a power cut can undo it."""

    def close(self) -> None:
        """Finish; nothing may be recorded afterwards."""


class Tracker:
    """Sends each record to all sinks; without sinks it records nothing (ranks of a DDP group but the first)."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: int) -> None:
        """Record named numbers at a step; NaN and infinity may occur and become null in `metrics.jsonl`."""
        row = Row(step, epoch, time.time(), {name: float(value) for name, value in values.items()})
        for sink in self._sinks:
            sink.scalars(row)

    def audio(self, step: int, name: str, sounds: Mapping[SoundKind, Sound], sample_rate: int) -> None:
        """Record the sounds of one example for listening.

        A sound whose peak is above full scale is turned down to it, and NaN or infinite samples are silenced,
        so that an estimate of undefined level neither clips nor stops the training.
        """
        for kind, samples in sounds.items():
            heard = _listenable(samples)
            for sink in self._sinks:
                sink.audio(step, name, kind, heard, sample_rate)

    def flush(self) -> None:
        """Secure the records so far; call it before saving a checkpoint."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Finish all sinks, each one even when another fails."""
        sinks, self._sinks = self._sinks, ()
        with ExitStack() as stack:
            for sink in sinks:
                stack.callback(sink.close)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tracker(
    config: TrackingConfig,
    folder: Path,
    run_name: str,
    experiment: Mapping[str, Any],
    resume_step: int | None = None,
) -> Tracker:
    """Open the record of a run in `folder`.

    `experiment` is the whole configuration as plain JSON values, shown beside the curves. With `resume_step`,
    the step of the checkpoint, records of later steps are dropped; without, an earlier record in the folder
    is replaced. Raises `MissingDependencyError`, `ConfigError` when Weights & Biases cannot start, and
    `StorageError`.
    """
    first_step = 0 if resume_step is None else resume_step + 1
    sinks: list[Sink] = []
    with ExitStack() as on_failure:

        def add(sink: Sink) -> None:
            sinks.append(sink)
            on_failure.callback(sink.close)

        if config.tensorboard:
            add(TensorBoardSink(folder / "tensorboard", first_step, experiment))
        if config.wandb.project is not None and config.wandb.mode != "disabled":
            add(WandbSink(config.wandb, folder, run_name, experiment, resume=resume_step is not None))
        add(JsonlSink(folder / "metrics.jsonl", resume_step))
        add(SamplesSink(folder / "samples", resume_step))
        on_failure.pop_all()
    return Tracker(*sinks)


class JsonlSink(Sink):
    """`metrics.jsonl`: `{"step", "epoch", "wall_time", name: value, …}` per line, each line written at once."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        kept = [] if resume_step is None else [row for row in read_rows(path) if row["step"] <= resume_step]
        atomic_write(path, "".join(_line(row) for row in kept).encode())
        self._path = path
        with storage_errors(path):
            self._stream = path.open("ab", buffering=0)

    def scalars(self, row: Row) -> None:
        """Append one line."""
        fixed = {"step": row.step, "epoch": row.epoch, "wall_time": round(row.wall_time, 3)}
        if clash := fixed.keys() & row.values.keys():
            raise ValueError(f"a scalar cannot be called {min(clash)!r}")
        values = {name: value if math.isfinite(value) else None for name, value in row.values.items()}
        with storage_errors(self._path):
            self._stream.write(_line(fixed | values).encode())

    def flush(self) -> None:
        """Bring the lines to the disk; without it they survive a kill, but not a power cut."""
        with storage_errors(self._path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; [] when it is missing.

    A line that was torn by a kill or a full disk is left out.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class SamplesSink(Sink):
    """`samples/step-XXXXXXXX-<name>-<kind>.wav`: 16-bit files of the latest validations."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self._folder = folder
        for step, path in self._files():
            if resume_step is None or step > resume_step:
                self._remove(path)

    def audio(self, step: int, name: str, kind: SoundKind, samples: Sound, sample_rate: int) -> None:
        """Write one file, and remove those of validations that are too long ago."""
        safe_name = re.sub(r"[^\w.-]+", "_", name)
        path = self._folder / f"step-{step:08d}-{safe_name}-{kind}.wav"
        write_audio(path, samples, sample_rate, durable=False)
        files = self._files()
        kept = sorted({step for step, _ in files})[-KEPT_VALIDATIONS:]
        for old_step, old_path in files:
            if old_step not in kept:
                self._remove(old_path)

    def _files(self) -> list[tuple[int, Path]]:
        named = ((re.match(r"step-(\d{8,})-.+\.wav$", path.name), path) for path in self._folder.glob("step-*.wav"))
        return [(int(match[1]), path) for match, path in named if match]

    def _remove(self, path: Path) -> None:
        with storage_errors(path):
            path.unlink(missing_ok=True)


class TensorBoardSink(Sink):
    """TensorBoard event files; the steps from `first_step` on of earlier files are hidden."""

    def __init__(self, folder: Path, first_step: int, experiment: Mapping[str, Any]) -> None:
        library = _package("torch.utils.tensorboard", "tensorboard", "tracking.tensorboard=false")
        with storage_errors(folder):
            self._writer = library.SummaryWriter(str(folder), purge_step=first_step)
        if first_step == 0:
            text = json.dumps(experiment, indent=2, default=str)
            self._writer.add_text("experiment", "    " + text.replace("\n", "\n    "), 0)

    def scalars(self, row: Row) -> None:
        """Add one point to each curve."""
        for name, value in row.values.items():
            self._writer.add_scalar(name, value, row.step, walltime=row.wall_time)

    def audio(self, step: int, name: str, kind: SoundKind, samples: Sound, sample_rate: int) -> None:
        """Add a player."""
        self._writer.add_audio(f"{name}/{kind}", samples[None], step, sample_rate=sample_rate)

    def flush(self) -> None:
        """Write the events that wait in the queue."""
        self._writer.flush()

    def close(self) -> None:
        """Write what waits and close the file."""
        self._writer.close()


class WandbSink(Sink):
    """A run at Weights & Biases, or an offline one in `wandb/`; its id is kept in `wandb_id.txt`."""

    def __init__(
        self, config: WandbConfig, folder: Path, run_name: str, experiment: Mapping[str, Any], *, resume: bool
    ) -> None:
        self._library = _package("wandb", "wandb", "tracking.wandb.mode=disabled")
        offline = config.mode == "offline"
        try:
            self._run = self._library.init(
                project=config.project,
                entity=config.entity,
                name=config.name or run_name,
                config=dict(experiment),
                dir=str(folder),
                mode=config.mode,
                id=_run_id(folder / "wandb_id.txt", keep=resume),
                resume=None if offline else "allow",
                settings=self._library.Settings(console="off", silent=offline),
            )
        except self._library.Error as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"tracking.wandb: cannot start ({reason}); run `wandb login` or set tracking.wandb.mode=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, row: Row) -> None:
        """Log the values with step and epoch as their axes."""
        self._run.log({"step": row.step, "epoch": row.epoch, **row.values})

    def audio(self, step: int, name: str, kind: SoundKind, samples: Sound, sample_rate: int) -> None:
        """Log a player."""
        sound = self._library.Audio(samples, sample_rate=sample_rate, caption=f"{name} {kind}")
        self._run.log({"step": step, f"{name}/{kind}": sound})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _listenable(samples: Sound) -> Sound:
    finite = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    return finite / max(1.0, float(np.abs(finite).max(initial=0.0)))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _run_id(path: Path, *, keep: bool) -> str:
    """Return the id in `path`; a new one, stored there, when there is none or it is not to be kept."""
    if not keep or not path.exists():
        atomic_write(path, uuid.uuid4().hex[:12].encode())
    return path.read_text().strip()


def _package(module: str, extra: str, alternative: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f'{extra} is not installed; pip install "onevoice[{extra}]" brings it, or set {alternative}'
        ) from error
