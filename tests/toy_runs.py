"""Experiments of a few steps on toy voices, in this process and in one of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import ROOT

from onevoice.config import from_dict
from onevoice.extraction.checkpoint import load_checkpoint
from onevoice.training.experiment import Experiment

MODEL = {
    "name": "spexplus", "sample_rate": 8000, "window_seconds": [0.005, 0.01, 0.02], "filters": 24, "channels": 16,
    "hidden": 32, "blocks": 3, "stacks": 2, "speaker_dim": 16, "num_classes": 0,
}  # fmt: skip


def settings(trials: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """A tiny experiment; `training__epochs=3` sets a key of a section."""
    values: dict[str, Any] = {
        "name": "toy",
        "runs_folder": str(runs),
        "model": dict(MODEL),
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


def start(arguments: Sequence[object], *launcher: str, script: Path = ROOT / "train.py") -> "subprocess.Popen[str]":
    """Start `train.py ARGUMENTS` or another script, by `launcher` where one is given, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", seconds: float = 120) -> str:
    """Wait for a process to end well, and return what it said; end it with its group when it does not."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "last.safetensors")[0]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows_without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "wall_time"} for row in rows]


def quiet(line: str) -> None:
    """Take the place of `print`."""


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
