"""What a run remembers: everything that the next step depends on, saved and taken up again whole."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from onevoice.config import from_dict, to_dict
from onevoice.errors import CheckpointError, ConfigError
from onevoice.extraction.checkpoint import load_pickled, load_state, resume_path, save_resume
from onevoice.models import Network
from onevoice.training.experiment import Experiment, changed_settings
from onevoice.training.optim import RunningAverage, Scheduler


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    """Epochs completed."""
    step_in_epoch: int = 0
    step: int = 0
    validated_step: int = 0
    """The step of the last validation."""
    best: float = -math.inf
    """Best mean SI-SDRi in dB on the validation trials."""
    epochs_without_gain: int = 0
    skipped_steps: int = 0
    """Steps left out because loss or gradient was not finite, in all and …"""
    skipped_in_a_row: int = 0
    """… since the last finite one."""
    accumulate: int = 1
    """Parts into which a batch is split now."""
    sums: dict[str, float] = field(default_factory=dict)
    """What the steps since the last log line gave, summed (`onevoice.training.step`)."""


@dataclass(frozen=True)
class RunState:
    """All that changes while training."""

    model: Network
    average: RunningAverage | None
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    progress: Progress

    def save(self, path: Path, experiment: Experiment, speakers: Sequence[str], digest: str) -> None:
        """Write it beside the checkpoint `path`, with what it belongs to. Raises `StorageError`."""
        content = {
            "experiment": json.dumps(to_dict(experiment)),
            "speakers": list(speakers),
            "data": digest,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
            "scaler": self.scaler.state_dict(),
            **random_state(),
        }
        save_resume(resume_path(path), content)

    def restore(self, checkpoint: str | Path, experiment: Experiment, speakers: Sequence[str], digest: str) -> Path:
        """Take up what was saved beside `checkpoint`; return the file. `CheckpointError` when it is of another run."""
        path = resume_path(checkpoint)
        state = _checked(path, Path(checkpoint), experiment, speakers, digest)
        load_state(self.model, state["model"], path)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = True  # as in `build_optimizer`; files of earlier versions say otherwise
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state)
        vars(self.progress).update(state["progress"])
        return path


def _checked(
    path: Path, checkpoint: Path, experiment: Experiment, speakers: Sequence[str], digest: str
) -> dict[str, Any]:
    """Read a resume file; `CheckpointError` unless it is there and belongs to this experiment."""
    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such checkpoint file")
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint}: has no {path.name} beside it; resume from last.safetensors of its run, or take its "
            "weights alone with --load"
        )
    state = load_pickled(path)
    try:
        saved = to_dict(from_dict(Experiment, json.loads(state["experiment"])))  # with defaults for keys that are new
        same_data = (list(state["speakers"]), state["data"]) == (list(speakers), digest)
        Progress(**state["progress"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: not a resume file ({error}); use --load to take weights alone") from error
    changed = changed_settings(saved, to_dict(experiment)) + ([] if same_data else ["the training data"])
    if changed:
        raise CheckpointError(
            f"{path}: was made with other settings ({', '.join(changed)}); resume with its own config "
            f"({checkpoint.parent / 'config.json'}) or take its weights alone with --load"
        )
    return state


def random_state() -> dict[str, Any]:
    """Return the state of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {"torch_rng": torch.get_rng_state(), "cuda_rng": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Set torch's generators to a state that `random_state` gave; those of GPUs that are not there are left out."""
    torch.set_rng_state(state["torch_rng"])
    for number, cuda in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, number)
