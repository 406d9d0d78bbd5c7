"""Publishing: which part of a checkpoint is shipped, what rounding costs, and which input is refused."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import publish
import pytest
import torch
from tiny import ROOT, SPEAKERS, TINY, command, process, save_tiny
from toy_runs import write_experiment
from voices import make_trials

from onevoice.audio import read_audio
from onevoice.errors import CheckpointError, ConfigError
from onevoice.evaluation import demo
from onevoice.evaluation.metrics import si_sdr
from onevoice.extraction import checkpoint as checkpoints
from onevoice.extraction import discovery
from onevoice.extraction.checkpoint import Card, load_checkpoint, load_model, read_registry, resolve, save_checkpoint
from onevoice.models import SpExPlus, SpExPlusConfig

FACTS = {"step": 3, "data": {"pack": "/home/someone/packs", "speeds": [0.9, "/a/b"], "snr_db": [-5, 5]}}
SUMMARY = {"count": 4, "missing": 0, "mean": 3.5379, "median": 3.75, "percentile_5": -1.8, "interval_95": [3.18, 3.89]}


def flite_version() -> str:
    return subprocess.run(["flite", "--version"], capture_output=True, text=True, check=False).stdout


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, its report, and nothing published."""
    discovery._load_encoder()  # the demo looks for a second voice by these weights, which are loaded once
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "registry.json").write_text('{"default": null, "weights": {}}')
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(publish, "CARDS", tmp_path / "cards")
    state, _ = load_checkpoint(save_tiny(tmp_path / "best.safetensors"))
    save_checkpoint(tmp_path / "best.safetensors", state, Card(TINY, SPEAKERS, FACTS))
    write_report(tmp_path / "report.json")
    return tmp_path


def write_report(path: Path, **changes: Any) -> None:
    report = {
        "data": {"folder": "/home/someone/dev"},
        "facts": FACTS,
        "target_present": 4,
        "target_absent": 1,
        "failure_rate": 0.25,
        "failure_threshold_db": 1.0,
        "attenuation_db": {**SUMMARY, "count": 1},
        "metrics": {"si_sdr_improvement": SUMMARY, "pesq": {**SUMMARY, "mean": None}},
    }
    path.write_text(json.dumps({**report, **changes}))


def publish_tiny(home: Path, name: str = "tiny-1", attribution: Path | None = None, default: bool = True) -> None:
    publish.publish(
        home / "best.safetensors", name, report=home / "report.json", attribution=attribution, default=default
    )


def test_what_is_published(home: Path) -> None:
    publish_tiny(home)
    registry, path = read_registry(), resolve()
    entry = registry.weights["tiny-1"]
    assert (registry.default, path) == ("tiny-1", home / "weights" / "tiny-1.safetensors")
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (entry.bytes, entry.si_sdr_improvement_db, entry.sample_rate) == (path.stat().st_size, 3.538, 8000)
    text = (home / "cards" / "tiny-1.md").read_text()
    for figure in (entry.sha256, "| 3.538 | 3.180 to 3.890 | 3.750 | -1.800 | 4 |", "below 1 dB): 25.0 %", publish.GAP):
        assert figure in text
    assert "PESQ" not in text
    model, card = load_model(path)
    assert card == Card(replace(TINY, num_classes=0), (), publish.portable(FACTS))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    original, _ = load_model(home / "best.safetensors")
    assert entry.parameters == sum(
        value.numel() for name, value in original.named_parameters() if not name.startswith("classifier.")
    )
    for name, value in original.state_dict().items():
        kept = model.state_dict()[name]
        if name.startswith("classifier."):
            assert kept.shape[0] == 0
        elif value.ndim > 1:  # float16 has ten bits of fraction
            assert (kept - value).abs().max() <= 2**-11 * value.abs().max() + 2**-25
            assert not torch.equal(kept, value)
        else:
            assert torch.equal(kept, value)


def test_training_starts_from_published_weights(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_tiny(home)
    experiment = write_experiment(home / "toy.json", make_trials(home / "trials", 6, seed=1))
    done = command(capsys, "train", "-c", experiment, "--load", "tiny-1", "--minutes", "0")
    assert done.status == 0
    assert all(line.startswith("step ") for line in done.err.splitlines())  # the log of training, and no warning
    assert "was trained on other speakers; the classifier is reinitialized" in done.out


def test_no_path_of_this_machine_is_published(home: Path) -> None:
    (home / "config.json").write_text(json.dumps({"name": "toy", "runs_folder": "/home/someone/runs"}))
    publish_tiny(home)
    for path in (*home.glob("weights/*"), *home.glob("cards/*")):
        assert b"home/someone" not in path.read_bytes()
    text = (home / "cards" / "tiny-1.md").read_text()
    assert '"runs_folder": "runs"' in text
    assert '"folder": "dev"' in text


def test_a_name_is_used_once(home: Path) -> None:
    publish_tiny(home)
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"tiny-1\.safetensors: exists; .* choose a new one"):
        publish_tiny(home)
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    publish_tiny(home, "tiny-2")
    registry = read_registry()
    assert (registry.default, list(registry.weights)) == ("tiny-2", ["tiny-1", "tiny-2"])
    publish_tiny(home, "tiny-3", default=False)
    registry = read_registry()
    assert (registry.default, list(registry.weights)) == ("tiny-2", ["tiny-1", "tiny-2", "tiny-3"])
    resolve("tiny-1")
    (home / "weights" / "registry.json").write_text('{"default": null, "weights": {}}')
    with pytest.raises(ConfigError, match="exists; a published name"):
        publish_tiny(home)


@pytest.mark.parametrize("name", ["Tiny", "a/b", "-a", "a-", "", "a b", "a..b"])
def test_names(home: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a name has lowercase letters"):
        publish_tiny(home, name)


def test_refusals(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"best\.safetensors: has [\d,]+ bytes after rounding; 1,000 are allowed"):
        publish_tiny(home)
    write_report(home / "report.json", facts={"step": 4})
    with pytest.raises(ConfigError, match=r"report\.json: belongs to another checkpoint"):
        publish_tiny(home)
    write_report(home / "report.json", metrics={"pesq": SUMMARY})
    with pytest.raises(ConfigError, match=r"report\.json: has no mean of si_sdr_improvement"):
        publish_tiny(home)
    state, card = load_checkpoint(home / "best.safetensors")
    save_checkpoint(home / "best.safetensors", {**state, "bottleneck.weight": state["bottleneck.weight"] + 7e4}, card)
    write_report(home / "report.json")
    with pytest.raises(CheckpointError, match=r"bottleneck\.weight has values that are not finite"):
        publish_tiny(home)
    assert [path.name for path in (home / "weights").iterdir()] == ["registry.json"]
    assert not (home / "cards").exists()


def test_mistakes_are_one_line(home: Path) -> None:
    """In a separate process; the report is missing, so nothing is published."""
    done = process([ROOT / "scripts" / "publish.py", home / "best.safetensors", "a", "--report", home / "none.json"])
    assert (done.status, done.out) == (1, "")
    assert done.err == f"publish: error: {home / 'none.json'}: No such file or directory\n"


def test_attribution_counts_only_the_training_speakers(home: Path) -> None:
    table = home / "table.csv"
    table.write_text(
        "utterance,speaker,corpus,licence,seconds,source\n"
        "a,spk000,Alpha,CC BY 4.0,1800,example.org/alpha\n"
        "b,spk000,Alpha,CC BY 4.0,1800,example.org/alpha\n"
        "c,spk001,Alpha,CC BY 4.0,3600,example.org/alpha\n"
        "d,spk002,Beta,CC0,900,\n"
        "e,dev000,Gamma,CC0,900,\n"
    )
    card = Card(TINY, ("spk000@0.9", "spk001", "spk001@1.1", "spk002", "spk003"))
    assert publish.describe_data(table, card).splitlines()[2:] == [
        "| Alpha | CC BY 4.0 | 2 | 3 | 2.00 | example.org/alpha |",
        "| Beta | CC0 | 1 | 1 | 0.25 |  |",
    ]
    with pytest.raises(ConfigError, match="names none of the speakers"):
        publish.describe_data(table, Card(TINY, ("other",)))
    table.write_text("speaker,seconds\na,1\n")
    with pytest.raises(ConfigError, match="has no columns corpus, license;"):
        publish.describe_data(table, card)
    table.write_text("speaker,seconds,corpus,license\nspk003,7200,Delta,CC0\n")
    assert publish.describe_data(table, card).endswith("| Delta | CC0 | 1 | 1 | 2.00 |  |")
    (home / "text.md").write_text("As it is.\n")
    publish_tiny(home, attribution=home / "text.md")
    assert "\nAs it is.\n" in (home / "cards" / "tiny-1.md").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_rounding_costs_almost_nothing(tmp_path: Path, seed: int) -> None:
    """Compare the published estimate with the float32 one, and both with a target, in a deep random network."""
    torch.manual_seed(seed)
    config = SpExPlusConfig(
        sample_rate=8000, window_seconds=(0.005, 0.01, 0.02), filters=32, channels=32, hidden=48,
        blocks=4, stacks=2, speaker_dim=16, num_classes=4,
    )  # fmt: skip
    model, card = SpExPlus(config).eval(), Card(config, SPEAKERS)
    save_checkpoint(tmp_path / "a.safetensors", *publish.slim(model.state_dict(), card, tmp_path))
    rounded, _ = load_model(tmp_path / "a.safetensors")
    batch = {"audio": torch.randn(1, 8000), "ref": torch.randn(1, 8000)}
    with torch.inference_mode():
        first, second = (network(batch)["predicted_audio"][0][0].double().numpy() for network in (model, rounded))
    assert si_sdr(second, first) > 40
    target = first + 0.3 * first.std() * torch.randn(8000, dtype=torch.float64).numpy()
    assert abs(si_sdr(first, target) - si_sdr(second, target)) < 0.02


def test_the_samples_can_be_made_again(tmp_path: Path) -> None:
    """By the command in their README, if the same version of flite is installed."""
    if shutil.which("flite") is None or "flite-2.2" not in flite_version():
        pytest.skip("flite 2.2 is not installed")
    done = process([ROOT / "scripts" / "make_samples.py", tmp_path])
    assert done.status == 0, done.err
    for path in demo.SAMPLES.glob("*.flac"):
        np.testing.assert_allclose(read_audio(tmp_path / path.name)[0], read_audio(path)[0], atol=2**-14)
