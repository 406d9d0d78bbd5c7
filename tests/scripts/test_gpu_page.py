"""The commands of docs/gpu.md, run here in order: pack, unpack, train, return; only pip is left out."""

import json
import re
import shlex
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest
from tiny import ROOT, command
from voices import make_corpus

from onevoice.config import load_config
from onevoice.corpus.pack import PackedCorpus
from onevoice.extraction.checkpoint import load_model
from onevoice.models import SpExPlusConfig
from onevoice.training.experiment import Experiment

PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
RATE = 16_000
SHORTER = {
    "-b 60M": "-b 200K",
    "-b 15M": "-b 10K",
    "head -n 12": "head -n 2",
    "--count 60": "--count 2",
    "--minutes 8": "--minutes 5",
}
"""What the test changes in the commands, for a toy corpus."""


def commands(heading: str) -> list[str]:
    """The commands below a heading of the page."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading)]
    found = "".join(re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for long, short in SHORTER.items():
        found = found.replace(long, short)
    return found.splitlines()


def run(lines: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the commands in a folder: `onevoice` in this process, all but pip in a shell; return what they print."""
    monkeypatch.chdir(folder)
    printed = ""
    for line in lines:
        if line.startswith("python3 -m onevoice "):
            done = command(capsys, *shlex.split(line)[3:])
            assert done.status == 0, f"{line}: {done.err}"
            printed += done.out
        elif not line.startswith("python3 -m pip "):
            shell = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True, check=False
            )
            assert shell.returncode == 0, f"{line}: {shell.stderr}"
            printed += shell.stdout
    return printed


def make_shards(folder: Path) -> None:
    """Two shards of six speakers with three utterances each, and a shard to be used as noise."""
    speech = make_corpus(folder / "speech", speakers=6, utterances=3, seconds=1.6, sample_rate=RATE)
    (folder / "shards").mkdir()
    for name, part in (("train-0", slice(0, None, 2)), ("train-1", slice(1, None, 2)), ("noise", slice(0, 3))):
        with tarfile.open(folder / "shards" / f"{name}.tar", "w") as tar:
            for path in sorted(speech.rglob("*.flac"))[part]:
                tar.add(path, f"{path.parts[-3]}/{path.name}")


def shrink(path: Path) -> None:
    """Shrink the shipped config to an epoch of two steps of a tiny network."""
    values = json.loads(path.read_text())
    values["model"] |= {"channels": 8, "hidden": 8, "blocks": 2, "shared": 4, "key_dim": 4, "voice_frames": 4}
    values["data"] |= {"batch_size": 2, "workers": 0}
    values["data"]["train"]["examples_per_epoch"] = 4
    values["data"]["train"]["mixing"] |= {"segment_seconds": 0.5, "enrollment_seconds": [0.5, 1.0]}
    values["training"] |= {"epochs": 1, "device": "cpu", "compile": False, "log_every_steps": 1}
    path.write_text(json.dumps(values))


def test_from_shards_to_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    checkout, gpu, home = (tmp_path / name for name in ("checkout", "gpu", "home"))
    make_shards(checkout)
    monkeypatch.setenv("GIT_DIR", str(git_directory()))
    run(commands("Pack"), checkout, capsys, monkeypatch)
    parts = sorted((checkout / "send").glob("part-*"))
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) <= 200 * 1024

    shutil.copytree(checkout / "send", gpu)
    run(["sha256sum -c SHA256SUMS", "cat part-* | tar -xf -"], gpu, capsys, monkeypatch)
    assert commands("Unpack")[0] == "cat part-* | tar -xf -"
    assert (gpu / "job" / "benchmarks" / "train_speed.py").read_bytes()
    shrink(gpu / "job" / "configs" / "gpu_pool.json")
    run(commands("Unpack")[1:], gpu, capsys, monkeypatch)
    training, validation = ({path.name for path in (gpu / name).iterdir()} for name in ("train", "valid"))
    assert (len(training), len(validation), training & validation) == (4, 2, set())
    assert sorted(PackedCorpus.open(gpu / "packs" / "pool").speakers) == sorted(
        f"{name}{speed}" for name in training for speed in ("", "@0.9", "@1.1")
    )

    printed = run(commands("Train"), gpu, capsys, monkeypatch)
    assert "validation SI-SDR" in printed
    assert "resumed" in printed
    run(commands("Return")[:4], gpu, capsys, monkeypatch)
    assert len(list((gpu / "out").glob("best.safetensors.??"))) > 1

    shutil.copytree(gpu / "out", home)
    run(commands("Return")[4:], home, capsys, monkeypatch)
    _, card = load_model(home / "best.safetensors")
    assert card.facts["step"] == 2
    assert (home / "best.safetensors").read_bytes() == (gpu / "runs/gpu_pool/best.safetensors").read_bytes()
    assert set(json.loads((home / "validation.json").read_text())["metrics"]) >= {"si_sdr", "si_sdr_improvement"}


def git_directory() -> Path:
    done = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--absolute-git-dir"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("needs a git checkout")
    return Path(done.stdout.strip())


def test_a_damaged_part_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "send").mkdir()
    (tmp_path / "send" / "part-00").write_bytes(b"sound")
    run([line for line in commands("Pack") if "sha256sum" in line], tmp_path, capsys, monkeypatch)
    (tmp_path / "send" / "part-00").write_bytes(b"sOund")
    with pytest.raises(AssertionError, match="sha256sum -c"):
        run(["sha256sum -c SHA256SUMS"], tmp_path / "send", capsys, monkeypatch)
    assert "sha256sum -c SHA256SUMS" in PAGE.replace("`", "")


def test_the_wheels_are_the_dependencies_that_the_machine_lacks() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=]", line)[0] for line in needed}
    (download,) = [line for line in commands("Pack") if "pip download" in line]
    assert set(download.partition("manylinux2014_x86_64 ")[2].split()) == names - {"torch", "numpy"}


@pytest.mark.parametrize("line", commands("Measure"))
def test_the_commands_that_measure_name_files_that_exist(line: str) -> None:
    assert all((ROOT / path).exists() for path in re.findall(r"job/(\S+)", line))


def test_the_config_of_spexplus_has_the_size_of_the_paper() -> None:
    config = load_config(Experiment, ROOT / "configs" / "spexplus_gpu_pool.json", [])
    assert config.model == SpExPlusConfig(num_classes=0)


def test_what_is_shortened_is_in_the_page() -> None:
    assert [long for long in SHORTER if long not in PAGE] == []
