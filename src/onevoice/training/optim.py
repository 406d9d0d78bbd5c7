"""Optimizers and learning-rate schedulers from their configs, and averages of weights."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from onevoice.errors import CheckpointError
from onevoice.extraction.checkpoint import Card, State, load_checkpoint, provenance
from onevoice.models import Network
from onevoice.training.experiment import AdamConfig, OneCycleConfig, PlateauConfig, SchedulerConfig, StableConfig

Scheduler = LRScheduler | ReduceLROnPlateau | None


def build_optimizer(model: Network, config: AdamConfig) -> Optimizer:
    """Return the optimizer over all parameters of `model`.

    It is the fused one: a single kernel, which also leaves everything as it is where its `found_inf` is 1, so that
    a step can be skipped on the device.
    """
    kind: type[Adam] = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind(model.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True)


def build_scheduler(optimizer: Optimizer, config: SchedulerConfig, total_steps: int) -> Scheduler:
    """Return the scheduler, stepped at each validation (plateau) or each step (others); None for constant."""
    if isinstance(config, OneCycleConfig):
        return OneCycleLR(
            optimizer,
            config.max_learning_rate,
            total_steps + 1,  # one more: the step after the last is computed too
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
    """A linear warm-up, the optimizer's rate, and a decay that may be decided on while training."""

    def __init__(self, optimizer: Optimizer, config: StableConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.decay_from = config.decay_from_step
        if config.decay_steps is not None and self.decay_from is None:
            self.decay_from = max(0, total_steps - config.decay_steps)
        super().__init__(optimizer)

    @property
    def last_step(self) -> int:
        """How many steps training has in all."""
        if self.decay_from is None or self.config.decay_steps is None:
            return self.total_steps
        return self.decay_from + self.config.decay_steps

    def factor(self, step: int) -> float:
        """Return the rate of a step, counted from 0, as a part of the stable one."""
        config, done = self.config, 0.0
        if self.decay_from is not None and config.decay_steps is not None:
            done = min(1.0, max(0.0, (step + 1 - self.decay_from) / config.decay_steps))
        fallen = done**0.5 if config.decay_shape == "sqrt" else done
        rising = min(1.0, (step + 1) / (config.warmup_steps + 1))
        return rising * (1 - (1 - 1 / config.decay_divisor) * fallen)

    def get_lr(self) -> list[float | Any]:
        """Return the rate of the coming step for each group of parameters."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the schedule, and what was decided of the decay."""
        decided = [self.config.decay_steps, self.config.decay_from_step]
        return {"step": self.last_epoch, "decided": decided, "decay_from": self.decay_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place: with its decay, or where the config has another one now, with that."""
        self.last_epoch = state["step"]
        if state["decided"] == [self.config.decay_steps, self.config.decay_from_step]:
            self.decay_from = state["decay_from"]
        elif self.config.decay_steps is None:
            self.decay_from = None
        elif self.config.decay_from_step is None:
            self.decay_from = self.last_epoch
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


class RunningAverage:
    """An exponential moving average of a network's weights, kept as a network of its own.

    After t updates the decay is min(decay, (1 + t) / (10 + t)), so that the first, random weights are soon
    forgotten. Running statistics are averaged like weights: to first order, the statistics of the mean weights are
    the mean of the statistics. Counters are copied. Nothing here makes the host wait for the device.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.updates = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: Network, finite: Bool[Tensor, ""]) -> None:
        """Move towards the weights of `model`, unless `finite` is False."""
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        share = torch.where(finite, 1 - decay, 0.0)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        means = [mean for mean, _ in pairs if mean.is_floating_point()]
        moves = torch._foreach_sub([now for _, now in pairs if now.is_floating_point()], means)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(means, moves)
        for mean, now in pairs:
            if not mean.is_floating_point():
                mean.copy_(now)
        self.updates += finite

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved average."""
        self.updates.copy_(state["updates"])
        self.model.load_state_dict(state["model"])


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
