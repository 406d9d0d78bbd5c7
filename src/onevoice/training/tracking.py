"""The record of a training run, in its folder and, if configured, in TensorBoard and W&B; and what it shows.

`metrics.jsonl` (one JSON object per line) and `samples/` (WAV files) are always written. `samples/` has the mixture,
enrollment and target of each recorded trial once, as `trial-NAME-KIND.wav`, and its estimates in the latest
validations, as `step-STEP-NAME-estimate.wav`.
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
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from onevoice.audio import Mono, read_audio, write_audio
from onevoice.config import STRICT
from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.files import atomic_write, parse_row, storage_errors, to_json_lines
from onevoice.report.sounds import power_db, spectrogram_rgb

KEPT_VALIDATIONS = 5
"""`samples/` holds the estimates of this many latest validations."""

SoundKind = Literal["mixture", "enrollment", "target", "estimate"]
CONSTANT_KINDS: tuple[SoundKind, ...] = ("mixture", "enrollment", "target")
"""The sounds of a validation trial that training does not change; they are recorded once."""
_SAMPLE = re.compile(r"(?:trial|step-(?P<step>\d{8,}))-(?P<name>.+)-(?P<kind>mixture|enrollment|target|estimate)\.wav")


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
    """Number of validation trials whose sounds and spectrograms are recorded at each validation."""
    pesq_examples: NonNegativeInt = 0
    """Number of validation trials whose mean PESQ is recorded at each validation; above 0 it needs the extra `eval`."""


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
        """Record the sounds of one trial, turned down to full scale if louder, with zeros for non-finite samples.

        Mixture, enrollment and target are recorded at the first call only. TensorBoard and W&B also get spectrograms.
        """
        if self.folder is None:
            return
        playable = {kind: _playable(samples) for kind, samples in sounds.items()}
        paths = {kind: self._sample_path(step, name, kind) for kind in playable}
        new = [kind for kind, path in paths.items() if kind == "estimate" or not path.exists()]
        for kind in new:
            write_audio(paths[kind], playable[kind], sample_rate, durable=False)
        if self.tensorboard is not None or self.wandb_run is not None:
            levels = {kind: power_db(samples, sample_rate) for kind, samples in playable.items()}
            loudest = max(float(each.max()) for each in levels.values())
            for kind in new:
                self._show(step, f"{name}/{kind}", playable[kind], sample_rate, spectrogram_rgb(levels[kind], loudest))
        _keep_samples(self.folder, step)

    def _show(self, step: int, name: str, samples: Mono, sample_rate: int, spectrogram: Any) -> None:
        if self.tensorboard is not None:
            self.tensorboard.add_audio(name, samples[None], step, sample_rate=sample_rate)
            self.tensorboard.add_image(f"{name}/spectrogram", spectrogram, step, dataformats="HWC")
        if self.wandb_run is not None:
            library = importlib.import_module("wandb")
            shown = {name: library.Audio(samples, sample_rate, name), f"{name}/spectrogram": library.Image(spectrogram)}
            self.wandb_run.log({"step": step, **shown})

    def _sample_path(self, step: int, name: str, kind: SoundKind) -> Path:
        place = f"step-{step:08d}" if kind == "estimate" else "trial"
        safe_name = re.sub(r"[^\w.-]+", "_", name)
        return Path(str(self.folder)) / "samples" / f"{place}-{safe_name}-{kind}.wav"

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

    def log(self, step: int, values: Mapping[str, float]) -> float:
        """Show the values of a log line; return the steps per second since the last one."""
        speed = (step - self.measured_step) / max(time.monotonic() - self.measured_time, 1e-9)
        self.start(step)
        results = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        results += [f"SI-SDR {values['si_sdr_db']:.2f} dB"] if "si_sdr_db" in values else []
        if self.has_bar:
            self.bar.set_postfix_str(", ".join(results), refresh=False)
        elif self.enabled:
            left = tqdm.format_interval((self.last_step - step) / speed) if speed else "?"
            results += [f"learning rate {values['learning_rate']:.3g}", f"{speed:.3g} steps/s", f"{left} left"]
            print(f"step {step}/{self.last_step}: {', '.join(results)}", file=sys.stderr, flush=True)
        return speed

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
        if not any(sounds.estimates for sounds in read_samples(folder)):  # the first validation is still to come
            _remove(path for sounds in read_samples(folder) for path in sounds.constant.values())
        tracker = Tracker(folder, tensorboard, wandb_run)
        tracker.resources.callback(resources.pop_all().close)
        if wandb_run is not None:
            tracker.resources.callback(_log_table, wandb_run, folder)
    return tracker


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, without lines torn by a kill or a full disk; [] if it is missing."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        row = parse_row(line)
        is_whole = row is not None and all(isinstance(value, int | float | None) for value in row.values())
        if row is not None and is_whole and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class TrialSounds(NamedTuple):
    """The recorded sounds of one validation trial."""

    name: str
    constant: dict[str, Path]
    """Mixture, enrollment and target."""
    estimates: dict[int, Path]
    """The estimates by step, in order."""


def read_samples(folder: Path) -> list[TrialSounds]:
    """Return the recorded sounds of a run by trial, by name. Runs of earlier versions have all sounds at every step."""
    trials: dict[str, TrialSounds] = {}
    for path in sorted(folder.glob("samples/*.wav"), key=lambda path: (path.name.startswith("trial-"), path.name)):
        match = _SAMPLE.fullmatch(path.name)
        if match is None:
            continue
        sounds = trials.setdefault(match["name"], TrialSounds(match["name"], {}, {}))
        if match["kind"] == "estimate":
            sounds.estimates[int(match["step"])] = path
        else:
            sounds.constant[match["kind"]] = path
    return sorted(trials.values(), key=lambda sounds: sounds.name)


def _playable(samples: Mono) -> Mono:
    finite = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(finite / max(1.0, float(np.abs(finite).max(initial=0.0))))


def _keep_samples(folder: Path, last_step: int) -> None:
    """Remove the estimates in `samples/` except those of the latest validations up to `last_step`."""
    named = {path: re.match(r"step-(\d{8,})-.+\.wav$", path.name) for path in folder.glob("samples/step-*.wav")}
    steps = {path: int(match[1]) for path, match in named.items() if match}
    kept = sorted({step for step in steps.values() if step <= last_step})[-KEPT_VALIDATIONS:]
    _remove(path for path, step in steps.items() if step not in kept)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with storage_errors(path):
            path.unlink(missing_ok=True)


def _log_table(wandb_run: Any, folder: Path) -> None:
    """Give W&B a table of the recorded trials with their latest estimates: players and spectrograms."""
    trials = [sounds for sounds in read_samples(folder) if sounds.estimates]
    if not trials:
        return
    library = importlib.import_module("wandb")
    kinds = (*CONSTANT_KINDS, "estimate")
    table = library.Table(["trial", "step", *kinds, *(f"{kind} spectrogram" for kind in kinds)])
    for sounds in trials:
        step, estimate = max(sounds.estimates.items())
        paths = {**sounds.constant, "estimate": estimate}
        levels = {kind: power_db(*read_audio(path)) for kind, path in paths.items()}
        loudest = max(float(each.max()) for each in levels.values())
        players = [library.Audio(str(paths[kind])) if kind in paths else None for kind in kinds]
        images = [library.Image(spectrogram_rgb(levels[kind], loudest)) if kind in paths else None for kind in kinds]
        table.add_data(sounds.name, step, *players, *images)
    wandb_run.log({"validation trials": table})


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
