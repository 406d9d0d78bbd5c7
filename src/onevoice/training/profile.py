"""Profiling: time and trace a few real training steps, and compare them with what the machine can do.

    RUN/profile/profile.json     the figures of the table
    RUN/profile/trace.json.gz    the last steps as a Chrome trace, for https://ui.perfetto.dev or chrome://tracing

Nothing else is written; the changed weights are discarded.
"""

import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from onevoice.errors import ConfigError, TrainingError
from onevoice.files import atomic_write
from onevoice.processes import keep_freed_memory
from onevoice.training.experiment import ConstantConfig, Experiment
from onevoice.training.roofline import Ceilings, Cost, CostCounter, measure_ceilings, synchronize
from onevoice.training.run import Trainer
from onevoice.trials.reading import TrialBatch

WARM_UP, TRACED = 3, 2
"""Steps before the timed ones, which no figure includes, and steps after them, which are traced."""
PRODUCTS = re.compile(
    r"(\b|_)(mm|addmm|bmm|baddbmm)(\b|_)|linear|convolution|gemm|cutlass|nvjet|wgrad|dgrad|fprop|xmma"
)
GROUPED = re.compile("depthwise|grouped")
"""Match the names of matrix products, and of the convolutions among them that are none."""


@dataclass(frozen=True)
class Operator:
    """The time spent in one operator or kernel, without the operators it calls."""

    name: str
    seconds: float
    """Per traced step."""
    calls: float
    """Per traced step."""
    is_product: bool


@dataclass(frozen=True)
class Profile:
    """The measurements; times are in seconds per step."""

    machine: str
    steps: int
    examples: int
    """Of all steps together, as are the next two."""
    audio_seconds: float
    cost: Cost
    step_seconds: Sequence[float]
    """Of each step, including its data."""
    wait_seconds: Sequence[float]
    """Of each step, until its batch was ready."""
    operators: Sequence[Operator]
    """All operators of the traced steps, longest first."""
    peak_bytes: int
    ceilings: Ceilings

    @property
    def seconds(self) -> float:
        """All timed steps together."""
        return sum(self.step_seconds)

    @property
    def copy_seconds(self) -> float:
        """Copies between host and device, per traced step."""
        return sum((each.seconds for each in self.operators if re.search("Memcpy (HtoD|DtoH)", each.name)), 0.0)

    @property
    def outside_products(self) -> float:
        """The share of the operators' time spent outside matrix products."""
        total = sum(operator.seconds for operator in self.operators)
        return sum(operator.seconds for operator in self.operators if not operator.is_product) / total if total else 0.0

    def figures(self) -> dict[str, Any]:
        """Return all numbers as plain values."""
        seconds, cost = self.seconds, self.cost
        return {
            "machine": self.machine,
            "steps": self.steps,
            "step_seconds_median": statistics.median(self.step_seconds),
            "step_seconds_95th_percentile": sorted(self.step_seconds)[int(0.95 * (self.steps - 1) + 0.5)],
            "examples_per_second": self.examples / seconds,
            "audio_seconds_per_second": self.audio_seconds / seconds,
            "data_wait_share": sum(self.wait_seconds) / seconds,
            "copy_seconds": self.copy_seconds,
            "flops_per_second": cost.flops / seconds,
            "operator_bytes_per_second": cost.operator_bytes / seconds,
            "product_bytes_per_second": cost.product_bytes / seconds,
            "times_the_floor": seconds / self.ceilings.floor(cost),
            "outside_products_share": self.outside_products,
            "peak_bytes": self.peak_bytes,
            "cost_per_step": {name: value / self.steps for name, value in asdict(cost).items()},
            "ceilings": asdict(self.ceilings),
            "step_seconds": list(self.step_seconds),
            "wait_seconds": list(self.wait_seconds),
            "operators": [asdict(operator) for operator in self.operators],
        }


def profile_training(
    experiment: Experiment,
    steps: int,
    *,
    load: str | Path | None = None,
    echo: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Profile `steps` training steps of an experiment on its own data, print the table, and write RUN/profile.

    `load` names a checkpoint to take weights from. The learning rate is constant. Raises the errors of training, and
    `ConfigError` for less than one step.
    """
    if steps < 1:
        raise ConfigError(f"--profile {steps}: give the number of steps to time, 1 or more")
    keep_freed_memory()
    trainer = Trainer(replace(experiment, scheduler=ConstantConfig()), echo)
    if load is not None:
        trainer.load(load)
    folder = trainer.folder / "profile"
    try:
        result = _measure(trainer, steps, folder, clock)
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"out of memory on {trainer.device}; lower data.batch_size or the lengths") from error
    atomic_write(folder / "profile.json", json.dumps(result.figures(), indent=2).encode() + b"\n")
    echo(table(result))
    echo(f"profiled {steps} steps; only {folder} was written")
    return result


def table(result: Profile, max_operators: int = 12) -> str:
    """Return the figures as aligned text, with the `max_operators` longest operators."""
    figures, cost, top = result.figures(), result.cost, result.ceilings
    count, median, slow = result.steps, figures["step_seconds_median"], figures["step_seconds_95th_percentile"]
    wait, peak = sum(result.wait_seconds) / count, "allocated" if "cuda" in result.machine else "resident set"
    rows = [
        ("step", f"median {median * 1e3:.1f} ms, 95th percentile {slow * 1e3:.1f} ms"),
        ("throughput", f"{figures['examples_per_second']:.2f} examples/s, "
                       f"{figures['audio_seconds_per_second']:.1f} s of audio per s"),
        ("data wait", f"{wait * 1e3:.2f} ms a step, {figures['data_wait_share']:.1%} of the time"),
        ("copies host ↔ device", f"{result.copy_seconds * 1e3:.2f} ms a step"),
        ("matrix products ¹", _rate(cost.flops, count, result.seconds, top.flops, "FLOP")),
        ("traffic, unfused ²", _rate(cost.operator_bytes, count, result.seconds, top.bytes, "B")),
        ("traffic, fused ³", _rate(cost.product_bytes, count, result.seconds, top.bytes, "B")),
        ("step over its floor ⁴", f"{figures['times_the_floor']:.1f}×"),
        ("outside products", f"{result.outside_products:.1%} of the operators' time"),
        ("peak memory", f"{result.peak_bytes / 2**30:.2f} GiB {peak}"),
    ]  # fmt: skip
    lines = [result.machine, *(f"{name:24}{value}" for name, value in rows)]
    lines += ["", f"{'time a step':>12}  {'share':>6}  {'calls':>7}  operator or kernel, by its own time (* product)"]
    total = sum(operator.seconds for operator in result.operators) or 1.0
    for each in result.operators[:max_operators]:
        name = each.name[:70] + (" *" if each.is_product else "")
        lines.append(f"{each.seconds * 1e3:9.2f} ms  {each.seconds / total:6.1%}  {each.calls:7.1f}  {name}")
    return "\n".join([*lines, "", *FOOTNOTES])


FOOTNOTES = (
    "¹ counted for forward and backward, in the precision of the run; the ceiling is a large product on this machine",
    "² every operator of the eager network reads its inputs and writes its outputs once; fusion and caches move less",
    "³ the operands of the matrix products alone: all between two of them fused; the ceiling is a large copy",
    "⁴ the longer of ¹ and ³ at their ceilings",
)


def _measure(trainer: Trainer, steps: int, folder: Path, clock: Callable[[], float]) -> Profile:
    device, precision = trainer.device, trainer.learner.precision
    batches = _batches(trainer)
    for _ in range(WARM_UP):
        trainer.learner.step(next(batches))
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    shapes: list[dict[str, tuple[int, ...]]] = []
    waits, times = [], []
    for _ in range(steps):
        begin = clock()
        batch = next(batches)
        synchronize(device)
        waits.append(clock() - begin)
        trainer.learner.step(batch)
        synchronize(device)
        times.append(clock() - begin)
        shapes.append({name: tuple(batch[name].shape) for name in ("audio", "ref")})
    peak = _peak_bytes(device)
    operators = _trace(trainer, batches, folder)
    counter = CostCounter(trainer.experiment.model, precision)
    costs = {shape: counter(dict(shape)) for shape in {tuple(sorted(each.items())) for each in shapes}}
    examples, rate = [each["audio"][0] for each in shapes], trainer.experiment.model.sample_rate
    return Profile(
        machine=_describe(trainer, steps, *shapes[0]["audio"]),
        steps=steps,
        examples=sum(examples),
        audio_seconds=sum(each["audio"][0] * each["audio"][1] for each in shapes) / rate,
        cost=sum((costs[tuple(sorted(each.items()))] for each in shapes), Cost()),
        step_seconds=times,
        wait_seconds=waits,
        operators=operators,
        peak_bytes=peak,
        ceilings=measure_ceilings(device, precision),
    )


def _batches(trainer: Trainer) -> Iterator[TrialBatch]:
    """Yield the batches of one epoch after another, as training reads them."""
    epoch = 0
    while True:
        yield from trainer.source.batches(epoch, 0, trainer.steps_per_epoch)
        epoch += 1


def _trace(trainer: Trainer, batches: Iterator[TrialBatch], folder: Path) -> list[Operator]:
    """Trace a few more steps into `folder` and return the time of each operator."""
    on_cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(TRACED):
            trainer.learner.step(next(batches))
        synchronize(trainer.device)
    atomic_write(folder / "trace.json.gz", lambda path: _export(recorded, path), durable=False)
    found: dict[tuple[str, bool], tuple[float, int]] = {}
    for event in recorded.key_averages(group_by_input_shape=True):
        if on_cuda != (event.device_type == DeviceType.CUDA):
            continue  # the time of a GPU is in its kernels, that of a CPU in its operators
        key = (event.key, _is_product(event.key, event.input_shapes))
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        seconds, calls = found.get(key, (0.0, 0))
        found[key] = seconds + own / 1e6, calls + event.count
    operators = [
        Operator(name, seconds / TRACED, calls / TRACED, is_product)
        for (name, is_product), (seconds, calls) in found.items()
    ]
    return sorted(operators, key=lambda operator: -operator.seconds)


def _export(recorded: Any, path: Path) -> None:
    """Write the trace compressed. The profiler compresses only names that end in .gz, unlike the temporary name."""
    compressed = path.with_name(f"{path.name}.json.gz")
    recorded.export_chrome_trace(str(compressed))
    compressed.replace(path)


def _is_product(name: str, shapes: Any) -> bool:
    """Check whether an operator or kernel is a matrix product. A grouped convolution is not one."""
    if not PRODUCTS.search(name) or GROUPED.search(name):
        return False
    sizes = [shape for shape in shapes or () if shape and len(shape) >= 3]
    if "convolution" in name and len(sizes) >= 2:
        inputs, weight = sizes[-2:]
        return bool(inputs[1] == weight[1])
    return True


def _peak_bytes(device: torch.device) -> int:
    """Return the peak memory: allocated by torch on a GPU, the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _describe(trainer: Trainer, steps: int, size: int, samples: int) -> str:
    """Describe the steps and the device."""
    device, precision = trainer.device, str(trainer.learner.precision).removeprefix("torch.")
    cpu = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu if device.type == "cpu" else "1 device"
    seconds = samples / trainer.experiment.model.sample_rate
    return f"{steps} steps of {size} × {seconds:g} s on {device.type} ({name}), {precision}, torch {torch.__version__}"


def _rate(amount: int, steps: int, seconds: float, ceiling: float, unit: str) -> str:
    each, rate = amount / steps / 1e9, amount / seconds
    return (
        f"{each:.4g} G{unit} a step, {rate / 1e9:.4g} G{unit}/s, {rate / ceiling:.1%} of {ceiling / 1e9:.4g} G{unit}/s"
    )
