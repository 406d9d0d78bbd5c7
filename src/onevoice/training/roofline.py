"""The two sides of a roofline: the counted work of a training step, and the measured limits of a machine.

The count runs the network forward and backward on tensors without data (`FakeTensorMode`), so it takes no memory, needs
no accelerator, and depends only on the model, the shapes of a batch, and the precision.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from onevoice.models import Batch, ModelConfig, build
from onevoice.models.layers import pointwise

aten = torch.ops.aten
NOT_MOVED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view, aten._reshape_alias}


@dataclass(frozen=True)
class Cost:
    """The work of the forward and backward pass of the network over one batch."""

    flops: int = 0
    """Floating-point operations of matrix products and convolutions; an addition and a multiplication are two."""
    operator_bytes: int = 0
    """Memory traffic if every operator of the eager network reads its inputs and writes its outputs once."""
    product_bytes: int = 0
    """The share of the matrix products in that traffic; it remains if everything between them is fused into them."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.operator_bytes + other.operator_bytes,
            self.product_bytes + other.product_bytes,
        )


class CostCounter:
    """Counts the work of one training step of a network."""

    def __init__(self, config: ModelConfig, precision: torch.dtype = torch.float32) -> None:
        self.fake, self.precision = FakeTensorMode(), precision
        with self.fake:
            self.model = build(config).train()

    def __call__(self, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        """Return the cost of a batch whose float tensors (`audio`, `ref`) have these shapes and whose rows are full."""
        traffic, low = _Traffic(), self.precision is not torch.float32
        flops = FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: _convolution_backward})
        with self.fake, flops, traffic:
            batch: Batch = {"audio": torch.empty(shapes["audio"]), "ref": torch.empty(shapes["ref"])}
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                prediction = self.model(batch)
            outputs = [*prediction["predicted_audio"], prediction["predicted_logits"]]
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        self.model.zero_grad(set_to_none=True)
        return Cost(flops.get_total_flops(), traffic.all, traffic.products)


@dataclass(frozen=True)
class Ceilings:
    """The measured peak rates of a machine."""

    flops: float
    """Per second, in a large matrix product of the run's precision."""
    bytes: float
    """Per second read and written, in a large copy."""

    def floor(self, cost: Cost) -> float:
        """Return the minimum seconds for `cost`: for the products, or for moving their operands if that is slower."""
        return max(cost.flops / self.flops, cost.product_bytes / self.bytes)


def measure_ceilings(
    device: torch.device, precision: torch.dtype = torch.float32, *, size: int | None = None, repeats: int = 5
) -> Ceilings:
    """Measure the ceilings of a device: the best of `repeats` products of `size`³ and copies of 16·`size`² floats.

    On the CPU, `torch.mm` and our `pointwise` are both tried: torch runs one with MKL or BLAS and the other with
    oneDNN, and which is faster depends on the processor. By default `size` is 2048 there, otherwise 8192.
    """
    size = size or (2048 if device.type == "cpu" else 8192)
    left, right = torch.randn(2, size, size, device=device).to(precision)
    products: list[Callable[[], Any]] = [lambda: left @ right]
    if device.type == "cpu":
        products.append(lambda: pointwise(left[None], right))
    source = torch.randn(16 * size**2 if device.type == "cpu" else 4 * size**2, device=device)
    copy = torch.empty_like(source)
    with torch.no_grad():
        product = min(_seconds(run, device, repeats) for run in products)
        moved = _seconds(lambda: copy.copy_(source), device, repeats)
    return Ceilings(2 * size**3 / product, 2 * source.numel() * source.element_size() / moved)


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    best = math.inf
    for _ in range(repeats + 1):  # the first one warms up
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes of the inputs and outputs of every operator that is not a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and packet not in NOT_MOVED:
            moved = _bytes(args) + _bytes((kwargs or {}).values()) + _bytes([result])
            self.all += moved
            self.products += moved if packet in flop_registry and not _is_depthwise(packet, args) else 0
        return result


def _bytes(values: Any) -> int:
    """Sum the bytes of all tensors; a tensor that repeats its storage counts as its storage."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        elif isinstance(value, list | tuple):
            total += _bytes(value)
    return total


def _is_depthwise(packet: Any, args: Any) -> bool:
    groups = {aten.convolution: 8, aten.convolution_backward: 9}.get(packet)
    return groups is not None and bool(args[groups] > 1)


def _convolution_backward(
    grad: tuple[int, ...], inputs: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **_: Any
) -> int:
    """Count the gradients of input and weight, each as much work as the forward pass.

    torch's own formula leaves out the groups, and so counts a depthwise convolution as a dense one.
    """
    is_transposed, (input_wanted, weight_wanted, _bias) = rest[4], rest[7]
    once = 2 * math.prod(inputs if is_transposed else grad) * math.prod(weight[1:])
    return once * (int(input_wanted) + int(weight_wanted))
