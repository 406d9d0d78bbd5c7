"""Training: one loop that can be killed at any moment and resumed to the same weights, bit for bit.

A run lives in one folder:

    config.json           the experiment as it was run, every default written out
    metrics.jsonl         one line per log step and per validation
    best.safetensors      the weights with the best mean SI-SDRi on the validation trials: the ones to use
    last.safetensors      the weights of the last save
    last.resume.pt        what resuming needs: `train.py --r RUN/last.safetensors`
    samples/              audio examples of the last validation
    tensorboard/, wandb/  where switched on
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from tqdm import tqdm

from onevoice.checkpoint import (
    Card,
    load_pickled,
    load_state,
    load_weights,
    provenance,
    resume_path,
    save_checkpoint,
    save_resume,
)
from onevoice.config import to_dict
from onevoice.dataset import TrialBatch
from onevoice.devices import pick_device
from onevoice.errors import CheckpointError, ConfigError, CorpusError, TrainingError
from onevoice.experiment import Experiment, changed_settings
from onevoice.files import atomic_write
from onevoice.loss import LossTerms, si_sdr, suppression
from onevoice.memory import keep_freed_memory
from onevoice.models import Network, build_model, to_network
from onevoice.optim import build_optimizer, build_scheduler
from onevoice.rng import derive_seed
from onevoice.sources import ValidationTrials, open_source
from onevoice.tracking import Sound, SoundKind, Tracker, open_tracker

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Progress:
    """Where a run stands; saved and restored whole."""

    epoch: int = 0
    """Epochs completed."""
    step_in_epoch: int = 0
    step: int = 0
    best: float = -math.inf
    """Best mean SI-SDRi in dB on the validation trials."""
    epochs_without_gain: int = 0
    skipped_steps: int = 0
    """Steps left out because loss or gradient was not finite, in all and …"""
    skipped_in_a_row: int = 0
    """… since the last finite one."""
    sums: dict[str, float] = field(default_factory=dict)
    """Loss terms summed since the last log line, and their count under `steps`."""


def train(
    experiment: Experiment,
    *,
    resume: str | Path | None = None,
    load: str | Path | None = None,
    minutes: float | None = None,
    echo: Callable[[str], None] = print,
) -> Path:
    """Run an experiment to its end, or for at most `minutes`, and return the run folder.

    `resume` names a checkpoint of this experiment to go on from; `load` one whose weights alone are taken.
    Raises `ConfigError`, `CorpusError`, `CheckpointError`, `TrainingError` or `StorageError`.
    """
    keep_freed_memory()
    trainer = Trainer(experiment, echo)
    if resume is not None:
        trainer.folder = Path(resume).parent  # wherever the run has been moved to
        trainer.restore(resume)
    else:
        trainer.refuse_used_folder()
        if load is not None:
            trainer.load(load)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    try:
        return trainer.run(deadline)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory on {trainer.device} at step {trainer.progress.step}; lower data.batch_size or the "
            f"lengths of the data, and resume with --r {trainer.folder}/last.safetensors"
        ) from error


class Trainer:
    """The state of a run and the loop over it."""

    def __init__(self, experiment: Experiment, echo: Callable[[str], None] = print) -> None:
        self.echo = echo
        self.device = pick_device(experiment.training.device, "training.device")
        rate, seed = experiment.model.sample_rate, experiment.seed
        self.source = open_source(experiment.data, rate, seed, self.device)
        self.validation = ValidationTrials(experiment.data, rate, seed, self.device)
        self.speakers = self.source.speakers
        self.experiment = experiment = _with_classes(experiment, len(self.speakers))
        self.steps_per_epoch = min(
            self.source.steps_per_epoch, experiment.training.steps_per_epoch or self.source.steps_per_epoch
        )
        torch.manual_seed(derive_seed(experiment.seed, "weights") % 2**63)
        self.model: Network = build_model(experiment.model).to(self.device)
        self.optimizer = build_optimizer(self.model, experiment.optimizer)
        self.scheduler = build_scheduler(
            self.optimizer, experiment.scheduler, self.steps_per_epoch * experiment.training.epochs
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=experiment.training.precision == "float16")
        self.progress = Progress()
        self.folder = Path(experiment.runs_folder) / experiment.name

    def run(self, deadline: float = math.inf) -> Path:
        """Train until the last epoch, an early stop or the deadline (on `time.monotonic`); return the run folder."""
        atomic_write(self.folder / "config.json", json.dumps(to_dict(self.experiment), indent=2).encode() + b"\n")
        settings, progress = self.experiment.training, self.progress
        with open_tracker(
            self.experiment.tracking,
            self.folder,
            self.experiment.name,
            to_dict(self.experiment),
            progress.step or None,
        ) as tracker:
            while progress.epoch < settings.epochs:
                if settings.early_stop_epochs and progress.epochs_without_gain >= settings.early_stop_epochs:
                    self.echo(f"no better validation for {progress.epochs_without_gain} epochs: stopped")
                    break
                if self._train_epoch(tracker, deadline):
                    self._validate(tracker)
                    self.save()
                if time.monotonic() > deadline:
                    self.echo(f"time is up at step {progress.step}; resume with --r {self.folder}/last.safetensors")
                    break
        return self.folder

    def step(self, batch: TrialBatch) -> LossTerms:
        """Learn from one batch. A loss or gradient that is not finite leaves weights and statistics untouched."""
        self.model.train()
        experiment, progress = self.experiment, self.progress
        statistics = [buffer.clone() for buffer in self.model.buffers()]
        inputs, target = to_network(batch, self.device), batch["target"].to(self.device, non_blocking=True)
        precision = PRECISIONS[experiment.training.precision]
        with torch.autocast(self.device.type, precision, enabled=precision is not torch.float32):
            prediction = self.model(inputs)
        speaker = batch["speaker"].to(self.device, non_blocking=True)
        terms = experiment.loss(prediction, target, speaker, inputs.get("audio_length"), inputs["audio"])
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(terms.total).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), experiment.training.clip_gradient_norm)
        finite = bool(torch.isfinite(norm) & torch.isfinite(terms.total))
        if finite:
            self.scaler.step(self.optimizer)
            progress.skipped_in_a_row = 0
        else:
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                    buffer.copy_(before)
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            self._complain_of_skipping(batch)
        self.scaler.update()
        if isinstance(self.scheduler, OneCycleLR):
            self.scheduler.step()
        progress.step += 1
        progress.step_in_epoch += 1
        if finite:
            values = {"loss": terms.total, "si_sdr_db": terms.si_sdr, "cross_entropy": terms.cross_entropy}
            for name, value in {**values, "gradient_norm": norm}.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + float(value.detach())
            progress.sums["steps"] = progress.sums.get("steps", 0.0) + 1
        return terms

    @torch.no_grad()
    def validate(self, tracker: Tracker | None = None) -> dict[str, float]:
        """Return the mean SI-SDR and SI-SDRi in dB over the validation trials, by the first estimate.

        Trials whose target is silent have neither; their mean suppression below the mixture stands beside.
        """
        self.model.eval()
        examples = self.experiment.tracking.audio_examples
        scores: list[tuple[float, float]] = []
        pressed: list[float] = []
        seen = 0
        for batch in self.validation:
            inputs, target = to_network(batch, self.device), batch["target"].to(self.device)
            estimate = self.model(inputs)["predicted_audio"][0]
            length = inputs.get("audio_length")
            after, before = si_sdr(estimate, target, length), si_sdr(inputs["audio"], target, length)
            present, absent = target.abs().amax(1) > 0, suppression(estimate, inputs["audio"], length)
            for row in range(len(batch["name"])):
                if tracker is not None and seen < examples:
                    tracker.audio(self.progress.step, batch["name"][row], _example(batch, estimate, row), self.rate)
                seen += 1
                if present[row]:
                    scores.append((float(after[row]), float(after[row] - before[row])))
                else:
                    pressed.append(float(absent[row]))
        if not scores:
            raise CorpusError("data.validation: the target speaks in none of its trials, so none can be scored")
        means = torch.tensor(scores, dtype=torch.float64).mean(0)
        suppressed = {"absent_suppression_db": sum(pressed) / len(pressed)} if pressed else {}
        return {"si_sdr_db": float(means[0]), "si_sdri_db": float(means[1]), **suppressed}

    @property
    def rate(self) -> int:
        """The sample rate of the model in Hz."""
        return self.experiment.model.sample_rate

    def card(self) -> Card:
        """Describe the present weights."""
        facts = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "best_validation_si_sdri_db": self.progress.best if math.isfinite(self.progress.best) else None,
            "experiment": self.experiment.name,
            "data": to_dict(self.experiment.data.train),
            **provenance(),
        }
        return Card(self.experiment.model, tuple(self.speakers), facts)

    def save(self, name: str = "last") -> None:
        """Write the weights under `name`, and for "last" all that resuming needs (first, and complete by itself)."""
        path = self.folder / f"{name}.safetensors"
        if name == "last":
            save_resume(
                resume_path(path),
                {
                    "experiment": json.dumps(to_dict(self.experiment)),
                    "speakers": self.speakers,
                    "data": self.source.digest,
                    "progress": asdict(self.progress),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
                    "scaler": self.scaler.state_dict(),
                    "torch_rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
                },
            )
        save_checkpoint(path, self.model.state_dict(), self.card())

    def restore(self, checkpoint: str | Path) -> None:
        """Take up the state saved beside `checkpoint`; raises `CheckpointError` when it is of another run."""
        path = resume_path(checkpoint)
        if not Path(checkpoint).is_file():
            raise CheckpointError(f"{checkpoint}: no such checkpoint file")
        if not path.is_file():
            raise CheckpointError(
                f"{checkpoint}: has no {path.name} beside it; resume from last.safetensors of its run, or take its "
                "weights alone with --load"
            )
        state = load_pickled(path)
        try:
            saved = json.loads(state["experiment"])
            same_data = (list(state["speakers"]), state["data"]) == (self.speakers, self.source.digest)
            progress = Progress(**state["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a resume file ({error}); use --load to take weights alone") from error
        changed = changed_settings(saved, to_dict(self.experiment)) + ([] if same_data else ["the training data"])
        if changed:
            raise CheckpointError(
                f"{path}: was made with other settings ({', '.join(changed)}); resume with its own config "
                f"({Path(checkpoint).parent / 'config.json'}) or take its weights alone with --load"
            )
        load_state(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.progress = progress
        self.echo(f"resumed {path} at epoch {progress.epoch}, step {progress.step}")

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
        self.echo(f"weights of {checkpoint} loaded; training starts at step 0")

    def refuse_used_folder(self) -> None:
        """Raise `ConfigError` when the run folder holds a run already."""
        if (self.folder / "last.resume.pt").exists():
            raise ConfigError(
                f"{self.folder}: holds a run already; resume it with --r {self.folder}/last.safetensors, "
                "or give this one another name (--set name=NAME)"
            )

    def _train_epoch(self, tracker: Tracker, deadline: float) -> bool:
        """Take the steps that the epoch has left; return False when time ran out first (the state is saved then)."""
        settings, progress = self.experiment.training, self.progress
        bar = tqdm(
            self.source.batches(progress.epoch, progress.step_in_epoch, self.steps_per_epoch),
            desc=f"epoch {progress.epoch + 1}/{settings.epochs}",
            total=self.steps_per_epoch,
            initial=progress.step_in_epoch,
            disable=None,
        )
        for batch in bar:
            terms = self.step(batch)
            bar.set_postfix(si_sdr=f"{float(terms.si_sdr.detach()):.2f}", refresh=False)
            if progress.step % settings.log_every_steps == 0:
                self._log(tracker)
            at_end = progress.step_in_epoch == self.steps_per_epoch  # validated first, saved then
            time_is_up = time.monotonic() > deadline
            if not at_end and (time_is_up or progress.step % settings.save_every_steps == 0):
                tracker.flush()
                self.save()
            if not at_end and time_is_up:
                return False
        progress.epoch += 1
        progress.step_in_epoch = 0
        return True

    def _validate(self, tracker: Tracker) -> None:
        progress = self.progress
        scores = self.validate(tracker)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(scores["si_sdri_db"])
        better = scores["si_sdri_db"] > progress.best
        if better:
            progress.best, progress.epochs_without_gain = scores["si_sdri_db"], 0
            self.save("best")
        else:
            progress.epochs_without_gain += 1
        tracker.scalars(progress.step, {f"validation/{k}": v for k, v in scores.items()}, epoch=progress.epoch)
        tracker.flush()
        self.echo(
            f"epoch {progress.epoch} step {progress.step}: validation SI-SDR {scores['si_sdr_db']:.2f} dB, "
            f"SI-SDRi {scores['si_sdri_db']:.2f} dB{' (best)' if better else ''}"
        )

    def _log(self, tracker: Tracker) -> None:
        sums, count = self.progress.sums, self.progress.sums.pop("steps", 0.0)
        values = {f"train/{name}": total / count for name, total in sums.items() if count}
        values["train/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values["train/skipped_steps"] = float(self.progress.skipped_steps)
        self.progress.sums = {}
        tracker.scalars(self.progress.step, values, epoch=self.progress.epoch)

    def _complain_of_skipping(self, batch: TrialBatch) -> None:
        progress, most = self.progress, self.experiment.training.max_nonfinite_steps
        self.echo(f"step {progress.step}: loss or gradient not finite, step skipped ({progress.skipped_steps} so far)")
        if progress.skipped_in_a_row >= most:
            raise TrainingError(
                f"no finite loss for {most} steps (last batch: {', '.join(batch['name'][:3])}, …); "
                "lower optimizer.learning_rate or use training.precision float32"
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


def _example(batch: TrialBatch, estimate: Tensor, row: int) -> dict[SoundKind, Sound]:
    length, ref_length = int(batch["audio_length"][row]), int(batch["ref_length"][row])
    return {
        "mixture": batch["audio"][row, :length].numpy(),
        "target": batch["target"][row, :length].numpy(),
        "estimate": estimate[row, :length].float().cpu().numpy(),
        "enrollment": batch["ref"][row, :ref_length].numpy(),
    }
