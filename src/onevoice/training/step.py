"""One training step: a batch in, updated weights and a log line out.

`Learner.step` shows the whole step, in order. It only queues work on the device: the device decides whether a step
counts, and the host reads results when a log line is due.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from onevoice.errors import TrainingError
from onevoice.models import Batch, to_network
from onevoice.models.base import has_bfloat16, missing_for_compiling
from onevoice.training.distributed import Group, distribute, sync_gradients
from onevoice.training.experiment import Experiment
from onevoice.training.loss import LossTerms
from onevoice.training.state import TrainingState, random_state, set_random_state
from onevoice.trials.reading import TrialBatch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Sums = dict[str, Tensor]


class Learner:
    """Takes training steps: it changes `state`, and gives the values of each log line to `log`."""

    def __init__(
        self,
        experiment: Experiment,
        state: TrainingState,
        device: torch.device,
        group: Group,
        say: Callable[[str], None],
        log: Callable[[dict[str, float]], None],
    ) -> None:
        settings = experiment.training
        self.experiment, self.state, self.device, self.group = experiment, state, device, group
        self.say, self.log = say, log
        state.model.compiled = settings.compile and self._can_compile()
        state.model.recompute = settings.checkpoint_activations
        self.network: nn.Module = distribute(state.model, group)
        """What predicts: the model, or in a group a wrapper that averages gradients over the processes."""
        self.precision = self._pick_precision()
        self.trial_names: list[str] = []
        """The trials of the last batch."""
        self.learning_rate = 0.0
        """The learning rate of the last step."""

    def step(self, batch: TrialBatch) -> LossTerms:
        """Learn from one batch and return its loss.

        A loss or gradient that is not finite leaves weights and statistics as they are; the device decides this.
        Raises `TrainingError` after too many such steps in a row.
        """
        state, settings = self.state, self.experiment.training
        model, optimizer, scaler = state.model, state.optimizer, state.scaler
        self.trial_names = batch["name"]
        buffers = [buffer.clone() for buffer in model.buffers()]
        model.train()

        def compute_gradient(parts: list[TrialBatch]) -> Sums:
            optimizer.zero_grad(set_to_none=True)
            sums: Sums = {}
            for part in parts:
                inputs, target, speaker = to_device(part, self.device)
                with sync_gradients(self.network, part is parts[-1]):
                    with torch.autocast(self.device.type, self.precision, self.precision is not torch.float32):
                        prediction = self.network(inputs)
                    terms = self.experiment.loss(
                        prediction, target, speaker, inputs.get("audio_length"), inputs["audio"]
                    )
                    weight = len(part["name"]) / len(batch["name"])
                    scaler.scale(weight * terms.total).backward()  # type: ignore[no-untyped-call]
                sums = add_to_sums(sums, terms, target, weight)
            return sums

        sums = self.in_smaller_parts_if_out_of_memory(compute_gradient, batch, buffers)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gradient_norm or math.inf)
        finite = self.group.all(torch.isfinite(norm) & torch.isfinite(sums["loss"]))
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # 1 makes a fused optimizer do nothing
        self.learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scaler.update()
        restore_buffers(model, buffers, ~finite)
        if state.average is not None:
            state.average.update(model, finite)
        state.step_schedule()
        state.count_step(finite, {**sums, "gradient_norm": norm})
        if self.device.type == "cpu" or self.log_is_due():  # on the CPU, reading the counts costs nothing
            self.check_skipped_steps()
        if self.log_is_due():
            self.log({**state.take_means(self.group), "learning_rate": self.learning_rate})
        return LossTerms(sums["loss"], sums["si_sdr_db"] / sums["speaking"].clamp(min=1), sums["cross_entropy"])

    def log_is_due(self) -> bool:
        """Check whether the last step ends with a log line."""
        return self.state.progress.step % self.experiment.training.log_every_steps == 0

    def log_rest(self) -> None:
        """Log the steps since the last log line, if there are any.

        Their sums are kept, so that a run that goes on logs the same lines as one that never ended.
        """
        if self.learning_rate and not self.log_is_due():
            self.log({**self.state.means(self.group), "learning_rate": self.learning_rate})

    def in_smaller_parts_if_out_of_memory(
        self, compute_gradient: Callable[[list[TrialBatch]], Sums], batch: TrialBatch, buffers: Sequence[Tensor]
    ) -> Sums:
        """Compute the gradient of a batch in its parts.

        If memory runs out and the config allows it, double the number of parts and repeat from the same state.
        """
        progress = self.state.progress
        may_halve = self.experiment.training.on_out_of_memory == "halve"
        random_before = random_state() if may_halve else {}
        while True:
            try:
                return compute_gradient(split(batch, progress.accumulate))
            except (RuntimeError, MemoryError) as error:
                if not (may_halve and is_out_of_memory(error) and progress.accumulate < len(batch["name"])):
                    raise
            progress.accumulate *= 2
            restore_buffers(self.state.model, buffers, torch.ones((), dtype=torch.bool, device=self.device))
            set_random_state(random_before)
            self.state.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.say(
                f"out of memory at step {progress.step}: from here on each batch is taken in "
                f"{progress.accumulate} parts"
            )

    def check_skipped_steps(self) -> None:
        """Report newly skipped steps; raise `TrainingError` if too many were skipped in a row."""
        progress, limit = self.state.progress, self.experiment.training.max_nonfinite_steps
        reported = progress.skipped_steps
        longest = self.state.read_skips()
        if progress.skipped_steps > reported:
            self.say(
                f"step {progress.step}: loss or gradient not finite, step skipped ({progress.skipped_steps} so far)"
            )
        if longest >= limit:
            raise TrainingError(
                f"no finite loss for {limit} steps (last batch: {', '.join(self.trial_names[:3])}, …); "
                "lower optimizer.learning_rate or use training.precision float32"
            )

    def leave_group(self) -> None:
        """Drop the wrapper of the network; torch may wait forever if it outlives the process group."""
        self.network = self.state.model

    def _can_compile(self) -> bool:
        missing = missing_for_compiling(self.device)
        if missing is not None:
            self.say(f"training.compile: {missing} is missing; training without it, steps take longer")
        return missing is None

    def _pick_precision(self) -> torch.dtype:
        name = self.experiment.training.precision
        if name == "auto":
            return torch.bfloat16 if has_bfloat16(self.device) else torch.float32
        if name == "bfloat16" and not has_bfloat16(self.device):
            self.say("training.precision: bfloat16 is emulated on this processor and slow; auto takes float32 here")
        return PRECISIONS[name]


def to_device(batch: TrialBatch, device: torch.device) -> tuple[Batch, Float[Tensor, "batch samples"], Tensor]:
    """Return on the device what the network takes, the targets, and the speakers."""
    target, speaker = (batch[name].to(device, non_blocking=True) for name in ("target", "speaker"))
    return to_network(batch, device), target, speaker


def add_to_sums(sums: Sums, terms: LossTerms, target: Float[Tensor, "batch samples"], weight: float) -> Sums:
    """Add what a part of a batch contributes to the log: `weight` of the loss, and SI-SDR over speaking targets."""
    speaking = (target.abs().amax(1) > 0).sum()
    values = {
        "loss": weight * terms.total,
        "cross_entropy": weight * terms.cross_entropy,
        "si_sdr_db": terms.si_sdr * speaking,
        "speaking": speaking,
    }
    return {name: sums.get(name, 0.0) + value.detach() for name, value in values.items()}


def restore_buffers(model: nn.Module, values: Sequence[Tensor], where: Bool[Tensor, ""]) -> None:
    """Set the running statistics of a network back to `values` if `where` is True, decided on the device."""
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), values, strict=True):
            buffer.copy_(torch.where(where, value, buffer))


def split(batch: TrialBatch, parts: int) -> list[TrialBatch]:
    """Split a batch into `parts` parts of equal size, in order; a batch with fewer items gives fewer parts."""
    items = len(batch["name"])
    size = -(-items // parts)
    content = cast(dict[str, Any], batch)
    return [
        cast(TrialBatch, {key: value[start : start + size] for key, value in content.items()})
        for start in range(0, items, size)
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error means that the device or the host ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
