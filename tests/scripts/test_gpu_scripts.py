"""The scripts for a borrowed GPU, run here: pack, unpack, train, return, join; and what broken transfers give."""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from tiny import ROOT, Outcome, process, save_tiny
from voices import make_corpus

from onevoice.config import load_config
from onevoice.corpus.pack import PackedCorpus
from onevoice.extraction.checkpoint import load_checkpoint, load_model
from onevoice.models import SpExPlusConfig
from onevoice.training.experiment import Experiment

SCRIPTS = ROOT / "scripts" / "gpu"
sys.path.insert(0, str(SCRIPTS))

import pack  # noqa: E402
import parts  # noqa: E402

RATE = 16_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shards of six speakers with three utterances each."""
    home = tmp_path_factory.mktemp("shards")
    speech = make_corpus(home / "speech", speakers=6, utterances=3, seconds=1.6, sample_rate=RATE)
    shards = []
    for number in range(2):
        shards.append(home / f"train-{number}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for path in sorted(speech.rglob("*.flac"))[number::2]:
                tar.add(path, f"{path.parts[-3]}/{path.name}")
    return shards


def files_of(folder: Path, sizes: dict[str, int]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for name, size in sizes.items():
        data = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        (folder / name).write_bytes(data.numpy().tobytes())
    return {f"there/{name}": folder / name for name in sizes}


# Parts


def test_parts_keep_the_limits_and_join_to_the_same_bytes(tmp_path: Path) -> None:
    sizes = {"a": 2500, "empty": 0, "exact": 1000, "b": 7001, **{f"small{k}": 10 for k in range(9)}}
    files = files_of(tmp_path / "from", sizes)
    limits = parts.Limits(part_bytes=1000, call_bytes=3000, call_files=4)
    calls = parts.split(files, tmp_path / "out", limits)
    for call in calls:
        pieces = [path.stat().st_size for path in call.iterdir() if path.name != parts.MANIFEST]
        assert 0 < len(pieces) <= 4
        assert max(pieces) <= 1000
        assert sum(pieces) <= 3000
    assert len(calls) == len(list((tmp_path / "out").iterdir()))
    written = parts.join(tmp_path / "out", tmp_path / "joined")
    assert {path.relative_to(tmp_path / "joined").as_posix() for path in written} == set(files)
    assert all((tmp_path / "joined" / name).read_bytes() == path.read_bytes() for name, path in files.items())


@pytest.mark.parametrize("fault", ["bit", "lost", "cut"])
def test_a_damaged_transfer_names_the_call_to_repeat(tmp_path: Path, fault: str) -> None:
    limits = parts.Limits(part_bytes=1000, call_bytes=2000)
    _, second, _ = parts.split(files_of(tmp_path / "from", {"a": 5500}), tmp_path / "out", limits)
    part = second / "there-a.002"
    data = part.read_bytes()
    if fault == "lost":
        part.unlink()
    else:
        part.write_bytes(bytes([data[0] ^ 1]) + data[1:] if fault == "bit" else data[:-1])
    assert parts.missing_calls(tmp_path / "out") == [2]
    done = process([SCRIPTS / "parts.py", tmp_path / "out", tmp_path / "joined"])
    assert done.status == 1
    message = f"{tmp_path / 'out'}: parts of call-2 are missing or damaged; transfer these again\n"
    assert (done.out, done.err) == ("", message)
    assert not (tmp_path / "joined").exists()


def test_a_manifest_cannot_write_outside(tmp_path: Path) -> None:
    (call,) = parts.split(files_of(tmp_path / "from", {"a": 5}), tmp_path / "out", parts.Limits())
    manifest = json.loads((call / parts.MANIFEST).read_text())
    manifest["files"]["../escaped"] = manifest["files"].pop("there/a")
    (call / parts.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="outside"):
        parts.join(tmp_path / "out", tmp_path / "joined")
    assert not (tmp_path / "escaped").exists()


# Packing


def packed(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run pack.py without a network: no wheels."""
    monkeypatch.setattr(pack, "gather_wheels", lambda out, python: None)
    monkeypatch.setattr(sys, "argv", ["pack.py", *map(str, arguments)])
    pack.main()


def test_wheels_are_those_of_the_dependencies_but_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def pip(*arguments: object) -> None:
        asked.append(tuple(map(str, arguments)))
        for name in ("torch-2.9-cp312.whl", "numpy-2.4-cp312.whl", "soxr-1.0-cp312.whl"):
            if arguments[0] == "download":
                (tmp_path / name).touch()

    monkeypatch.setattr(pack, "_pip", pip)
    pack.gather_wheels(tmp_path, "3.12")
    wanted = {word.split(">")[0] for word in asked[0] if ">=" in word}
    assert {"soundfile", "soxr", "pydantic", "jaxtyping", "safetensors", "cyclopts", "tqdm"} <= wanted
    assert not {"torch", "numpy"} & wanted
    assert asked[1][0] == "wheel"
    assert [path.name for path in tmp_path.iterdir()] == ["soxr-1.0-cp312.whl"]


def test_bad_arguments_of_pack(tmp_path: Path, shards: list[Path]) -> None:
    done = process([SCRIPTS / "pack.py", tmp_path / "out", "--speech", tmp_path / "no.tar"])
    assert (done.status, done.err) == (1, f"{tmp_path / 'no.tar'}: no such file\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").touch()
    done = process([SCRIPTS / "pack.py", tmp_path / "full", "--speech", shards[0]])
    assert (done.status, "is not empty" in done.err, len(done.err.splitlines())) == (1, True, 1)


# The whole way


def script(folder: Path, name: str, *arguments: object) -> Outcome:
    done = process([folder / name, *arguments], PYTHONPATH=str(ROOT / "src"))
    assert done.status == 0, done.err
    return done


def test_from_shards_to_weights_and_on(tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    size = ("--part-mib", 0.2, "--call-mib", 0.6)
    config = small_config(tmp_path / "small.json")
    start = save_tiny(tmp_path / "start.safetensors", load_config(Experiment, config, ["model.num_classes=4"]).model)
    sent = ("--speech", *shards, "--noise", shards[0], "--weights", start)
    packed(monkeypatch, tmp_path / "sent", *sent, *size)
    calls = sorted((tmp_path / "sent").iterdir(), key=lambda call: int(call.name.split("-")[1]))
    assert len(calls) > 2
    scratch = tmp_path / "scratch"
    for call in calls:
        arrived = tmp_path / "there" / call.name  # only this, as on another machine
        shutil.copytree(call, arrived)
        done = script(arrived, "unpack.py", arrived, scratch, "--held-out", "2", "--trials", "3")
        assert ("still missing" in done.out) == (call != calls[-1])
    pool = PackedCorpus.open(scratch / "packs" / "pool")
    voices = (
        {path.name for path in (scratch / "train").iterdir()},
        {path.name for path in (scratch / "valid").iterdir()},
    )
    assert not voices[0] & voices[1]
    assert (len(voices[0]), len(voices[1])) == (4, 2)
    assert sorted(pool.speakers) == sorted(f"{name}{speed}" for name in voices[0] for speed in ("", "@0.9", "@1.1"))

    first = script(calls[0], "run.py", scratch, "--minutes", "0", "--config", config, "--out", tmp_path / "returned")
    assert "start.safetensors loaded" in first.out
    assert "time is up at step 1" in first.out
    second = script(calls[0], "run.py", scratch, "--minutes", "5", "--config", config, "--out", tmp_path / "returned")
    assert "resumed" in second.out
    parts.join(scratch / "return", tmp_path / "home")
    model, card = load_model(tmp_path / "home" / "best.safetensors")
    assert card.facts["step"] in (2, 4)
    scores = json.loads((tmp_path / "home" / "validation.json").read_text())
    assert set(scores["metrics"]) == {"si_sdr", "si_sdr_improvement"}
    state, _ = load_checkpoint(scratch / "runs" / "toy" / "best.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (tmp_path / "home" / "last.resume.pt").read_bytes() == (
        scratch / "runs" / "toy" / "last.resume.pt"
    ).read_bytes()
    assert {path.name for path in (scratch / "return" / "call-1").iterdir()} <= {
        path.name for path in (tmp_path / "returned").iterdir()
    }


def small_config(path: Path) -> Path:
    """Write the shipped config shrunk to two epochs of two steps of a tiny network."""
    values = json.loads((ROOT / "configs" / "gpu_pool.json").read_text())
    values["name"] = "toy"
    sizes = {"filters": 8, "channels": 8, "hidden": 8, "blocks": 2, "stacks": 1, "speaker_dim": 8}
    values["model"] |= {"window_seconds": [0.005, 0.01, 0.02], **sizes}
    values["data"] |= {"batch_size": 2, "workers": 0}
    values["data"]["validation"]["limit"] = 2
    values["data"]["train"]["examples_per_epoch"] = 4
    values["data"]["train"]["mixing"] |= {"segment_seconds": 0.5, "enrollment_seconds": [0.5, 1.0]}
    values["training"] |= {"epochs": 2, "device": "cpu", "log_every_steps": 1}
    path.write_text(json.dumps(values))
    return path


def test_the_shipped_config_is_the_paper_size() -> None:
    config = load_config(Experiment, ROOT / "configs" / "gpu_pool.json", [])
    assert config.model == SpExPlusConfig(num_classes=0)
