"""Weights by name, path and hub address; the published ones; and the demo."""

import hashlib
import json
import re
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import pytest
import torch
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from hub import serve
from tiny import ROOT, command, save_tiny
from toy_runs import forked_process

import onevoice
from onevoice.audio import read_audio
from onevoice.errors import CheckpointError, ConfigError, MissingDependencyError
from onevoice.evaluation.demo import SAMPLES, Demo, run
from onevoice.evaluation.metrics import si_sdr
from onevoice.extraction import checkpoint as checkpoints
from onevoice.extraction import discovery
from onevoice.extraction.checkpoint import load_checkpoint, load_model, read_registry, resolve


def register(folder: Path, default: str | None, **weights: bytes) -> None:
    """Publish `weights` in `folder` with a handwritten registry."""
    entries = {}
    for name, content in weights.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        entries[name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "parameters": 1_234_567,
            "sample_rate": 8000,
            "si_sdr_improvement_db": 3.25,
        }
    (folder / "registry.json").write_text(json.dumps({"default": default, "weights": entries}))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with the weights `old` and `tiny`; `tiny` is the default."""
    discovery._load_encoder()  # an extraction looks for a second voice by these weights, which are loaded once
    folder = tmp_path / "weights"
    folder.mkdir()
    register(folder, "tiny", old=b"old", tiny=save_tiny(tmp_path / "a.safetensors").read_bytes())
    monkeypatch.setattr(checkpoints, "WEIGHTS", folder)
    return folder


@pytest.fixture
def unpublished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without weights."""
    register(tmp_path, None)
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)


# The weights in this repository


def test_published_weights_are_whole_and_have_their_card() -> None:
    """A published name never changes its bytes: the card has their SHA-256 too."""
    registry = read_registry()
    assert registry.default in registry.weights if registry.weights else registry.default is None
    assert {path.stem for path in checkpoints.WEIGHTS.glob("*.safetensors")} == registry.weights.keys()
    for name, entry in registry.weights.items():
        path = resolve(name)
        content = path.read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry.sha256, entry.bytes)
        assert len(content) <= 30_000_000
        model, card = load_model(path)
        assert (card.config.sample_rate, card.speakers) == (entry.sample_rate, ())
        assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
        text = (ROOT / "docs" / "models" / f"{name}.md").read_text(encoding="utf-8")
        assert entry.sha256 in text
        assert "To be written" not in text


@pytest.mark.parametrize("builder", [WheelBuilder, SdistBuilder])
def test_weights_and_samples_are_shipped(builder: type[WheelBuilder] | type[SdistBuilder]) -> None:
    shipped = {Path(file.path) for file in builder(str(ROOT)).recurse_included_files()}
    package = ROOT / "src" / "onevoice"
    folders = ("extraction/weights", "extraction/samples", "report/assets")
    data = {path for folder in folders for path in (package / folder).iterdir()}
    assert (
        {package / "extraction" / "weights" / "registry.json", package / "extraction" / "samples" / "mixture.flac"}
        <= data
        <= shipped
    )


def test_the_samples_are_a_mixture() -> None:
    """They mix at 0 dB, are small, and the enrollment is not the target utterance."""
    (mixture, rate), (target, _), (enrollment, _) = (
        read_audio(SAMPLES / f"{name}.flac") for name in ("mixture", "target", "enrollment")
    )
    assert rate == 16_000
    assert len(mixture) == len(target)
    assert 10 * np.log10(np.square(target).sum() / np.square(mixture - target).sum()) == pytest.approx(0, abs=0.01)
    assert max(map(np.max, map(np.abs, (mixture, target, enrollment)))) < 1
    length = min(len(enrollment), len(target))
    assert abs(np.corrcoef(enrollment[:length], target[:length])[0, 1]) < 0.2
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < 500_000


# Names and paths


def test_names_and_paths(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve() == resolve("tiny") == published / "tiny.safetensors"
    assert resolve("old") == published / "old.safetensors"
    assert resolve(Path("old")) == Path("old")
    for path in ("old.safetensors", "model.pth", "./old", "runs/old"):
        assert resolve(path) == Path(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").touch()
    (tmp_path / "tiny").touch()
    assert resolve("bare") == Path("bare")
    assert resolve("tiny") == published / "tiny.safetensors"


def test_unknown_names(published: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^tinny: neither a checkpoint file nor .*; did you mean tiny\?$"):
        resolve("tinny")
    with pytest.raises(CheckpointError, match=r"^spexplus: neither a checkpoint file .*; published names: old, tiny$"):
        resolve("spexplus")


@pytest.mark.usefixtures("unpublished")
def test_nothing_published(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="no weights come with this installation; name a checkpoint"):
        resolve()
    with pytest.raises(CheckpointError, match=r"^tiny: neither a checkpoint file nor .*; published names: none$"):
        resolve("tiny")
    assert command(capsys, "info").out == "no weights come with this installation\n"


def test_damage_is_detected(published: Path) -> None:
    path = published / "tiny.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors: damaged .*; install onevoice again"):
        resolve("tiny")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors: missing .*; install onevoice again"):
        resolve()
    (published / "registry.json").write_text('{"default": null, "weights": {"a": {"sha256": "beef"}}}')
    with pytest.raises(ConfigError, match="sha256"):
        resolve("a")


def test_every_command_takes_a_name(published: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [SAMPLES / "mixture.flac", SAMPLES / "enrollment.flac"]
    for options in ([], ["--pretrained", "tiny"], ["--checkpoint", published / "tiny.safetensors"]):
        out = tmp_path / f"{len(options)}{len(str(options))}.wav"
        done = command(capsys, "extract", *files, out, *options)
        assert (done.status, done.out.startswith(f"{out}: 8.0 s of sound in "), done.err) == (0, True, "")
    first, *others = (read_audio(path)[0] for path in tmp_path.glob("*.wav"))
    assert len(others) == 2
    assert all(np.array_equal(first, other) for other in others)
    assert json.loads(command(capsys, "info", "tiny").out)["facts"] == {"step": 3}
    for arguments in (["eval", "-r", "tinny", "-t", tmp_path], ["train", "-c", "none.json", "--load", "tinny"]):
        assert "did you mean tiny?" in command(capsys, *arguments).err
    state = onevoice.load(device="cpu").model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in load_checkpoint(resolve())[0].items())


def test_the_list(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, tiny = command(capsys, "info").out.splitlines()
    assert old == "old  1.2 M parameters, 0.0 MB, 8000 Hz, SI-SDRi 3.25 dB"
    assert tiny.startswith("tiny  ")
    assert tiny.endswith(" (default)")


# The demo


def test_demo(published: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = command(capsys, "demo", "--out", out, "--device", "cpu")
    assert (done.status, done.err) == (0, "")
    voice, mixture, rest, enrollment = (
        read_audio(out / f"{name}.wav")[0] for name in ("voice", "mixture", "residual", "enrollment")
    )
    target = read_audio(SAMPLES / "target.flac")[0]
    assert np.array_equal(mixture, read_audio(SAMPLES / "mixture.flac")[0])
    assert np.array_equal(enrollment, read_audio(SAMPLES / "enrollment.flac")[0])
    np.testing.assert_allclose(voice + rest, mixture, atol=1e-6)
    level, gain = si_sdr(voice, target), si_sdr(voice, target) - si_sdr(mixture, target)
    assert f"SI-SDR   {level:.2f} dB, {gain:+.2f} dB over the mixture (SI-SDRi)\n" in done.out
    assert str(out / "voice.wav") in done.out
    (out / "mixture.wav").write_bytes(b"not of the demo")
    again = command(capsys, "demo", "--out", out, "--device", "cpu")
    assert (again.status, "mixture.wav: exists; choose another name, or overwrite it with --force" in again.err) == (
        2,
        True,
    )
    assert (out / "mixture.wav").read_bytes() == b"not of the demo"
    assert command(capsys, "demo", "--out", out, "--device", "cpu", "--force").status == 0
    assert run(onevoice.load("tiny", device="cpu"), out).si_sdr_db == pytest.approx(level)


def test_demo_prints_the_speed() -> None:
    assert "0.25 s per second" in Demo(Path(), 1.0, 2.0, 0.25).text()


# The hub

PROBE = """
import json, sys
from onevoice.errors import OnevoiceError
from onevoice.extraction.checkpoint import resolve

for spec in json.loads(sys.argv[1]):
    try:
        print(json.dumps(resolve(spec).read_bytes().decode()))
    except OnevoiceError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""
REPOS = {
    "lab/usual": {"main": {"model.safetensors": b"usual", "a.safetensors": b"a"}, "v1": {"model.safetensors": b"v1"}},
    "lab/single": {"main": {"README.md": b"", "best.safetensors": b"best"}},
    "lab/many": {"main": {"a.safetensors": b"a", "b.safetensors": b"b", "sub/c.safetensors": b"c"}},
    "lab/gated": {},
}


def from_hub(specs: list[str], cache: Path, address: str, offline: int = 0) -> list[str]:
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_TOKEN": "", "HF_HUB_OFFLINE": str(offline)}
    done = forked_process(["-c", PROBE, json.dumps(specs)], **environment)
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


EXPECTED = {
    "hf://lab/usual": "usual",
    "hf://lab/usual@v1": "v1",
    "hf://lab/usual/a.safetensors": "a",
    "hf://lab/usual@main/a.safetensors": "a",
    "hf://lab/single": "best",
    "hf://lab/many/sub/c.safetensors": "c",
    "hf://lab/many": "has no model.safetensors and not exactly one other .safetensors file; name one of its files: a",
    "hf://lab/usual/d.safetensors": "has no d.safetensors; name one of its files: model.safetensors, a.safetensors",
    "hf://lab/usual@v9": "the repository has no revision v9",
    "hf://lab/gated": "you must accept its terms first",
    "hf://lab/nothing": "no such repository on the hub",
    "hf://lab": "write it as hf://OWNER/REPO",
    "hf://lab/usual/model.bin": "write it as hf://OWNER/REPO",
    "hf://lab/..": "cannot be downloaded",
}


def test_the_hub(tmp_path: Path) -> None:
    with serve(REPOS) as address:
        answers = dict(zip(EXPECTED, from_hub(list(EXPECTED), tmp_path, address), strict=True))
    for spec, expected in EXPECTED.items():
        if " " in expected:
            assert answers[spec].startswith("CheckpointError: hf://lab"), answers[spec]
            assert expected in answers[spec]
        else:
            assert answers[spec] == expected
    cached, missing = from_hub(["hf://lab/usual", "hf://lab/many/a.safetensors"], tmp_path, address, offline=1)
    assert cached == "usual"  # the cache needs no network
    assert re.match(r"CheckpointError: hf://lab/many/a\.safetensors: cannot be downloaded from the hub", missing)
    assert "need no network" in missing


def test_without_network_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client retries for half a minute; asking it for a list would double that."""

    def unreachable(*arguments: object, **options: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: pytest.fail("asked for a list"))
    with pytest.raises(CheckpointError, match=r"^hf://a/b: cannot be downloaded .* \(no network\); .* need no network"):
        resolve("hf://a/b")


def test_the_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r'^hf://a/b: .*pip install "onevoice\[hub\]"$'):
        resolve("hf://a/b")
