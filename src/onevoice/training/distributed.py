"""Training in several processes that torchrun starts: what they share, and which of them writes.

Every process holds the whole network and learns from its share of each batch. DistributedDataParallel averages the
gradients, and batch normalization uses the statistics of the whole batch. So a step depends on the number of
processes only by the order of sums.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from onevoice.errors import ConfigError
from onevoice.models import Network
from onevoice.models.layers import ValidBatchNorm

Item = TypeVar("Item")


@dataclass(frozen=True)
class Group:
    """The processes of a training run, as seen from one of them. By default a process is alone.

    All processes must call each method at the same place, since they wait for each other there.
    """

    rank: int = 0
    size: int = 1
    restarts: int = 0
    """How often torchrun has restarted the group after a failure."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """The number of this process, and the number of processes."""
        return self.rank, self.size

    def all(self, flag: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return, on the device, whether the flag is set in every process. The host does not wait for it."""
        if self.size == 1:
            return flag
        votes = flag.to(torch.float32)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return votes > 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in some process. The device does not wait for it."""
        if self.size == 1:
            return flag
        votes = torch.tensor(float(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def mean(self, values: Float[Tensor, " values"]) -> Float[Tensor, " values"]:
        """Return the mean over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values / self.size

    def gather(self, items: list[Item]) -> list[Item]:
        """Return the items of all processes, in the order of their ranks."""
        if self.size == 1:
            return items
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]


SINGLE_PROCESS = Group()


def group_from_environment(environment: Mapping[str, str]) -> Group:
    """Return the place in the group that torchrun's variables give this process."""
    rank, size, restarts = (
        int(environment.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "0"))
    )
    return Group(rank, size, restarts)


@contextlib.contextmanager
def open_group(device: str) -> Iterator[Group]:
    """Join the group that torchrun started this process for, and leave it at the end.

    With CUDA each process takes the GPU of its LOCAL_RANK. Raises `ConfigError` if there are too few GPUs.
    """
    group = group_from_environment(os.environ)
    if group.size == 1:
        yield group
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            raise ConfigError(f"torchrun: process {number} has no GPU, there are {count}; use --nproc-per-node {count}")
        torch.cuda.set_device(number)
    store, rank, size = next(rendezvous("env://"))
    # A group that failed may have left keys in the store.
    attempt = dist.PrefixStore(f"attempt {group.restarts}", store)  # type: ignore[attr-defined]
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=attempt, rank=rank, world_size=size)
    yield group
    dist.destroy_process_group()  # skipped after an error: other processes may be gone, and waiting would never end


def distribute(model: Network, group: Group) -> nn.Module:
    """Return what to call for a prediction whose gradient is averaged over the group; for one process, `model`."""
    if group.size == 1:
        return model
    for module in model.modules():
        if isinstance(module, ValidBatchNorm):
            module.sum_over_processes = sum_over_processes
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def sync_gradients(network: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context for a backward pass: average gradients over the group only if wanted."""
    if not wanted and isinstance(network, DistributedDataParallel):
        context: contextlib.AbstractContextManager[None] = network.no_sync()
        return context
    return contextlib.nullcontext()


class SumOverProcesses(torch.autograd.Function):
    """A sum over the processes whose gradient flows back to each of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the sum."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the sum of all processes' gradients by this process's values."""
        return SumOverProcesses.forward(ctx, gradients[0])


def sum_over_processes(values: Float[Tensor, " values"]) -> Float[Tensor, " values"]:
    """Return the sum over the processes, through which gradients flow."""
    total: Tensor = SumOverProcesses.apply(values)  # type: ignore[no-untyped-call]
    return total
