"""Training: one loop that can be killed at any moment and resumed to the same weights, bit for bit.

A run lives in one folder:

    config.json           the experiment, with every default written out
    environment.json      versions, commit and machine of the latest start
    metrics.jsonl         one line per log step and per validation
    best.safetensors      the weights with the best mean SI-SDRi on the validation trials: the ones to use
    last.safetensors      the weights of the last save
    last.resume.pt        what resuming needs: `train.py --r RUN/last.safetensors`
    epoch-NNNN.safetensors  weights of earlier epochs, if the config asks for them
    samples/              audio of some validation trials
    tensorboard/, wandb/  if switched on
"""

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from onevoice.config import to_dict
from onevoice.errors import ConfigError, TrainingError, WorkerError
from onevoice.extraction.checkpoint import Card, load_state, load_weights, provenance, save_checkpoint
from onevoice.files import atomic_write, sole_writer
from onevoice.models.base import pick_device
from onevoice.processes import StopRequest, keep_freed_memory, stop_requests
from onevoice.training.batches import ValidationTrials, open_source
from onevoice.training.distributed import SINGLE_PROCESS, Group, open_group
from onevoice.training.experiment import Experiment, fill_model_fields
from onevoice.training.state import TrainingState, reinitialize_misfits
from onevoice.training.step import Learner, is_out_of_memory
from onevoice.training.tracking import Display, Tracker, open_tracker
from onevoice.training.validation import Judge, require_pesq, sounds, validate
from onevoice.trials.reading import TrialBatch, dead_worker_error


def train(
    experiment: Experiment,
    *,
    resume: str | Path | None = None,
    load: str | Path | None = None,
    minutes: float | None = None,
    echo: Callable[[str], None] = print,
) -> Path:
    """Run an experiment to its end, or for at most `minutes`, and return the run folder.

    `resume` names a checkpoint of this experiment to resume from, `load` a checkpoint whose weights alone are taken.
    SIGTERM or Ctrl-C end the run at a checkpoint. Started by torchrun, this is one process of a group; if torchrun
    restarts the group after a failure, it resumes from the run's last checkpoint by itself.
    Raises `ConfigError`, `CorpusError`, `CheckpointError`, `TrainingError` or `StorageError`.
    """
    keep_freed_memory()
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with open_group(experiment.training.device) as group:
        trainer = Trainer(experiment, echo, group)
        process = None if group.size == 1 else f"process {group.rank} of {group.size}"
        try:
            trainer.begin(resume, load)
            with (
                sole_writer(trainer.folder, group.is_first),
                stop_requests() as stop_request,
                explain_errors(trainer.last, process),
            ):
                return trainer.run(deadline, stop_request)
        finally:
            trainer.learner.leave_group()


class Trainer:
    """A run: the loop over epochs and steps, and the files in its folder."""

    def __init__(
        self, experiment: Experiment, echo: Callable[[str], None] = print, group: Group = SINGLE_PROCESS
    ) -> None:
        check_shares(experiment, group)
        self.group, self.echo = group, echo
        self.tracker, self.display = Tracker(), Display(0, 0, enabled=False)
        self.device = pick_device(experiment.training.device, "training.device")
        data, rate, seed = experiment.data, experiment.model.sample_rate, experiment.seed
        require_pesq(experiment.tracking.pesq_examples, rate)
        self.source = open_source(data, rate, seed, self.device, group.share, experiment.training.steps_per_epoch)
        self.validation_trials = ValidationTrials(data, rate, seed, self.device, group.share)
        pesq_trials = self.validation_trials.names[: experiment.tracking.pesq_examples]
        self.judge = Judge(experiment.loss, rate, frozenset(pesq_trials))
        self.experiment = experiment = fill_model_fields(experiment, len(self.source.speakers))
        self.folder = Path(experiment.runs_folder) / experiment.name
        self.state = TrainingState.create(experiment, self.device, self.planned_steps)
        self.learner = Learner(experiment, self.state, self.device, group, self.say, self._log)
        self.deadline, self.stop_request = math.inf, StopRequest()

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of an epoch."""
        return self.source.steps_per_epoch

    @property
    def planned_steps(self) -> int:
        """The number of steps of all epochs."""
        return self.steps_per_epoch * self.experiment.training.epochs

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "last.safetensors"

    @property
    def last_step(self) -> int:
        """The number of steps in total."""
        return self.state.last_step(self.planned_steps)

    def say(self, line: str) -> None:
        """Print a line, in the first process only."""
        if self.group.is_first:
            self.display.say(line, self.echo)

    def begin(self, resume: str | Path | None, load: str | Path | None) -> None:
        """Resume a run or load weights, as `train` describes."""
        for note in dict.fromkeys([*self.source.notes, *self.validation_trials.notes]):
            self.say(f"note: {note}")
        is_foreign = resume is not None and Path(resume).suffix == ".pth"
        if resume is not None and not is_foreign:
            self.folder = Path(resume).parent  # wherever the run has been moved to
        if self.group.restarts and self.last.with_suffix(".resume.pt").exists():
            self.resume(self.last.with_suffix(".resume.pt"))
        elif resume is not None and not is_foreign:
            self.resume(resume)
        else:
            self.refuse_used_folder()
            if resume is not None:
                self.resume_original(resume)
            elif load is not None:
                self.load(load)

    def run(self, deadline: float = math.inf, stop_request: StopRequest | None = None) -> Path:
        """Train to the end, an early stop, the deadline (on `time.monotonic`) or a signal; return the run folder."""
        self.deadline, self.stop_request = deadline, stop_request or self.stop_request
        settings, progress = self.experiment.training, self.state.progress
        self.tracker, self.display = self._open_tracker(), self._open_display()
        if self.group.is_first and self.last.with_suffix(".resume.pt").exists():  # killed before it wrote the weights?
            save_checkpoint(self.last, self.state.weights.state_dict(), self.card())
        with contextlib.closing(self.tracker), contextlib.closing(self.display):
            while progress.step < self.last_step or progress.validated_step < progress.step:
                if settings.early_stop_epochs and progress.epochs_without_gain >= settings.early_stop_epochs:
                    self.learner.log_rest()
                    self.say(f"no better validation for {progress.epochs_without_gain} epochs: stopped")
                    break
                if self._train_epoch():
                    self._finish_epoch()
                    self.save()
                if self._is_stopping():
                    reason = (
                        "time is up" if self.stop_request.signal is None else f"stopped by {self.stop_request.signal}"
                    )
                    self.say(f"{reason} at step {progress.step}; resume with --r {self.last}")
                    break
        return self.folder

    def _train_epoch(self) -> bool:
        """Take the remaining steps of the epoch; if asked to stop before its end, save and return False."""
        progress = self.state.progress
        end = min(self.steps_per_epoch, progress.step_in_epoch + max(0, self.last_step - progress.step))
        self.display.start(progress.step)
        for batch in self.source.batches(progress.epoch, progress.step_in_epoch, end):
            self.learner.step(batch)
            self.display.update()
            at_end, stopping = progress.step_in_epoch == end, self._is_stopping()
            if progress.step == self.last_step:
                self.learner.log_rest()
            if at_end:  # validation comes first, and then a save
                continue
            if stopping or progress.step % self.experiment.training.save_every_steps == 0:
                self.tracker.flush()
                self.save()
            if stopping:
                return False
        return True

    def _log(self, values: dict[str, float]) -> None:
        """Record the values of a log line."""
        progress = self.state.progress
        speed = self.display.log(progress.step, values)
        values = {**values, "skipped_steps": progress.skipped_steps, "steps_per_second": speed}
        named = {f"train/{name}": value for name, value in values.items()}
        self.tracker.scalars(progress.step, named, epoch=progress.epoch + 1)

    def validate(self) -> dict[str, float]:
        """Return the mean scores over the validation trials; {} if asked to stop before the end."""
        remaining, rate = self.experiment.tracking.audio_examples, self.experiment.model.sample_rate

        def record_sounds(batch: TrialBatch, estimate: Tensor) -> None:
            nonlocal remaining
            for row, name in enumerate(batch["name"]):
                if remaining > 0:
                    self.tracker.audio(self.state.progress.step, name, sounds(batch, estimate, row), rate)
                    remaining -= 1

        return validate(
            self.state.weights, self.validation_trials, self.device, self.group, self.judge, record_sounds,
            lambda: self.stop_request.signal is not None,
        )  # fmt: skip

    def _finish_epoch(self) -> None:
        """Validate, keep the best weights, and record the scores; if asked to stop, leave it to the resumed run."""
        progress, settings = self.state.progress, self.experiment.training
        scores = self.validate()
        if not scores:
            return
        progress.validated_step, epoch = progress.step, progress.epoch + 1
        if progress.step_in_epoch == self.steps_per_epoch:
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        if isinstance(self.state.scheduler, ReduceLROnPlateau):
            self.state.scheduler.step(scores["si_sdri_db"])
        better = scores["si_sdri_db"] > progress.best
        progress.epochs_without_gain = 0 if better else progress.epochs_without_gain + 1
        if better:
            progress.best = scores["si_sdri_db"]
            self.save("best")
        if settings.keep_every_epochs and progress.epoch % settings.keep_every_epochs == 0:
            self.save(f"epoch-{progress.epoch:04d}")
        named = {f"validation/{name}": value for name, value in scores.items()}
        self.tracker.scalars(progress.step, named, epoch=epoch)
        self.tracker.flush()
        self.say(
            f"epoch {epoch} step {progress.step}: validation SI-SDR {scores['si_sdr_db']:.2f} dB, "
            f"SI-SDRi {scores['si_sdri_db']:.2f} dB{' (best)' if better else ''}"
        )

    def card(self) -> Card:
        """Describe the weights that are shipped."""
        progress, average = self.state.progress, self.state.average
        facts = {
            "step": progress.step,
            "epoch": progress.epoch,
            "best_validation_si_sdri_db": progress.best if math.isfinite(progress.best) else None,
            "experiment": self.experiment.name,
            "data": to_dict(self.experiment.data.train),
            **({} if average is None else {"ema": average.decay}),
            **provenance(),
        }
        return Card(self.experiment.model, tuple(self.source.speakers), facts)

    def save(self, name: str = "last") -> None:
        """Write the weights as `name`; for "last" also, and before them, the state that resuming needs."""
        self.learner.check_skipped_steps()
        self.state.read_sums(self.group)
        self.state.progress.steps_per_epoch = self.steps_per_epoch
        if not self.group.is_first:
            return
        path = self.folder / f"{name}.safetensors"
        if name == "last":
            self.state.save(path, self.experiment, self.source.speakers, self.source.digest)
        save_checkpoint(path, self.state.weights.state_dict(), self.card())

    def resume(self, checkpoint: str | Path) -> None:
        """Take over the state saved beside `checkpoint`; raises `CheckpointError` if it belongs to another run."""
        path = self.state.load(checkpoint, self.experiment, self.source.speakers, self.source.digest)
        one_pass = min(self.source.steps_per_epoch, self.source.steps_per_pass)  # the limit of earlier versions
        self.source.steps_per_epoch = self.state.progress.steps_per_epoch or one_pass
        self.state.plan(self.planned_steps)
        self.say(f"resumed {path} at epoch {self.state.progress.epoch}, step {self.state.progress.step}")

    def resume_original(self, checkpoint: str | Path) -> None:
        """Go on in a new run folder from a checkpoint of the original system; raises `CheckpointError`."""
        self.state.load_original(checkpoint, self.steps_per_epoch)
        progress = self.state.progress
        if progress.step >= self.last_step:
            raise ConfigError(f"{checkpoint}: all {progress.epoch} epochs are done; set training.epochs higher")
        self.say(
            f"resumed {checkpoint} at epoch {progress.epoch}, step {progress.step}, in {self.folder}: weights and "
            "moments of Adam; its order of the data, random numbers and best score cannot be resumed"
        )

    def load(self, checkpoint: str | Path) -> None:
        """Take the weights of a checkpoint alone, as far as `reinitialize_misfits` keeps them."""
        state, card = load_weights(checkpoint)
        if card is not None:
            self.warn_about_other_model(checkpoint, card)
        other_speakers = card is not None and bool(card.speakers) and list(card.speakers) != self.source.speakers
        state, notes = reinitialize_misfits(state, self.state.model.state_dict(), other_speakers)
        for note in notes:
            self.say(f"{checkpoint}: {note}")
        load_state(self.state.model, state, Path(checkpoint))
        if self.state.average is not None:
            self.state.average.model.load_state_dict(self.state.model.state_dict())
        self.say(f"weights of {checkpoint} loaded; training starts at step 0")

    def warn_about_other_model(self, checkpoint: str | Path, card: Card) -> None:
        """Say which keys of the model differ although all weights fit, because they change what the weights do."""
        trained, now = to_dict(card.config), to_dict(self.experiment.model)
        keys = [key for key in trained if key not in ("num_classes", "has_level") and trained[key] != now.get(key)]
        if keys:
            values = ", ".join(f"model.{key}={json.dumps(trained[key])}" for key in keys)
            self.say(f"{checkpoint}: was trained with {values}; this config has other values")

    def refuse_used_folder(self) -> None:
        """Raise `ConfigError` if the run folder already holds a run."""
        saved = self.last.with_suffix(".resume.pt")
        if saved.exists():
            raise ConfigError(
                f"{self.folder}: already holds a run; resume it with --r {self.last if self.last.exists() else saved}, "
                "or give this one another name (--set name=NAME)"
            )

    def _open_tracker(self) -> Tracker:
        if not self.group.is_first:
            return Tracker()
        settings = to_dict(self.experiment)
        for name, values in (("config", settings), ("environment", self._environment())):
            atomic_write(self.folder / f"{name}.json", json.dumps(values, indent=2).encode() + b"\n")
        step = self.state.progress.step or None
        return open_tracker(self.experiment.tracking, self.folder, self.experiment.name, settings, step)

    def _environment(self) -> dict[str, Any]:
        """Describe what the run runs on."""
        named = {"device": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        return {
            **provenance(),
            "python": platform.python_version(),
            "system": platform.platform(),
            "device": str(self.device),
            **named,
            "processes": self.group.size,
            "threads": torch.get_num_threads(),
        }

    def _open_display(self) -> Display:
        return Display(self.state.progress.step, self.last_step, enabled=self.group.is_first)

    def _is_stopping(self) -> bool:
        """Check whether time is up or a signal asked to stop, in any process of the group."""
        return self.group.any(self.stop_request.signal is not None or time.monotonic() > self.deadline)


def describe_result(folder: Path) -> str:
    """Return one line on where a run lies and which of its weights to use."""
    if (folder / "best.safetensors").exists():
        return f"run folder: {folder} (best.safetensors is the one to use)"
    if (folder / "last.safetensors").exists():
        return f"run folder: {folder} (last.safetensors holds the weights so far, not validated yet)"
    return f"run folder: {folder}"


def check_shares(experiment: Experiment, group: Group) -> None:
    """Raise `ConfigError` if the processes of a group cannot share the batches."""
    size, settings = experiment.data.batch_size, experiment.training
    if size % (group.size * settings.accumulate):
        raise ConfigError(
            f"data.batch_size: {size} cannot be shared by {group.size} processes in training.accumulate "
            f"{settings.accumulate} equal parts each"
        )
    if group.size > 1 and settings.on_out_of_memory == "halve":
        raise ConfigError(
            "training.on_out_of_memory: one process cannot halve its parts while the others wait for it; "
            "set training.accumulate instead"
        )


@contextlib.contextmanager
def explain_errors(last: Path, process: str | None) -> Iterator[None]:
    """Turn failures during training into one-line errors that say how to resume.

    Raises `TrainingError` if memory runs out, a data reader dies, the compiler fails or, in a group, another process
    is lost. `last` is the checkpoint to resume from, once it exists; `process` names this process of a group.
    """
    try:
        yield
    except (WorkerError, RuntimeError, MemoryError) as error:
        how = f"resume with --r {last}" if last.exists() else "start again"
        dead = error if isinstance(error, WorkerError) else dead_worker_error(error)
        if dead is not None:
            raise TrainingError(f"{dead}; {how}") from error
        if is_out_of_memory(error):
            raise TrainingError(
                f"out of memory; {how} with --set training.on_out_of_memory=halve or "
                "training.checkpoint_activations=true, or start a new run with a smaller data.batch_size"
            ) from error
        reason = str(error).strip().partition("\n")[0].partition(". ")[0][:150]
        if any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__):
            raise TrainingError(f"torch.compile failed ({reason}); {how} with --set training.compile=false") from error
        if process is not None:
            raise TrainingError(
                f"{process} lost the others ({reason}); {how}, or let torchrun do it by --max-restarts"
            ) from error
        raise
