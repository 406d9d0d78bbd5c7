"""Training: one loop that can be killed at any moment and resumed to the same weights, bit for bit.

A run lives in one folder:

    config.json           the experiment as it was run, every default written out
    metrics.jsonl         one line per log step and per validation
    best.safetensors      the weights with the best mean SI-SDRi on the validation trials: the ones to use
    last.safetensors      the weights of the last save
    last.resume.pt        what resuming needs: `train.py --r RUN/last.safetensors`
    epoch-NNNN.safetensors  weights along the way, where asked for
    samples/              audio examples of the last validation
    tensorboard/, wandb/  where switched on
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from onevoice.config import to_dict
from onevoice.devices import pick_device
from onevoice.errors import ConfigError, TrainingError, WorkerError
from onevoice.extraction.checkpoint import Card, load_state, load_weights, provenance, save_checkpoint
from onevoice.files import atomic_write
from onevoice.processes import StopRequest, keep_freed_memory, stop_requests
from onevoice.training.batches import ValidationTrials, open_source
from onevoice.training.distributed import ALONE, Group, open_group
from onevoice.training.experiment import Experiment
from onevoice.training.step import Learner, means, out_of_memory
from onevoice.training.tracking import Tracker, open_tracker
from onevoice.training.validation import sounds, validate
from onevoice.trials.trials import TrialBatch, reader_death


def train(
    experiment: Experiment,
    *,
    resume: str | Path | None = None,
    load: str | Path | None = None,
    minutes: float | None = None,
    echo: Callable[[str], None] = print,
) -> Path:
    """Run an experiment to its end, or for at most `minutes`, and return the run folder.

    `resume` names a checkpoint of this experiment to go on from; `load` one whose weights alone are taken. SIGTERM
    or Ctrl-C end it at a checkpoint. Started by torchrun it is one process of a group; after a failure, when torchrun
    starts the group again, it goes on from the last checkpoint of the run by itself.
    Raises `ConfigError`, `CorpusError`, `CheckpointError`, `TrainingError` or `StorageError`.
    """
    keep_freed_memory()
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with open_group(experiment.training.device) as group:
        trainer = Trainer(experiment, echo, group)
        process = None if group.size == 1 else f"process {group.rank} of {group.size}"
        try:
            trainer.begin(resume, load)
            with stop_requests() as asked, plain_errors(trainer.last, process):
                return trainer.run(deadline, asked)
        finally:
            trainer.leave_group()


class Trainer(Learner):
    """A run: the loop over epochs and steps, and what it leaves in its folder."""

    def __init__(self, experiment: Experiment, echo: Callable[[str], None] = print, group: Group = ALONE) -> None:
        _check_shares(experiment, group)
        say = echo if group.first else _say_nothing
        device = pick_device(experiment.training.device, "training.device")
        rate, seed = experiment.model.sample_rate, experiment.seed
        self.source = open_source(experiment.data, rate, seed, device, group.share)
        self.trials = ValidationTrials(experiment.data, rate, seed, device, group.share)
        self.speakers = self.source.speakers
        experiment = _with_classes(experiment, len(self.speakers))
        most = experiment.training.steps_per_epoch or self.source.steps_per_epoch
        self.steps_per_epoch = min(self.source.steps_per_epoch, most)
        super().__init__(experiment, device, group, self.steps_per_epoch * experiment.training.epochs, say)
        self.folder = Path(experiment.runs_folder) / experiment.name
        self.deadline, self.asked = math.inf, StopRequest()

    def begin(self, resume: str | Path | None, load: str | Path | None) -> None:
        """Take up a state or weights, as `train` says."""
        if resume is not None:
            self.folder = Path(resume).parent  # wherever the run has been moved to
        if self.group.restarts and self.last.with_suffix(".resume.pt").exists():
            self.restore(self.last)
        elif resume is not None:
            self.restore(resume)
        else:
            self.refuse_used_folder()
            if load is not None:
                self.load(load)

    def run(self, deadline: float = math.inf, asked: StopRequest | None = None) -> Path:
        """Train to the end, an early stop, the deadline (on `time.monotonic`) or a signal; return the run folder."""
        self.deadline, self.asked = deadline, asked or self.asked
        settings, progress = self.experiment.training, self.progress
        with self._open_tracker() as tracker:
            while progress.step < self.last_step or progress.validated_step < progress.step:
                if settings.early_stop_epochs and progress.epochs_without_gain >= settings.early_stop_epochs:
                    self.echo(f"no better validation for {progress.epochs_without_gain} epochs: stopped")
                    break
                if self._train_epoch(tracker):
                    self._validate(tracker)
                    self.save()
                if self._stopping():
                    why = "time is up" if self.asked.signal is None else f"stopped by {self.asked.signal}"
                    self.echo(f"{why} at step {progress.step}; resume with --r {self.last}")
                    break
        return self.folder

    def _train_epoch(self, tracker: Tracker) -> bool:
        """Take the steps that the epoch has left; return False when asked to stop before (the state is saved then)."""
        settings, progress = self.experiment.training, self.progress
        end = min(self.steps_per_epoch, progress.step_in_epoch + max(0, self.last_step - progress.step))
        bar = tqdm(
            self.source.batches(progress.epoch, progress.step_in_epoch, end),
            desc=f"epoch {progress.epoch + 1}/{settings.epochs}",
            total=end,
            initial=progress.step_in_epoch,
            disable=None if self.group.first else True,
        )
        for batch in bar:
            self.step(batch)
            if progress.step % settings.log_every_steps == 0:
                bar.set_postfix(self._log(tracker), refresh=False)
            at_end, stopping = progress.step_in_epoch == end, self._stopping()
            if not at_end and (stopping or progress.step % settings.save_every_steps == 0):
                tracker.flush()
                self.save()
            if not at_end and stopping:  # at the end it is validated first, saved then
                return False
        return True

    def validate(self, tracker: Tracker | None = None) -> dict[str, float]:
        """Return the mean SI-SDR and SI-SDRi in dB over the validation trials; {} when asked to stop before the end."""
        left = self.experiment.tracking.audio_examples

        def show(batch: TrialBatch, estimate: Tensor) -> None:
            nonlocal left
            for row, name in enumerate(batch["name"]):
                if tracker is not None and left > 0:
                    rate = self.experiment.model.sample_rate
                    tracker.audio(self.progress.step, name, sounds(batch, estimate, row), rate)
                    left -= 1

        return validate(self.weights, self.trials, self.device, self.group, show, lambda: self.asked.signal is not None)

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "last.safetensors"

    def card(self) -> Card:
        """Describe the weights that are shipped."""
        facts = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "best_validation_si_sdri_db": self.progress.best if math.isfinite(self.progress.best) else None,
            "experiment": self.experiment.name,
            "data": to_dict(self.experiment.data.train),
            "levelled": self.experiment.loss.level > 0,
            **({} if self.average is None else {"ema": self.average.decay}),
            **provenance(),
        }
        return Card(self.experiment.model, tuple(self.speakers), facts)

    def save(self, name: str = "last") -> None:
        """Write the weights under `name`, and for "last" all that resuming needs (first, and complete by itself)."""
        self.watch_skipping()
        self.take_sums()
        if not self.group.first:
            return
        path = self.folder / f"{name}.safetensors"
        if name == "last":
            self.state.save(path, self.experiment, self.speakers, self.source.digest)
        save_checkpoint(path, self.weights.state_dict(), self.card())

    def restore(self, checkpoint: str | Path) -> None:
        """Take up the state saved beside `checkpoint`; raises `CheckpointError` when it is of another run."""
        path = self.state.restore(checkpoint, self.experiment, self.speakers, self.source.digest)
        self.tally.set_skipped(self.progress.skipped_steps, self.progress.skipped_in_a_row)
        self.echo(f"resumed {path} at epoch {self.progress.epoch}, step {self.progress.step}")

    def load(self, checkpoint: str | Path) -> None:
        """Take the weights of a checkpoint alone; a classifier for other speakers is left fresh, and said."""
        state, card = load_weights(checkpoint)
        own = self.model.state_dict()
        other_speakers = card is not None and list(card.speakers) != self.speakers
        classifier = [name for name in own if name.startswith("classifier.")]
        if other_speakers or any(name in state and state[name].shape != own[name].shape for name in classifier):
            state = {**state, **{name: own[name] for name in classifier}}
            self.echo(f"{checkpoint}: was trained on other speakers; the classifier starts fresh")
        load_state(self.model, state, Path(checkpoint))
        if self.average is not None:
            self.average.model.load_state_dict(self.model.state_dict())
        self.echo(f"weights of {checkpoint} loaded; training starts at step 0")

    def refuse_used_folder(self) -> None:
        """Raise `ConfigError` when the run folder holds a run already."""
        if self.last.with_suffix(".resume.pt").exists():
            raise ConfigError(
                f"{self.folder}: holds a run already; resume it with --r {self.last}, "
                "or give this one another name (--set name=NAME)"
            )

    def _open_tracker(self) -> Tracker:
        if not self.group.first:
            return Tracker()
        settings = to_dict(self.experiment)
        atomic_write(self.folder / "config.json", json.dumps(settings, indent=2).encode() + b"\n")
        tracking = self.experiment.tracking
        return open_tracker(tracking, self.folder, self.experiment.name, settings, self.progress.step or None)

    def _validate(self, tracker: Tracker) -> None:
        progress, settings = self.progress, self.experiment.training
        scores = self.validate(tracker)
        if not scores:  # asked to stop: done again on resuming
            return
        progress.validated_step = progress.step
        if progress.step_in_epoch == self.steps_per_epoch:
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(scores["si_sdri_db"])
        better = scores["si_sdri_db"] > progress.best
        progress.epochs_without_gain = 0 if better else progress.epochs_without_gain + 1
        if better:
            progress.best = scores["si_sdri_db"]
            self.save("best")
        if settings.keep_every_epochs and progress.epoch % settings.keep_every_epochs == 0:
            self.save(f"epoch-{progress.epoch:04d}")
        tracker.scalars(progress.step, {f"validation/{k}": v for k, v in scores.items()}, epoch=progress.epoch)
        tracker.flush()
        self.echo(
            f"epoch {progress.epoch} step {progress.step}: validation SI-SDR {scores['si_sdr_db']:.2f} dB, "
            f"SI-SDRi {scores['si_sdri_db']:.2f} dB{' (best)' if better else ''}"
        )

    def _log(self, tracker: Tracker) -> dict[str, str]:
        """Record the means since the last log line; return what the progress bar shows."""
        self.watch_skipping()
        self.take_sums()
        values = means(self.progress.sums)
        self.progress.sums = {}
        others = {"learning_rate": self.rate, "skipped_steps": self.progress.skipped_steps}
        named = {f"train/{name}": float(value) for name, value in {**values, **others}.items()}
        tracker.scalars(self.progress.step, named, epoch=self.progress.epoch)
        return {"si_sdr": f"{values['si_sdr_db']:.2f}"} if "si_sdr_db" in values else {}

    def _stopping(self) -> bool:
        """Say whether time is up or the end was asked for, in any process of the group."""
        return self.group.any(self.asked.signal is not None or time.monotonic() > self.deadline)


def _say_nothing(line: str) -> None:
    """Take the place of `print` where another process speaks."""


def _check_shares(experiment: Experiment, group: Group) -> None:
    """Raise `ConfigError` when batches cannot be shared by the processes of a group."""
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


def _with_classes(experiment: Experiment, speakers: int) -> Experiment:
    """Return the experiment with `model.num_classes` filled in for 0, and checked otherwise."""
    classes = experiment.model.num_classes or speakers
    if classes < speakers:
        raise ConfigError(
            f"model.num_classes: {classes} is too small for the {speakers} speakers of "
            "the training data; set 0 to have them counted"
        )
    return replace(experiment, model=replace(experiment.model, num_classes=classes))


def compiler_failed(error: BaseException) -> bool:
    """Say whether an error comes from the compiler of `training.compile`."""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)


@contextlib.contextmanager
def plain_errors(last: Path, process: str | None) -> Iterator[None]:
    """Raise `TrainingError` for short memory, a lost data reader, a failed compiler and, in a group, lost others.

    `last` is the checkpoint that a run goes on from, once it is there; `process` names this one of a group.
    """
    try:
        yield
    except (WorkerError, RuntimeError, MemoryError) as error:
        go_on = f"resume with --r {last}" if last.exists() else "start again"
        dead = error if isinstance(error, WorkerError) else reader_death(error)
        if dead is not None:
            raise TrainingError(f"{dead}; {go_on}") from error
        if out_of_memory(error):
            raise TrainingError(
                f"out of memory; {go_on} with --set training.on_out_of_memory=halve or "
                "training.checkpoint_activations=true, or start anew with a lower data.batch_size"
            ) from error
        reason = str(error).strip().partition("\n")[0].partition(". ")[0][:150]
        if compiler_failed(error):
            raise TrainingError(
                f"torch.compile failed ({reason}); {go_on} with --set training.compile=false"
            ) from error
        if process is not None:
            raise TrainingError(
                f"{process} lost the others ({reason}); {go_on}, or let torchrun do it by --max-restarts"
            ) from error
        raise
