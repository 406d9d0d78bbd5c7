"""What a run shows: a bar on a terminal, a line per log step elsewhere, and at the end only files that exist."""

import ast
import io
import math
import re
import sys
from pathlib import Path

import pytest
from tiny import ROOT, command
from toy_runs import experiment, write_experiment

from onevoice.training.run import Trainer, describe_result, train
from onevoice.training.tracking import Display

LINE = re.compile(
    r"step (\d+)/(\d+): loss \S+, SI-SDR -?\d+\.\d\d dB, learning rate \S+, \S+ steps/s, (\d+:)?\d\d:\d\d left"
)


SHORT = {"training__steps_per_epoch": 2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_log_step_is_a_line(
    trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(experiment(trials, tmp_path, training__epochs=3, training__log_every_steps=2, **SHORT))
    shown = capsys.readouterr()
    assert "\r" not in shown.out + shown.err
    found = [LINE.fullmatch(line) for line in shown.err.splitlines()]
    assert [match and match.groups()[:2] for match in found] == [("2", "6"), ("4", "6"), ("6", "6")]
    assert shown.err.endswith("00:00 left\n")


def test_on_a_terminal_a_bar_shows_loss_speed_and_remaining_time(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    lines: list[str] = []
    train(experiment(trials, tmp_path, training__epochs=2, **SHORT), echo=lines.append)
    text = terminal.getvalue()
    last = text.rstrip().rpartition("\r")[2]
    assert re.search(r"100%.* 4/4 \[\d\d:\d\d<00:00, .*(step/s|s/step), loss \S+, SI-SDR -?\d+\.\d\d dB\]", last)
    assert not LINE.search(text)
    assert sum("validation SI-SDR" in line for line in lines) == 2


def test_a_step_without_finite_loss_and_a_process_that_does_not_print(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(4, 8)
    display.log(6, {"learning_rate": 0.001})
    assert re.fullmatch(r"step 6/8: learning rate 0\.001, \S+ steps/s, \d\d:\d\d left\n", capsys.readouterr().err)
    Display(4, 8, enabled=False).log(6, {"learning_rate": 0.001})
    assert capsys.readouterr().err == ""


def test_speed_and_remaining_time_are_those_since_the_last_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    display = Display(0, 1000)
    now[0] += 4
    display.log(20, {"learning_rate": 0.5})
    now[0] += 500
    display.start(20)  # after a validation, which does not count
    now[0] += 10
    display.log(40, {"learning_rate": 0.5})
    monkeypatch.undo()
    assert [line.partition("0.5, ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "5 steps/s, 03:16 left",  # 980 steps
        "2 steps/s, 08:00 left",  # 960 steps
    ]


def test_the_last_line_names_only_files_that_exist(
    trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_experiment(tmp_path / "toy.json", trials)
    done = command(capsys, "train", "--c", config, "--minutes", "0")
    folder = tmp_path / "runs" / "toy"
    assert (done.status, (folder / "best.safetensors").exists()) == (0, False)
    assert done.out.splitlines()[-1] == (
        f"run folder: {folder} (last.safetensors holds the weights so far, not validated yet)"
    )
    assert "best.safetensors" not in done.out
    assert (folder / "last.safetensors").exists()
    done = command(capsys, "train", "--r", folder / "last.safetensors")
    assert done.out.splitlines()[-1] == f"run folder: {folder} (best.safetensors is the one to use)"
    assert (folder / "best.safetensors").exists()


def test_after_an_early_stop_without_a_score_no_best_weights_are_named(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "validate", lambda self: {"si_sdr_db": math.nan, "si_sdri_db": math.nan})
    lines: list[str] = []
    folder = train(experiment(trials, tmp_path, training__early_stop_epochs=1), echo=lines.append)
    assert lines[-1] == "no better validation for 1 epochs: stopped"
    assert "best" not in describe_result(folder)
    assert describe_result(tmp_path) == f"run folder: {tmp_path}"


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: path.stem)
def test_no_bar_is_drawn_where_there_is_no_terminal(path: Path) -> None:
    """tqdm draws carriage returns into files unless it is told to look for a terminal: disable=None."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm":
            disable = [keyword.value for keyword in node.keywords if keyword.arg == "disable"]
            assert disable, f"{path}: line {node.lineno}"
            assert "None" in ast.unparse(disable[0])
