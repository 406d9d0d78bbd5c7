"""What befalls a run: a signal, a full disk, a lost data reader."""

import json
import math
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import equal, experiment, finish, lines_of, quiet, rows_without_time, settings, start, weights
from voices import make_trials

from onevoice.errors import StorageError, TrainingError
from onevoice.models.base import missing_for_compiling
from onevoice.processes import StopRequest
from onevoice.training.run import Trainer, train
from onevoice.training.step import Learner
from onevoice.training.tracking import read_rows


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trials(tmp_path_factory.mktemp("trials"), 24)


def wait_for(path: Path, lines: int, process: Any) -> None:
    """Wait until a file has so many lines; a minute is far more than it takes."""
    patience = time.monotonic() + 60
    while lines_of(path) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < patience
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_at_a_checkpoint(trials: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Sent to the whole process group, data readers and all, as a batch system and a terminal do."""
    changes = {"training__epochs": 2, "training__save_every_steps": 1000}
    config = tmp_path / "toy.json"
    config.write_text(json.dumps(settings(trials, tmp_path, name="stopped", data__workers=1, **changes)))
    process = start(["--c", config])
    folder = tmp_path / "stopped"
    wait_for(folder / "metrics.jsonl", 2, process)
    os.killpg(process.pid, number)
    output = finish(process, 30)
    assert f"stopped by {number.name} at step " in output
    assert f"; resume with --r {folder}/last.safetensors\n" in output
    assert "Traceback" not in output
    train(experiment(trials, tmp_path, name="stopped", **changes), resume=folder / "last.safetensors", echo=quiet)
    whole = train(experiment(trials, tmp_path, name="whole", **changes), echo=quiet)
    assert equal(weights(folder), weights(whole))


def test_a_signal_in_validation_leaves_it_to_the_next_run(trials: Path, tmp_path: Path) -> None:
    whole = train(experiment(trials, tmp_path, name="whole"), echo=quiet)
    config, lines, asked = experiment(trials, tmp_path, name="stopped"), list[str](), StopRequest()
    trainer = Trainer(config, lines.append)
    held = trainer.validation_trials

    class Interrupting:
        def __iter__(self) -> Iterator[Any]:
            for batch in held:
                yield batch
                asked.signal = "SIGTERM"

    trainer.validation_trials = Interrupting()  # type: ignore[assignment]
    folder = trainer.run(stop_request=asked)
    assert lines == [f"stopped by SIGTERM at step 6; resume with --r {folder}/last.safetensors"]
    assert not (folder / "best.safetensors").exists()
    train(config, resume=folder / "last.safetensors", echo=quiet)
    assert equal(weights(folder), weights(whole))
    logs = [rows_without_time(read_rows(path / "metrics.jsonl")) for path in (folder, whole)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("saved", [False, True])
def test_a_killed_data_reader(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool) -> None:
    config = experiment(trials, tmp_path, data__workers=1, training__save_every_steps=2 if saved else 1000)
    killed: list[int] = []
    others = set(multiprocessing.active_children())  # of earlier tests
    step = Learner.step

    def killing(self: Learner, batch: Any) -> Any:
        if self.state.progress.step == 2 and not killed:
            (reader,) = set(multiprocessing.active_children()) - others
            killed.append(reader.pid or 0)
            os.kill(killed[0], signal.SIGKILL)
            os.waitid(os.P_PID, killed[0], os.WEXITED | os.WNOWAIT)  # torch raises from its handler of SIGCHLD
        return step(self, batch)

    monkeypatch.setattr(Learner, "step", killing)
    with pytest.raises(TrainingError) as caught:
        train(config, echo=quiet)
    last = tmp_path / "toy" / "last.safetensors"
    assert str(caught.value).startswith(f"a process that reads the data died (pid {killed[0]})")
    assert str(caught.value).endswith(f"; resume with --r {last}" if saved else "; start again")
    assert "\n" not in str(caught.value)
    again = train(config, resume=last if saved else None, echo=quiet)
    whole = train(experiment(trials, tmp_path, name="whole"), echo=quiet)
    assert equal(weights(again), weights(whole))


def test_without_a_compiler_training_goes_on(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    trainer = Trainer(experiment(trials, tmp_path, name="compiled", training__compile=True))
    assert not trainer.state.model.compiled
    assert "training.compile: a C++ compiler (g++ or clang++) is missing; training" in capsys.readouterr().out
    monkeypatch.undo()
    assert missing_for_compiling(torch.device("meta")) == "a compiler for meta"


def test_a_failed_compiler_is_named(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CompilerError(RuntimeError):
        """Stands in for torch's, whose name differs between releases."""

        __module__ = "torch._dynamo.exc"

    def fail(*anything: Any, **named: Any) -> None:
        raise CompilerError("backend='inductor' raised:\nCppCompileError: no Python.h")

    monkeypatch.setattr(Learner, "step", fail)
    with pytest.raises(TrainingError, match=r"torch\.compile failed \(backend='inductor' raised:\); start again with"):
        train(experiment(trials, tmp_path, name="failing"), echo=quiet)


def test_a_full_disk_leaves_the_checkpoint_before(trials: Path, tmp_path: Path) -> None:
    """The file of the next checkpoint is the one that cannot be written: it grows no further than its first half."""
    config = experiment(trials, tmp_path, training__save_every_steps=1, data__workers=0)
    trainer = Trainer(config, quiet)
    folder = trainer.run(deadline=-math.inf)
    before = {path.name: path.read_bytes() for path in folder.glob("last.*")}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["last.resume.pt"]) // 2, limit[1]))
    try:
        with pytest.raises(StorageError, match=r"last\.resume\.pt: cannot be written .*; free space") as caught:
            train(config, resume=trainer.last, echo=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.glob("last.*")} == before
    assert not list(folder.glob(".*.part"))
    train(config, resume=trainer.last, echo=quiet)
    assert equal(weights(folder), weights(train(experiment(trials, tmp_path, name="whole"), echo=quiet)))
