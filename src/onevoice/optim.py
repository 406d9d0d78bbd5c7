"""Optimizers and learning-rate schedulers, from their configs."""

from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from onevoice.experiment import AdamConfig, OneCycleConfig, PlateauConfig, SchedulerConfig
from onevoice.models import Network

Scheduler = LRScheduler | ReduceLROnPlateau | None


def build_optimizer(model: Network, config: AdamConfig) -> Optimizer:
    """Return the optimizer over all parameters of `model`."""
    kind: type[Adam] = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind(model.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay)


def build_scheduler(optimizer: Optimizer, config: SchedulerConfig, total_steps: int) -> Scheduler:
    """Return the scheduler, stepped at each step (onecycle) or each validation (plateau); None for constant."""
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
    return None
