"""One training step: parts, running average, skipped steps, memory, schedule."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_runs import equal, experiment, quiet, weights

from onevoice.errors import CheckpointError, ConfigError, TrainingError
from onevoice.extraction.checkpoint import load_checkpoint
from onevoice.extraction.pickled import load_pickled
from onevoice.models import Network, to_network
from onevoice.training import step as step_module
from onevoice.training.experiment import OptimizerConfig, StableConfig
from onevoice.training.optim import WarmupStableDecay, build_optimizer
from onevoice.training.run import Trainer, train
from onevoice.training.state import RunningAverage
from onevoice.training.step import is_out_of_memory, split
from onevoice.training.tracking import read_rows


@pytest.fixture
def trainer(trials: Path, tmp_path: Path) -> Trainer:
    return Trainer(experiment(trials, tmp_path), quiet)


def batches(trainer: Trainer, count: int) -> list[Any]:
    return list(trainer.source.batches(0, 0, count))


def new_trainer(trials: Path, runs: Path, **changes: Any) -> Trainer:
    """A trainer that does not clip, so that parameters keep the gradient of a step."""
    return Trainer(experiment(trials, runs, training__clip_gradient_norm=1e9, **changes), quiet)


def gradients(model: Network) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-5 as one vector, and each tensor to 1e-4, except for rounding of sums that are nearly zero."""
    assert got.keys() == expected.keys()
    distance = torch.stack([(got[name] - value).norm() for name, value in expected.items()])
    size = torch.stack([value.norm() for value in expected.values()])
    assert distance.norm() <= 1e-5 * size.norm()
    assert (
        distance <= 1e-4 * size + 1e-7 * size.norm()
    ).all()  # the gradients of the decoders' biases are only rounding


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of weights, statistics, optimizer state and average."""
    found = {**trainer.state.model.state_dict()}
    for number, state in trainer.state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    if trainer.state.average is not None:
        found |= {f"average.{name}": value for name, value in trainer.state.average.model.state_dict().items()}
        found["average.updates"] = trainer.state.average.updates
    return {name: value.clone() for name, value in found.items()}


# Parts ----------------------------------------------------------------------------------------------------------


def test_parts_in_order_are_the_batch(trainer: Trainer) -> None:
    batch = batches(trainer, 1)[0]
    for parts in (1, 2, 3, 4, 9):
        pieces = split(batch, parts)
        assert len(pieces) == {3: 2, 9: 4}.get(parts, parts)
        assert [name for piece in pieces for name in piece["name"]] == batch["name"]
        assert torch.equal(torch.cat([piece["target"] for piece in pieces]), batch["target"])


@pytest.mark.parametrize("parts", [2, 4])
def test_the_gradient_in_parts_equals_that_of_the_batch(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """Exact if items do not influence each other, as in evaluation mode, whose statistics are fixed."""
    whole, parted = (new_trainer(trials, tmp_path, training__accumulate=count) for count in (1, parts))
    batch, terms = batches(whole, 1)[0], []
    for trainer in (whole, parted):
        model = trainer.state.model.eval()
        monkeypatch.setattr(model, "train", lambda: None)
        terms.append(trainer.learner.step(batch))
    assert_close(gradients(parted.state.model), gradients(whole.state.model))
    for got, expected in zip(terms[1], terms[0], strict=True):
        assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_the_gradient_in_training_is_the_mean_over_the_parts(trials: Path, tmp_path: Path) -> None:
    trainer = new_trainer(trials, tmp_path, training__accumulate=2)
    batch = batches(trainer, 1)[0]
    trainer.state.model.train()
    means: dict[str, torch.Tensor] = {}
    for part in split(batch, 2):
        inputs = to_network(part, trainer.device)
        prediction = trainer.state.model(inputs)
        loss = trainer.experiment.loss(
            prediction, part["target"], part["speaker"], inputs.get("audio_length"), inputs["audio"]
        ).total
        names, values = zip(*trainer.state.model.named_parameters(), strict=True)
        for name, value in zip(names, torch.autograd.grad(loss, values), strict=True):
            means[name] = means.get(name, 0) + value / 2
    trainer.learner.step(batch)
    assert_close(gradients(trainer.state.model), means)


def test_a_batch_that_does_not_split_is_refused(trials: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size 4 cannot be split into training\.accumulate 3"):
        experiment(trials, tmp_path, training__accumulate=3)


# Averages -------------------------------------------------------------------------------------------------------


def test_the_average_follows_its_formula(trials: Path, tmp_path: Path) -> None:
    trainer = Trainer(experiment(trials, tmp_path, training__ema=0.3), quiet)
    expected = {name: value.double() for name, value in trainer.state.model.state_dict().items()}
    for t, batch in enumerate(batches(trainer, 6)):
        trainer.learner.step(batch)
        decay = min(0.3, (1 + t) / (10 + t))
        for name, value in trainer.state.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    assert trainer.state.average is not None
    for name, value in trainer.state.average.model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-6), name
        else:
            assert torch.equal(value, trainer.state.model.state_dict()[name])
    assert not equal(trainer.state.average.model.state_dict(), trainer.state.model.state_dict())


def test_the_average_is_validated_and_saved(trials: Path, tmp_path: Path) -> None:
    trainer = Trainer(experiment(trials, tmp_path, training__ema=0.9, training__epochs=1), quiet)
    folder = trainer.run()
    assert trainer.state.average is not None
    average = trainer.state.average.model.state_dict()
    for name in ("best", "last"):
        state, card = load_checkpoint(folder / f"{name}.safetensors")
        assert equal(state, average)
        assert card.facts["ema"] == 0.9
    saved = load_pickled(folder / "last.resume.pt")
    assert equal(saved["model"], trainer.state.model.state_dict())
    assert equal(saved["average"]["model"], average)
    score = trainer.validate()
    trainer.state.model.load_state_dict(average)
    trainer.state.average = None
    assert trainer.validate() == score


def test_the_average_starts_at_loaded_weights(trials: Path, tmp_path: Path) -> None:
    folder = train(experiment(trials, tmp_path, training__epochs=1), echo=quiet)
    trainer = Trainer(experiment(trials, tmp_path, name="second", training__ema=0.9), quiet)
    trainer.load(folder / "best.safetensors")
    assert equal(trainer.state.weights.state_dict(), load_checkpoint(folder / "best.safetensors")[0])


# Skipped steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["audio", "target"])
def test_a_nonfinite_part_changes_nothing(trials: Path, tmp_path: Path, bad: str) -> None:
    config = experiment(trials, tmp_path, training__ema=0.9, training__accumulate=2, training__max_nonfinite_steps=3)
    trainer = Trainer(config, quiet)
    batch, other = batches(trainer, 2)
    trainer.learner.step(batch)
    before = snapshot(trainer)
    values = other[bad].clone()
    values[-1] = math.nan  # in the second part only
    trainer.learner.step({**other, bad: values})
    assert equal(snapshot(trainer), before)
    assert (trainer.state.progress.skipped_steps, trainer.state.progress.skipped_in_a_row) == (1, 1)
    trainer.learner.step(other)
    after = snapshot(trainer)
    assert not any(
        torch.equal(after[f"average.{name}"], before[f"average.{name}"]) for name in gradients(trainer.state.model)
    )
    assert (trainer.state.progress.skipped_steps, trainer.state.progress.skipped_in_a_row) == (1, 0)


def test_bad_steps_are_skipped_after_resuming_an_older_file(trials: Path, tmp_path: Path) -> None:
    """A file of an earlier version: the optimizer was not fused, and newer fields are missing."""
    config = experiment(trials, tmp_path)
    first = Trainer(config, quiet)
    first.run(deadline=-math.inf)
    path = first.last.with_suffix(".resume.pt")
    state = load_pickled(path)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    for name in ("accumulate", "validated_step"):
        del state["progress"][name]
    saved = json.loads(state["experiment"])
    for name in ("accumulate", "ema"):
        del saved["training"][name]
    del state["average"]
    torch.save({**state, "experiment": json.dumps(saved)}, path)
    second = Trainer(config, quiet)
    second.resume(first.last)
    before = snapshot(second)
    batch = batches(second, 1)[0]
    second.learner.step({**batch, "audio": batch["audio"] * math.nan})
    assert equal(snapshot(second), before)


def test_half_precision_skips_and_lowers_its_scale(trials: Path, tmp_path: Path) -> None:
    trainer = Trainer(experiment(trials, tmp_path, training__precision="float16"), quiet)
    batch, before, scale = batches(trainer, 1)[0], snapshot(trainer), trainer.state.scaler.get_scale()
    trainer.learner.step({**batch, "audio": batch["audio"] * math.nan})
    after = snapshot(trainer)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert trainer.state.scaler.get_scale() == scale / 2
    for _ in range(12):  # until the scale is low enough
        trainer.learner.step(batch)
    assert not torch.equal(snapshot(trainer)["masks.0.weight"], before["masks.0.weight"])


def test_too_many_skipped_steps_are_found_at_the_log_line(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which reads the counts only there: a finite step after the bad ones does not hide them."""
    trainer = Trainer(experiment(trials, tmp_path, training__max_nonfinite_steps=3), quiet)
    watch = trainer.learner.check_skipped_steps
    monkeypatch.setattr(trainer.learner, "check_skipped_steps", lambda: None)
    batch = batches(trainer, 1)[0]
    for _ in range(3):
        trainer.learner.step({**batch, "audio": batch["audio"] * math.nan})
    trainer.learner.step(batch)
    with pytest.raises(TrainingError, match="no finite loss for 3 steps"):
        watch()
    watch()
    assert (trainer.state.progress.skipped_steps, trainer.state.progress.skipped_in_a_row) == (3, 0)


class HostReads(TorchDispatchMode):
    """Collects the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_host_does_not_wait_for_the_device(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"training__ema": 0.9, "training__accumulate": 2, "training__log_every_steps": 2}
    trainer = Trainer(experiment(trials, tmp_path, **changes), quiet)
    monkeypatch.setattr(
        trainer.learner, "check_skipped_steps", lambda: None
    )  # which only the CPU calls after each step
    batch = batches(trainer, 1)[0]
    full = {name: batch[name] for name in ("audio", "ref", "target", "speaker", "name")}
    with HostReads() as reads:
        trainer.learner.step(full)
        assert reads.found == []
        bool(trainer.state.skips[0] > 0)
        assert reads.found  # a read is found


# Memory ---------------------------------------------------------------------------------------------------------

SHORT: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: MemoryError(),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
]


def fails_above(trainer: Trainer, rows: int, error: Callable[[], Exception]) -> None:
    """Let the network run out of memory for more than `rows` items, after its statistics have moved."""
    forward = trainer.state.model.forward

    def short(batch: Any) -> Any:
        prediction = forward(batch)
        if len(batch["audio"]) > rows:
            raise error()
        return prediction

    trainer.state.model.forward = short  # type: ignore[method-assign]


def test_errors_that_mean_out_of_memory() -> None:
    assert all(is_out_of_memory(error()) for error in SHORT)
    assert not any(
        is_out_of_memory(error) for error in (RuntimeError("size mismatch"), ValueError("memory"), OSError())
    )


def test_out_of_memory_halves_the_parts(trials: Path, tmp_path: Path) -> None:
    """The result equals that of small parts from the start, bit for bit, also after resuming."""
    error = SHORT[0]
    changes = {"training__ema": 0.9, "training__save_every_steps": 2, "training__epochs": 1}
    whole = Trainer(experiment(trials, tmp_path, name="whole", training__accumulate=4, **changes), quiet)
    whole.run()
    lines: list[str] = []
    config = experiment(trials, tmp_path, name="halved", training__on_out_of_memory="halve", **changes)
    halved = Trainer(config, lines.append)
    fails_above(halved, 1, error)
    halved.run(deadline=-math.inf)
    assert lines[:2] == [
        f"out of memory at step 0: from here on each batch is taken in {parts} parts" for parts in (2, 4)
    ]
    resumed = Trainer(config, lines.append)
    fails_above(resumed, 1, error)
    resumed.resume(halved.last)
    resumed.run()
    assert sum("out of memory" in line for line in lines) == 2
    assert equal(weights(whole.folder), weights(resumed.folder))


def test_out_of_memory_stops_with_advice(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*anything: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("onevoice.training.step.to_device", short)
    with pytest.raises(TrainingError, match=r"^out of memory; start again with --set training\.on_out_of_memory=halve"):
        train(experiment(trials, tmp_path), echo=quiet)
    halving = experiment(trials, tmp_path, name="one", training__on_out_of_memory="halve")
    with pytest.raises(TrainingError, match=r"^out of memory"):  # not even one item fits
        train(halving, echo=quiet)


def saved_bytes(trainer: Trainer, batch: Any) -> int:
    """Memory in bytes of all tensors kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.learner.step(batch)
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointed_activations(trials: Path, tmp_path: Path, precision: str) -> None:
    changes: dict[str, Any] = {"training__precision": precision, "model__stacks": 6, "model__hidden": 32}
    plain = new_trainer(trials, tmp_path, **changes)
    thrifty = new_trainer(trials, tmp_path, training__checkpoint_activations=True, **changes)
    assert equal(plain.state.model.state_dict(), thrifty.state.model.state_dict())
    batch = batches(plain, 1)[0]
    saved = {trainer: saved_bytes(trainer, batch) for trainer in (plain, thrifty)}
    expected, got = gradients(plain.state.model), gradients(thrifty.state.model)
    if precision == "float32":
        assert equal(expected, got)
    else:
        assert all((got[name] - value).norm() <= 1e-2 * value.norm() + 1e-6 for name, value in expected.items())
    assert saved[thrifty] < 0.6 * saved[plain]


def test_a_checkpointed_network_can_be_copied(trainer: Trainer) -> None:
    """A copy computes with its own weights, not with those of the original."""
    trainer.state.model.recompute = True
    copied = copy.deepcopy(trainer.state.model)
    with torch.no_grad():
        for parameter in trainer.state.model.parameters():
            parameter.zero_()
    batch = to_network(batches(trainer, 1)[0], trainer.device)
    assert copied(batch)["predicted_audio"][0].abs().max() > 0
    assert RunningAverage(copied, 0.9).model(batch)["predicted_audio"][0].abs().max() > 0


# Schedules ------------------------------------------------------------------------------------------------------


def rates(model: Network, steps: int, **config: Any) -> list[float]:
    """The rate of each step as a fraction of the stable rate."""
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=2.0))
    scheduler = WarmupStableDecay(optimizer, StableConfig(**config), steps)
    found = []
    for _ in range(scheduler.last_step):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_stable_decay(trainer: Trainer) -> None:
    warm, stable = [1 / 5, 2 / 5, 3 / 5, 4 / 5], [1.0] * 11
    line = rates(trainer.state.model, 20, warmup_steps=4, decay_steps=5, decay_shape="linear", decay_divisor=10.0)
    assert line == pytest.approx([*warm, *stable, *(1 - 0.9 * k / 5 for k in range(1, 6))])
    root = rates(trainer.state.model, 20, warmup_steps=4, decay_steps=5, decay_divisor=10.0)
    assert root == pytest.approx([*warm, *stable, *(1 - 0.9 * math.sqrt(k / 5) for k in range(1, 6))])
    assert rates(trainer.state.model, 20, warmup_steps=4) == pytest.approx([*warm, *[1.0] * 16])
    early = rates(trainer.state.model, 20, warmup_steps=0, decay_steps=2, decay_from_step=3, decay_divisor=2.0)
    assert early == pytest.approx([1, 1, 1, 1 - 0.5 * math.sqrt(0.5), 0.5])
    with pytest.raises(ValueError, match="decay_from_step needs decay_steps"):
        StableConfig(decay_from_step=3)


def stable(trials: Path, runs: Path, **changes: Any) -> Any:
    """A run at a stable rate with 6 steps per epoch."""
    changes = {"scheduler": {"name": "wsd", "warmup_steps": 2}, "optimizer__learning_rate": 0.002, **changes}
    return experiment(trials, runs, **changes)


def test_a_decay_can_be_added_at_any_step(trials: Path, tmp_path: Path) -> None:
    """Eight steps at the stable rate, then a decay of six steps that is interrupted and resumed."""
    decaying = {"name": "wsd", "warmup_steps": 2, "decay_steps": 6, "decay_divisor": 4.0}
    known = {**decaying, "decay_from_step": 8}
    plain = train(stable(trials, tmp_path, name="plain", training__epochs=9, scheduler=known), echo=quiet)
    first = Trainer(stable(trials, tmp_path, name="late", training__epochs=9), quiet)
    for _ in range(8):
        first.run(deadline=-math.inf)
    assert first.state.progress.step == 8
    for _ in range(2):
        late = stable(trials, tmp_path, name="late", training__epochs=9, scheduler=decaying)
        second = Trainer(late, quiet)
        second.resume(first.last)
        second.run(deadline=-math.inf)
    assert second.state.progress.step == 10
    last = train(late, resume=first.last, echo=quiet)
    rows = [row for row in read_rows(last / "metrics.jsonl") if "train/learning_rate" in row]
    assert [row["step"] for row in rows] == list(range(1, 15))
    fallen = [1 - 0.75 * math.sqrt(k / 6) for k in range(1, 7)]
    assert [row["train/learning_rate"] / 0.002 for row in rows] == pytest.approx([1 / 3, 2 / 3, *[1] * 6, *fallen])
    assert read_rows(last / "metrics.jsonl")[-1]["step"] == 14  # validated in the middle of an epoch
    assert "validation/si_sdri_db" in read_rows(last / "metrics.jsonl")[-1]
    assert equal(weights(last), weights(plain))


def test_a_decay_can_be_removed_and_training_extended(trials: Path, tmp_path: Path) -> None:
    decaying = {"name": "wsd", "warmup_steps": 2, "decay_steps": 3}
    folder = train(stable(trials, tmp_path, training__epochs=1, scheduler=decaying), echo=quiet)
    on = stable(trials, tmp_path, training__epochs=2)
    train(on, resume=folder / "last.safetensors", echo=quiet)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "train/learning_rate" in row]
    assert [row["train/learning_rate"] for row in rows][6:] == [0.002] * 6
    other = stable(trials, tmp_path, training__epochs=2, scheduler={"name": "wsd", "warmup_steps": 3})
    with pytest.raises(CheckpointError, match=r"other settings \(scheduler\.warmup_steps\)"):
        train(other, resume=folder / "last.safetensors")


def test_a_plateau_halves_the_rate_as_in_the_paper(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third validation without a gain halves the rate."""
    scores = iter([1.0, 0.5, 0.5, 0.5, 0.5, 2.0])
    monkeypatch.setattr(Trainer, "validate", lambda self: {"si_sdr_db": 0.0, "si_sdri_db": next(scores)})
    config = experiment(
        trials, tmp_path, scheduler={"name": "plateau"}, training__epochs=6, training__steps_per_epoch=1
    )  # fmt: skip
    rows = read_rows(train(config, echo=quiet) / "metrics.jsonl")
    assert [row["train/learning_rate"] for row in rows if "train/loss" in row] == [*[1e-3] * 4, 5e-4, 5e-4]


def test_the_one_cycle_follows_its_formula(trials: Path, tmp_path: Path) -> None:
    scheduler = {"name": "onecycle", "max_learning_rate": 0.01, "rising_part": 0.25, "start_divisor": 10.0}
    rows = read_rows(train(experiment(trials, tmp_path, scheduler=scheduler), echo=quiet) / "metrics.jsonl")
    found = [row["train/learning_rate"] for row in rows if "train/loss" in row]

    def cosine(start: float, end: float, part: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

    steps, top = 12, 0.25 * 13 - 1  # torch's cycle of 13 points, of which 12 are taken
    expected = [
        cosine(1e-3, 1e-2, k / top) if k <= top else cosine(1e-2, 1e-3 / 1e4, (k - top) / (12 - top))
        for k in range(steps)
    ]
    assert found == pytest.approx(expected, rel=1e-6)


def test_weights_of_earlier_epochs_are_kept(trials: Path, tmp_path: Path) -> None:
    config = experiment(
        trials, tmp_path, training__epochs=4, training__keep_every_epochs=2, training__steps_per_epoch=1
    )
    folder = train(config, echo=quiet)
    kept = sorted(path.name for path in folder.glob("epoch-*"))
    assert kept == ["epoch-0002.safetensors", "epoch-0004.safetensors"]
    assert load_checkpoint(folder / kept[0])[1].facts["step"] == 2
    assert equal(load_checkpoint(folder / kept[1])[0], weights(folder))


@pytest.mark.parametrize(
    ("has", "name", "used"),
    [(True, "auto", torch.bfloat16), (False, "auto", torch.float32), (False, "bfloat16", torch.bfloat16)],
)
def test_the_precision_of_a_processor(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool, name: str, used: torch.dtype
) -> None:
    """`auto` never takes a type that the processor emulates; whoever asks for one is told that it is slow."""
    monkeypatch.setattr(step_module, "has_bfloat16", lambda device: has)
    said: list[str] = []
    trainer = Trainer(experiment(trials, tmp_path, training__precision=name), said.append)
    assert trainer.learner.precision is used
    assert any("emulated" in line for line in said) == (name == "bfloat16")
