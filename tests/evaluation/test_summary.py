"""Evaluation gives the values of the metrics, for any batch size and number of processes."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_runs import forked_workers
from voices import make_trials

from onevoice.audio import read_audio, write_audio
from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.evaluation.metrics import pesq, si_sdr, si_sdr_improvement, stoi
from onevoice.evaluation.results import TrialRow, hash_rows
from onevoice.evaluation.run import EvaluationConfig, evaluate, require_metrics, require_rate
from onevoice.evaluation.statistics import Statistics, bootstrap_interval, failure_rate, summarize
from onevoice.evaluation.summary import Report, format_report, save_report
from onevoice.extraction.checkpoint import Card
from onevoice.extraction.extractor import Extractor
from onevoice.models import SpExPlus, SpExPlusConfig
from onevoice.models.base import Embedding, Lengths, Network, NetworkConfig, Wave
from onevoice.processes import ordered_map
from onevoice.rng import derive_seed
from onevoice.trials.reading import find_trials

CONFIG = SpExPlusConfig(
    sample_rate=8000, filters=16, channels=12, hidden=20, blocks=3, stacks=2, speaker_dim=10, num_classes=5
)


class Unchanged(Network):
    """A network whose estimate is the mixture."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def classify(self, embedding: Embedding) -> torch.Tensor:
        return embedding

    def _embed(self, ref: Wave, ref_length: Lengths | None) -> torch.Tensor:
        return ref[:, :5]

    def _extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None) -> tuple[torch.Tensor, ...]:
        return (self.gain * audio,)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    torch.manual_seed(0)
    return Extractor(SpExPlus(CONFIG), Card(CONFIG))


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


def test_failures_are_counted_by_improvement_not_by_quality(tmp_path: Path) -> None:
    """An estimate that is the mixture improves nothing, however good the mixture is."""
    rng = np.random.default_rng(0)
    for number, noise in enumerate((0.01, 0.1)):
        target = rng.standard_normal(8000).astype(np.float32) / 10
        mixture = target + noise * rng.standard_normal(8000).astype(np.float32) / 10
        for kind, samples in {"mixed": mixture, "target": target, "ref": target}.items():
            write_audio(tmp_path / f"{number}-{kind}.wav", samples, 8000, subtype="FLOAT")
    extractor = Extractor(Unchanged(CONFIG), Card(CONFIG))
    report = evaluate(extractor, config(tmp_path, metrics=("si_sdr", "si_sdr_improvement")), progress=False)
    assert [row.values["si_sdr"] for row in report.trials] == pytest.approx([40.0, 20.0], abs=0.5)
    assert [row.values["si_sdr_improvement"] for row in report.trials] == pytest.approx([0.0, 0.0], abs=1e-3)
    assert report.failure_rate == 1.0
    assert "failures 100.0 % of trials below 1 dB SI-SDRi" in format_report(report)
    assert report.to_dict()["failure_rate"] == 1.0
    without = evaluate(extractor, config(tmp_path, metrics=("si_sdr",)), progress=False)
    assert without.failure_rate is None
    assert "failures" not in format_report(without)


def test_batch_size_and_processes_change_nothing(extractor: Extractor, trials: Path) -> None:
    """Processes not a bit, and the batch size only the rounding of the network."""
    one = evaluate(extractor, config(trials), progress=False)
    batched = evaluate(extractor, config(trials, batch_size=3), progress=False)
    with forked_workers():
        spread = evaluate(extractor, config(trials, batch_size=3, jobs=2), progress=False)
    for single, row in zip(one.trials, batched.trials, strict=True):
        assert single.name == row.name
        assert row.values == pytest.approx(single.values, abs=2e-3)
    assert one.failure_rate == batched.failure_rate
    assert hash_rows(spread.trials) == hash_rows(batched.trials)


def test_a_silent_estimate_is_counted_not_fatal(trials: Path) -> None:
    model = SpExPlus(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = evaluate(Extractor(model, Card(CONFIG)), config(trials), progress=False)
    assert report.summaries["pesq"].mean is None
    assert report.summaries["pesq"].missing == 4
    assert report.refusals() == {"pesq: PESQ refused: the estimate is silent": 4}
    assert report.failure_rate == 1.0
    assert "refused  4 × pesq" in format_report(report)


def test_absent_targets_are_scored_by_attenuation(extractor: Extractor, tmp_path: Path) -> None:
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


def test_presence_is_counted_for_networks_with_a_level(tmp_path: Path) -> None:
    """A network that passes the mixture on hears every voice: a false output in each absent trial, no false silence."""
    make_trials(tmp_path, 3)
    write_audio(find_trials(tmp_path)[0].target, np.zeros(8000, np.float32), 8000)
    leveled = replace(CONFIG, has_level=True)
    report = evaluate(Extractor(Unchanged(leveled), Card(leveled)), config(tmp_path, metrics=("si_sdr",)))
    assert [row.presence_db for row in report.trials] == pytest.approx([0.0] * 3, abs=0.01)
    assert [row.heard for row in report.trials] == [True] * 3
    presence = report.to_dict()["presence"]
    assert (presence["false_output_rate"], presence["false_silence_rate"]) == (1.0, 0.0)
    assert "presence false output 100.0 %, false silence 0.0 %" in format_report(report)
    plain = evaluate(Extractor(Unchanged(CONFIG), Card(CONFIG)), config(tmp_path, metrics=("si_sdr",)))
    assert plain.to_dict()["presence"] is None
    assert {row.presence_db for row in plain.trials} == {None}


def test_the_folders_layout_gives_the_same(extractor: Extractor, trials: Path, tmp_path: Path) -> None:
    for suffix, folder in {"mixed": "mix", "ref": "refs", "target": "targets"}.items():
        (tmp_path / folder).mkdir()
        for path in trials.glob(f"*-{suffix}.wav"):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    names = ("si_sdr", "si_sdr_improvement")
    flat = evaluate(extractor, config(trials, metrics=names), progress=False)
    folders = evaluate(extractor, config(tmp_path, metrics=names), progress=False)
    assert [replace(row, network_seconds=None, corpus=None) for row in flat.trials] == [
        replace(row, network_seconds=None, corpus=None) for row in folders.trials
    ]


def test_metrics_run_in_as_many_processes_as_asked_for(
    extractor: Extractor, trials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def one_process(make_work: Any, items: Any, workers: int) -> Any:
        asked.append(workers)
        return ordered_map(make_work, items, 1)

    monkeypatch.setattr("onevoice.evaluation.run.ordered_map", one_process)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    for jobs in (1, 2, 9, 0):  # at most one per trial; 0 is one per core
        evaluate(extractor, config(trials, jobs=jobs, metrics=("si_sdr",)), progress=False)
    assert asked == [1, 2, 4, 3]


def test_the_printed_report() -> None:
    rows = [TrialRow(f"{k}", 1.0, {"si_sdr": k * k, "pesq": None}, {"pesq": "too short"}) for k in (1.0, 2.0, 6.0)]
    rows += [TrialRow(f"absent{k}", 1.0, {}, {}, attenuation_db=k) for k in (10.0, 20.0, 60.0)]
    statistics = {
        "si_sdr": Statistics(3, 0, 13.6667, 4.0, 1.3, (1.5, 25.25)),
        "pesq": Statistics(3, 0, 2.5, 2.25, 1.5, (2.0, 3.0)),
        "sdr": summarize([None, None, None]),
        "stoi": Statistics(3, 0, 0.5, 0.25, 0.125, (0.0, 1.0)),
    }
    report = Report(rows, statistics, 0.125, ["a: gone", "b: gone"], ["odd"])
    assert format_report(report).splitlines() == [
        "SI-SDR   mean 13.667 dB  (95 % interval 1.500 to 25.250, median 4.000, 5th percentile 1.300, n = 3)",
        "PESQ     mean 2.500  (95 % interval 2.000 to 3.000, median 2.250, 5th percentile 1.500, n = 3)",
        "SDR      no trial has a value",
        "STOI     mean 0.500  (95 % interval 0.000 to 1.000, median 0.250, 5th percentile 0.125, n = 3)",
        "failures 12.5 % of trials below 1 dB SI-SDRi",
        "target absent: 3 trials, attenuation mean 30.00 dB, median 20.00 dB",
        "trials   3 with the target, 3 without",
        "skipped  2 trials that are missing or damaged, first a: gone",
        "note     odd",
        "refused  3 × pesq: too short",
    ]
    values = report.to_dict()
    assert (values["trials"], values["target_present"], values["target_absent"]) == (6, 3, 3)
    assert (values["attenuation_db"]["mean"], values["attenuation_db"]["median"]) == (30.0, 20.0)
    assert (values["left_out"], values["notes"], values["refusals"]) == (
        ["a: gone", "b: gone"],
        ["odd"],
        {"pesq: too short": 3},
    )
    assert report.to_csv().splitlines()[-1].startswith("absent60.0,1.000,,,60.0,,")


def test_pesq_needs_a_rate_that_it_is_defined_at() -> None:
    for rate in (8000, 16000):
        require_rate(("pesq", "si_sdr"), rate)
    require_rate(("si_sdr",), 44100)
    with pytest.raises(ConfigError, match=r"^metrics: PESQ .* the network works at 44100 Hz; choose others"):
        require_rate(("pesq",), 44100)


def test_the_report_on_disk(extractor: Extractor, trials: Path, tmp_path: Path) -> None:
    report = evaluate(extractor, config(trials, limit=2), progress=False)
    rows = save_report(report, tmp_path / "result.json", {"checkpoint": "model"})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["checkpoint"] == "model"
    assert result["trials"] == 2
    assert result["attenuation_db"] is None
    assert result["metrics"]["si_sdr"]["mean"] == report.summaries["si_sdr"].mean
    with rows.open() as file:
        table = list(csv.DictReader(file))
    assert [row["trial"] for row in table] == [row.name for row in report.trials]
    assert float(table[0]["si_sdr"]) == report.trials[0].values["si_sdr"]


def test_a_missing_package_is_an_error_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onevoice.evaluation.run.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pesq, pystoi: pip install \"onevoice\[eval\]\""):
        require_metrics(("si_sdr", "pesq", "stoi"))
    require_metrics(("si_sdr", "si_sdr_improvement"))


def test_summary_leaves_refused_trials_out() -> None:
    summary = summarize([None, *map(float, range(101)), None])
    assert (summary.count, summary.missing) == (101, 2)
    assert (summary.mean, summary.median, summary.percentile_5) == (50.0, 50.0, 5.0)
    low, high = summary.interval_95
    assert low < 50 < high
    nothing = summarize([None])
    assert nothing == Statistics(0, 1, None, None, None, None)
    with pytest.raises(ValueError, match="never NaN"):
        summarize([1.0, float("nan")])


def test_bootstrap_interval_follows_the_seed_and_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert (low, high) != bootstrap_interval(values, seed=2)
    standard_error = values.std() / np.sqrt(400)
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.08)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * standard_error)
    for level, errors in ((0.95, 1.96), (0.8, 1.2816)):  # quantiles of the normal distribution, at both ends
        interval = np.array(bootstrap_interval(values, seed=1, resamples=20000, level=level))
        np.testing.assert_allclose((interval - values.mean()) / standard_error, [-errors, errors], atol=0.08)
    assert bootstrap_interval(values) == bootstrap_interval(values, derive_seed(0, "bootstrap"), 2000, 0.95)
    assert bootstrap_interval(np.array([2.5])) == (2.5, 2.5)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval(np.array([]))


def test_bootstrap_interval_covers_the_true_mean_as_often_as_stated() -> None:
    rng = np.random.default_rng(7)
    intervals = [bootstrap_interval(rng.normal(0, 1, 60), seed, resamples=300) for seed in range(200)]
    assert 0.89 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.99


def test_failure_rate_counts_below_one_decibel() -> None:
    assert failure_rate([None, 0.999, 1.0, 5.0, -3.0]) == 0.5
    assert failure_rate([4.0, 6.0], threshold_db=5.0) == 0.5
    assert failure_rate([None]) is None
