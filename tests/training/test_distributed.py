"""Many processes: the same steps as one, the same files as one, and a restart when one is lost."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_runs import equal, experiment, finish, lines_of, quiet, settings, start, weights
from voices import make_trials

from onevoice.errors import ConfigError
from onevoice.extraction.checkpoint import load_pickled
from onevoice.training.distributed import Group, group_from_environment
from onevoice.training.run import Trainer, train
from onevoice.training.tracking import read_rows
from onevoice.trials.reading import share_of_batch

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CHANGES: dict[str, Any] = {
    "scheduler": {"name": "constant"},
    "training__epochs": 2,
    "training__ema": 0.5,
    "training__accumulate": 2,
    "data__batch_size": 8,
    "data__validation__limit": 5,
}
"""With batches of unequal lengths shared by 2 processes in 2 parts each; enrollments are of several lengths."""


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trials(tmp_path_factory.mktemp("trials"), 24)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> bool:
    """Equal but for the biases of the decoders: the loss, centred, does not see them, so that they follow rounding."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].double(), other[name].double(), rtol=0, atol=tolerance)
        for name in one
        if not re.fullmatch(r"decoders\.\d\.bias", name)
    )


@pytest.fixture(scope="module")
def undisturbed(trials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "two.json").write_text(json.dumps(settings(trials, runs, name="two", **CHANGES)))
    process = start(["--c", runs / "two.json"], *TORCHRUN)
    output = finish(process)
    assert output.count("validation SI-SDR") == 2  # said by one of them
    assert output.count("run folder:") == 1
    assert "Warning" not in output
    return runs / "two"


def assert_same_log(one: Path, other: Path, tolerance: float) -> None:
    logs = [read_rows(folder / "metrics.jsonl") for folder in (one, other)]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for left, right in zip(*logs, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"wall_time"}:
            most = (
                10 * tolerance if name == "train/gradient_norm" else tolerance
            )  # kinks of the network enlarge rounding
            assert right[name] == pytest.approx(left[name], rel=most, abs=10 * tolerance), name


def test_two_processes_take_the_steps_of_one(trials: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One process takes the whole batches in as many parts as the two together: the same parts of batch statistics."""
    one = train(experiment(trials, tmp_path, name="one", **CHANGES), echo=quiet)
    assert_same_log(one, undisturbed, 1e-5)
    assert close(weights(one), weights(undisturbed), 2e-4)  # of the 6e-3 that six steps of Adam move a weight


def test_another_number_of_processes_goes_on(trials: Path, undisturbed: Path, tmp_path: Path) -> None:
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
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # kinks of the network enlarge what rounding began
    assert [row["step"] for row in read_rows(moved / "metrics.jsonl")] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]


def test_a_lost_process_is_replaced(trials: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL for the second process in the second epoch: the group starts again from the checkpoint by itself."""
    changes = {**CHANGES, "training__save_every_steps": 1}
    (tmp_path / "two.json").write_text(json.dumps(settings(trials, tmp_path, name="two", **changes)))
    process = start(["--c", tmp_path / "two.json"], *TORCHRUN, "--max-restarts", "1")
    log, patience = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 120
    while lines_of(log) < 5:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < patience
        time.sleep(0.001)
    os.kill(second_process(process.pid), signal.SIGKILL)
    output = finish(process)
    assert f"resumed {tmp_path}/two/last.resume.pt" in output
    assert equal(weights(tmp_path / "two"), weights(undisturbed))
    saved = [load_pickled(folder / "last.resume.pt")["model"] for folder in (tmp_path / "two", undisturbed)]
    assert equal(*saved)


POISON = """
import json, math, sys
from pathlib import Path
from onevoice.config import load_config
from onevoice.training.distributed import open_group
from onevoice.training.experiment import Experiment
from onevoice.training.run import Trainer

with open_group("cpu") as group:
    trainer = Trainer(load_config(Experiment, sys.argv[1]), lambda line: None, group)
    first, second, third = trainer.source.batches(0, 0, 3)
    trainer.learner.step(first)
    before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
    trainer.learner.step({**second, "audio": second["audio"] * math.nan} if group.rank == 1 else second)
    after = trainer.state.model.state_dict()
    kept = all(value.equal(after[name]) for name, value in before.items())
    skipped = trainer.state.progress.skipped_in_a_row
    finite = trainer.learner.step(third).total.isfinite().item()
    found = [kept, skipped, finite, trainer.state.progress.skipped_steps]
    Path(sys.argv[2], f"rank{group.rank}.json").write_text(json.dumps(found))
    trainer.learner.leave_group()
"""


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(trials: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps(settings(trials, tmp_path, **CHANGES)))
    (tmp_path / "poison.py").write_text(POISON)
    finish(start([tmp_path / "toy.json", tmp_path], *TORCHRUN, script=tmp_path / "poison.py"))
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [True, 1, True, 1]


def second_process(launcher: int) -> int:
    """Return the number of the process that torchrun has started as RANK 1."""
    (found,) = (
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if int(path.name) in children(launcher) and b"\0RANK=1\0" in (path / "environ").read_bytes()
    )
    return found


def children(parent: int) -> set[int]:
    return {
        int(number)
        for task in Path(f"/proc/{parent}/task").iterdir()
        for number in (task / "children").read_text().split()
    }


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shares_make_up_the_batch_and_its_parts(parts: int) -> None:
    """Which items meet in a part does not depend on the number of processes."""
    batch = torch.randperm(16).numpy()
    for count in (1, 2, 4):
        shares = [share_of_batch(batch, (number, count)) for number in range(count)]
        for part, whole in enumerate(np.split(batch, parts)):
            assert {value for share in shares for value in np.split(share, parts)[part]} == set(whole)


def test_the_place_in_the_group_is_torchruns() -> None:
    assert group_from_environment({}) == Group(0, 1, 0)
    assert group_from_environment({"RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2"}) == Group(3, 4, 2)


def test_what_cannot_be_shared_is_refused(trials: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size: 4 cannot be shared by 3 processes"):
        Trainer(experiment(trials, tmp_path), quiet, Group(0, 3))
    with pytest.raises(ConfigError, match=r"data\.batch_size: 4 cannot be shared by 2 processes .* 4 equal parts"):
        Trainer(experiment(trials, tmp_path, training__accumulate=4), quiet, Group(0, 2))
    with pytest.raises(ConfigError, match=r"training\.on_out_of_memory"):
        Trainer(experiment(trials, tmp_path, training__on_out_of_memory="halve"), quiet, Group(0, 2))
    with pytest.raises(ConfigError, match=r"more than the 24 trials that 2 processes share"):
        Trainer(experiment(trials, tmp_path, data__batch_size=26), quiet, Group(0, 2))
