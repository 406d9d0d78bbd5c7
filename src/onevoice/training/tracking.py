"""The record of a training run, in its folder and, if configured, in TensorBoard and W&B; and what it shows.

`metrics.jsonl` (one JSON object per line) and `samples/` (WAV files of the latest validations) are always written.
The packages for TensorBoard and Weights & Biases are imported only if the config asks for them.

A run that was killed and resumed leaves the record of a run without a break: resuming drops what was recorded after
the checkpoint, and the repeated steps are recorded again. For that, record everything about a step and call `flush`
before the checkpoint of that step is saved. (Weights & Biases cannot drop steps: it shows repeated ones twice.)
"""

import importlib
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from onevoice.audio import Mono, write_audio
from onevoice.config import STRICT
from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.files import atomic_write, storage_errors, to_json_lines

KEPT_VALIDATIONS = 5
"""`samples/` holds the sounds of this many latest validations."""

SoundKind = Literal["mixture", "enrollment", "target", "estimate"]


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    """Weights & Biases, used if a project is named and the mode is not "disabled"."""

    project: str | None = None
    """Name of the project; null switches Weights & Biases off."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """Offline needs no network; `wandb sync` uploads the run later."""
    entity: str | None = None
    """The team or user; null for the user who is logged in."""
    name: str | None = None
    """Name of the run there; null for the name of the experiment."""


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """What is recorded besides `metrics.jsonl` and `samples/`."""

    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Also write TensorBoard event files to the folder `tensorboard/` of the run."""
    audio_examples: NonNegativeInt = 3
    """Number of validation trials whose sounds are recorded at each validation."""


class Tracker:
    """Records what it is given. `open_tracker` opens one; `Tracker()` records nothing."""

    def __init__(self, folder: Path | None = None, tensorboard: Any = None, wandb_run: Any = None) -> None:
        self.folder, self.tensorboard, self.wandb_run = folder, tensorboard, wandb_run
        self.resources = ExitStack()
        if folder is not None:
            with storage_errors(folder / "metrics.jsonl"):
                self.metrics = self.resources.enter_context((folder / "metrics.jsonl").open("ab", buffering=0))

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: int) -> None:
        """Record named numbers at a step. NaN and infinity become null in `metrics.jsonl`."""
        if self.folder is None:
            return
        row: dict[str, Any] = {"step": step, "epoch": epoch, "wall_time": round(time.time(), 3)}
        if clash := row.keys() & values.keys():
            raise ValueError(f"a scalar cannot be called {min(clash)!r}")
        numbers = {name: float(value) for name, value in values.items()}
        with storage_errors(self.folder / "metrics.jsonl"):
            values_or_null = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            self.metrics.write(to_json_lines([row | values_or_null]))
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log({"step": step, "epoch": epoch, **numbers})

    def audio(self, step: int, name: str, sounds: Mapping[SoundKind, Mono], sample_rate: int) -> None:
        """Record the sounds of one trial, turned down to full scale if louder, with zeros for non-finite samples."""
        if self.folder is None:
            return
        for kind, samples in sounds.items():
            finite = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
            playable = finite / max(1.0, float(np.abs(finite).max(initial=0.0)))
            file_name = re.sub(r"[^\w.-]+", "_", name)
            path = self.folder / "samples" / f"step-{step:08d}-{file_name}-{kind}.wav"
            write_audio(path, playable, sample_rate, durable=False)
            if self.tensorboard is not None:
                self.tensorboard.add_audio(f"{name}/{kind}", playable[None], step, sample_rate=sample_rate)
            if self.wandb_run is not None:
                player = importlib.import_module("wandb").Audio(playable, sample_rate, f"{name} {kind}")
                self.wandb_run.log({"step": step, f"{name}/{kind}": player})
        _keep_samples(self.folder, step)

    def flush(self) -> None:
        """Bring the records to disk, safe from a power failure; call it before saving a checkpoint."""
        if self.folder is None:
            return
        with storage_errors(self.folder / "metrics.jsonl"):
            os.fsync(self.metrics.fileno())
        if self.tensorboard is not None:
            self.tensorboard.flush()

    def close(self) -> None:
        """Finish all records, each one even if another fails; nothing is recorded afterwards."""
        self.folder = None
        self.resources.close()


class Display:
    """Shows steps, loss, speed and remaining time; `enabled=False` shows nothing."""

    def __init__(self, step: int, last_step: int, *, enabled: bool = True) -> None:
        self.enabled, self.last_step = enabled, last_step
        self.bar = tqdm(
            total=last_step, initial=step, unit="step", dynamic_ncols=True, disable=None if enabled else True
        )
        self.start(step)

    @property
    def has_bar(self) -> bool:
        """Whether standard error is a terminal, which shows a bar."""
        return not self.bar.disable

    def start(self, step: int) -> None:
        """Measure speed from here, after a pause such as a validation."""
        self.measured_step, self.measured_time = step, time.monotonic()

    def update(self) -> None:
        """Show one more step."""
        self.bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a log line."""
        results = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        results += [f"SI-SDR {values['si_sdr_db']:.2f} dB"] if "si_sdr_db" in values else []
        if self.has_bar:
            self.bar.set_postfix_str(", ".join(results), refresh=False)
        elif self.enabled:
            speed = (step - self.measured_step) / max(time.monotonic() - self.measured_time, 1e-9)
            self.start(step)
            results += [
                f"learning rate {values['learning_rate']:.3g}",
                f"{speed:.3g} steps/s",
                f"{tqdm.format_interval((self.last_step - step) / speed)} left",
            ]
            print(f"step {step}/{self.last_step}: {', '.join(results)}", file=sys.stderr, flush=True)

    def say(self, line: str, echo: Callable[[str], None]) -> None:
        """Call `echo(line)` without garbling the bar."""
        if not self.has_bar:
            echo(line)
            return
        with tqdm.external_write_mode():
            echo(line)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def open_tracker(
    config: TrackingConfig, folder: Path, run_name: str, experiment: Mapping[str, Any], resume_step: int | None = None
) -> Tracker:
    """Open the record of a run in `folder`.

    `experiment` is the whole config as plain JSON values, shown beside the curves. With `resume_step`, the step of the
    checkpoint, records of later steps are dropped; without it, an earlier record in the folder is replaced.
    Raises `MissingDependencyError`, `ConfigError` if Weights & Biases cannot start, and `StorageError`.
    """
    last_step = -1 if resume_step is None else resume_step
    with ExitStack() as resources:
        tensorboard = wandb_run = None
        if config.tensorboard:
            tensorboard = _open_tensorboard(folder / "tensorboard", last_step + 1, experiment)
            resources.callback(tensorboard.close)
        if config.wandb.project is not None and config.wandb.mode != "disabled":
            wandb_run = _open_wandb(config.wandb, folder, run_name, experiment, resume_step is None)
            resources.callback(wandb_run.finish)
        rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= last_step]
        atomic_write(folder / "metrics.jsonl", to_json_lines(rows))
        _keep_samples(folder, last_step)
        tracker = Tracker(folder, tensorboard, wandb_run)
        tracker.resources.callback(resources.pop_all().close)
    return tracker


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, without lines torn by a kill or a full disk; [] if it is missing."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _keep_samples(folder: Path, last_step: int) -> None:
    """Remove the files of `samples/` except those of the latest validations up to `last_step`."""
    named = {path: re.match(r"step-(\d{8,})-.+\.wav$", path.name) for path in folder.glob("samples/step-*.wav")}
    steps = {path: int(match[1]) for path, match in named.items() if match}
    kept = sorted({step for step in steps.values() if step <= last_step})[-KEPT_VALIDATIONS:]
    for path in (path for path, step in steps.items() if step not in kept):
        with storage_errors(path):
            path.unlink(missing_ok=True)


def _open_tensorboard(folder: Path, first_step: int, experiment: Mapping[str, Any]) -> Any:
    """Open TensorBoard event files; steps from `first_step` on in earlier files are hidden."""
    library = _import("torch.utils.tensorboard", "tensorboard", "tracking.tensorboard=false")
    with storage_errors(folder):
        writer = library.SummaryWriter(str(folder), purge_step=first_step)
    if first_step == 0:
        text = json.dumps(experiment, indent=2, default=str)
        writer.add_text("experiment", "    " + text.replace("\n", "\n    "), 0)
    return writer


def _open_wandb(config: WandbConfig, folder: Path, run_name: str, experiment: Mapping[str, Any], is_new: bool) -> Any:
    """Start or resume a run at Weights & Biases; `wandb_id.txt` keeps its id."""
    library = _import("wandb", "wandb", "tracking.wandb.mode=disabled")
    id_file = folder / "wandb_id.txt"
    if is_new or not id_file.exists():
        atomic_write(id_file, uuid.uuid4().hex[:12].encode())
    try:
        run = library.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run_name,
            config=dict(experiment),
            dir=str(folder),
            mode=config.mode,
            id=id_file.read_text().strip(),
            resume=None if config.mode == "offline" else "allow",
            settings=library.Settings(console="off", silent=config.mode == "offline"),
        )
    except library.Error as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"tracking.wandb: cannot start ({reason}); run `wandb login` or set tracking.wandb.mode=offline"
        ) from error
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _import(module: str, extra: str, alternative: str) -> ModuleType:
    """Import an optional package; `alternative` is the setting that does without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f'{extra} is not installed; pip install "onevoice[{extra}]" installs it, or set {alternative}'
        ) from error
