"""The page of a run: everything that the run recorded is on it, and it opens in a browser."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import needs_browser, open_page
from pages import Page, decode
from tiny import command
from toy_runs import experiment, quiet

from onevoice.audio import read_audio
from onevoice.training.report import run_report
from onevoice.training.run import train
from onevoice.training.tracking import read_rows


@pytest.fixture(scope="module")
def run(trials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    changes = {"training__keep_every_epochs": 1, "tracking__audio_examples": 2, "training__steps_per_epoch": 2}
    return train(experiment(trials, folder, **changes), echo=quiet)


def test_the_page_has_every_curve_checkpoint_and_setting(run: Path) -> None:
    shown = Page(run_report(run))
    rows = read_rows(run / "metrics.jsonl")
    assert shown.titles[:2] == ["Training run toy", "Curves"]
    for title, name in (("Loss", "loss"), ("Learning rate", "learning_rate"), ("Gradient norm", "gradient_norm"),
                        ("Speaker cross-entropy", "cross_entropy")):  # fmt: skip
        expected = [row[f"train/{name}"] for row in rows if f"train/{name}" in row]
        recorded = [value for value in shown.charts[title]["data"][1] if value is not None]
        np.testing.assert_allclose(recorded, expected, rtol=1e-5)
    validated = [(row["step"], row["validation/si_sdr_db"]) for row in rows if "validation/si_sdr_db" in row]
    steps, _, score = shown.charts["SI-SDR"]["data"][:3]
    found = [(step, value) for step, value in zip(steps, score, strict=True) if value is not None]
    np.testing.assert_allclose(found, validated, rtol=1e-5)
    lines = {line[0]: line for line in shown.tables["Checkpoints"][1:]}
    assert set(lines) == {path.name for path in run.glob("*.safetensors")}
    gains = {str(row["step"]): row["validation/si_sdri_db"] for row in rows if "validation/si_sdri_db" in row}
    assert lines["epoch-0001.safetensors"][1:4] == ["1", "2", f"{gains['2']:.4g}"]
    assert ["optimizer.learning_rate", "0.001"] in shown.tables["config.json"]
    environment = dict(shown.tables["Environment"][1:])
    assert environment["device"] == "cpu"
    assert {"onevoice", "torch", "python", "system", "threads"} <= set(environment)


def test_validation_trials_can_be_heard(run: Path) -> None:
    groups = Page(run_report(run)).players
    assert len(groups) == 2
    for name, tracks in groups.items():
        assert list(tracks) == ["mixture", "enrollment", "target", "estimate, step 4", "estimate, step 2"]
        assert tracks["enrollment"]["aligned"] == "no"
        samples, rate = soundfile.read(io.BytesIO(decode(tracks["target"]["audio"])), dtype="float32")
        file, file_rate = read_audio(run / "samples" / f"trial-{name}-target.wav")
        assert rate == file_rate
        np.testing.assert_allclose(samples * np.abs(file).max(), file * np.abs(samples).max(), atol=1e-4)


def test_a_run_of_an_earlier_version_and_one_that_just_began(run: Path, tmp_path: Path) -> None:
    """Earlier versions wrote every sound at every validation, and no environment."""
    old = shutil.copytree(run, tmp_path / "old")
    (old / "environment.json").unlink()
    for path in (old / "samples").glob("trial-*"):
        for step in (2, 4):
            shutil.copy(path, path.with_name(path.name.replace("trial-", f"step-{step:08d}-")))
        path.unlink()
    shown = Page(run_report(old))
    assert [list(tracks)[:4] for tracks in shown.players.values()] == 2 * [
        ["mixture", "enrollment", "target", "estimate, step 4"]
    ]
    assert "torch" in dict(shown.tables["Environment"][1:])
    young = tmp_path / "young"
    young.mkdir()
    (young / "metrics.jsonl").write_text("")
    assert Page(run_report(young)).titles == ["Training run young"]


def test_a_broken_checkpoint_is_a_line_of_the_table(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "best.safetensors").write_bytes(b"no weights")
    line = next(line for line in Page(run_report(copy)).tables["Checkpoints"] if line[0] == "best.safetensors")
    assert "not a readable checkpoint" in line[-1]


@needs_browser
def test_it_opens_without_a_word_in_the_console(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = command(capsys, "report", run, "-o", tmp_path / "page.html")
    assert (done.status, done.out) == (0, f"{tmp_path / 'page.html'}\n")
    opened = open_page(tmp_path / "page.html", tmp_path, "return all('canvas').length;")
    assert opened.console == []
    assert opened.found == len(Page((tmp_path / "page.html").read_text()).charts)


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((tmp_path, "-o", tmp_path / "a.html"), "holds no training run"),
        ((run, "-o", tmp_path / "a.pdf"), "must end in .html"),
        ((run, "--evaluation", "a.json", "-o", tmp_path / "a.html"), "belongs to weights"),
        (("nothing", "-o", tmp_path / "a.html"), "neither a checkpoint file nor the name"),
    ):
        done = command(capsys, "report", *arguments)
        assert done.status == 2
        assert message in done.err
        assert done.err.count("\n") == 1
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "config.json").write_text(json.dumps({"name": "x"})[:-2])
    done = command(capsys, "report", damaged, "-o", tmp_path / "a.html")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "config.json: is not JSON" in done.err
