"""The notebook runs to its end, as a user would run it, and is stored without outputs."""

import html
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import CHROMIUM, open_page
from pages import Page, decode
from voices import make_corpus

NOTEBOOK = Path(__file__).parents[1] / "Dataset_generation.ipynb"


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("has_val_corpus", [False, True])
def test_runs_to_its_end(corpus: Path, tmp_path: Path, has_val_corpus: bool) -> None:
    pytest.importorskip("nbconvert")
    pytest.importorskip("ipykernel")
    settings = {
        "CORPUS": str(corpus),
        "OUT": str(tmp_path / "mixtures"),
        "TRAIN_COUNT": "6",
        "VAL_COUNT": "3",
        "VAL_SHARE": "0.5",
        "SAMPLE_RATE": "8000",
        "SEGMENT_SECONDS": "1",
        "WORKERS": "2",
        "SEED": "5",
    }
    if has_val_corpus:
        val_corpus = make_corpus(tmp_path / "others", 3, first=20)
        settings |= {"VAL_CORPUS": str(val_corpus), "TRAIN_SNRS_DB": "3", "VAL_SNRS_DB": "-2"}
    environment = {**os.environ, **{f"ONEVOICE_{name}": value for name, value in settings.items()}}
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path)]
    command += ["--ExecutePreprocessor.startup_timeout=300"]  # the default, a minute, is short under load
    done = subprocess.run(
        [*command, str(NOTEBOOK)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = "".join(
        "".join(output.get("text", ""))
        for cell in cells(tmp_path / NOTEBOOK.name)
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    assert "6 of 6 trials" in printed
    assert "3 of 3 trials, 3 mixtures" in printed
    train, validation = (tmp_path / "mixtures" / part for part in ("train", "validation"))
    assert speakers_in(train).isdisjoint(speakers_in(validation))
    if has_val_corpus:
        assert speakers_in(validation) <= {"spk020", "spk021", "spk022"}
    assert {row["snr_db"] for row in rows_of(train)} <= ({3.0} if has_val_corpus else {0.0, 5.0})
    assert {row["snr_db"] for row in rows_of(validation)} == ({-2.0} if has_val_corpus else {0.0})
    check_players(cells(tmp_path / NOTEBOOK.name)[-1]["outputs"], validation, tmp_path)


def check_players(outputs: list[dict], validation: Path, folder: Path) -> None:
    """The last cell shows labelled players with waveforms and spectrograms; in a browser nothing is in the console."""
    shown = "".join("".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {}))
    match = re.search(r'srcdoc="(.*?)" style', shown, re.DOTALL)
    assert match
    text = html.unescape(match[1])
    [(name, tracks)] = Page(text).players.items()
    assert list(tracks) == ["mixture", "enrollment", "target", "estimate"]
    assert all(track["image"].startswith("data:image/png") for track in tracks.values())
    mixture = soundfile.read(validation / f"{name}-mixed.wav")[0]
    heard = {kind: soundfile.read(io.BytesIO(decode(track["audio"])))[0] for kind, track in tracks.items()}
    np.testing.assert_allclose(heard["mixture"], mixture, atol=1e-4)
    assert len(heard["estimate"]) == len(mixture)
    assert np.abs(heard["estimate"]).max() > 0.01
    if CHROMIUM is not None:
        (folder / "cell.html").write_text(text, encoding="utf-8")
        assert open_page(folder / "cell.html", folder).console == []


def test_the_defaults_are_the_recipe_of_the_original_system() -> None:
    """10,000 trials of train-clean-100 at 0 and 5 dB, and 1,000 of test-clean at 0 dB, all in one cell."""
    [parameters] = [cell for cell in cells(NOTEBOOK) if "TRAIN_COUNT =" in "".join(cell["source"])]
    code = (
        "import json\n"
        + "".join(parameters["source"])
        + (
            "\nprint(json.dumps([str(CORPUS), VAL_CORPUS, TRAIN_COUNT, TRAIN_SNRS_DB, VAL_COUNT, VAL_SNRS_DB,"
            " SAMPLE_RATE, SEGMENT_SECONDS, TRIM_DB, VAD_DB]))"
        )
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ONEVOICE_")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        "data/LibriSpeech/train-clean-100", "data/LibriSpeech/test-clean", 10_000, [0, 5], 1000, [0], 16_000, 3, 20, 20,
    ]  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def speakers_in(folder: Path) -> set[str]:
    return {row[key] for row in rows_of(folder) for key in ("target_speaker", "interferer_speaker")}


def test_is_stored_without_outputs() -> None:
    code = [cell for cell in cells(NOTEBOOK) if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
