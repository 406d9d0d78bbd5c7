"""`onevoice average`: the mean of checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SPEAKERS, TINY, command, save_tiny

from onevoice.extraction.checkpoint import Card, load_checkpoint, load_model, save_checkpoint
from onevoice.models import SpExPlus


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    paths = []
    for step in (10, 20, 30):
        torch.manual_seed(step)
        state = SpExPlus(TINY).state_dict()
        for name, value in state.items():
            if name.endswith("num_batches_tracked"):
                value.fill_(step)
        paths.append(tmp_path / f"epoch-{step:04d}.safetensors")
        save_checkpoint(paths[-1], state, Card(TINY, SPEAKERS, {"step": step, "experiment": "toy"}))
    return paths


def test_the_mean_is_exact_and_lists_its_sources(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean.safetensors"
    done = command(capsys, "average", out, *checkpoints)
    assert (done.status, done.out) == (0, f"{out}\n")
    state, card = load_checkpoint(out)
    states = [load_checkpoint(path)[0] for path in checkpoints]
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            assert value == 10
        else:
            expected = sum(each[name].double() for each in states) / 3
            assert value.dtype == torch.float32
            assert torch.equal(value, torch.as_tensor(expected).float())
    assert card.speakers == SPEAKERS
    assert [source["file"] for source in card.facts["average_of"]] == [path.name for path in checkpoints]
    assert [source["step"] for source in card.facts["average_of"]] == [10, 20, 30]
    load_model(out)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"config": replace(TINY, hidden=12)}, "has another config than"),
        ({"speakers": ("a", "b", "c", "d")}, "has other training speakers than"),
    ],
)
def test_checkpoints_of_different_runs_are_refused(
    checkpoints: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    complaint: str,
) -> None:
    card = replace(load_checkpoint(checkpoints[0])[1], **change)
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, SpExPlus(card.config).state_dict(), card)
    done = command(capsys, "average", tmp_path / "mean.safetensors", checkpoints[0], other)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert f"{other}: {complaint} {checkpoints[0]}" in done.err
    assert not (tmp_path / "mean.safetensors").exists()


def test_wrong_arguments_are_one_line(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command(capsys, "average", tmp_path / "mean.safetensors", checkpoints[0])
    assert (done.status, "needs two checkpoints or more" in done.err) == (2, True)
    done = command(capsys, "average", tmp_path / "mean", *checkpoints)
    assert (done.status, "mean: must end in .safetensors" in done.err) == (2, True)
    done = command(capsys, "average", tmp_path / "mean.safetensors", checkpoints[0], tmp_path / "none.safetensors")
    assert (done.status, "none.safetensors: no such checkpoint file" in done.err) == (2, True)
    assert not (tmp_path / "mean.safetensors").exists()


def test_the_mean_of_a_checkpoint_with_itself_is_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_tiny(tmp_path / "one.safetensors")
    assert command(capsys, "average", tmp_path / "mean.safetensors", one, one).status == 0
    before, after = load_checkpoint(one)[0], load_checkpoint(tmp_path / "mean.safetensors")[0]
    assert all(torch.equal(before[name], after[name]) for name in before)
