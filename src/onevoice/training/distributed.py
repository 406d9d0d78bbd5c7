"""Many processes that train one network, started by torchrun: what they share, and who does what.

Every process holds the whole network and learns from its share of each batch; gradients are averaged by
DistributedDataParallel, statistics of batch normalisation are those of the whole batch. So a step does not depend
on the number of processes but for the order of sums.
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
from onevoice.models.fused import Frames
from onevoice.models.layers import Mask
from onevoice.models.speaker import ValidBatchNorm

Item = TypeVar("Item")


@dataclass(frozen=True)
class Group:
    """The processes of a training, seen from one of them; a process by itself is a group of one.

    Each method is called by all of them at the same place, as all wait for each other there.
    """

    rank: int = 0
    size: int = 1
    restarts: int = 0
    """How often torchrun has started the group again after a failure."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """The number of this process, and how many there are."""
        return self.rank, self.size

    def all(self, flag: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return, on the device, whether the flag is set in every process; the host does not wait for it."""
        if self.size == 1:
            return flag
        votes = flag.to(torch.float32)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return votes > 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in some process; the device does not wait for it."""
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
        """Return the items of all processes, in the order of their numbers."""
        if self.size == 1:
            return items
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]


ALONE = Group()


def group_of(environment: Mapping[str, str]) -> Group:
    """Return the place in a group that torchrun's variables give this process."""
    rank, size, restarts = (
        int(environment.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "0"))
    )
    return Group(rank, size, restarts)


@contextlib.contextmanager
def open_group(device: str) -> Iterator[Group]:
    """Join the group that torchrun has started this process for, and leave it after.

    With CUDA each process takes the GPU of its LOCAL_RANK; raises `ConfigError` when there is none left for it.
    """
    group = group_of(os.environ)
    if group.size == 1:
        yield group
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= there:
            raise ConfigError(f"torchrun: process {number} has no GPU, there are {there}; use --nproc-per-node {there}")
        torch.cuda.set_device(number)
    store, rank, size = next(rendezvous("env://"))
    # What a lost group left in the store is not ours.
    attempt = dist.PrefixStore(f"attempt {group.restarts}", store)  # type: ignore[attr-defined]
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=attempt, rank=rank, world_size=size)
    yield group
    dist.destroy_process_group()  # after a failure others may be gone, and waiting for them would be for ever


def distribute(model: Network, group: Group) -> nn.Module:
    """Return what to call for a prediction whose gradient is to be averaged over the group; `model` alone for one."""
    if group.size == 1:
        return model
    for module in model.modules():
        if isinstance(module, ValidBatchNorm):
            module.__class__ = SharedBatchNorm
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def unsynchronised(network: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which gradients only add up in this process, where that is wanted."""
    if wanted and isinstance(network, DistributedDataParallel):
        context: contextlib.AbstractContextManager[None] = network.no_sync()
        return context
    return contextlib.nullcontext()


class SharedBatchNorm(ValidBatchNorm):
    """Batch normalisation by the statistics of the valid frames of all processes."""

    def moments(self, frames: Frames, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance of each channel over the valid frames of all processes, and their number."""
        valid = frames.new_ones(()) if mask is None else mask
        own = frames.new_tensor([frames.shape[0] * frames.shape[1]]) if mask is None else mask.sum()[None]
        sums = _sum_over_group(torch.cat([(frames * valid).sum((0, 1)), own]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        variance = _sum_over_group(((frames - mean) * valid).square().sum((0, 1))) / count
        return mean, variance, count


class SumOverGroup(torch.autograd.Function):
    """The sum over the processes, through which gradients flow back to each."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the sum."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return what all processes want of this one's values."""
        return SumOverGroup.forward(ctx, gradients[0])


def _sum_over_group(values: Float[Tensor, " values"]) -> Float[Tensor, " values"]:
    total: Tensor = SumOverGroup.apply(values)  # type: ignore[no-untyped-call]
    return total
