"""One step of learning: a batch in, better weights out.

The host only queues work here: whether a step counts is decided on the device, and what it gave is read when a log
line is due.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from onevoice.devices import missing_for_compiling
from onevoice.errors import TrainingError
from onevoice.models import Network, build_model, to_network
from onevoice.models.activations import checkpoint_blocks
from onevoice.rng import derive_seed
from onevoice.training.distributed import Group, distribute, unsynchronised
from onevoice.training.experiment import Experiment
from onevoice.training.loss import LossTerms
from onevoice.training.optim import RunningAverage, WarmupStableDecay, build_optimizer, build_scheduler
from onevoice.training.state import Progress, RunState, random_state, set_random_state
from onevoice.trials.trials import TrialBatch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Learner:
    """A network, its optimizer, and all else that changes while training."""

    def __init__(
        self, experiment: Experiment, device: torch.device, group: Group, steps: int, echo: Callable[[str], None]
    ) -> None:
        """Begin with fresh weights a training of `steps` steps."""
        settings = experiment.training
        self.experiment, self.device, self.group, self.echo, self.steps = experiment, device, group, echo, steps
        torch.manual_seed(derive_seed(experiment.seed, "weights") % 2**63)
        self.model: Network = build_model(experiment.model).to(device)
        self.average = None if settings.ema is None else RunningAverage(self.model, settings.ema)
        self.model.compiled = settings.compile and self._can_compile()
        if settings.checkpoint_activations:
            checkpoint_blocks(self.model)
        self.network = distribute(self.model, group)
        self.optimizer = build_optimizer(self.model, experiment.optimizer)
        self.scheduler = build_scheduler(self.optimizer, experiment.scheduler, steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.progress = Progress(accumulate=settings.accumulate)
        self.tally = Tally(device, group)
        self.names: list[str] = []
        self.rate = 0.0
        """The learning rate of the last step, and before it the names of its trials."""

    def _can_compile(self) -> bool:
        missing = missing_for_compiling(self.device)
        if missing is not None:
            self.echo(f"training.compile: {missing} is missing here; going on without, steps take longer")
        return missing is None

    @property
    def weights(self) -> Network:
        """The network that is judged and shipped: the average where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def last_step(self) -> int:
        """How many steps training has in all."""
        if isinstance(self.scheduler, WarmupStableDecay):
            return self.scheduler.last_step
        return self.steps

    @property
    def state(self) -> RunState:
        """All that changes while training."""
        return RunState(self.model, self.average, self.optimizer, self.scheduler, self.scaler, self.progress)

    def step(self, batch: TrialBatch) -> LossTerms:
        """Learn from one batch. A loss or gradient that is not finite leaves weights and statistics untouched.

        Whether it is finite is decided on the device, without the host waiting for it.
        """
        self.model.train()
        progress, settings = self.progress, self.experiment.training
        self.names = batch["name"]
        before = [buffer.clone() for buffer in self.model.buffers()]
        sums = self._learn(batch, before)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_gradient_norm)
        finite = self.group.all(torch.isfinite(norm) & torch.isfinite(sums["loss"]))
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # fused optimizers obey it
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scaler.update()
        self._set_buffers(before, ~finite)
        if self.average is not None:
            self.average.update(self.model, finite)
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        progress.step += 1
        progress.step_in_epoch += 1
        self.tally.add(finite, {**sums, "gradient_norm": norm, "steps": torch.ones_like(norm)})
        if self.device.type == "cpu":  # where reading costs nothing
            self.watch_skipping()
        return LossTerms(sums["loss"], sums["si_sdr_db"] / sums["speaking"].clamp(min=1), sums["cross_entropy"])

    def _learn(self, batch: TrialBatch, before: list[Tensor]) -> dict[str, Tensor]:
        """Compute the gradient of a batch; where memory is short and one may, in smaller parts from the same state."""
        halve = self.experiment.training.on_out_of_memory == "halve"
        chance = random_state() if halve else {}
        while True:
            try:
                return self._gradient(batch)
            except (RuntimeError, MemoryError) as error:
                if not (halve and out_of_memory(error) and self.progress.accumulate < len(batch["name"])):
                    raise
            self.progress.accumulate *= 2
            self._set_buffers(before, torch.ones((), dtype=torch.bool, device=self.device))
            set_random_state(chance)
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.echo(
                f"out of memory at step {self.progress.step}: from here on each batch is taken in "
                f"{self.progress.accumulate} parts"
            )

    def _gradient(self, batch: TrialBatch) -> dict[str, Tensor]:
        """Leave the gradient of the batch's mean loss in the parameters; return what is to be reported, summed."""
        self.optimizer.zero_grad(set_to_none=True)
        parts, sums = split(batch, self.progress.accumulate), dict[str, Tensor]()
        for number, part in enumerate(parts, start=1):
            with unsynchronised(self.network, number < len(parts)):
                terms, speaking = self._loss(part)
                weight = len(part["name"]) / len(batch["name"])
                self.scaler.scale(weight * terms.total).backward()  # type: ignore[no-untyped-call]
            values = {"loss": weight * terms.total, "cross_entropy": weight * terms.cross_entropy,
                      "si_sdr_db": terms.si_sdr * speaking, "speaking": speaking}  # fmt: skip
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in values.items()}
        return sums

    def _loss(self, batch: TrialBatch) -> tuple[LossTerms, Tensor]:
        """Return the loss of a batch, and the number of items whose target speaks."""
        inputs, target = to_network(batch, self.device), batch["target"].to(self.device, non_blocking=True)
        speaker = batch["speaker"].to(self.device, non_blocking=True)
        precision = PRECISIONS[self.experiment.training.precision]
        with torch.autocast(self.device.type, precision, enabled=precision is not torch.float32):
            prediction = self.network(inputs)
        terms = self.experiment.loss(prediction, target, speaker, inputs.get("audio_length"), inputs["audio"])
        return terms, (target.abs().amax(1) > 0).sum()

    def leave_group(self) -> None:
        """Let go of the other processes, before the group is closed: in the other order torch may wait for ever."""
        self.network = self.model

    def take_sums(self) -> None:
        """Move what is summed on the device to the record of the run."""
        sums = self.progress.sums
        self.progress.sums = {name: sums.get(name, 0.0) + value for name, value in self.tally.take().items()}

    def _set_buffers(self, values: list[Tensor], where: Tensor) -> None:
        """Set the running statistics back to `values` where that is wanted; decided on the device."""
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), values, strict=True):
                buffer.copy_(torch.where(where, value, buffer))

    def watch_skipping(self) -> None:
        """Say whether steps were skipped since last asked; raise `TrainingError` when too many were in a row."""
        progress, most = self.progress, self.experiment.training.max_nonfinite_steps
        total, progress.skipped_in_a_row, longest = self.tally.read_skipped()
        if total > progress.skipped_steps:
            self.echo(f"step {progress.step}: loss or gradient not finite, step skipped ({total} so far)")
        progress.skipped_steps = total
        if longest >= most:
            raise TrainingError(
                f"no finite loss for {most} steps (last batch: {', '.join(self.names[:3])}, …); "
                "lower optimizer.learning_rate or use training.precision float32"
            )


MEANS = {
    "loss": "steps",
    "cross_entropy": "steps",
    "gradient_norm": "steps",
    "si_sdr_db": "speaking",
}
"""What is reported, and what its sum is divided by: steps, or the items whose target speaks."""
COLUMNS = (*MEANS, "steps", "speaking")


class Tally:
    """Sums over the finite steps since the last reading, and counts of the others."""

    def __init__(self, device: torch.device, group: Group) -> None:
        self.group = group
        self.sums = torch.zeros(len(COLUMNS), device=device)
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps skipped: in all, in a row up to now, and the most in a row since the last reading."""

    def add(self, finite: Bool[Tensor, ""], sums: dict[str, Float[Tensor, ""]]) -> None:
        """Take in one step; the host does not wait for it."""
        values = torch.stack([sums[name].detach().float() for name in COLUMNS])
        self.sums += torch.where(finite, values, 0.0)
        total, row, most = self.skipped
        row = torch.where(finite, 0, row + 1)
        self.skipped = torch.stack([total + ~finite, row, torch.maximum(most, row)])

    def take(self) -> dict[str, float]:
        """Return the sums, averaged over the processes of the group, and begin anew."""
        sums = self.group.mean(self.sums).tolist()
        self.sums.zero_()
        return dict(zip(COLUMNS, sums, strict=True))

    def read_skipped(self) -> tuple[int, int, int]:
        """Return how many steps were skipped: in all, in a row up to now, and the most in a row since last asked."""
        total, row, most = self.skipped.tolist()
        self.skipped[2] = 0
        return total, row, most

    def set_skipped(self, total: int, row: int) -> None:
        """Begin from counts of an earlier process."""
        self.skipped.copy_(torch.tensor([total, row, 0]))


def means(sums: dict[str, float]) -> dict[str, float]:
    """Return the reported means; what nothing was counted for is left out."""
    return {name: sums[name] / sums[by] for name, by in MEANS.items() if sums.get(by)}


def split(batch: TrialBatch, parts: int) -> list[TrialBatch]:
    """Return a batch in `parts` parts of equal size, in order; fewer where it has fewer items."""
    items = len(batch["name"])
    size = -(-items // parts)
    content = cast(dict[str, Any], batch)
    return [
        cast(TrialBatch, {key: value[start : start + size] for key, value in content.items()})
        for start in range(0, items, size)
    ]


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory of the device or of the host is short."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
