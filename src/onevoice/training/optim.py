"""Optimizers and learning-rate schedules from their configs, and the average of checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from onevoice.errors import CheckpointError
from onevoice.extraction.checkpoint import Card, State, load_checkpoint, provenance
from onevoice.models import Network
from onevoice.training.experiment import (
    OneCycleConfig,
    OptimizerConfig,
    PlateauConfig,
    SchedulerConfig,
    StableConfig,
)
from onevoice.training.muon import Muon

Scheduler = LRScheduler | ReduceLROnPlateau | None


def build_optimizer(model: Network, config: OptimizerConfig) -> Optimizer:
    """Return the optimizer over all parameters of `model`.

    Adam is the fused version: one kernel, which changes nothing if its `found_inf` is 1, so the device can skip a step.
    """
    if config.name == "muon":
        return MuonAndAdamW(model, config)
    kind: type[Adam] = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind(model.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True)


class MuonAndAdamW(Optimizer):
    """Muon for the weights of linear layers but the classifier, AdamW for the rest; one optimizer to the outside."""

    found_inf: Tensor | None = None
    """Set by the training step: 1 makes the next step do nothing. On a GPU, Muon waits for it."""

    def __init__(self, model: Network, config: OptimizerConfig) -> None:
        named = dict(model.named_parameters())
        matrices = {
            name for name, weight in named.items()
            if weight.ndim == 2 and name.endswith(".weight") and not name.startswith("classifier.")
        }  # fmt: skip
        rate, decay = config.learning_rate, config.weight_decay
        muon = Muon([weight for name, weight in named.items() if name in matrices], rate, decay, config.momentum)
        rest = [weight for name, weight in named.items() if name not in matrices]
        self.parts = (muon, AdamW(rest, rate, config.betas, weight_decay=decay, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._connect()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step, or none if `found_inf` is 1."""
        if self.found_inf is None or not self.found_inf:
            for part in self.parts:
                part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state."""
        super().load_state_dict(state_dict)
        self._connect()

    def _connect(self) -> None:
        """Let both parts read and write the groups and the state of the whole."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state


def build_scheduler(optimizer: Optimizer, config: SchedulerConfig, total_steps: int) -> Scheduler:
    """Return the scheduler, stepped after each validation (plateau) or each step (others); None for constant."""
    if isinstance(config, OneCycleConfig):
        return OneCycleLR(
            optimizer,
            config.max_learning_rate,
            total_steps + 1,  # torch also computes the rate after the last step
            pct_start=config.rising_part,
            div_factor=config.start_divisor,
            final_div_factor=config.final_divisor,
        )
    if isinstance(config, PlateauConfig):
        return ReduceLROnPlateau(
            optimizer, "max", config.factor, config.patience_epochs, min_lr=config.min_learning_rate
        )
    if isinstance(config, StableConfig):
        return WarmupStableDecay(optimizer, config, total_steps)
    return None


class WarmupStableDecay(LRScheduler):
    """A linear warm-up, then the optimizer's rate, then a decay that can be added while training."""

    def __init__(self, optimizer: Optimizer, config: StableConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.decay_from = config.decay_from_step
        if config.decay_steps is not None and self.decay_from is None:
            self.decay_from = max(0, total_steps - config.decay_steps)
        super().__init__(optimizer)

    @property
    def last_step(self) -> int:
        """The number of steps in total."""
        if self.decay_from is None or self.config.decay_steps is None:
            return self.total_steps
        return self.decay_from + self.config.decay_steps

    def factor(self, step: int) -> float:
        """Return the rate of a step, counted from 0, as a fraction of the stable rate."""
        config, done = self.config, 0.0
        if self.decay_from is not None and config.decay_steps is not None:
            done = min(1.0, max(0.0, (step + 1 - self.decay_from) / config.decay_steps))
        fallen = done**0.5 if config.decay_shape == "sqrt" else done
        rising = min(1.0, (step + 1) / (config.warmup_steps + 1))
        return rising * (1 - (1 - 1 / config.decay_divisor) * fallen)

    def get_lr(self) -> list[float | Any]:
        """Return the rate of the next step for each group of parameters."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule, and the settings and start of the decay."""
        decided = [self.config.decay_steps, self.config.decay_from_step]
        return {"step": self.last_epoch, "decided": decided, "decay_from": self.decay_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position, with its decay, or with that of the config if it has changed."""
        self.last_epoch = state["step"]
        if state["decided"] == [self.config.decay_steps, self.config.decay_from_step]:
            self.decay_from = state["decay_from"]
        elif self.config.decay_steps is None:
            self.decay_from = None
        elif self.config.decay_from_step is None:
            self.decay_from = self.last_epoch
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


def average_checkpoints(paths: Sequence[str | Path]) -> tuple[State, Card]:
    """Return the mean of the weights of checkpoints of one run, and a card that lists them.

    Sums are taken in float64; integer values are those of the first. Raises `CheckpointError` unless all have the same
    config and training speakers.
    """
    if len(paths) < 2:
        raise CheckpointError(
            "an average needs two checkpoints or more: onevoice average OUT A.safetensors B.safetensors"
        )
    first, card = load_checkpoint(paths[0])
    sums = {name: value.double() for name, value in first.items() if value.is_floating_point()}
    sources = [_source(paths[0], card)]
    for path in paths[1:]:
        state, other = load_checkpoint(path)
        if (other.config, other.speakers) != (card.config, card.speakers):
            what = "another config" if other.config != card.config else "other training speakers"
            raise CheckpointError(f"{path}: has {what} than {paths[0]}; average checkpoints of one run")
        for name, total in sums.items():
            total += state[name]
        sources.append(_source(path, other))
    means = {name: (total / len(paths)).to(first[name].dtype) for name, total in sums.items()}
    return {**first, **means}, Card(card.config, card.speakers, {"average_of": sources, **provenance()})


def _source(path: str | Path, card: Card) -> dict[str, Any]:
    return {"file": Path(path).name, "experiment": card.facts.get("experiment"), "step": card.facts.get("step")}
