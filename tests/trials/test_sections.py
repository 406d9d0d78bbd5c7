"""The config sections of trials: the same shape everywhere, and the shapes of earlier versions still load."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import command, save_tiny
from toy_runs import equal, settings, weights
from voices import make_trials

from onevoice.config import from_dict, json_schema, load_config, override, to_dict
from onevoice.errors import ConfigError
from onevoice.evaluation.run import EvaluationConfig
from onevoice.extraction.pickled import load_pickled, save_resume
from onevoice.training.experiment import DynamicTrials, Experiment, changed_settings
from onevoice.training.run import train
from onevoice.trials.config import (
    FolderTrials,
    LibriMixMetadataTrials,
    LibriMixTrials,
    TrialsFile,
    Wsj0Trials,
    load_trials_config,
)
from onevoice.trials.reading import to_record

LEAST: dict[str, Any] = {"name": "x", "data": {"train": {"folder": "a"}, "validation": {"folder": "b"}}}
LIBRIMIX: dict[str, Any] = {"kind": "librimix", "root": "Libri2Mix", "part": "test", "mode": "max"}
CUTS: dict[str, Any] = {"segment_seconds": 2.0, "enrollment_seconds": 3.0, "limit": 4}

JSON: list[tuple[dict[str, Any], type]] = [
    ({"kind": "folder", "folder": "trials"}, FolderTrials),
    ({"folder": "trials"}, FolderTrials),
    (LIBRIMIX, LibriMixTrials),
    (
        {
            "kind": "librimix_metadata",
            "metadata": "libri2mix_test-clean.csv",
            "librispeech_dir": "LibriSpeech",
            "sample_rate": 8000,
            "enrollment": {"kind": "map", "file": "map"},
        },
        LibriMixMetadataTrials,
    ),
    ({"kind": "wsj0_2mix", "lists": "tt", "replace": {"/theirs": "/mine"}}, Wsj0Trials),
]


@pytest.mark.parametrize(("values", "kind"), JSON)
def test_configs_come_from_json(values: dict[str, Any], kind: type, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({"data": values}))
    config = load_config(EvaluationConfig, tmp_path / "eval.json")
    assert isinstance(config.data, kind)
    assert from_dict(EvaluationConfig, to_dict(config)) == config
    assert load_trials_config(tmp_path / "eval.json") == config.data
    assert json_schema(TrialsFile)["properties"]["data"]
    with pytest.raises(ConfigError, match=r"data\b.*nonsense: unknown key"):
        from_dict(EvaluationConfig, {"data": {**values, "nonsense": 1}})


@pytest.mark.parametrize(("values", "kind"), JSON)
def test_training_and_evaluation_take_the_same_section(values: dict[str, Any], kind: type) -> None:
    section = {**values, **CUTS}
    experiment = from_dict(Experiment, {"name": "x", "data": {"train": section, "validation": section}})
    assert isinstance(experiment.data.train, kind)
    assert experiment.data.train == experiment.data.validation
    assert experiment.data.train == from_dict(EvaluationConfig, {"data": section}).data
    assert {key: to_dict(experiment)["data"]["train"][key] for key in section} == section
    assert from_dict(Experiment, to_dict(experiment)) == experiment


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "librispeech"},
        {"kind": "dynamic", "pack": "packs/train"},
        {"kind": "librimix", "root": "r", "part": "test", "max_missing": 1.5},
        {"kind": "librimix", "root": "r", "part": "test", "sample_rate": 44100},
        {"kind": "librimix", "root": "r", "part": "test", "enrollment": {"kind": "draw", "version": 2}},
    ],
)
def test_wrong_configs_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="data"):
        from_dict(EvaluationConfig, {"data": values})


KINDS = "'folder', 'librimix', 'librimix_metadata', 'wsj0_2mix'"
WRONG = {
    "data.train.kind=librimx": f"data.train.kind: input should be one of {KINDS}, 'dynamic', not \"librimx\"",
    "data.validation.kind=dynamic": f'data.validation.kind: input should be one of {KINDS}, not "dynamic"',
    "data.train.fold=a": "data.train.fold: unknown key; did you mean 'folder'?",
    "data.train.kind=librimix": (
        "data.train.root: is required and missing; data.train.part: is required and missing; "
        "data.train.folder: unknown key; did you mean 'mode'?"
    ),
    "data.train={}": "data.train.folder: is required and missing",
    "data.train=null": "data.train: input should be an object, not null",
    "data.train.limit=0": "data.train.limit: input should be greater than 0, not 0",
    'data.train={"kind": "dynamic", "pack": "p", "pck": 1}': "data.train.pck: unknown key; did you mean 'pack'?",
    'data.train={"kind": "trials"}': "data.train.folder: is required and missing",
    'data.train.data={"kind": "librimix"}': (
        "data.train.data: unknown key; known keys: segment_seconds, enrollment_seconds, limit, folder, kind"
    ),
    'data.train={"data": {"kind": "librimix", "root": "r", "part": "p", "mod": "min"}}': (
        "data.train.mod: unknown key; did you mean 'mode'?"
    ),
}


@pytest.mark.parametrize(("setting", "complaint"), WRONG.items(), ids=list(WRONG))
def test_errors_name_the_full_path(setting: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Experiment, override(LEAST, [setting]), name="my.json")
    assert str(error.value) == f"my.json: {complaint}"


# ------------------------------------------------------------------ shapes of earlier versions

NO_CUTS = dict.fromkeys(CUTS)
OLD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "trials", "folder": "a", "data": None, **CUTS}, {"folder": "a", **CUTS}),
    ({"folder": "a", "data": None, "kind": "trials", **NO_CUTS}, {"folder": "a"}),
    ({"kind": "trials", "data": LIBRIMIX, **CUTS}, {**LIBRIMIX, **CUTS}),
    ({"folder": None, "data": LIBRIMIX, "kind": "trials", **NO_CUTS}, LIBRIMIX),
    ({"data": {"kind": "folder", "folder": "a"}, "limit": 3}, {"folder": "a", "limit": 3}),
]


@pytest.mark.parametrize(("old", "new"), OLD)
def test_older_experiments_load(old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = (
        from_dict(Experiment, {"name": "x", "data": {"train": each, "validation": each}}) for each in (old, new)
    )
    assert before == now
    assert changed_settings(before, now) == []
    shorter = {**new, "segment_seconds": 0.5}
    other = from_dict(Experiment, {"name": "x", "data": {"train": shorter, "validation": new}})
    assert changed_settings(before, other) == ["data.train.segment_seconds"]


def test_dynamic_trials_load() -> None:
    experiment = from_dict(
        Experiment,
        override(LEAST, ['data.train={"kind": "dynamic", "pack": "p", "mixing": {"snr_db": [0.0, 5.0]}}']),
    )
    assert isinstance(experiment.data.train, DynamicTrials)
    assert experiment.data.train.mixing.snr_db == (0.0, 5.0)


@pytest.mark.parametrize("key", ["data_dir", "test_data_dir"])
def test_older_names_of_the_folder_load(key: str) -> None:
    assert from_dict(EvaluationConfig, {key: "a", "metrics": ["pesq"]}) == EvaluationConfig("a", metrics=("pesq",))
    assert from_dict(EvaluationConfig, {key: None, "data": LIBRIMIX}) == from_dict(EvaluationConfig, {"data": LIBRIMIX})
    with pytest.raises(ConfigError, match=f"{key}: unknown key"):
        from_dict(EvaluationConfig, {key: "a", "folder": "b"})


@pytest.mark.parametrize("option", ["-t", "--t", "--folder", "--test-data-dir", "--test-data-folder"])
def test_the_option_has_every_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    make_trials(tmp_path / "trials", 1)
    (tmp_path / "eval.json").write_text(json.dumps({"data": LIBRIMIX, "metrics": ["si_sdr"], "jobs": 1}))
    checkpoint = save_tiny(tmp_path / "a.safetensors")
    done = command(
        capsys, "eval", "-c", tmp_path / "eval.json", "-r", checkpoint, option, tmp_path / "trials",
        "-o", tmp_path / "result.json",
    )  # fmt: skip
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["data"] == {"folder": str(tmp_path / "trials"), "kind": "folder"}


def older(experiment: dict[str, Any]) -> dict[str, Any]:
    """Give the sections of trials the shape of earlier versions."""
    for part in ("train", "validation"):
        values = experiment["data"][part]
        cuts = {key: values.pop(key) for key in CUTS}
        experiment["data"][part] = {"folder": values["folder"], "data": None, "kind": "trials", **cuts}
    return experiment


def test_an_older_run_folder_resumes(tmp_path: Path) -> None:
    """Its config.json and resume file have the old shape, and the weights equal those of an uninterrupted run."""
    trials = make_trials(tmp_path / "trials", 8, seconds=1.0)
    whole = from_dict(Experiment, settings(trials, tmp_path / "whole", scheduler={"name": "constant"}))
    train(whole)
    half = dataclasses.replace(whole, runs_folder=str(tmp_path), training=dataclasses.replace(whole.training, epochs=1))
    folder = train(half)
    config, resume = folder / "config.json", folder / "last.resume.pt"
    config.write_text(json.dumps(older(json.loads(config.read_text()))))
    content = load_pickled(resume)
    save_resume(resume, {**content, "experiment": json.dumps(older(json.loads(content["experiment"])))})
    loaded = load_config(Experiment, config, ["training.epochs=2"])
    train(loaded, resume=folder / "last.safetensors")
    assert equal(weights(folder), weights(tmp_path / "whole" / "toy"))


def test_records_keep_their_keys() -> None:
    """Records keep the keys they had before; the newer keys appear only if they are set."""
    assert list(to_record(FolderTrials("a"))) == ["folder", "kind"]
    assert to_record(FolderTrials("a", limit=2)) == {"limit": 2, "folder": "a", "kind": "folder"}
