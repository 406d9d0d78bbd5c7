"""The page of weights: card, sample recordings, and a result of `onevoice eval`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import needs_browser, open_page
from pages import Page, decode
from tiny import command, save_tiny

from onevoice.audio import read_audio
from onevoice.evaluation.demo import SAMPLES
from onevoice.extraction.checkpoint import read_registry


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def test_card_demo_and_evaluation(
    weights: Path, trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ["--metrics", "si_sdr", "si_sdr_improvement"]
    done = command(capsys, "eval", "--r", weights, "-t", trials, "-j", 1, "-o", tmp_path / "result.json", *metrics)
    assert done.status == 0, done.err
    done = command(capsys, "report", weights, "-o", tmp_path / "page.html", "--evaluation", tmp_path / "result.json")
    assert done.status == 0, done.err
    shown = Page((tmp_path / "page.html").read_text())
    result = json.loads((tmp_path / "result.json").read_text())
    assert shown.titles[0] == "Weights tiny"
    gain = result["metrics"]["si_sdr_improvement"]
    line = next(line for line in shown.tables["Metrics"] if line[0] == "SI-SDRi (dB)")
    assert line[1] == "result"
    assert line[2] == f"{gain['mean']:.4g}"
    assert sum(shown.charts["SI-SDRi"]["data"][1]) == result["trials"]
    before, gains = shown.charts["SI-SDRi by SI-SDR of the mixture"]["data"]
    assert np.mean(gains) == pytest.approx(gain["mean"], rel=1e-4)
    assert np.mean(before) + np.mean(gains) == pytest.approx(result["metrics"]["si_sdr"]["mean"], rel=1e-4)
    assert ["step", "3"] in shown.tables["How it was made"]
    assert ["speakers", "4"] in shown.tables["Model"]
    tracks = shown.players["Demo"]
    assert list(tracks) == ["mixture", "enrollment", "target", "estimate", "residual"]
    heard = {name: soundfile.read(io.BytesIO(decode(tracks[name]["audio"])))[0] for name in tracks}
    np.testing.assert_allclose(heard["mixture"], read_audio(SAMPLES / "mixture.flac")[0], atol=1e-4)
    np.testing.assert_allclose(heard["estimate"] + heard["residual"], heard["mixture"], atol=1e-3)


@needs_browser
def test_the_page_of_the_default_weights_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = command(capsys, "report", "-o", tmp_path / "page.html")
    assert done.status == 0, done.err
    opened = open_page(tmp_path / "page.html", tmp_path, "return [all('.track').length, document.title];")
    assert opened.console == []
    assert opened.found == [5, f"Weights {read_registry().default}"]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"metrics": {"pesq": 1}}'])
def test_something_else_than_a_result_is_one_line(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "result.json").write_text(content)
    done = command(capsys, "report", weights, "-o", tmp_path / "a.html", "--evaluation", tmp_path / "result.json")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "not a result of onevoice eval" in done.err
