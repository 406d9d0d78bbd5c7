"""The example of docs/add_a_network.md, added to a copy of the package as the page says, trains and extracts."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from tiny import ROOT, process
from voices import make_trials

PAGE = ROOT / "docs" / "add_a_network.md"

SCRIPT = """
import json, sys
from onevoice.cli import main
for words in json.loads(sys.argv[1]):
    main(words)
"""


def blocks() -> list[str]:
    """Return the code of the page: the file, the line in the table, and the small config for the tests."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def add_the_network(folder: Path) -> None:
    """Copy the package to `folder`, and make the two changes of the page."""
    shutil.copytree(ROOT / "src" / "onevoice", folder / "onevoice", ignore=shutil.ignore_patterns("__pycache__"))
    file, line, _ = blocks()
    models = folder / "onevoice" / "models"
    (models / "masker.py").write_text(file, encoding="utf-8")
    imported, _, table = line.strip().split("\n")
    text = (models / "__init__.py").read_text(encoding="utf-8")
    changed = re.sub(r"^NETWORKS: .*$", table, text, flags=re.MULTILINE)
    assert changed != text
    (models / "__init__.py").write_text(
        changed.replace("from onevoice.models.spexplus", f"{imported}\nfrom onevoice.models.spexplus")
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    add_the_network(folder)
    return folder


def test_the_example_trains_and_extracts(package: Path, tmp_path: Path) -> None:
    trials = make_trials(tmp_path / "trials", 4)
    experiment = {
        "name": "masker",
        "runs_folder": str(tmp_path / "runs"),
        "model": {"name": "masker", "sample_rate": 8000, "hidden": 16, "speaker_dim": 8, "num_classes": 0},
        "data": {
            "train": {"folder": str(trials), "segment_seconds": 0.5},
            "validation": {"folder": str(trials)},
            "batch_size": 2,
            "workers": 0,
        },
        "training": {"epochs": 2, "device": "cpu"},
    }
    config = tmp_path / "masker.json"
    config.write_text(json.dumps(experiment))
    mixture, enrollment = (next(trials.glob(f"*-{kind}.wav")) for kind in ("mixed", "ref"))
    weights = tmp_path / "runs" / "masker" / "last.safetensors"
    lines = [
        ["train", "--config", config],
        ["extract", mixture, enrollment, tmp_path / "voice.wav", "--pretrained", weights],
    ]
    done = process(["-c", SCRIPT, json.dumps(lines, default=str)], PYTHONPATH=str(package))
    assert (done.status, "epoch 2 step 4" in done.out) == (0, True), done.out + done.err
    assert (tmp_path / "voice.wav").exists()


def test_the_example_keeps_the_contract(package: Path) -> None:
    """The tests of the contract, with the small config of the page."""
    tests = package / "tests"
    tests.mkdir()
    for name in ("models/test_models.py", "plain_spexplus.py"):
        shutil.copy(ROOT / "tests" / name, tests)
    text = (ROOT / "tests" / "tiny.py").read_text(encoding="utf-8")
    changed = text.replace('= {\n    "spexplus": SpEx', f'= {{\n{blocks()[2]}    "spexplus": SpEx')
    assert changed != text
    (tests / "tiny.py").write_text(f"from onevoice.models.masker import MaskerConfig\n{changed}", encoding="utf-8")
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:schemathesis",
        "-p",
        "no:hypothesispytest",
        "-c",
        os.devnull,
        "--rootdir",
        tests,
    ]
    done = process(["-m", "pytest", *options, tests / "test_models.py", "-k", "masker"], PYTHONPATH=str(package))
    assert done.status == 0, done.out
    assert int(re.findall(r"(\d+) passed", done.out)[0]) >= 15
