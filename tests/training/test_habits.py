"""What users of the original system rely on: long epochs, rich log lines, its shapes and its loss."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SMALL_CONFIGS, TINY
from toy_runs import equal, experiment, quiet, rows_without_time, weights
from voices import make_corpus

from onevoice.audio import read_audio, write_audio
from onevoice.corpus.listing import list_corpus
from onevoice.corpus.packing import pack_corpus
from onevoice.errors import AudioError, ConfigError, MissingDependencyError
from onevoice.evaluation.metrics import pesq
from onevoice.extraction.extractor import load
from onevoice.models import MODELS, SpExPlus, to_network
from onevoice.training.loss import MultiLoss, si_sdr
from onevoice.training.run import Trainer, train
from onevoice.training.tracking import read_rows
from onevoice.trials.reading import TrialDataset, find_trials


def rows_of(folder: Path, part: str) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if any(key.startswith(part) for key in row)]


# ------------------------------------------------------------------ epochs longer than a pass


def test_an_epoch_of_two_passes_takes_the_batches_of_two_epochs(trials: Path, tmp_path: Path) -> None:
    """24 trials in batches of 4 are 6 steps; the second pass has another order and other cuts."""
    one = Trainer(experiment(trials, tmp_path), quiet)
    two = Trainer(experiment(trials, tmp_path, training__steps_per_epoch=12), quiet)
    assert (one.steps_per_epoch, two.steps_per_epoch, two.planned_steps) == (6, 12, 24)
    for epoch in (0, 1):
        passes = [batch for half in (0, 1) for batch in one.source.batches(2 * epoch + half, 0, 6)]
        whole = list(two.source.batches(epoch, 0, 12))
        parts = [*two.source.batches(epoch, 0, 5), *two.source.batches(epoch, 5, 8), *two.source.batches(epoch, 8, 12)]
        for batches in (whole, parts):
            assert [batch["name"] for batch in batches] == [batch["name"] for batch in passes]
            assert all(torch.equal(a["audio"], b["audio"]) for a, b in zip(batches, passes, strict=True))
        halves = [sorted(name for batch in whole[half : half + 6] for name in batch["name"]) for half in (0, 6)]
        assert halves[0] == halves[1]


def test_one_batch_is_learned_by_heart(trials: Path, tmp_path: Path) -> None:
    data = {"folder": str(trials), "limit": 2, "segment_seconds": 0.5, "enrollment_seconds": 1.0}
    changes = {"data__train": data, "data__batch_size": 2, "training__epochs": 1, "training__steps_per_epoch": 60}
    changes |= {"training__log_every_steps": 10, "training__save_every_steps": 60}
    folder = train(experiment(trials, tmp_path, **changes), echo=quiet)
    losses = [row["train/loss"] for row in rows_of(folder, "train/")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 5


def test_drawn_mixtures_never_repeat_within_a_longer_epoch(trials: Path, tmp_path: Path) -> None:
    pack_corpus(list_corpus([make_corpus(tmp_path / "corpus")]), tmp_path / "pack", sample_rate=8000)
    drawn = {"kind": "dynamic", "pack": str(tmp_path / "pack"), "examples_per_epoch": 8}
    trainer = Trainer(experiment(trials, tmp_path, data__train=drawn, training__steps_per_epoch=5), quiet)
    assert trainer.steps_per_epoch == 5
    batches = list(trainer.source.batches(0, 0, 5))
    assert len({row.numpy().tobytes() for batch in batches for row in batch["audio"]}) == 20


def test_a_long_epoch_resumes_bit_for_bit(trials: Path, tmp_path: Path) -> None:
    changes = {"training__steps_per_epoch": 9, "training__epochs": 1}
    whole = train(experiment(trials, tmp_path, name="whole", **changes), echo=quiet)
    pieces = experiment(trials, tmp_path, name="pieces", **changes)
    folder = train(pieces, minutes=0.0, echo=quiet)
    for _ in range(8):
        train(pieces, resume=folder / "last.safetensors", minutes=0.0, echo=quiet)
    assert equal(weights(whole), weights(folder))
    logs = [rows_without_time(read_rows(run / "metrics.jsonl")) for run in (whole, folder)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("scheduler", ["onecycle", "wsd"])
def test_a_run_of_an_earlier_version_keeps_its_shorter_epochs(trials: Path, tmp_path: Path, scheduler: str) -> None:
    """They ended after a pass, whatever `steps_per_epoch` was."""
    changes = {"scheduler": {"name": scheduler}, "training__epochs": 2}
    whole = train(experiment(trials, tmp_path, name="whole", **changes), echo=quiet)
    old = train(experiment(trials, tmp_path, name="old", **changes), minutes=0.0, echo=quiet)
    file = old / "last.resume.pt"
    content = torch.load(file, weights_only=True)
    saved = json.loads(content["experiment"])
    saved["training"]["steps_per_epoch"] = 100
    del content["progress"]["steps_per_epoch"]
    torch.save({**content, "experiment": json.dumps(saved)}, file)
    config = experiment(trials, tmp_path, name="old", training__steps_per_epoch=100, **changes)
    for _ in range(2):  # the second time from a file of this version
        train(config, resume=old / "last.safetensors", minutes=0.0, echo=quiet)
    train(config, resume=old / "last.safetensors", echo=quiet)
    assert equal(weights(whole), weights(old))
    logs = [rows_without_time(read_rows(run / "metrics.jsonl")) for run in (whole, old)]
    assert logs[0] == logs[1]


# ------------------------------------------------------------------ log lines


def test_validation_logs_loss_every_estimate_and_pesq(trials: Path, tmp_path: Path) -> None:
    changes = {"training__epochs": 1, "tracking__pesq_examples": 2, "data__validation_batch_size": 2}
    folder = train(experiment(trials, tmp_path, **changes), echo=quiet)
    [row] = rows_of(folder, "validation/")
    extractor = load(folder / "best.safetensors", device="cpu")
    data, found = TrialDataset(find_trials(trials, 3), 8000), []
    for index in range(3):
        item = data[0, index]
        inputs = {"audio": torch.from_numpy(item.mixture)[None], "ref": torch.from_numpy(item.enrollment)[None]}
        with torch.no_grad():
            estimates = extractor.model(inputs)["predicted_audio"]
        target = torch.from_numpy(item.target)[None]
        quality = pesq(estimates[0][0].numpy(), item.target, 8000)
        found.append([*(float(si_sdr(each, target)) for each in estimates), quality])
    short, middle, long, _ = np.mean(found, 0)
    recorded = [row[f"validation/{name}"] for name in ("si_sdr_db", "si_sdr_2_db", "si_sdr_3_db")]
    np.testing.assert_allclose(recorded, [short, middle, long], atol=1e-3)
    assert row["validation/loss"] == pytest.approx(-(0.8 * short + 0.1 * middle + 0.1 * long), abs=1e-3)
    assert row["validation/pesq"] == pytest.approx(np.mean([each[3] for each in found[:2]]), abs=0.02)


def test_pesq_is_only_measured_when_asked(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pesq", None)
    folder = train(experiment(trials, tmp_path, training__epochs=1, training__steps_per_epoch=1), echo=quiet)
    assert "validation/pesq" not in rows_of(folder, "validation/")[0]


def test_pesq_that_cannot_be_measured_is_named_before_any_work(
    trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {**experiment(trials, tmp_path).model.__dict__, "sample_rate": 12000, "num_classes": 0}
    with pytest.raises(ConfigError, match=r"tracking\.pesq_examples: PESQ is defined at 8000 and 16000 Hz"):
        Trainer(experiment(trials, tmp_path, model=odd, tracking__pesq_examples=1), quiet)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"tracking\.pesq_examples: .*onevoice\[eval\]"):
        Trainer(experiment(trials, tmp_path, tracking__pesq_examples=1), quiet)


def test_each_line_has_its_speed_and_both_rows_of_an_epoch_its_number(trials: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = train(experiment(trials, tmp_path, training__steps_per_epoch=2), echo=lines.append)
    trained, validated = rows_of(folder, "train/"), rows_of(folder, "validation/")
    assert [(row["step"], row["epoch"]) for row in trained] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert [(row["step"], row["epoch"]) for row in validated] == [(2, 1), (4, 2)]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1 step 2", "epoch 2 step 4"]
    assert all(0 < row["train/steps_per_second"] < 1000 for row in trained)


def test_an_epoch_that_ends_early_has_its_number_too(trials: Path, tmp_path: Path) -> None:
    """A decay ends training in the middle of the second epoch."""
    decay = {"name": "wsd", "warmup_steps": 1, "decay_from_step": 6, "decay_steps": 2}
    folder = train(experiment(trials, tmp_path, scheduler=decay, training__log_every_steps=4), echo=quiet)
    assert [(row["step"], row["epoch"]) for row in rows_of(folder, "validation/")] == [(6, 1), (8, 2)]
    assert [(row["step"], row["epoch"]) for row in rows_of(folder, "train/")] == [(4, 1), (8, 2)]


@pytest.mark.parametrize(("every", "steps"), [(100, [4]), (3, [3, 4]), (2, [2, 4])])
def test_the_last_steps_are_logged(trials: Path, tmp_path: Path, every: int, steps: list[int]) -> None:
    changes = {"training__steps_per_epoch": 4, "training__epochs": 1}
    each = train(experiment(trials, tmp_path, name="each", **changes), echo=quiet)
    folder = train(experiment(trials, tmp_path, training__log_every_steps=every, **changes), echo=quiet)
    rows, all_rows = rows_of(folder, "train/"), rows_of(each, "train/")
    assert [row["step"] for row in rows] == steps
    last = [row["train/loss"] for row in all_rows][([0, *steps])[-2] :]
    assert rows[-1]["train/loss"] == pytest.approx(np.mean(last), rel=1e-5)
    assert rows[-1]["train/learning_rate"] == all_rows[-1]["train/learning_rate"]


def test_an_early_stop_logs_the_last_steps(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "validate", lambda self: {"si_sdr_db": 0.0, "si_sdri_db": -self.state.progress.step})
    changes = {"training__early_stop_epochs": 1, "training__steps_per_epoch": 1, "training__epochs": 9}
    folder = train(experiment(trials, tmp_path, training__log_every_steps=100, **changes), echo=quiet)
    assert [row["step"] for row in rows_of(folder, "train/")] == [2]


def test_a_run_that_goes_on_logs_the_lines_of_one_that_never_ended(trials: Path, tmp_path: Path) -> None:
    changes = {"scheduler": {"name": "constant"}, "training__log_every_steps": 4, "training__steps_per_epoch": 3}
    whole = train(experiment(trials, tmp_path, name="whole", training__epochs=4, **changes), echo=quiet)
    folder = train(experiment(trials, tmp_path, name="longer", training__epochs=2, **changes), echo=quiet)
    train(experiment(trials, tmp_path, name="longer", training__epochs=4, **changes),
          resume=folder / "last.safetensors", echo=quiet)  # fmt: skip
    logs = [rows_without_time(rows_of(run, "train/")) for run in (whole, folder)]
    assert [row for row in logs[1] if row["step"] != 6] == logs[0]  # step 6 was the last one once
    assert equal(weights(whole), weights(folder))


def test_training_says_what_is_odd_about_the_data(trials: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trials, tmp_path / "trials")
    path = find_trials(copy)[0].target
    assert isinstance(path, Path)
    write_audio(path, read_audio(path)[0][:-3], 8000)
    lines: list[str] = []
    train(experiment(copy, tmp_path, training__steps_per_epoch=1, training__epochs=1), echo=lines.append)
    assert next(line for line in lines if line.startswith("note: ")).startswith(f"note: {copy}: in 1 of 24 trials")


def test_mixture_enrollment_and_target_are_written_once(trials: Path, tmp_path: Path) -> None:
    folder = train(experiment(trials, tmp_path, training__steps_per_epoch=1, training__epochs=3), echo=quiet)
    names = sorted(path.name for path in (folder / "samples").iterdir())
    trial = find_trials(trials, 1)[0]
    assert names == [
        *(f"step-{step:08d}-{trial.name}-estimate.wav" for step in (1, 2, 3)),
        *(f"trial-{trial.name}-{kind}.wav" for kind in ("enrollment", "mixture", "target")),
    ]
    assert isinstance(trial.target, Path)
    np.testing.assert_allclose(
        read_audio(folder / "samples" / names[-1])[0], read_audio(trial.target)[0], atol=1 / 32768
    )


# ------------------------------------------------------------------ shapes and the loss


@pytest.mark.parametrize("name", list(SMALL_CONFIGS))
def test_audio_with_a_channel_axis_gives_the_same(name: str) -> None:
    """The original system gives (batch, 1, samples)."""
    torch.manual_seed(0)
    model = MODELS[name](SMALL_CONFIGS[name]).eval()
    audio, ref, target = torch.randn(2, 1600), torch.randn(2, 2400), torch.randn(2, 1600)
    length = {"audio_length": torch.tensor([1600, 1200]), "ref_length": torch.tensor([2400, 2000])}
    batches = [{"audio": audio, "ref": ref, **length}, {"audio": audio[:, None], "ref": ref[:, None], **length}]
    speaker = torch.tensor([0, -1])
    predictions = []
    for batch in batches:
        inputs = to_network(batch, torch.device("cpu"))
        assert {"audio_length", "ref_length"} <= inputs.keys()
        predictions.append([model(batch), model(inputs)])
    [plain, _], others = predictions[0], [predictions[0][1], *predictions[1]]
    loss = MultiLoss(weights=None if len(plain["predicted_audio"]) == 3 else (1.0,))
    expected = loss(plain, target, speaker, length["audio_length"], audio).total
    for other in others:
        for one, same in zip(plain["predicted_audio"], other["predicted_audio"], strict=True):
            assert torch.equal(one, same)
        assert loss(other, target[:, None], speaker, length["audio_length"], audio[:, None]).total == expected


@pytest.mark.parametrize("shape", [(1600,), (2, 2, 1600), (1, 2, 1, 1600)])
def test_any_other_shape_is_refused_in_one_sentence(shape: tuple[int, ...]) -> None:
    model, good = SpExPlus(TINY), torch.randn(2, 1600)
    for name in ("audio", "ref"):
        batch = {"audio": good, "ref": good, name: torch.randn(shape)}
        for call in (lambda batch: model(batch), lambda batch: to_network(batch, torch.device("cpu"))):
            with pytest.raises(AudioError, match=rf"^{name}: has shape .*; give \(batch, samples\) or [^\n]*$"):
                call(batch)
    prediction = model({"audio": good, "ref": good})
    with pytest.raises(AudioError, match=r"^target: has shape"):
        MultiLoss()(prediction, torch.randn(shape), torch.tensor([0, 1]))


def test_the_first_value_of_the_loss_is_lambd() -> None:
    assert MultiLoss(0.25) == MultiLoss(lambd=0.25)
    assert MultiLoss(0.25) != MultiLoss()
    with pytest.raises(ValueError, match="positional"):
        MultiLoss(0.5, 0.1)
