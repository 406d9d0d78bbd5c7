"""Experiments of a few steps on toy voices, and processes that run them."""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tiny import TINY, Outcome
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from onevoice import processes
from onevoice.cli import main
from onevoice.config import from_dict, to_dict
from onevoice.extraction.checkpoint import load_checkpoint
from onevoice.training.experiment import Experiment


def settings(trials: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """An experiment with a tiny network and two epochs; `training__epochs=3` sets a key of a section."""
    values: dict[str, Any] = {
        "name": "toy",
        "runs_folder": str(runs),
        "model": {**to_dict(TINY), "num_classes": 0},
        "data": {
            "train": {"folder": str(trials), "segment_seconds": 0.5, "enrollment_seconds": 1.0},
            "validation": {"folder": str(trials), "limit": 3},
            "batch_size": 4,
            "workers": 0,
        },
        "scheduler": {"name": "onecycle", "max_learning_rate": 0.003},
        "training": {"epochs": 2, "save_every_steps": 2, "log_every_steps": 1, "device": "cpu"},
        "tracking": {"audio_examples": 1},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return values


def experiment(trials: Path, runs: Path, **changes: Any) -> Experiment:
    return from_dict(Experiment, settings(trials, runs, **changes))


def write_experiment(path: Path, trials: Path, **changes: Any) -> Path:
    """Write the experiment to a file; its runs go to the folder `runs` beside the file."""
    path.write_text(json.dumps(settings(trials, path.parent / "runs", **changes)))
    return path


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "onevoice.cli.training", "onevoice.training.run", "onevoice.extraction.recording", "torch._dynamo"]
)
PATIENCE = 300.0
"""Seconds that a process may take; far more than it needs, for machines under load."""


class Child(NamedTuple):
    """A process that a test has started, and the file with what it prints."""

    process: Any
    output: Path

    def finish(self) -> str:
        """Wait for the process to end with status 0, and return what it printed; kill its group if it does not end."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        printed = self.output.read_text()
        assert self.process.exitcode == 0, printed
        return printed

    def wait_for_lines(self, path: Path, count: int) -> None:
        """Wait until a file has so many lines."""
        end = time.monotonic() + PATIENCE
        while count_lines(path) < count:
            assert self.process.exitcode is None, self.output.read_text()
            assert time.monotonic() < end
            time.sleep(0.001)


def start(output: Path, work: Callable[..., None], *arguments: object) -> Child:
    """Start `work(*arguments)` in a process group of its own.

    The process is forked from a server that has imported the package, so that it does not spend seconds on that.
    """
    process = SERVER.Process(target=_lead_group, args=(output, work, *arguments))
    process.start()
    return Child(process, output)


def _lead_group(output: Path, work: Callable[..., None], *arguments: object) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the server sets its own; data readers belong to this group
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    stream = output.open("ab", buffering=0)
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    work(*arguments)


def forked_process(arguments: Sequence[object], **environment: str) -> Outcome:
    """Run a command line as `tiny.process` does, in this folder, but in a process that `start` forks."""
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        words = [str(each) for each in arguments]
        child = start(
            Path(folder) / "output", _run_python, errors, Path.cwd(), {"COLUMNS": "120", **environment}, words
        )
        child.process.join(PATIENCE)
        if child.process.exitcode is None:
            os.killpg(child.process.pid, signal.SIGKILL)
            raise AssertionError(f"no end after {PATIENCE:.0f} s: {arguments}")
        return Outcome(child.process.exitcode, child.output.read_text(), errors.read_text())


def _run_python(errors: Path, folder: Path, environment: dict[str, str], arguments: list[str]) -> None:
    os.chdir(folder)
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.environ.update(environment)
    kind, sys.argv = arguments[0], arguments
    if kind == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """Let the workers of `onevoice.processes` come from the same server, in place of spawned ones, which load torch.

    They inherit as little from this process; `tests/mixing` and `tests/corpus` spawn theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "multiprocessing", SimpleNamespace(get_context=lambda kind: SERVER))
        yield


def run_command(*arguments: object) -> None:
    """Run `onevoice ARGUMENTS`."""
    main([str(argument) for argument in arguments])


def run_group(work: Callable[..., None], *arguments: object, restarts: int = 0) -> None:
    """Run `work(*arguments)` in two processes of a group, as `torchrun --nproc-per-node 2` does."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=restarts, start_method="fork", monitor_interval=0.05,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(os.getpid()),
    )  # fmt: skip
    elastic_launch(config, work)(*arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "last.safetensors")[0]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows_without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in ("wall_time", "train/steps_per_second")} for row in rows
    ]


def quiet(line: str) -> None:
    """Ignore a line that `print` would show."""


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
