"""Profiling: counts equal formulas, times add up, and a profile does not change a run."""

import gzip
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, command
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from toy_runs import experiment, write_experiment

from onevoice.extraction.checkpoint import load_checkpoint
from onevoice.models import SpExPlus, SpExPlusConfig
from onevoice.training.batches import TrialSource
from onevoice.training.profile import _is_product, profile_training, table
from onevoice.training.roofline import Ceilings, Cost, CostCounter, _Traffic, measure_ceilings
from onevoice.training.run import train
from onevoice.training.step import Learner


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine with small products."""
    monkeypatch.setattr("onevoice.training.profile.measure_ceilings", partial(measure_ceilings, size=128))


SHORT = {"training__steps_per_epoch": 1}


def quiet(line: str) -> None: ...


# Counts


def products_of(config: SpExPlusConfig, samples: int, ref_samples: int) -> tuple[int, int]:
    """Multiplications of SpEx+ by the paper's equations: those of dense layers forward and backward, and the others.

    A weight meets every frame once forward and twice backward; the encoder's inputs want no gradient.
    """
    frames, ref_frames = (-(-(size - config.windows[0]) // config.hop) + 1 for size in (samples, ref_samples))
    n, o, p, d, k = config.filters, config.channels, config.hidden, config.speaker_dim, config.num_classes
    encoder = 2 * n * sum(config.windows) * (frames + ref_frames)
    temporal = config.stacks * (config.blocks * 2 * o * p * frames + d * p)
    rest = 3 * n * o * frames + 3 * o * n * frames + n * sum(config.windows) * frames
    speaker, length = 3 * n * o * ref_frames, ref_frames
    for inside, outside in ((o, o), (o, p), (p, p)):
        shortcut = inside * outside if inside != outside else 0
        speaker += (inside * outside + outside * outside + shortcut) * length
        length //= 3
    speaker += p * d * length + d * k
    depthwise = config.stacks * config.blocks * config.kernel_size * p * frames
    return encoder + 3 * (temporal + rest + speaker), 3 * depthwise


@pytest.mark.parametrize("config", [TINY, SpExPlusConfig(num_classes=1000)], ids=["tiny", "paper"])
def test_the_operations_of_a_step_follow_the_equations(config: SpExPlusConfig) -> None:
    samples, ref_samples = 4 * config.sample_rate, 3 * config.sample_rate
    cost = CostCounter(config)({"audio": (2, samples), "ref": (2, ref_samples)})
    dense, depthwise = products_of(config, samples, ref_samples)
    assert 4 * dense <= cost.flops <= 4 * (dense + depthwise)  # 2 examples, 2 operations a multiplication


def test_cost_grows_with_the_batch_and_halves_in_half_precision() -> None:
    config = replace(TINY, channels=64, hidden=128, blocks=4)  # blocks cost more than encoders, as in a real network
    full, half = CostCounter(config), CostCounter(config, torch.bfloat16)
    one, two = ({"audio": (size, 8000), "ref": (size, 8000)} for size in (100, 200))
    cost, double, low = full(one), full(two), half(one)
    assert double.flops == 2 * cost.flops == 2 * low.flops
    assert double.operator_bytes == pytest.approx(2 * cost.operator_bytes, rel=0.01)
    assert 0.5 < low.product_bytes / cost.product_bytes < 0.65  # the windows of the encoders overlap in memory
    assert cost.product_bytes < cost.operator_bytes / 3


def test_traffic_is_inputs_and_outputs_and_views_are_free() -> None:
    left, right = torch.randn(3, 5), torch.randn(7, 5)
    with _Traffic() as traffic:
        product = left @ right.t()
        torch.relu_(product)
        product.transpose(0, 1)[1:].expand(2, 6, 3)
    assert traffic.products == 4 * (15 + 35 + 21)
    assert traffic.all == traffic.products + 4 * (21 + 21)
    with _Traffic() as traffic:
        left[:1].expand(30, 5) + torch.empty(30, 5)
    assert traffic.all == 4 * (15 + 150 + 150)  # the repeated row lies in a storage of 15 numbers


def test_the_floor_is_the_slower_of_products_and_their_operands() -> None:
    cost = Cost(flops=100, operator_bytes=10_000, product_bytes=20)
    assert Ceilings(flops=10.0, bytes=5.0).floor(cost) == 10
    assert Ceilings(flops=100.0, bytes=5.0).floor(cost) == 4


def test_a_plain_product_is_not_much_faster_than_the_ceiling() -> None:
    size = 256
    ceilings = max((measure_ceilings(torch.device("cpu"), size=size) for _ in range(3)), key=lambda each: each.flops)
    left, right = torch.randn(2, size, size)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - begin)
    assert 2 * size**3 / sorted(times)[10] < 3 * ceilings.flops
    assert 1e8 < ceilings.bytes < 1e13


def test_depthwise_convolutions_are_no_products() -> None:
    frames = torch.randn(2, 6, 50, requires_grad=True)
    dense, grouped = torch.randn(4, 6, 3, requires_grad=True), torch.randn(6, 1, 3, requires_grad=True)
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for weight, groups in ((dense, 1), (grouped, 6)):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            F.conv1d(frames, weight, groups=groups).relu().sum().backward()
            torch.randn(9, 9) @ torch.randn(9, 9)
        for event in recorded.key_averages(group_by_input_shape=True):
            if "convolution_backward" in event.key and event.input_shapes[0]:
                assert _is_product(event.key, event.input_shapes) == (groups == 1), event
            found[_is_product(event.key, event.input_shapes)].add(event.key)
    assert "aten::mm" in found[True]
    assert {"aten::relu", "aten::sum"} <= found[False] - found[True]
    assert not _is_product("void conv_depthwise2d_backward_kernel", [])
    assert _is_product("sm90_xmma_gemm_bf16bf16_bf16f32", [])
    assert _is_product("triton_tem_fused_mm_3", [])


# Measurements

pytestmark = pytest.mark.usefixtures("quick_ceilings")


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_for_data_is_separate_from_the_step(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, read, step = Clock(), TrialSource.batches, Learner.step

    def slow_batches(self: TrialSource, *span: int) -> Any:
        for batch in read(self, *span):
            clock.now += 3
            yield batch

    def slow_step(self: Learner, batch: Any) -> Any:
        clock.now += 1
        return step(self, batch)

    monkeypatch.setattr(TrialSource, "batches", slow_batches)
    monkeypatch.setattr(Learner, "step", slow_step)
    monkeypatch.setattr("onevoice.training.profile._trace", lambda *_: [])
    result = profile_training(experiment(trials, tmp_path), 5, echo=quiet, clock=clock)
    assert (result.wait_seconds, result.step_seconds) == ([3] * 5, [4] * 5)
    figures = result.figures()
    assert figures["data_wait_share"] == 0.75
    assert figures["examples_per_second"] == 1.0  # 4 examples a step
    assert figures["audio_seconds_per_second"] == 0.5  # of half a second
    assert (figures["step_seconds_median"], figures["step_seconds_95th_percentile"]) == (4, 4)
    assert figures["flops_per_second"] * 20 == pytest.approx(result.cost.flops)
    assert figures["times_the_floor"] == pytest.approx(20 / result.ceilings.floor(result.cost))
    assert "data wait               3000.00 ms a step, 75.0% of the time" in table(result)


def test_a_profile_writes_its_files_and_does_not_change_the_run(trials: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    begin = time.perf_counter()
    result = profile_training(experiment(trials, tmp_path / "one"), 3, echo=lines.append)
    assert 0 < result.seconds < time.perf_counter() - begin
    assert all(wait < whole for wait, whole in zip(result.wait_seconds, result.step_seconds, strict=True))
    assert 0 < result.outside_products < 1
    assert result.peak_bytes > 2**26  # torch alone takes more
    folder = tmp_path / "one" / "toy"
    assert lines[-1] == f"profiled 3 steps; only {folder / 'profile'} was written"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
        "profile", "profile/profile.json", "profile/trace.json.gz",
    ]  # fmt: skip
    with gzip.open(folder / "profile" / "trace.json.gz") as stream:
        names = {event.get("name") for event in json.load(stream)["traceEvents"]}
    assert "aten::convolution" in names or "aten::mm" in names
    assert json.loads((folder / "profile" / "profile.json").read_text())["steps"] == 3
    rows = table(result, max_operators=2).split("by its own time")[1].splitlines()
    longest = sorted(result.operators, key=lambda each: each.seconds)[:-3:-1]
    assert [row.rsplit("  ")[-1].removesuffix(" *") for row in rows[1:3]] == [each.name for each in longest]
    assert rows[3] == ""
    after, fresh = (
        train(experiment(trials, tmp_path / name, training__steps_per_epoch=1), echo=quiet) for name in ("one", "two")
    )
    weights = [load_checkpoint(run / "last.safetensors")[0] for run in (after, fresh)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("steps", [0, -3, "x"])
def test_invalid_numbers_of_steps(
    trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: object
) -> None:
    config = write_experiment(tmp_path / "toy.json", trials, **SHORT)
    done = command(capsys, "train", "--c", config, "--profile", steps)
    assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert "--profile" in done.err
    done = command(capsys, "train", "--c", config, "--profile", "2", "--minutes", "3")
    assert (done.status, done.err) == (
        2, "onevoice: error: --profile and --minutes exclude each other: a profile ends after its steps\n",
    )  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_a_trained_run_can_be_profiled(
    trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onevoice.training.profile._trace", lambda *_: [])
    config = write_experiment(tmp_path / "toy.json", trials, **SHORT)
    command(capsys, "train", "--c", config)
    last = tmp_path / "runs" / "toy" / "last.safetensors"
    before = last.read_bytes()
    done = command(capsys, "train", "--r", last, "--profile", "1")
    assert done.status == 0, done.err
    assert "profiled 1 steps; only " in done.out
    assert last.read_bytes() == before


def test_counts_equal_those_of_a_real_network() -> None:
    """The network without data sees the same shapes as a real one."""
    model = SpExPlus(TINY).train()
    shape = {"audio": (2, 4000), "ref": (2, 3000)}
    with _Traffic() as traffic:
        prediction = model({name: torch.randn(size) for name, size in shape.items()})
        outputs = [*prediction["predicted_audio"], prediction["predicted_logits"]]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert traffic.products == CostCounter(TINY)(shape).product_bytes
