"""The commands as a user types them, from a corpus to an extracted voice."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ROOT, Outcome, command, process, save_tiny
from toy_runs import forked_process, write_experiment
from voices import make_trials

from onevoice.audio import read_audio
from onevoice.config import from_dict
from onevoice.extraction.checkpoint import load_checkpoint
from onevoice.training.experiment import Experiment

VERBS = ("mix", "train", "eval", "extract", "demo", "info", "schema")


def good(outcome: Outcome) -> Outcome:
    assert outcome.status == 0, outcome.err
    assert "Traceback" not in outcome.err
    return outcome


@pytest.fixture(scope="module")
def home(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `onevoice mix` and `train.py` have run."""
    home = tmp_path_factory.mktemp("home")
    done = good(
        process(
            [
                *("-m", "onevoice", "mix", corpus, home / "mixed", "--count", "4", "--snr", "0", "5"),
                *("--workers", "1", "--sample-rate", "8000", "--segment-seconds", "1"),
            ]
        )
    )
    assert done.out.startswith("4 of 4 trials, ")
    config = write_experiment(home / "toy.json", home / "mixed")
    done = good(forked_process([ROOT / "train.py", "--c", config, "--set", "training.epochs=2", "seed=3"]))
    assert f"run folder: {home / 'runs' / 'toy'}" in done.out
    return home


def test_mixing_writes_trials_of_the_requested_rate_and_length(home: Path) -> None:
    mixtures = sorted((home / "mixed").glob("*-mixed.wav"))
    assert len(mixtures) >= 4
    assert {(len(samples), rate) for samples, rate in map(read_audio, mixtures)} == {(8000, 8000)}
    rows = [json.loads(line) for line in (home / "mixed" / "manifest.jsonl").read_text().splitlines()]
    assert {row["snr_db"] for row in rows} <= {0.0, 5.0}
    assert len(rows) == len(mixtures)


def test_training_writes_a_run(home: Path) -> None:
    run = home / "runs" / "toy"
    assert {"config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "last.resume.pt"} <= {
        path.name for path in run.iterdir()
    }
    assert from_dict(Experiment, json.loads((run / "config.json").read_text())).training.epochs == 2
    assert load_checkpoint(run / "last.safetensors")[1].facts["epoch"] == 2


@pytest.mark.parametrize("option", ["--r", "-r", "--resume"])
def test_a_resumed_run_equals_an_uninterrupted_run(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """The run stops after each step, and its folder is enough to resume it."""
    config = write_experiment(tmp_path / "toy.json", home / "mixed", seed=3)
    last = tmp_path / "runs" / "toy" / "last.safetensors"
    done = good(command(capsys, "train", "--c", config, "--minutes", "0"))
    assert "time is up at step 1; resume with --r" in done.out
    while "time is up" in done.out:
        done = good(command(capsys, "train", option, last, "--minutes", "0"))
        assert "resumed" in done.out
    pieces, _ = load_checkpoint(last)
    whole, _ = load_checkpoint(home / "runs" / "toy" / "last.safetensors")
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_load_starts_at_step_0(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = home / "runs" / "toy" / "best.safetensors"
    done = good(
        command(capsys, "train", "--c", home / "toy.json", "--load", best, "--set", "name=loaded", "training.epochs=1")
    )
    assert f"weights of {best} loaded; training starts at step 0" in done.out


def test_evaluation_prints_and_writes(home: Path, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps({"data_dir": str(home / "mixed"), "jobs": 1}))
    arguments = ["--c", tmp_path / "test.json", "--r", home / "runs/toy/best.safetensors", "-o", tmp_path / "r.json"]
    done = good(forked_process([ROOT / "eval.py", *arguments]))
    result = json.loads((tmp_path / "r.json").read_text())
    for title, name in (("SI-SDR", "si_sdr"), ("PESQ", "pesq"), ("SI-SDRi", "si_sdr_improvement"), ("STOI", "stoi")):
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"{title} ")]
        assert f"mean {result['metrics'][name]['mean']:.3f}" in line
    assert "failures " in done.out
    assert done.err == ""  # no progress bar without a terminal
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["trials"] == len(list((home / "mixed").glob("*-mixed.wav")))
    assert np.mean([float(row["si_sdr"]) for row in rows]) == pytest.approx(result["metrics"]["si_sdr"]["mean"])
    assert result["facts"]["experiment"] == "toy"


def test_options_override_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trials(tmp_path / "trials", 3)
    (tmp_path / "test.json").write_text(json.dumps({"data_dir": "nowhere", "limit": 1, "metrics": ["pesq"]}))
    checkpoint = save_tiny(tmp_path / "a.safetensors")
    done = good(
        command(
            capsys, "eval", "-c", tmp_path / "test.json", "-r", checkpoint, "-t", tmp_path / "trials", "-b", 2, "-j", 1,
            "--limit", 2, "--metrics", "si_sdr", "si_sdr_improvement",
        )
    )  # fmt: skip
    assert "n = 2" in done.out
    assert "PESQ" not in done.out
    assert "SI-SDRi" in done.out


def test_extraction_of_a_file(home: Path, tmp_path: Path) -> None:
    mixture = sorted((home / "mixed").glob("*-mixed.wav"))[0]
    enrollment = str(mixture).replace("-mixed", "-ref")
    arguments = [mixture, enrollment, tmp_path / "o.wav", "--checkpoint", home / "runs/toy/best.safetensors"]
    done = good(forked_process(["-m", "onevoice", "extract", *arguments, "--residual", tmp_path / "rest.wav"]))
    assert done.out.startswith(f"{tmp_path / 'o.wav'}: 1.0 s of sound in ")
    assert done.err == ""
    estimate, residual = read_audio(tmp_path / "o.wav"), read_audio(tmp_path / "rest.wav")
    whole = read_audio(mixture)
    assert estimate[1] == residual[1] == whole[1]
    np.testing.assert_allclose(estimate[0] + residual[0], whole[0], atol=1e-6)
    assert np.ptp(estimate[0]) > 0


def test_info_is_the_card(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "runs" / "toy" / "best.safetensors"
    state, card = load_checkpoint(path)
    printed = json.loads(good(command(capsys, "info", path)).out)
    assert printed.pop("weights") == sum(value.numel() for value in state.values())
    assert printed == json.loads(card.to_json())


@pytest.mark.parametrize(("kind", "key"), [("train", "training"), ("eval", "batch_size")])
def test_schema(capsys: pytest.CaptureFixture[str], kind: str, key: str) -> None:
    assert key in json.loads(good(command(capsys, "schema", kind)).out)["properties"]


def described(schema: dict[str, Any]) -> dict[str, bool]:
    """Every key of every section of a JSON Schema, and whether it has a description of its own."""
    return {
        f"{name}.{key}": bool(value.get("description", "").strip())
        for name, section in {"": schema, **schema.get("$defs", {})}.items()
        for key, value in section.get("properties", {}).items()
    }


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_schema_describes_every_key(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    keys = described(json.loads(good(command(capsys, "schema", kind)).out))
    assert len(keys) > 30
    assert [key for key, is_described in keys.items() if not is_described] == []


def test_schema_of_training_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert good(command(capsys, "schema")).out == good(command(capsys, "schema", "train")).out


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        text = good(command(capsys, *arguments)).out
        assert all(f" {verb} " in text for verb in VERBS)


OPTIONS = {
    "mix": "--count --snr --test --seed --workers --sample-rate --segment-seconds --vad-db --trim-db --layout "
    "--pattern",
    "train": "--config --c -c --resume --r -r --load -l --minutes --set -s",
    "eval": "--checkpoint --pretrained --r -r --config --c -c -t --batch-size -b --jobs -j --output -o --limit",
    "extract": "--pretrained --checkpoint --residual --device MIXTURE ENROLLMENT OUTPUT",
    "demo": "--out -o --force --pretrained --device",
    "info": "CHECKPOINT",
    "schema": "KIND",
}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_option(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    text = good(command(capsys, verb, "--help")).out
    assert all(f" {option}" in text for option in OPTIONS[verb].split()), text


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_scripts_equal_the_command(verb: str) -> None:
    assert process([ROOT / f"{verb}.py", "--help"]) == good(process(["-m", "onevoice", verb, "--help"]))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sing"], "sing: unknown command; choose one of "),
        (["evl"], "evl: unknown command; did you mean eval?"),
        (["corpus", "scn"], "scn: unknown command; did you mean scan?"),
        (["mix"], "one or more corpora and, last, the folder to write"),
        (["eval"], "--checkpoint: is missing; see onevoice eval --help"),
        (["extract", "a.wav", "b.wav"], "OUTPUT: is missing; see onevoice extract --help"),
        (["extract", "a", "b", "c", "d", "e"], "d e: too many arguments; see onevoice extract --help"),
        (["info", "a.safetensors", "--loud"], "--loud: unknown option; see onevoice info --help"),
        (["eval", "-r", "a", "--batchsize=3"], "--batchsize: unknown option; did you mean --batch-size?"),
        (["demo", "--device"], "--device: needs a value; see onevoice demo --help"),
        (["demo", "--device", "a", "--device", "b"], "--device: appears twice; give it once"),
        (["corpus", "rooms", "a", "--t60", "1"], "--t60: needs 2 values; see onevoice corpus rooms --help"),
        (["eval", "-r", "a", "-b", "two"], "-b: 'two' is not a whole number; see onevoice eval --help"),
        (["mix", "a", "b", "--snr", "loud"], "--snr: 'loud' is not a number; see onevoice mix --help"),
        (["mix", "a", "b", "--test=maybe"], "--test: 'maybe' is not true or false; see onevoice mix --help"),
        (["train"], "no experiment; name one with --config FILE.json, or a run with --resume CHECKPOINT"),
        (["train", "-r", "a", "--load", "b"], "--resume and --load exclude each other"),
        (["eval", "-r", "a"], "no trials to score; name a folder of trials with -t FOLDER"),
        (["schema", "sing"], "sing: unknown config; choose one of train, eval"),
    ],
)
def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str) -> None:
    done = command(capsys, *arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("onevoice: error: ")
    assert complaint in done.err
    assert done.err.count("\n") == 1


def test_ctrl_c_prints_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onevoice.extraction.checkpoint.load_weights", interrupt)
    assert command(capsys, "info", "a.safetensors") == (130, "", "interrupted\n")


def test_paths_are_relative_to_the_current_folder(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    done = command(capsys, "eval", "--r", "runs/toy/best.safetensors", "-t", "mixed", "-j", 1, "--metrics", "si_sdr")
    assert good(done).out.startswith("runs/toy/best.safetensors on mixed\n")
