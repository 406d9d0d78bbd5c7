"""Damaged files end in one line, found by `benchmarks/fuzz.py`: each test is a bug that it found, or a flipped byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import command

from onevoice.cli import main
from onevoice.corpus.pack import CHECKSUM, Header, PackedCorpus
from onevoice.errors import CorpusError, OnevoiceError
from onevoice.extraction.checkpoint import Card, load_checkpoint, load_tensors
from onevoice.extraction.pickled import load_pickled
from onevoice.extraction.voice import Voice, load_voice
from onevoice.files import CHECKSUM_KEY


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files of every kind."""
    return fuzz.make_home(tmp_path_factory.mktemp("good") / "home")


@pytest.fixture
def home(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "home"))


def check_refused(capsys: pytest.CaptureFixture[str], words: str, *complaints: str) -> None:
    done = command(capsys, *words.split())
    assert done.status == 2, done
    assert done.err.splitlines()[-1].startswith("onevoice: error: "), done.err
    assert "Traceback" not in done.err
    for complaint in complaints:
        assert complaint in done.err


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file as a program would that knows nothing of its checksum."""
    values = json.loads(path.read_text())
    values.pop(CHECKSUM, None)
    change(values)
    path.write_text(json.dumps(values))


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no source_rates": lambda header: header.pop("source_rates"),
    "a rate that is no number": lambda header: header.update(source_rates={"8000": "/"}),
    "no checksum of the samples": lambda header: header["sha256"].pop("samples.int16"),
    "no count": lambda header: header.pop("utterances"),
    "null for the rate": lambda header: header.update(sample_rate=None),
    "a speaker without a number": lambda header: header["speakers"][0].pop(),
    "a speaker less": lambda header: header["speakers"].pop(),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=list(HEADERS))
def test_the_header_of_a_pack(home: Path, capsys: pytest.CaptureFixture[str], change: Callable[..., object]) -> None:
    change_json(home / "pack" / "pack.json", change)
    check_refused(
        capsys, f"corpus verify {home}/pack", "pack.json" if change is not HEADERS["no checksum of the samples"] else ""
    )


def test_every_flipped_byte_of_an_index_is_found(home: Path) -> None:
    path = home / "pack" / "index.npy"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(CorpusError, match=r"index\.npy"):
            PackedCorpus.open(home / "pack")


def plain(value: object) -> object:
    """Return what a file holds, in a form in which equal means equal to the bit."""
    match value:
        case torch.Tensor():
            return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
        case dict():
            return {name: plain(each) for name, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case Card():
            return value.to_json()
        case Voice():
            return [plain(value.embedding), value.model_hash, value.sources, value.check_up]
    return value


def load_header(path: Path) -> object:
    """Return what opening a pack takes from `pack.json`."""
    header = PackedCorpus.open(path.parent).header
    return {name: header[name] for name in Header.__dataclass_fields__}


LOADS: dict[str, tuple[str, int, Callable[[Path], object]]] = {
    "checkpoint": ("tiny.safetensors", 197, load_checkpoint),
    "voice": ("v.voice", 3, load_voice),
    "resume file": ("runs/run/last.resume.pt", 797, load_pickled),
    "header of a pack": ("pack/pack.json", 3, load_header),
}


@pytest.mark.parametrize(("name", "step", "load"), LOADS.values(), ids=list(LOADS))
def test_a_flipped_bit_is_refused_or_changes_nothing(
    home: Path, name: str, step: int, load: Callable[[Path], object]
) -> None:
    path = home / name
    data, expected = path.read_bytes(), plain(load(path))
    refusals = []
    places = range(0, len(data), step)
    assert len(places) > 100
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            assert plain(load(path)) == expected, f"byte {place}"
        except OnevoiceError as error:
            refusals.append(str(error))
    assert len(refusals) > 0.9 * len(places)
    assert all(len(each.splitlines()) == 1 for each in refusals)


def test_files_without_a_checksum_load(home: Path) -> None:
    """Those of other programs and of earlier versions."""
    for name, _, load in LOADS.values():
        path = home / name
        before = plain(load(path))
        if path.suffix == ".pt":
            torch.save(load(path), path)
        elif path.suffix == ".json":
            change_json(path, lambda header: None)
        else:
            tensors, metadata = load_tensors(path)
            save_file(tensors, path, metadata)
            assert CHECKSUM_KEY.encode() not in path.read_bytes()
        assert plain(load(path)) == before


def test_verify_reads_the_rows_and_the_names(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "pack", home / "other")
    change_json(home / "other" / "pack.json", lambda header: header["speakers"][0].__setitem__(0, "spkOOO"))
    check_refused(capsys, f"corpus verify {home}/other", "utterances.jsonl: names other speakers")
    rows = home / "pack" / "utterances.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace('"samples": 1', '"samples": 2', 1))
    check_refused(capsys, f"corpus verify {home}/pack", "utterances.jsonl: has other lengths")
    rows.write_text(text.replace('.flac"', '.flaC"', 1))
    check_refused(capsys, f"corpus verify {home}/pack", "utterances.jsonl: differs from its checksum")
    rows.write_text(text.replace("{", "[", 1))
    check_refused(capsys, f"corpus verify {home}/pack", "utterances.jsonl: line 1 is damaged")


RESUMES: dict[str, tuple[str, object]] = {
    "a random state of another size": ("torch_rng", torch.zeros(0, dtype=torch.uint8)),
    "a random state of floats": ("torch_rng", torch.zeros(5056)),
    "no list of random states": ("cuda_rng", 3),
    "weights that are no dict": ("model", 3),
    "an optimizer that is no dict": ("optimizer", {"param_groups": ["x"], "state": {}}),
    "a step that is no number": ("progress", {"step": "x"}),
    "no weights": ("model", None),
}


@pytest.mark.parametrize(("key", "value"), RESUMES.values(), ids=list(RESUMES))
def test_resume_files(home: Path, capsys: pytest.CaptureFixture[str], key: str, value: object) -> None:
    path = home / "runs" / "run" / "last.resume.pt"
    content = torch.load(path, weights_only=True)
    content[key] = value
    if value is None:
        del content[key]
    torch.save(content, path)
    check_refused(capsys, f"train -r {home}/runs/run/last.safetensors --minutes 0", "last.resume.pt")


@pytest.mark.parametrize(("key", "value"), [("model_hash", 7), ("sources", [3]), ("sources", 3)])
def test_voices(home: Path, capsys: pytest.CaptureFixture[str], key: str, value: object) -> None:
    path = home / "v.voice"
    tensors, metadata = load_tensors(path)
    about = json.loads(metadata["onevoice_voice"])
    use = f"--pretrained {home}/tiny.safetensors"
    save_file(tensors, path, {"onevoice_voice": json.dumps({**about, key: value})})
    if value != [3]:  # a name that is a number does no harm
        check_refused(capsys, f"extract {home}/m.wav {path} {home}/o.wav {use}", "v.voice")
    save_file({"embedding": tensors["embedding"] * np.nan}, path, {"onevoice_voice": json.dumps(about)})
    check_refused(capsys, f"extract {home}/m.wav {path} {home}/o.wav {use}", "not one row of finite numbers")


def test_a_manifest_with_half_a_surrogate(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "corpus.jsonl"
    path.write_text(path.read_text() + '{"path": "a\\ud800.flac", "speaker": "a"}\n')
    done = command(capsys, *f"corpus scan {path} --workers 1 --max-broken 1".split())
    assert done.status == 0
    assert "is not JSON ('utf-8' codec can't encode" in done.out.encode().decode()


def test_a_page_of_a_damaged_result(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_json(home / "result.json", lambda summary: summary.update(failure_rate="x"))
    check_refused(capsys, f"report {home}/result.json -o {home}/r.html --played 0", "not a result")


ROWS = [{"samples": []}, {"sample_rate": 0}, {"sample_rate": None}, {"mixtures": "1"}, {"name": "\ud800"}]


@pytest.mark.parametrize("change", ROWS)
def test_a_damaged_row_of_mix_is_made_again(
    home: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    path = home / "mixed" / "manifest.jsonl"
    before = path.read_bytes()
    first, *others = before.decode().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *others, ""]))
    options = "--count 3 --workers 1 --segment-seconds 0.5 --sample-rate 8000"
    assert command(capsys, *f"mix {home}/corpus {home}/mixed {options}".split()).status == 0
    assert path.read_bytes() == before


def test_a_page_of_a_run_with_damaged_rows(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "runs" / "run"
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1, "epoch": 0, "train/loss": "x"}\n' + "[" * 100_000 + "\n")
    change_json(run / "config.json", lambda values: values.update(name="\ud800"))
    assert command(capsys, "report", run, "-o", home / "r.html").status == 0


@pytest.mark.parametrize("text", ["[" * 100_000, '{"folder": "a\\u0000"}', '{"folder": "\\ud800"}'])
def test_configs_and_job_lists(home: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (home / "eval.json").write_text(text)
    check_refused(capsys, f"eval -r {home}/tiny.safetensors -c {home}/eval.json", "eval.json")
    (home / "jobs.jsonl").write_text(text.replace("folder", "mixture"))
    check_refused(capsys, f"extract --list {home}/jobs.jsonl --pretrained {home}/tiny.safetensors", "jobs.jsonl")


def test_an_error_is_one_line_whatever_a_name_holds(capsys: pytest.CaptureFixture[str]) -> None:
    done = command(capsys, "extract", "a\r\u2028\n\x1b[1m.wav", "b.wav", "c.wav")
    assert len(done.err.splitlines()) == 1
    assert "\x1b" not in done.err


def test_some_cases_of_the_fuzzer(good: Path, tmp_path: Path) -> None:
    """The same command as the long run, on 40 cases of the quick kinds."""
    quick = [each for each in fuzz.targets() if each.command.split()[0] in ("corpus", "info", "convert", "compare")]
    place = tmp_path / "place"
    found = []
    for number in range(40):
        target = fuzz.draw_target(1, number, quick)
        found.append((target.name, fuzz.run_case(good, place, target, 1, number)))
    assert not [each for each in found if each[1].kind not in ("refused", "accepted")]
    assert {each[1].kind for each in found} == {"refused", "accepted"}


def test_the_fuzzer_sees_a_bug(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*anything: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("onevoice.corpus.pack.read_header", broken)
    (target,) = [each for each in fuzz.targets() if each.name == "verify pack.json"]
    result = fuzz.run_case(good, tmp_path / "place", target, 0, 0)
    assert result.kind == "traceback"
    assert main is fuzz.main
