"""The state of a run: everything that the next step depends on. It saves and loads itself as a whole."""

import copy
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import TypeAdapter
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from onevoice.config import from_dict, to_dict
from onevoice.errors import CheckpointError, ConfigError
from onevoice.extraction.checkpoint import load_original, load_state
from onevoice.extraction.original import OriginalCheckpoint, convert_moments
from onevoice.extraction.pickled import load_pickled, resume_path, save_resume
from onevoice.models import Network, build
from onevoice.rng import derive_seed
from onevoice.training.distributed import Group
from onevoice.training.experiment import Experiment, changed_settings, fill_model_fields
from onevoice.training.optim import Scheduler, WarmupStableDecay, build_optimizer, build_scheduler

LOGGED_MEANS = {"loss": "steps", "cross_entropy": "steps", "gradient_norm": "steps", "si_sdr_db": "speaking"}
"""The values of a log line, and what each sum is divided by: steps, or items whose target speaks."""
SUMS = (*LOGGED_MEANS, "steps", "speaking")


@dataclass
class Progress:
    """How far a run has come, in plain numbers."""

    epoch: int = 0
    """Completed epochs."""
    step_in_epoch: int = 0
    """Completed steps of the current epoch."""
    step: int = 0
    """Completed steps in total."""
    validated_step: int = 0
    """The step of the last validation."""
    best: float = -math.inf
    """Best mean SI-SDRi in dB on the validation trials."""
    epochs_without_gain: int = 0
    """Validations since the best one."""
    skipped_steps: int = 0
    """Steps skipped because the loss or gradient was not finite, in total."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last finite one."""
    accumulate: int = 1
    """Parts into which each batch is split now."""
    steps_per_epoch: int = 0
    """Number of steps of an epoch; 0 in files of earlier versions, in which an epoch was one pass at most."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums over the steps since the last log line, by the names in `SUMS`."""


class RunningAverage:
    """An exponential moving average of a network's weights, kept as a network of its own.

    After t updates the decay is min(decay, (1 + t) / (10 + t)), so the first, random weights are soon
    forgotten. Running statistics are averaged like weights: to first order, the statistics of the mean weights are
    the mean of the statistics. Counters are copied. Nothing here makes the host wait for the device.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.updates = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: Network, finite: Bool[Tensor, ""]) -> None:
        """Move toward the weights of `model`, unless `finite` is False."""
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        step = torch.where(finite, 1 - decay, 0.0)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        means = [mean for mean, _ in pairs if mean.is_floating_point()]
        moves = torch._foreach_sub([now for _, now in pairs if now.is_floating_point()], means)
        torch._foreach_mul_(moves, step)
        torch._foreach_add_(means, moves)
        for mean, now in pairs:
            if not mean.is_floating_point():
                mean.copy_(now)
        self.updates += finite

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved average."""
        self.updates.copy_(state["updates"])
        self.model.load_state_dict(state["model"])


@dataclass
class TrainingState:
    """Everything that changes during training."""

    model: Network
    average: RunningAverage | None
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    progress: Progress
    device_sums: Float[Tensor, " sums"]
    """Sums over the finite steps that `progress` does not have yet, in the order of `SUMS`."""
    skips: Int[Tensor, "3"]
    """Skipped steps on the device: in total, in a row now, and the longest row since the last reading."""

    @classmethod
    def create(cls, experiment: Experiment, device: torch.device, steps: int) -> "TrainingState":
        """Return the state before the first of `steps` steps, with fresh weights drawn from the seed."""
        settings = experiment.training
        torch.manual_seed(derive_seed(experiment.seed, "weights") % 2**63)
        model = build(experiment.model).to(device)
        optimizer = build_optimizer(model, experiment.optimizer)
        return cls(
            model=model,
            average=None if settings.ema is None else RunningAverage(model, settings.ema),
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, experiment.scheduler, steps),
            scaler=torch.amp.GradScaler(device.type, enabled=settings.precision == "float16"),
            progress=Progress(accumulate=settings.accumulate),
            device_sums=torch.zeros(len(SUMS), device=device),
            skips=torch.zeros(3, dtype=torch.int64, device=device),
        )

    @property
    def weights(self) -> Network:
        """The network that is validated and shipped: the running average if there is one."""
        return self.model if self.average is None else self.average.model

    def last_step(self, planned: int) -> int:
        """Return the number of steps in total: `planned`, unless the scheduler's decay ends training elsewhere."""
        return self.scheduler.last_step if isinstance(self.scheduler, WarmupStableDecay) else planned

    def plan(self, steps: int) -> None:
        """Change the number of planned steps; a loaded cycle keeps its own."""
        if isinstance(self.scheduler, WarmupStableDecay):
            self.scheduler.total_steps = steps

    def step_schedule(self) -> None:
        """Set the learning rate of the next step; the plateau schedule moves after validations instead."""
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()

    def count_step(self, finite: Bool[Tensor, ""], sums: Mapping[str, Float[Tensor, ""]]) -> None:
        """Count one step and add to its sums if it is finite. The host does not wait for the device."""
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        values = torch.stack([{**sums, "steps": finite}[name].detach().float() for name in SUMS])
        self.device_sums += torch.where(finite, values, 0.0)
        total, row, longest = self.skips
        row = torch.where(finite, 0, row + 1)
        self.skips = torch.stack([total + ~finite, row, torch.maximum(longest, row)])

    def read_skips(self) -> int:
        """Read the counts of skipped steps from the device; return the longest row since the last reading."""
        self.progress.skipped_steps, self.progress.skipped_in_a_row, longest = self.skips.tolist()
        self.skips[2] = 0
        return int(longest)

    def read_sums(self, group: Group) -> None:
        """Add the sums on the device, averaged over the processes of the group, to `progress`."""
        values = dict(zip(SUMS, group.mean(self.device_sums).tolist(), strict=True))
        self.device_sums.zero_()
        self.progress.sums = {name: self.progress.sums.get(name, 0.0) + value for name, value in values.items()}

    def take_means(self, group: Group) -> dict[str, float]:
        """Return the means since the last call and start new ones."""
        means = self.means(group)
        self.progress.sums = {}
        return means

    def means(self, group: Group) -> dict[str, float]:
        """Return the means since the last call of `take_means`; a mean over nothing is left out."""
        self.read_sums(group)
        sums = self.progress.sums
        return {name: sums[name] / sums[count] for name, count in LOGGED_MEANS.items() if sums.get(count)}

    def save(self, checkpoint: Path, experiment: Experiment, speakers: Sequence[str], data_digest: str) -> None:
        """Write the state beside `checkpoint`, with a description of its run. Raises `StorageError`."""
        content = {
            "experiment": json.dumps(to_dict(experiment)),
            "speakers": list(speakers),
            "data": data_digest,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
            "scaler": self.scaler.state_dict(),
            **random_state(),
        }
        save_resume(resume_path(checkpoint), content)

    def load(self, checkpoint: str | Path, experiment: Experiment, speakers: Sequence[str], data_digest: str) -> Path:
        """Take over the state saved beside `checkpoint` and return its file.

        Raises `CheckpointError` if the file is missing, unreadable, or belongs to another run.
        """
        path = resume_path(checkpoint)
        saved = read_resume_file(checkpoint, experiment, speakers, data_digest)
        try:
            self._take(saved, path)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0][:150]
            raise CheckpointError(f"{path}: is damaged ({reason}); use --load to take weights alone") from error
        return path

    def _take(self, saved: dict[str, Any], path: Path) -> None:
        """Take over the content of a resume file."""
        load_state(self.model, saved["model"], path)
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        for group in saved["optimizer"]["param_groups"]:
            group["fused"] = True  # as in `build_optimizer`; files of earlier versions differ
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        set_random_state(saved)
        self.progress = Progress(**{**asdict(self.progress), **saved["progress"]})
        self.device_sums.zero_()
        self.skips.copy_(torch.tensor([self.progress.skipped_steps, self.progress.skipped_in_a_row, 0]))

    def load_original(self, path: str | Path, steps_per_epoch: int) -> None:
        """Take over weights, moments of Adam and epoch of a checkpoint of the original system, and set the rate.

        Raises `CheckpointError` if the file is no such checkpoint or belongs to another network or optimizer.
        """
        original = load_original(path)
        load_state(self.model, original.state, path)
        self.optimizer.load_state_dict(self._with_moments(original, path))
        if self.average is not None:
            self.average.model.load_state_dict(self.model.state_dict())
        progress = self.progress
        progress.epoch, progress.step = original.epoch, original.epoch * steps_per_epoch
        progress.validated_step = progress.step
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau) and progress.step:
            self.scheduler.last_epoch = progress.step - 1
            with warnings.catch_warnings():  # torch expects a step of the optimizer first
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.scheduler.step()

    def _with_moments(self, original: OriginalCheckpoint, path: str | Path) -> dict[str, Any]:
        """Return the state of the optimizer with the moments of another one, by the names of the parameters."""
        try:
            moments = convert_moments(original)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: cannot be resumed: {error}; take its weights alone with --load") from error
        numbers = {name: number for number, (name, _) in enumerate(self.model.named_parameters())}
        return {**self.optimizer.state_dict(), "state": {numbers[name]: own for name, own in moments.items()}}


def read_resume_file(
    checkpoint: str | Path, experiment: Experiment, speakers: Sequence[str], data_digest: str
) -> dict[str, Any]:
    """Read the state saved beside `checkpoint`; raise `CheckpointError` unless it belongs to this experiment."""
    checkpoint, path = Path(checkpoint), resume_path(checkpoint)
    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such checkpoint file")
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint}: has no {path.name} beside it; resume from last.safetensors of its run, or take its "
            "weights alone with --load"
        )
    saved = load_pickled(path)
    try:
        before = from_dict(Experiment, json.loads(saved["experiment"]))  # with defaults for new keys
        before = fill_model_fields(before, len(saved["speakers"]))
        same_data = (list(saved["speakers"]), saved["data"]) == (list(speakers), data_digest)
        TypeAdapter(Progress).validate_python(saved["progress"])
    except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: not a resume file ({error}); use --load to take weights alone") from error
    changed = changed_settings(before, experiment) + ([] if same_data else ["the training data"])
    if changed:
        raise CheckpointError(
            f"{path}: was made with other settings ({', '.join(changed)}); resume with its own config "
            f"({checkpoint.parent / 'config.json'}) or take its weights alone with --load"
        )
    return saved


def random_state() -> dict[str, Any]:
    """Return the states of torch's random generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {"torch_rng": torch.get_rng_state(), "cuda_rng": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set torch's random generators to the states from `random_state`; GPUs that are missing here are skipped."""
    torch.set_rng_state(state["torch_rng"])
    for number, cuda in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, number)


def reinitialize_misfits(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], other_speakers: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a checkpoint with those of `own` where they cannot be used, and a note on each such case.

    These are the classifier if it knows other speakers, and tensors of other sizes if they are less than half of the
    network. So a network can begin from one with another window, bands, or number of speakers.
    """
    state, notes = dict(state), []
    misfits = {name for name in own if name in state and state[name].shape != own[name].shape}
    classifier = {name for name in own if name.startswith("classifier.")}
    if other_speakers or misfits & classifier:
        state |= {name: own[name] for name in classifier}
        notes.append("was trained on other speakers; the classifier is reinitialized")
    misfits -= classifier
    if 0 < 2 * sum(own[name].numel() for name in misfits) < sum(each.numel() for each in own.values()):
        state |= {name: own[name] for name in misfits}
        notes.append(f"tensors of other sizes are reinitialized: {', '.join(sorted(misfits))}")
    return state, notes
