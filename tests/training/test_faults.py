"""Failures during a run: a signal, a full disk, a killed data reader, a missing compiler."""

import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import equal, experiment, quiet, rows_without_time, run_command, start, weights, write_experiment

from onevoice.errors import StorageError, TrainingError
from onevoice.models.base import missing_for_compiling
from onevoice.processes import StopRequest
from onevoice.training.run import Trainer, train
from onevoice.training.step import Learner
from onevoice.training.tracking import read_rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_at_a_checkpoint(
    trials: Path, finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Sent to the whole process group, data readers and all, as a batch system and a terminal do."""
    changes = {"training__save_every_steps": 1000}
    config = write_experiment(tmp_path / "toy.json", trials, name="stopped", data__workers=1, **changes)
    child = start(tmp_path / "output", run_command, "train", "--c", config)
    folder = tmp_path / "runs" / "stopped"
    child.wait_for_lines(folder / "metrics.jsonl", 2)
    os.killpg(child.process.pid, number)
    output = child.finish()
    assert f"stopped by {number.name} at step " in output
    assert f"; resume with --r {folder}/last.safetensors\n" in output
    assert "Traceback" not in output
    stopped = experiment(trials, tmp_path, name="stopped", **changes)
    train(stopped, resume=folder / "last.safetensors", echo=quiet)
    assert equal(weights(folder), weights(finished))


def test_a_validation_ended_by_a_signal_is_repeated_by_the_resumed_run(
    trials: Path, finished: Path, tmp_path: Path
) -> None:
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
    assert equal(weights(folder), weights(finished))
    logs = [rows_without_time(read_rows(path / "metrics.jsonl")) for path in (folder, finished)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("saved", [False, True])
def test_a_killed_data_reader(
    trials: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
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
    assert equal(weights(again), weights(finished))


def test_training_runs_without_a_compiler(
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
        """Replaces the class of torch, whose name differs between releases."""

        __module__ = "torch._dynamo.exc"

    def fail(*anything: Any, **named: Any) -> None:
        raise CompilerError("backend='inductor' raised:\nCppCompileError: no Python.h")

    monkeypatch.setattr(Learner, "step", fail)
    with pytest.raises(TrainingError, match=r"torch\.compile failed \(backend='inductor' raised:\); start again with"):
        train(experiment(trials, tmp_path, name="failing"), echo=quiet)


def test_a_full_disk_keeps_the_previous_checkpoint(trials: Path, finished: Path, tmp_path: Path) -> None:
    """The next checkpoint cannot be written: the limit on file sizes is half of its size."""
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
    assert equal(weights(folder), weights(finished))
