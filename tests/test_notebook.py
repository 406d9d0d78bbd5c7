"""The notebook runs to its end, as a user would run it, and is stored without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "Dataset_generation.ipynb"


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_runs_to_its_end(corpus: Path, tmp_path: Path) -> None:
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
    environment = {**os.environ, **{f"ONEVOICE_{name}": value for name, value in settings.items()}}
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path)]
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
    assert speakers_in(tmp_path / "mixtures" / "train").isdisjoint(speakers_in(tmp_path / "mixtures" / "validation"))


def speakers_in(folder: Path) -> set[str]:
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return {row[key] for row in rows for key in ("target_speaker", "interferer_speaker")}


def test_is_stored_without_outputs() -> None:
    code = [cell for cell in cells(NOTEBOOK) if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
