"""One step of learning: a batch in, better weights out.

The host only queues work here: whether a step counts is decided on the device, and what it gave is read when a log
line is due.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from onevoice.activations import checkpoint_blocks
from onevoice.averaging import RunningAverage
from onevoice.dataset import TrialBatch
from onevoice.devices import missing_for_compiling
from onevoice.distributed import Group, distribute, unsynchronised
from onevoice.errors import TrainingError
from onevoice.experiment import Experiment
from onevoice.faults import out_of_memory
from onevoice.loss import LossTerms
from onevoice.microbatches import split
from onevoice.models import Network, build_model, to_network
from onevoice.optim import WarmupStableDecay, build_optimizer, build_scheduler
from onevoice.resuming import Progress, RunState, random_state, set_random_state
from onevoice.rng import derive_seed
from onevoice.tally import Tally

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
