"""Evaluation: the same numbers for any batch size and number of processes, checked against the metrics themselves."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from voices import make_trials

from onevoice.audio import read_audio, write_audio
from onevoice.errors import MissingDependencyError
from onevoice.evaluation.metrics import pesq, si_sdr, si_sdr_improvement, stoi
from onevoice.evaluation.summary import EvaluationConfig, evaluate, format_report, require_metrics, save_report
from onevoice.extraction.checkpoint import Card
from onevoice.extraction.extractor import Extractor
from onevoice.models import SpExPlusConfig, build_model
from onevoice.trials.trials import find_trials

CONFIG = SpExPlusConfig(
    sample_rate=8000, filters=16, channels=12, hidden=20, blocks=3, stacks=2, speaker_dim=10, num_classes=5
)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    torch.manual_seed(0)
    return Extractor(build_model(CONFIG), Card(CONFIG))


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trials of four different lengths."""
    folder = tmp_path_factory.mktemp("trials")
    for number, seconds in enumerate((1.0, 1.31, 1.7, 2.02)):
        make_trials(folder / "parts" / str(number), 1, seconds=seconds, seed=number)
        for path in (folder / "parts" / str(number)).iterdir():
            path.rename(folder / path.name.replace("_000000", f"_{number:06d}"))
    return folder


def config(trials: Path, **changes: object) -> EvaluationConfig:
    return EvaluationConfig(folder=str(trials), **{"jobs": 1, **changes})  # type: ignore[arg-type]


def test_the_rows_are_the_metrics_of_the_estimates(extractor: Extractor, trials: Path) -> None:
    report = evaluate(extractor, config(trials), progress=False)
    assert [row.name for row in report.trials] == [trial.name for trial in find_trials(trials)]
    for row, trial in zip(report.trials, find_trials(trials), strict=True):
        mixture, ref, target = (read_audio(path)[0] for path in (trial.mixture, trial.enrollment, trial.target))
        batch = {"audio": torch.from_numpy(mixture)[None], "ref": torch.from_numpy(ref)[None]}
        estimate = extractor.estimate(batch)[0].numpy()
        expected = {
            "si_sdr": si_sdr(estimate, target),
            "si_sdr_improvement": si_sdr_improvement(estimate, mixture, target),
            "pesq": pesq(estimate, target, 8000),
            "stoi": stoi(estimate, target, 8000),
        }
        assert row.values == pytest.approx(expected, abs=1e-4)
        assert row.seconds == len(mixture) / 8000
    mean = np.mean([row.values["si_sdr"] for row in report.trials])
    assert report.summaries["si_sdr"].mean == pytest.approx(mean)
    assert report.failure_rate == np.mean([row.values["si_sdr_improvement"] < 1 for row in report.trials])


def test_batch_size_and_processes_change_nothing(extractor: Extractor, trials: Path) -> None:
    one = evaluate(extractor, config(trials), progress=False)
    many = evaluate(extractor, config(trials, batch_size=3, jobs=2), progress=False)
    for single, batched in zip(one.trials, many.trials, strict=True):
        assert single.name == batched.name
        assert batched.values == pytest.approx(single.values, abs=2e-3)
    assert one.failure_rate == many.failure_rate


def test_a_silent_estimate_is_counted_not_fatal(trials: Path) -> None:
    model = build_model(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = evaluate(Extractor(model, Card(CONFIG)), config(trials), progress=False)
    assert report.summaries["pesq"].mean is None
    assert report.summaries["pesq"].missing == 4
    assert report.refusals() == {"pesq: PESQ refused: the estimate is silent": 4}
    assert report.failure_rate == 1.0
    assert "refused  4 × pesq" in format_report(report)


def test_absent_targets_are_judged_by_attenuation(extractor: Extractor, tmp_path: Path) -> None:
    make_trials(tmp_path, 2)
    absent = find_trials(tmp_path)[0]
    write_audio(absent.target, np.zeros(8000, np.float32), 8000)
    report = evaluate(extractor, config(tmp_path), progress=False)
    assert (len(report.present), len(report.absent)) == (1, 1)
    mixture, ref = (read_audio(path)[0] for path in (absent.mixture, absent.enrollment))
    estimate = extractor.estimate({"audio": torch.from_numpy(mixture)[None], "ref": torch.from_numpy(ref)[None]})[0]
    expected = 10 * np.log10(np.sum(mixture.astype(float) ** 2) / np.sum(estimate.numpy().astype(float) ** 2))
    assert report.absent[0].attenuation_db == pytest.approx(expected, abs=1e-3)
    assert report.summaries["si_sdr"].count == 1


def test_the_folders_layout_gives_the_same(extractor: Extractor, trials: Path, tmp_path: Path) -> None:
    for suffix, folder in {"mixed": "mix", "ref": "refs", "target": "targets"}.items():
        (tmp_path / folder).mkdir()
        for path in trials.glob(f"*-{suffix}.wav"):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    names = ("si_sdr", "si_sdr_improvement")
    flat = evaluate(extractor, config(trials, metrics=names), progress=False)
    folders = evaluate(extractor, config(tmp_path, metrics=names), progress=False)
    assert flat.trials == folders.trials


def test_the_report_on_disk(extractor: Extractor, trials: Path, tmp_path: Path) -> None:
    report = evaluate(extractor, config(trials, limit=2), progress=False)
    rows = save_report(report, tmp_path / "result.json", {"checkpoint": "model"})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["checkpoint"] == "model"
    assert result["trials"] == 2
    assert result["metrics"]["si_sdr"]["mean"] == report.summaries["si_sdr"].mean
    with rows.open() as file:
        table = list(csv.DictReader(file))
    assert [row["trial"] for row in table] == [row.name for row in report.trials]
    assert float(table[0]["si_sdr"]) == report.trials[0].values["si_sdr"]


def test_a_missing_package_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onevoice.evaluation.summary.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pesq, pystoi: pip install \"onevoice\[eval\]\""):
        require_metrics(("si_sdr", "pesq", "stoi"))
    require_metrics(("si_sdr", "si_sdr_improvement"))
