"""Several processes: the same steps and files as one process, and a restart if one is lost."""

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_runs import equal, experiment, quiet, run_command, run_group, start, weights, write_experiment

from onevoice.config import load_config
from onevoice.errors import ConfigError
from onevoice.extraction.pickled import load_pickled
from onevoice.training.distributed import Group, group_from_environment, open_group
from onevoice.training.experiment import Experiment
from onevoice.training.run import Trainer, train
from onevoice.training.tracking import read_rows
from onevoice.trials.reading import share_of_batch

CHANGES: dict[str, Any] = {
    "scheduler": {"name": "constant"},
    "training__epochs": 2,
    "training__ema": 0.5,
    "training__accumulate": 2,
    "data__batch_size": 8,
    "data__validation__limit": 5,
}
"""Two processes share each batch in two parts each; mixtures and enrollments differ in length."""


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> bool:
    """Equal except for the biases of the decoders: the loss removes means, so these gradients are only rounding."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].double(), other[name].double(), rtol=0, atol=tolerance)
        for name in one
        if not re.fullmatch(r"decoders\.\d\.bias", name)
    )


@pytest.fixture(scope="module")
def undisturbed(trials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    config = write_experiment(folder / "two.json", trials, name="two", **CHANGES)
    output = start(folder / "output", run_group, run_command, "train", "--c", config).finish()
    assert output.count("validation SI-SDR") == 2  # printed by one of them
    assert output.count("run folder:") == 1
    assert "Warning" not in output
    return folder / "runs" / "two"


def assert_same_log(one: Path, other: Path, tolerance: float) -> None:
    logs = [read_rows(folder / "metrics.jsonl") for folder in (one, other)]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for left, right in zip(*logs, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"wall_time", "train/steps_per_second"}:
            most = (
                10 * tolerance if name == "train/gradient_norm" else tolerance
            )  # the network amplifies rounding differences
            assert right[name] == pytest.approx(left[name], rel=most, abs=10 * tolerance), name


def test_two_processes_take_the_steps_of_one(trials: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One process splits its batches into the same parts as the two together, so the batch statistics are the same."""
    one = train(experiment(trials, tmp_path, name="one", **CHANGES), echo=quiet)
    assert_same_log(one, undisturbed, 1e-5)
    assert close(weights(one), weights(undisturbed), 2e-4)  # of the 6e-3 that six steps of Adam move a weight


def test_another_number_of_processes_resumes_the_run(trials: Path, undisturbed: Path, tmp_path: Path) -> None:
    longer = {**CHANGES, "training__epochs": 3}
    whole = train(experiment(trials, tmp_path, name="whole", **longer), echo=quiet)
    moved = tmp_path / "two"
    moved.mkdir()
    for path in undisturbed.glob("*.*"):
        (moved / path.name).write_bytes(path.read_bytes())
    train(experiment(trials, tmp_path, name="two", **longer), resume=moved / "last.safetensors", echo=quiet)
    losses = [
        [row["train/loss"] for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
        for folder in (whole, moved)
    ]
    assert losses[1][:7] == pytest.approx(losses[0][:7], rel=1e-5)  # the seventh is the first after resuming
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # the network amplifies rounding differences
    assert [row["step"] for row in read_rows(moved / "metrics.jsonl")] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]


def train_as_rank(folder: Path, config: Path) -> None:
    """Train in one process of a group, after leaving its number in a file."""
    (folder / f"{os.environ['RANK']}.{os.environ['TORCHELASTIC_RESTART_COUNT']}").write_text(str(os.getpid()))
    run_command("train", "--c", config)


def run_group_with_restart(folder: Path, config: Path) -> None:
    run_group(train_as_rank, folder, config, restarts=1)


def test_a_lost_process_is_replaced(trials: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL for the second process in the second epoch: the group starts again from the checkpoint by itself."""
    changes = {**CHANGES, "training__save_every_steps": 1}
    config = write_experiment(tmp_path / "two.json", trials, name="two", **changes)
    folder = tmp_path / "runs" / "two"
    child = start(tmp_path / "output", run_group_with_restart, tmp_path, config)
    child.wait_for_lines(folder / "metrics.jsonl", 5)
    os.kill(int((tmp_path / "1.0").read_text()), signal.SIGKILL)
    output = child.finish()
    assert f"resumed {folder}/last.resume.pt" in output
    assert (tmp_path / "1.1").exists()
    assert equal(weights(folder), weights(undisturbed))
    saved = [load_pickled(run / "last.resume.pt")["model"] for run in (folder, undisturbed)]
    assert equal(*saved)


def poison(config: Path, out: Path) -> None:
    """Take a good step, a step that is not finite in the second process, and a good one; record what happened."""
    with open_group("cpu") as group:
        trainer = Trainer(load_config(Experiment, config), quiet, group)
        first, second, third = trainer.source.batches(0, 0, 3)
        trainer.learner.step(first)
        before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
        trainer.learner.step({**second, "audio": second["audio"] * math.nan} if group.rank == 1 else second)
        after = trainer.state.model.state_dict()
        kept = all(value.equal(after[name]) for name, value in before.items())
        skipped = trainer.state.progress.skipped_in_a_row
        finite = trainer.learner.step(third).total.isfinite().item()
        found = [kept, skipped, finite, trainer.state.progress.skipped_steps]
        (out / f"rank{group.rank}.json").write_text(json.dumps(found))
        trainer.learner.leave_group()


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(trials: Path, tmp_path: Path) -> None:
    config = write_experiment(tmp_path / "toy.json", trials, **CHANGES)
    start(tmp_path / "output", run_group, poison, config, tmp_path).finish()
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [True, 1, True, 1]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_shares_of_all_processes_are_the_batch(parts: int) -> None:
    """The number of processes does not change which items form a part."""
    batch = torch.randperm(16).numpy()
    for count in (1, 2, 4):
        shares = [share_of_batch(batch, (number, count)) for number in range(count)]
        for part, whole in enumerate(np.split(batch, parts)):
            assert {value for share in shares for value in np.split(share, parts)[part]} == set(whole)


def test_the_rank_comes_from_the_variables_of_torchrun() -> None:
    assert group_from_environment({}) == Group(0, 1, 0)
    assert group_from_environment({"RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2"}) == Group(3, 4, 2)


def test_batches_that_cannot_be_shared_are_refused(trials: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size: 4 cannot be shared by 3 processes"):
        Trainer(experiment(trials, tmp_path), quiet, Group(0, 3))
    with pytest.raises(ConfigError, match=r"data\.batch_size: 4 cannot be shared by 2 processes .* 4 equal parts"):
        Trainer(experiment(trials, tmp_path, training__accumulate=4), quiet, Group(0, 2))
    with pytest.raises(ConfigError, match=r"training\.on_out_of_memory"):
        Trainer(experiment(trials, tmp_path, training__on_out_of_memory="halve"), quiet, Group(0, 2))
    with pytest.raises(ConfigError, match=r"more than the 24 trials that 2 processes share"):
        Trainer(experiment(trials, tmp_path, data__batch_size=26), quiet, Group(0, 2))
