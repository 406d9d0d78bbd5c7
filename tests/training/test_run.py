"""Training: it learns, resumes bit for bit after a kill at any moment, and skips bad steps."""

import json
import math
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_runs import (
    equal,
    experiment,
    quiet,
    rows_without_time,
    run_command,
    settings,
    start,
    weights,
    write_experiment,
)
from voices import make_trials

from onevoice.audio import write_audio
from onevoice.config import from_dict
from onevoice.errors import CheckpointError, ConfigError, CorpusError, TrainingError
from onevoice.extraction.checkpoint import Card, load_checkpoint, save_checkpoint
from onevoice.extraction.pickled import load_pickled, save_resume
from onevoice.models import build
from onevoice.models.bandsplit_blocks import BandSplitConfig
from onevoice.training.experiment import Experiment
from onevoice.training.run import Trainer, train
from onevoice.training.tracking import read_rows


def test_a_run_writes_the_documented_files(finished: Path) -> None:
    folder = finished
    assert {"config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "last.resume.pt", "samples"} <= {
        path.name for path in folder.iterdir()
    }
    config = from_dict(Experiment, json.loads((folder / "config.json").read_text()))
    assert config.model.num_classes == 4  # counted from the data
    _, card = load_checkpoint(folder / "best.safetensors")
    assert card.config == config.model
    assert card.speakers == ("spk000", "spk001", "spk002", "spk003")
    assert card.facts["step"] in (6, 12)
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "validation/si_sdri_db" in row] == [6, 12]
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert max(rates) == pytest.approx(0.003, rel=0.05)
    assert rates[-1] < 1e-4
    assert len(list((folder / "samples").glob("*-estimate.wav"))) == 2


def test_a_tiny_model_learns_toy_voices(tmp_path: Path) -> None:
    """Mean SI-SDRi above 3 dB on new utterances of the training voices, from 0 dB for the mixture."""
    make_trials(tmp_path / "train", 48, speakers=2, seconds=1.0)
    make_trials(tmp_path / "validation", 12, speakers=2, seconds=1.0, seed=1)
    values = settings(
        tmp_path / "train", tmp_path, training__epochs=12, training__log_every_steps=1000,
        training__save_every_steps=1000, scheduler__max_learning_rate=0.03, data__train__segment_seconds=1.0,
        data__validation={"folder": str(tmp_path / "validation")}, data__validation_batch_size=12,
    )  # fmt: skip
    values["model"] |= {"filters": 32, "channels": 16, "hidden": 32, "blocks": 3, "speaker_dim": 16}
    assert Trainer(from_dict(Experiment, values), echo=quiet).validate()["si_sdri_db"] < 1  # untrained
    (tmp_path / "toy.json").write_text(json.dumps(values))
    start(tmp_path / "output", run_command, "train", "--c", tmp_path / "toy.json").finish()  # no checks of shapes
    _, card = load_checkpoint(tmp_path / "toy" / "best.safetensors")
    assert card.facts["best_validation_si_sdri_db"] > 3


@pytest.mark.parametrize(
    ("scheduler", "more"),
    [
        ({"name": "onecycle", "max_learning_rate": 0.01}, {}),
        ({"name": "wsd", "warmup_steps": 3, "decay_steps": 4}, {"ema": 0.9, "accumulate": 2}),
    ],
)
def test_a_run_killed_three_times_ends_with_the_same_bits(
    trials: Path, tmp_path: Path, scheduler: dict[str, Any], more: dict[str, Any]
) -> None:
    """SIGKILL at the 1st, 5th and 9th log line, wherever the process is then; compare with an uninterrupted run."""
    changes = {f"training__{name}": value for name, value in more.items()}
    config = write_experiment(tmp_path / "killed.json", trials, name="killed", scheduler=scheduler, **changes)
    folder = tmp_path / "runs" / "killed"
    resume = folder / "last.safetensors"
    kills = 0
    for lines in (1, 5, 9):
        again = ["--r", str(resume)] if resume.exists() else []
        if not again and folder.exists():
            (folder / "last.resume.pt").unlink(missing_ok=True)  # killed between its first two writes
        child = start(tmp_path / "output", run_command, "train", "--c", config, *again)
        child.wait_for_lines(folder / "metrics.jsonl", lines)
        child.process.kill()
        child.process.join()
        kills += child.process.exitcode == -signal.SIGKILL
    assert kills == 3
    start(tmp_path / "output", run_command, "train", "--r", resume).finish()
    whole = train(experiment(trials, tmp_path, name="whole", scheduler=scheduler, **changes), echo=quiet)
    assert equal(weights(whole), weights(folder))
    states = [load_pickled(run / "last.resume.pt") for run in (whole, folder)]
    for part in ("progress", "scheduler"):
        assert states[0][part] == states[1][part]
    assert equal(states[0]["model"], states[1]["model"])
    assert equal(states[0]["average"].get("model", {}), states[1]["average"].get("model", {}))
    logs = [rows_without_time(read_rows(run / "metrics.jsonl")) for run in (whole, folder)]
    assert logs[0] == logs[1]


def test_workers_and_saving_change_nothing(trials: Path, finished: Path, tmp_path: Path) -> None:
    other = experiment(trials, tmp_path, name="other", data__workers=2, training__save_every_steps=5)
    assert equal(weights(train(other, echo=quiet)), weights(finished))


def test_a_run_stopped_after_every_step_equals_an_uninterrupted_run(trials: Path, tmp_path: Path) -> None:
    """Stopped after each of six steps in two epochs."""
    whole = train(experiment(trials, tmp_path, name="whole", training__steps_per_epoch=3), echo=quiet)
    pieces = experiment(trials, tmp_path, name="pieces", training__steps_per_epoch=3)
    lines: list[str] = []
    folder = train(pieces, minutes=0.0, echo=lines.append)
    assert lines == [f"time is up at step 1; resume with --r {folder}/last.safetensors"]
    for _ in range(6):
        train(pieces, resume=folder / "last.safetensors", minutes=0.0, echo=lines.append)
    assert sum("time is up" in line for line in lines) == 6
    expected, got = weights(whole), weights(folder)
    assert equal(expected, got)


def test_a_used_folder_is_refused(trials: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds a run; resume it with --r .*last\.safetensors"):
        train(experiment(trials, finished.parent), echo=quiet)


def test_load_takes_only_the_weights(trials: Path, finished: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = Trainer(experiment(trials, tmp_path, name="second"), echo=lines.append)
    trainer.load(finished / "best.safetensors")
    expected = load_checkpoint(finished / "best.safetensors")[0]
    assert all(torch.equal(value, expected[name]) for name, value in trainer.state.model.state_dict().items())
    assert trainer.state.progress.step == 0


def test_load_for_other_speakers_reinitializes_the_classifier(finished: Path, tmp_path: Path) -> None:
    fewer = make_trials(tmp_path / "two", 4, speakers=2)
    lines: list[str] = []
    trainer = Trainer(experiment(fewer, tmp_path, name="second"), echo=lines.append)
    fresh = trainer.state.model.state_dict()["classifier.weight"].clone()
    trainer.load(finished / "best.safetensors")
    assert torch.equal(trainer.state.model.state_dict()["classifier.weight"], fresh)
    assert any("the classifier is reinitialized" in line for line in lines)


def test_load_keeps_what_fits_when_the_bands_are_others(trials: Path, tmp_path: Path) -> None:
    sizes = {"name": "bandsplit", "channels": 8, "hidden": 8, "feed_forward": 8, "shared": 4, "blocks": 2, "heads": 2}
    model = build(from_dict(BandSplitConfig, {**sizes, "bands": [[4, 4], [2, 16]]}))
    save_checkpoint(tmp_path / "wide.safetensors", model.state_dict(), Card(model.config))
    narrow = {**sizes, "bands": [[4, 3], [2, 12]], "window_seconds": 0.02, "causal": True, "normalize_level": False}
    lines: list[str] = []
    trainer = Trainer(experiment(trials, tmp_path, model=narrow), echo=lines.append)
    fresh = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
    trainer.load(tmp_path / "wide.safetensors")
    loaded, given = trainer.state.model.state_dict(), model.state_dict()
    of_bands = {f"{part}.weights.{group}" for part in ("split", "voice_split", "mask") for group in range(2)}
    for name, value in loaded.items():
        kept = name not in of_bands | {"mask.bias"}
        assert torch.equal(value, given[name] if kept else fresh[name]), name
    (line,) = (line for line in lines if "other sizes are reinitialized: mask.bias, mask.weights.0, " in line)
    assert line.count("weights") == len(of_bands)


class ConfigParser:
    """Replaces the class that the original system pickled into its checkpoints."""

    def __init__(self) -> None:
        self.config = {"n_gpu": 1}


def test_load_reads_the_original_pth_format(trials: Path, tmp_path: Path) -> None:
    trainer = Trainer(experiment(trials, tmp_path), echo=quiet)
    state = {f"module.{name}": value + 1 for name, value in trainer.state.model.state_dict().items()}
    original = {"arch": "SpExPlus", "epoch": 3, "state_dict": state, "monitor_best": 1.0, "config": ConfigParser()}
    torch.save(original, tmp_path / "model_best.pth")
    trainer.load(tmp_path / "model_best.pth")
    assert all(torch.equal(value, state[f"module.{name}"]) for name, value in trainer.state.model.state_dict().items())


def test_resume_refuses_other_settings(trials: Path, finished: Path, tmp_path: Path) -> None:
    last = finished / "last.safetensors"
    with pytest.raises(CheckpointError, match=r"other settings \(model\.hidden\)"):
        train(experiment(trials, tmp_path, model__hidden=40), resume=last)
    with pytest.raises(CheckpointError, match=r"other settings \(training\.epochs\)"):
        train(experiment(trials, tmp_path, training__epochs=5), resume=last)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(experiment(trials, tmp_path), resume=tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [("data__batch_size", 2), ("training__steps_per_epoch", 3), ("training__precision", "bfloat16"), ("seed", 5)],
)
def test_resume_refuses_settings_that_change_the_run(
    trials: Path, finished: Path, tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(CheckpointError, match=rf"other settings \({key.replace('__', '.')}\)"):
        train(experiment(trials, tmp_path, **{key: value}), resume=finished / "last.safetensors")


def test_a_run_from_before_a_setting_existed_resumes(trials: Path, tmp_path: Path) -> None:
    config = experiment(trials, tmp_path, training__epochs=1, loss__level=0.05)
    last = train(config, echo=quiet) / "last.safetensors"
    assert load_checkpoint(last)[1].config.has_level
    content = load_pickled(last.with_suffix(".resume.pt"))
    saved = json.loads(content["experiment"])
    del saved["model"]["has_level"], saved["loss"]["weights"]
    save_resume(last.with_suffix(".resume.pt"), {**content, "experiment": json.dumps(saved)})
    train(config, resume=last, echo=quiet)
    with pytest.raises(CheckpointError, match=r"other settings \(model\.has_level, loss\.level\)"):
        train(experiment(trials, tmp_path, training__epochs=1), resume=last, echo=quiet)


def test_resume_recognizes_moved_data(trials: Path, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "toy"))
    shutil.copytree(trials, tmp_path / "moved")
    moved = experiment(tmp_path / "moved", tmp_path)
    train(moved, resume=folder / "last.safetensors", echo=quiet)
    for path in sorted((tmp_path / "moved").glob("*_000003-*")):
        path.unlink()
    with pytest.raises(CheckpointError, match="the training data"):
        train(moved, resume=folder / "last.safetensors", echo=quiet)


def test_a_moved_run_resumes_in_its_new_folder(trials: Path, tmp_path: Path) -> None:
    folder = train(experiment(trials, tmp_path / "a"), minutes=0.0, echo=quiet)
    (tmp_path / "b").mkdir()
    folder.rename(tmp_path / "b" / "toy")
    train(experiment(trials, tmp_path / "a"), resume=tmp_path / "b" / "toy" / "last.safetensors", echo=quiet)
    assert load_checkpoint(tmp_path / "b" / "toy" / "last.safetensors")[1].facts["step"] == 12
    assert not folder.exists()


def test_resuming_a_run_that_stopped_early_changes_nothing(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "validate", lambda self: {"si_sdr_db": 0.0, "si_sdri_db": 1.0})
    config = experiment(
        trials, tmp_path, training__epochs=5, training__early_stop_epochs=1, training__steps_per_epoch=1
    )
    last = train(config, echo=quiet) / "last.safetensors"
    before = last.read_bytes()
    lines: list[str] = []
    train(config, resume=last, echo=lines.append)
    assert last.read_bytes() == before
    assert lines[-1] == "no better validation for 1 epochs: stopped"


def test_validation_scores_only_trials_whose_target_speaks(trials: Path, tmp_path: Path) -> None:
    shutil.copytree(trials, tmp_path / "some")
    names = sorted({path.name.rsplit("-", 1)[0] for path in (tmp_path / "some").iterdir()})
    write_audio(tmp_path / "some" / f"{names[1]}-target.wav", np.zeros(8000, np.float32), 8000)
    with_absent = Trainer(experiment(tmp_path / "some", tmp_path), echo=quiet).validate()
    assert with_absent.pop("absent_suppression_db") < 30
    for name in (names[1],):
        for path in (tmp_path / "some").glob(f"{name}-*"):
            path.unlink()
    without = experiment(tmp_path / "some", tmp_path, data__validation__limit=2)
    trainer = Trainer(without, echo=quiet)
    present = trainer.validate()
    assert with_absent.pop("loss") < present.pop("loss") - 5  # the loss has a term for the absent target
    assert with_absent == pytest.approx(present, abs=1e-4)
    for path in (tmp_path / "some").glob("*-target.wav"):
        write_audio(path, np.zeros(8000, np.float32), 8000)
    with pytest.raises(CorpusError, match="every target is silent"):
        trainer.validate()


def test_too_many_nonfinite_steps_in_a_row_end_the_run(trials: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = Trainer(experiment(trials, tmp_path, training__max_nonfinite_steps=2), echo=lines.append)
    batch = next(iter(trainer.source.batches(0, 0, 1)))
    trainer.learner.step(batch)
    before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
    poisoned = {**batch, "audio": batch["audio"] * math.nan}
    trainer.learner.step(poisoned)
    assert all(torch.equal(value, before[name]) for name, value in trainer.state.model.state_dict().items())
    assert "not finite, step skipped (1 so far)" in lines[-1]
    assert trainer.learner.step(batch).total.isfinite()
    trainer.learner.step(poisoned)
    with pytest.raises(TrainingError, match="no finite loss for 2 steps"):
        trainer.learner.step(poisoned)
    assert trainer.state.progress.skipped_steps == 3


def test_gradients_are_clipped(trials: Path, tmp_path: Path) -> None:
    trainer = Trainer(experiment(trials, tmp_path, training__clip_gradient_norm=0.01), echo=quiet)
    trainer.learner.step(next(iter(trainer.source.batches(0, 0, 1))))
    norm = torch.stack([parameter.grad.norm() for parameter in trainer.state.model.parameters()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_early_stop(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    monkeypatch.setattr(Trainer, "validate", lambda self: {"si_sdr_db": 0.0, "si_sdri_db": next(scores)})
    lines: list[str] = []
    folder = train(
        experiment(trials, tmp_path, training__epochs=5, training__early_stop_epochs=2, training__steps_per_epoch=1),
        echo=lines.append,
    )
    assert lines[-1] == "no better validation for 2 epochs: stopped"
    assert load_checkpoint(folder / "best.safetensors")[1].facts["best_validation_si_sdri_db"] == 3.0
    assert load_checkpoint(folder / "best.safetensors")[1].facts["step"] == 2
    assert load_checkpoint(folder / "last.safetensors")[1].facts["step"] == 4


@pytest.mark.parametrize(("precision", "scheduler"), [("bfloat16", "constant"), ("float32", "plateau")])
def test_precisions_and_schedulers_run(trials: Path, tmp_path: Path, precision: str, scheduler: str) -> None:
    config = experiment(
        trials, tmp_path, training__precision=precision, training__epochs=1, scheduler={"name": scheduler}
    )
    rows = read_rows(train(config, echo=quiet) / "metrics.jsonl")
    assert all(math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)


def test_too_few_classes(trials: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_classes: 2 is too small for the 4 speakers"):
        Trainer(experiment(trials, tmp_path, model__num_classes=2))


def test_without_classification_there_is_no_classifier(trials: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = train(experiment(trials, tmp_path, loss__lambd=0.0), echo=quiet)
    state, card = load_checkpoint(folder / "last.safetensors")
    assert card.config.num_classes == len(state["classifier.weight"]) == 0
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    assert rows
    assert all(row["train/cross_entropy"] == 0 for row in rows)


def test_a_folder_without_trials(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no trials"):
        Trainer(experiment(tmp_path, tmp_path))
