"""Configs and checkpoints of the original system train and evaluate here, and what cannot be taken over is said."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original import ORIGINAL, original_checkpoint, original_config, random_network, their_name
from tiny import ROOT, command
from toy_runs import quiet
from voices import make_trials

from onevoice.cli.training import visible_device
from onevoice.config import from_dict, load_config, to_dict
from onevoice.errors import ConfigError
from onevoice.evaluation.run import EvaluationConfig
from onevoice.extraction.checkpoint import load_checkpoint
from onevoice.training.experiment import Experiment, OneCycleConfig, OptimizerConfig
from onevoice.training.original import (
    is_for_evaluation,
    is_original,
    load_experiment,
    translate_evaluation,
    translate_experiment,
)
from onevoice.training.run import Trainer

GENERAL = {"type": "MixedGeneralDataset", "args": {"data_dir": "a/b"}}
"""A data set in the folders mix/, refs/ and targets/ of a/b."""


def change(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a key; a number in its path is a place in a list."""
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    node: Any = values
    for parent in parents:
        node = node[parent]
    node[last] = value
    return values


def test_every_key_is_translated_or_named() -> None:
    translation = translate_experiment(original_config())
    experiment = from_dict(Experiment, translation.values)
    assert experiment.model == ORIGINAL
    assert to_dict(experiment.data.train)["folder"] == "mixes/train"
    assert to_dict(experiment.data.validation)["folder"] == "mixes/test"
    assert (experiment.data.batch_size, experiment.data.validation_batch_size, experiment.data.workers) == (5, 1, 0)
    assert experiment.optimizer == OptimizerConfig(learning_rate=0.001)
    assert experiment.scheduler == OneCycleConfig(max_learning_rate=0.002, rising_part=0.2)
    assert (experiment.loss.alpha, experiment.loss.beta, experiment.loss.lambd) == (0.1, 0.1, 0.5)
    training = experiment.training
    assert (training.epochs, training.steps_per_epoch, training.clip_gradient_norm) == (3, None, None)
    assert (training.keep_every_epochs, training.early_stop_epochs, training.device) == (5, 100, "cpu")
    assert (experiment.name, experiment.runs_folder, experiment.seed) == ("original", "saved", 123)
    assert experiment.tracking.wandb.project is None
    assert [line.partition(" (")[0] for line in translation.left_out] == [
        "data.train.datasets[0].args.index_dir",
        "data.val.datasets[0].args.index_dir",
        "lr_scheduler.args.steps_per_epoch",
        "trainer.monitor",
        "trainer.verbosity",
    ]
    assert experiment.tracking.pesq_examples == 10


@pytest.mark.parametrize(
    ("key", "value", "path", "expected"),
    [
        ("trainer.visualize", "wandb", "tracking.wandb", {"project": "voices", "mode": "online"}),
        ("trainer.visualize", "tensorboard", "tracking.tensorboard", True),
        ("trainer.len_epoch", 50, "training.steps_per_epoch", 50),
        ("trainer.grad_norm_clip", 5.0, "training.clip_gradient_norm", 5.0),
        ("trainer.early_stop", 0, "training.early_stop_epochs", None),
        ("loss.args", {"lambd": 0.25}, "loss.lambd", 0.25),
        ("optimizer", {"type": "AdamW", "args": {"lr": 0.5}}, "optimizer.weight_decay", 0.01),
        ("optimizer", {"type": "AdamW", "args": {"lr": 0.5}}, "optimizer.name", "adamw"),
        ("optimizer", {"type": "AdamW", "args": {"lr": 0.5}}, "optimizer.learning_rate", 0.5),
        ("lr_scheduler.args.div_factor", 10.0, "scheduler.start_divisor", 10.0),
        ("data.train.datasets.0", GENERAL, "data.train.folder", "a/b"),
        ("arch.args.L2", 80, "model.window_seconds", [0.005, 0.01, 0.04]),
        ("n_gpu", 1, "training.device", "auto"),
        ("metrics", [{"type": "SISPDRMetric"}], "tracking.pesq_examples", 0),
    ],
)  # fmt: skip
def test_keys_with_a_counterpart(key: str, value: Any, path: str, expected: Any) -> None:
    translated: Any = translate_experiment(change(original_config(), key, value)).values
    from_dict(Experiment, translated)
    for part in path.split("."):
        translated = translated[part]
    assert translated == expected


def test_without_a_schedule_the_rate_is_constant() -> None:
    values = original_config()
    del values["lr_scheduler"]
    assert translate_experiment(values).values["scheduler"] == {"name": "constant"}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("augmentations.wave", [{"type": "Gain", "args": {}}], "augmentations.wave (use noise"),
        ("n_gpu", 2, "n_gpu (start with torchrun"),
        ("trainer.resume_from", "x", "trainer.resume_from"),
        ("arch.args.dropout", 0.1, "arch.args.dropout"),
        ("optimizer.args.amsgrad", True, "optimizer.args.amsgrad"),
        ("lr_scheduler.args.anneal_strategy", "linear", "lr_scheduler.args.anneal_strategy"),
        ("lr_scheduler.args.epochs", 9, "lr_scheduler.args.epochs (the schedule ends"),
        ("data.train.batch_sampler", {"type": "X"}, "data.train.batch_sampler"),
        ("data.test", {"batch_size": 1}, "data.test"),
        ("text_encoder", {}, "text_encoder"),
    ],
)
def test_keys_without_a_counterpart_are_named(key: str, value: Any, named: str) -> None:
    usual = translate_experiment(original_config()).left_out
    left_out = translate_experiment(change(original_config(), key, value)).left_out
    (more,) = [line for line in left_out if line not in usual]
    assert more.startswith(named)


def test_a_second_data_set_is_named() -> None:
    values = original_config()
    values["data"]["train"]["datasets"] *= 2
    assert "data.train.datasets[1] (put all trials into one folder)" in translate_experiment(values).left_out


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("arch.type", "BaselineModel", r"^arch\.type: 'BaselineModel' has no counterpart; choose SpexPlus$"),
        ("optimizer.type", "SGD", r"^optimizer\.type: 'SGD' has no counterpart; choose Adam or AdamW$"),
        ("lr_scheduler.type", "StepLR", r"^lr_scheduler\.type: 'StepLR' has no counterpart; choose OneCycleLR$"),
        ("loss.type", "CELossWrapper", r"^loss\.type: 'CELossWrapper' has no counterpart; choose MultiLoss$"),
        ("data.train.datasets.0.type", "X", r"^data\.train\.datasets\[0\]\.type: 'X' has no counterpart"),
        ("data.train.datasets", [], r"^data\.train\.datasets: is missing; name a folder of trials there$"),
        ("data", {}, r"^data\.train\.datasets: is missing"),
        (
            "trainer.visualize",
            "comet",
            r"^trainer\.visualize: 'comet' has no counterpart; choose wandb or tensorboard$",
        ),
        ("arch.args.hidden", 9, r"^arch\.args\.hidden: must be 8 to match the other sizes, not 9$"),
        ("arch.args.L", 42, r"^arch\.args\.L: must be 40 to match the other sizes, not 42$"),
        ("arch.args.embed_dim", "wide", r"^arch\.args\.embed_dim: must be a whole number above 0, not 'wide'$"),
        ("metrics", ["SNR"], r"^metrics: 'SNR' has no counterpart; choose SISPDRMetric or PESQMetric$"),
        ("trainer.save_dir", {"a": 1}, r"^trainer\.save_dir: must be a string, not \{'a': 1\}$"),
        ("preprocessing.sr", 0, r"^preprocessing\.sr: must be a whole number above 0, not 0$"),
        ("arch.args", 3, r"^arch\.args: must be an object, not 3$"),
    ],
)
def test_what_cannot_be_translated(key: str, value: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        translate_experiment(change(original_config(), key, value))


def test_wrong_values_are_named_in_our_keys(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change(original_config(), "trainer.epochs", "many")))
    with pytest.raises(ConfigError, match=r"config\.json: training\.epochs: input should be a valid integer"):
        load_experiment(path, say=quiet)


def test_an_evaluation_has_the_test_trials_and_metrics() -> None:
    values = original_config()
    values["data"] = {"test": {**values["data"]["val"], "batch_size": 3}}
    assert is_for_evaluation(values)
    assert not is_for_evaluation(original_config())
    translation = translate_evaluation(values)
    config = from_dict(EvaluationConfig, translation.values)
    assert (config.folder, config.batch_size, config.metrics) == ("mixes/test", 3, ("si_sdr", "pesq"))
    assert (config.model, config.device) == (ORIGINAL, "cpu")
    assert [line.partition(" (")[0] for line in translation.left_out] == [
        "data.test.datasets[0].args.index_dir",
        "data.test.num_workers",
    ]
    with pytest.raises(ConfigError, match=r"^metrics: 'SNR' has no counterpart; choose SISPDRMetric or PESQMetric$"):
        translate_evaluation(change(values, "metrics", [{"type": "SNR"}]))


def test_our_own_configs_are_not_original_ones() -> None:
    assert is_original(original_config())
    for path in (ROOT / "configs").glob("*.json"):
        assert not is_original(json.loads(path.read_text()))


# Runs


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of the original system: data, config.json beside a checkpoint, and nothing trained yet."""
    make_trials(tmp_path / "mixes" / "train", 6)
    make_trials(tmp_path / "mixes" / "test", 2)
    (tmp_path / "config.json").write_text(json.dumps(original_config()))
    torch.save(original_checkpoint(random_network()), tmp_path / "checkpoint-epoch1.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_training_from_an_original_config_with_its_options(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--c", "config.json", "-d", "cpu", "--lr", "0.0005", "--bs", "3", "--set", "training.epochs=1"]
    result = command(capsys, "train", *arguments)
    assert result.status == 0, result.err
    assert "config.json: translated from the original system; without a counterpart: data.train." in result.out
    run = home / "saved" / "original"
    saved = load_config(Experiment, run / "config.json")
    assert saved.scheduler == OneCycleConfig(max_learning_rate=0.0005, rising_part=0.2)
    assert (saved.optimizer.learning_rate, saved.data.batch_size, saved.training.device) == (0.0005, 3, "cpu")
    assert load_checkpoint(run / "last.safetensors")[1].facts["step"] == 2  # of 6 trials
    result = command(capsys, "eval", "--c", run / "config.json", "--r", run / "last.safetensors", "--metrics", "si_sdr")
    assert result.status == 0, result.err
    assert f"{run / 'config.json'}: a training config; its validation trials are the default" in result.err
    assert "trials   2 with the target" in result.out


def test_eval_takes_original_configs_and_checkpoints(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--c", "config.json", "--r", "checkpoint-epoch1.pth", "--metrics", "si_sdr", "-j", "1"]
    result = command(capsys, *arguments)
    assert result.status == 0, result.err
    assert "trials   2 with the target" in result.out
    result = command(capsys, *arguments, "--test-data-folder", "mixes/train")
    assert "checkpoint-epoch1.pth on mixes/train" in result.out
    assert "trials   6 with the target" in result.out


def test_convert_writes_or_prints_a_config(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = command(capsys, "convert", "config.json", "new.json")
    assert (written.status, written.out) == (0, "")
    assert written.err.startswith("new.json: a config for onevoice train; without a counterpart: data.train.")
    assert load_config(Experiment, home / "new.json") == load_experiment(home / "config.json", say=quiet)
    assert json.loads(command(capsys, "convert", "config.json").out) == json.loads((home / "new.json").read_text())
    again = command(capsys, "convert", "new.json", "newer.json")
    assert (again.status, again.out) == (2, "")
    assert "new.json: not a config of the original system" in again.err


def test_loading_keeps_the_classifier_and_says_what_differs(home: Path) -> None:
    lines: list[str] = []
    trainer = Trainer(load_experiment("config.json", say=quiet), echo=lines.append)
    trainer.begin(None, "checkpoint-epoch1.pth")
    own = random_network().state_dict()
    assert all(torch.equal(values, own[name]) for name, values in trainer.state.model.state_dict().items())
    assert lines == ["weights of checkpoint-epoch1.pth loaded; training starts at step 0"]
    trainer = Trainer(load_experiment("config.json", ["model.norm_eps=1e-5"], quiet), echo=lines.append)
    trainer.load("checkpoint-epoch1.pth")
    assert "checkpoint-epoch1.pth: was trained with model.norm_eps=1e-07; this config has other values" in lines


def test_resuming_takes_over_weights_moments_epoch_and_rate(home: Path) -> None:
    lines: list[str] = []
    experiment = load_experiment("config.json", ["data.batch_size=3"], quiet)
    trainer = Trainer(experiment, echo=lines.append)
    rates = []
    fresh = Trainer(experiment, echo=quiet)
    for _ in range(4):
        rates.append(fresh.state.optimizer.param_groups[0]["lr"])
        fresh.state.optimizer.step()
        fresh.state.step_schedule()
    trainer.begin("checkpoint-epoch1.pth", None)
    state = trainer.state
    assert (state.progress.epoch, state.progress.step, state.progress.step_in_epoch) == (1, 2, 0)
    assert state.optimizer.param_groups[0]["lr"] == rates[2]
    own, content = random_network(), original_checkpoint(random_network())
    parameters = {their_name(name) for name, _ in own.named_parameters()}
    order = [name for name in content["state_dict"] if name in parameters]
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, own.state_dict()[name])
        moments, number = state.optimizer.state[parameter], order.index(their_name(name))
        assert float(moments["step"]) == 7
        assert torch.equal(moments["exp_avg"], torch.full_like(parameter, number))
        assert torch.equal(moments["exp_avg_sq"], torch.full_like(parameter, number**2))
    (line,) = lines
    assert line.startswith("resumed checkpoint-epoch1.pth at epoch 1, step 2, in saved/original: weights and moments")
    assert line.endswith("its order of the data, random numbers and best score cannot be resumed")
    assert trainer.run() == Path("saved/original")
    assert load_checkpoint("saved/original/last.safetensors")[1].facts["step"] == 6


def sgd(content: dict[str, Any]) -> None:
    content["optimizer"]["state"] = {}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (sgd, "checkpoint-epoch1.pth: cannot be resumed: its optimizer does not hold the moments of Adam for every"),
        (lambda content: content.update(epoch=3), "checkpoint-epoch1.pth: all 3 epochs are done; set training.epochs"),
        (
            lambda content: content.update(state_dict={"net.0.weight": torch.zeros(1)}),
            "checkpoint-epoch1.pth: not a checkpoint of the original system; take its weights alone with --load",
        ),
    ],
)
def test_what_cannot_be_resumed(
    home: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    content = original_checkpoint(random_network())
    spoil(content)
    torch.save(content, home / "checkpoint-epoch1.pth")
    result = command(capsys, "train", "--r", "checkpoint-epoch1.pth")  # with the config beside it
    assert result.status == 2
    assert result.err.startswith(f"onevoice: error: {complaint}")
    assert result.err.count("\n") == 1


def test_the_number_of_a_gpu_hides_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert [visible_device(word) for word in (None, "cpu", "cuda:1")] == [None, "cpu", "cuda:1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert visible_device("3") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    with pytest.raises(ConfigError, match=r"^--device 0,1: one process has one GPU; for several, use torchrun"):
        visible_device("0,1")
