"""A network of a few thousand weights, its checkpoint, and commands run in this process."""

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from onevoice.cli import main
from onevoice.extraction.checkpoint import Card, save_checkpoint
from onevoice.models import BandSplitConfig, ModelConfig, SpExPlus, SpExPlusConfig

ROOT = Path(__file__).parents[1]
TINY = SpExPlusConfig(
    sample_rate=8000, window_seconds=(0.005, 0.01, 0.02), filters=8, channels=8, hidden=8,
    blocks=2, stacks=1, speaker_dim=8, num_classes=4,
)  # fmt: skip
SMALL_CONFIGS: dict[str, ModelConfig] = {
    "spexplus": SpExPlusConfig(
        sample_rate=8000, filters=16, channels=12, hidden=20, blocks=3, stacks=2, speaker_dim=10, num_classes=5
    ),
    "bandsplit": BandSplitConfig(
        sample_rate=8000, bands=((4, 8), (3, 32)), channels=8, hidden=12, feed_forward=10, shared=4, blocks=3,
        dilations=(1, 2), taps=3, attention_seconds=0.05, heads=2, key_dim=3, voice_frames=3, num_classes=5,
    ),
}  # fmt: skip
"""A small config of every network, with 5 training speakers at 8 kHz: the tests of the contract use it."""
SPEAKERS = ("spk000", "spk001", "spk002", "spk003")


def save_tiny(path: Path, config: SpExPlusConfig = TINY) -> Path:
    """Write a checkpoint of fresh weights, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(path, SpExPlus(config).state_dict(), Card(config, SPEAKERS, {"step": 3}))
    return path


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run `onevoice ARGUMENTS` in this process."""
    capsys.readouterr()
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    return Outcome(status, *capsys.readouterr())


def process(arguments: Sequence[object], prepare: Any = None, **environment: str) -> Outcome:
    """Run a command line that begins with a Python script or `-m`; `prepare` runs in the child first."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment},
        capture_output=True, text=True, check=False, preexec_fn=prepare,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Limit every file to `size` bytes, in this process and the processes it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
