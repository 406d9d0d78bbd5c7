"""Optimizers and learning-rate schedulers, from their configs."""

from typing import Any

from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from onevoice.experiment import AdamConfig, OneCycleConfig, PlateauConfig, SchedulerConfig, StableConfig
from onevoice.models import Network

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
