"""What can befall a training, in a line that says how to go on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from onevoice.dataset import reader_death
from onevoice.errors import TrainingError, WorkerError


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory of the device or of the host is short."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def compiler_failed(error: BaseException) -> bool:
    """Say whether an error comes from the compiler of `training.compile`."""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)


@contextlib.contextmanager
def plain_errors(last: Path, process: str | None) -> Iterator[None]:
    """Raise `TrainingError` for short memory, a lost data reader, a failed compiler and, in a group, lost others.

    `last` is the checkpoint that a run goes on from, once it is there; `process` names this one of a group.
    """
    try:
        yield
    except (WorkerError, RuntimeError, MemoryError) as error:
        go_on = f"resume with --r {last}" if last.exists() else "start again"
        dead = error if isinstance(error, WorkerError) else reader_death(error)
        if dead is not None:
            raise TrainingError(f"{dead}; {go_on}") from error
        if out_of_memory(error):
            raise TrainingError(
                f"out of memory; {go_on} with --set training.on_out_of_memory=halve or "
                "training.checkpoint_activations=true, or start anew with a lower data.batch_size"
            ) from error
        reason = str(error).strip().partition("\n")[0].partition(". ")[0][:150]
        if compiler_failed(error):
            raise TrainingError(
                f"torch.compile failed ({reason}); {go_on} with --set training.compile=false"
            ) from error
        if process is not None:
            raise TrainingError(
                f"{process} lost the others ({reason}); {go_on}, or let torchrun do it by --max-restarts"
            ) from error
        raise
