"""Scoring a checkpoint on trials: one row of metrics per trial, and their statistics.

The network runs in batches in this process, the metrics in worker processes (PESQ and STOI do not run in threads).
Estimates are scored at the network's rate and never rescaled. Batch size, number of processes and padding change
nothing but rounding. A metric without a value for a trial (PESQ has none for a silent estimate) is counted. Trials with
a silent target are scored by attenuation alone.
"""

import contextlib
import csv
import functools
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass as section
from torch.utils.data import DataLoader
from tqdm import tqdm

from onevoice.config import STRICT
from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.evaluation.metrics import IN_DB, TITLES, EstimatedTrial, MetricName, TrialScore, score_trial
from onevoice.extraction.extractor import Extractor
from onevoice.files import atomic_write
from onevoice.models import ModelConfig
from onevoice.processes import ordered_map
from onevoice.trials import FolderTrials, TrialsConfig, open_trials
from onevoice.trials.reading import EpochSampler, TrialDataset, collate, read_batches

FAILURE_DB = 1.0
"""A trial counts as failed if its SI-SDR improvement is below this many dB."""

BOOTSTRAP_SEED = 0xC8991C33C70A4A4BE5AC2582569305CB
"""The seed of the bootstrap interval, which thus depends on the values alone."""

METRIC_NAMES: tuple[MetricName, ...] = ("si_sdr", "si_sdr_improvement", "pesq", "stoi")


@section(frozen=True, config=STRICT)
class EvaluationConfig:
    """What `eval.py --c FILE` reads. Options of the command override it."""

    folder: str | None = None
    """A folder of trials, short for `data` of kind "folder"."""
    data: TrialsConfig | None = None
    """The trials, by `kind`: a folder of trials or another data set; null when `folder` is set."""
    batch_size: PositiveInt = 1
    """Trials per pass of the network; the scores do not depend on it."""
    jobs: NonNegativeInt = 0
    """Number of processes for the metrics; 0 for one per core."""
    limit: PositiveInt | None = None
    """Number of trials to use, from the first one on; null for `data.limit`."""
    metrics: tuple[MetricName, ...] = METRIC_NAMES
    """The metrics to compute."""
    device: str = "auto"
    """Where the network runs: cpu, cuda, …; auto takes the best available device."""
    model: ModelConfig | None = None
    """The network; needed only for checkpoints that do not describe theirs (`.pth`)."""

    @staticmethod
    def upgrade(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rename `data_dir` or `test_data_dir`, the older names of `folder`; `from_dict` calls this."""
        old = next((key for key in ("data_dir", "test_data_dir") if key in values), "")
        if not old or "folder" in values:
            return values
        return {"folder" if key == old else key: value for key, value in values.items()}

    @property
    def trials(self) -> TrialsConfig:
        """The set of trials, from `folder` or `data`; raises `ConfigError` unless exactly one is set."""
        if (self.folder is None) == (self.data is None):
            raise ConfigError("folder, data: set one of them; trials come from a folder or from another data set")
        chosen = self.data or FolderTrials(str(self.folder))
        return chosen if self.limit is None else replace(chosen, limit=self.limit)


@dataclass(frozen=True)
class Statistics:
    """One metric over all trials, in its own unit. Every statistic is None if no trial has a value."""

    count: int
    """Trials with a value."""
    missing: int
    """Trials without a value; the statistics leave them out."""
    mean: float | None
    median: float | None
    percentile_5: float | None
    interval_95: tuple[float, float] | None
    """Bootstrap 95 % interval of the mean."""


def summarize(values: Sequence[float | None]) -> Statistics:
    """Return the statistics of one metric over trials; None stands for a trial without a value.

    Raises `ValueError` for NaN or infinity, which no metric returns.
    """
    known = _known(values)
    missing = len(values) - len(known)
    if not known.size:
        return Statistics(0, missing, None, None, None, None)
    return Statistics(
        count=len(known),
        missing=missing,
        mean=float(known.mean()),
        median=float(np.median(known)),
        percentile_5=float(np.percentile(known, 5)),
        interval_95=bootstrap_interval(known),
    )


def bootstrap_interval(
    values: Float[np.ndarray, "trials"], seed: int = BOOTSTRAP_SEED, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (low, high) of the mean (Efron, 1979).

    It draws `resamples` sets of trials with replacement, and the interval covers the middle `level` of their means.
    Raises `ValueError` for no values.
    """
    if not values.size:
        raise ValueError("no values to draw from")
    rng = np.random.Generator(np.random.PCG64(seed))
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def failure_rate(improvements: Sequence[float | None], threshold_db: float = FAILURE_DB) -> float | None:
    """Return the share of trials (0 to 1) whose SI-SDR improvement in dB is below `threshold_db`.

    None in `improvements` stands for a trial without a value, which is left out. Returns None if no trial is left.
    """
    known = _known(improvements)
    return float(np.mean(known < threshold_db)) if known.size else None


def _known(values: Sequence[float | None]) -> Float[np.ndarray, "trials"]:
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not np.isfinite(known).all():
        raise ValueError("a metric without a value is None, never NaN or infinite")
    return known


@dataclass(frozen=True)
class Report:
    """All trials of one evaluation."""

    trials: list[TrialScore]
    summaries: dict[MetricName, Statistics]
    failure_rate: float | None
    """Share of the trials with a target whose SI-SDRi is below 1 dB; None without SI-SDRi."""
    left_out: Sequence[str] = ()
    """One line per trial that was skipped because it is missing or damaged."""
    notes: Sequence[str] = ()
    """What is unusual about the data set."""

    @property
    def present(self) -> list[TrialScore]:
        """The trials in which the target speaks."""
        return [trial for trial in self.trials if trial.attenuation_db is None]

    @property
    def absent(self) -> list[TrialScore]:
        """The trials with a silent target."""
        return [trial for trial in self.trials if trial.attenuation_db is not None]

    def refusals(self) -> dict[str, int]:
        """Count the metrics without a value, by metric and reason."""
        return dict(Counter(f"{name}: {why}" for trial in self.trials for name, why in trial.refusals.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the rows as JSON values."""
        return {
            "trials": len(self.trials),
            "target_present": len(self.present),
            "target_absent": len(self.absent),
            "failure_rate": self.failure_rate,
            "failure_threshold_db": FAILURE_DB,
            "attenuation_db": asdict(summarize([t.attenuation_db for t in self.absent])) if self.absent else None,
            "refusals": self.refusals(),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "metrics": {name: asdict(summary) for name, summary in self.summaries.items()},
        }

    def to_csv(self) -> str:
        """Return one row per trial."""
        text = io.StringIO()
        names = list(self.summaries)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", "seconds", *names, "attenuation_db", "refused"])
        for trial in self.trials:
            cells = [trial.values.get(name) for name in names]
            refused = "; ".join(f"{name}: {why}" for name, why in trial.refusals.items())
            writer.writerow([trial.name, f"{trial.seconds:.3f}", *cells, trial.attenuation_db, refused])
        return text.getvalue()


def evaluate(extractor: Extractor, config: EvaluationConfig, *, progress: bool = True) -> Report:
    """Score the trials of `config.folder` or `config.data`, in the order of the data set.

    Raises `CorpusError` or `AudioError` for unusable trials, `MissingDependencyError` without the extra `eval`.
    """
    chosen = config.trials
    opened = open_trials(chosen)
    trials = opened.trials
    rate = extractor.sample_rate
    jobs = min(config.jobs or os.cpu_count() or 1, len(trials))
    data = TrialDataset(trials, rate, (), chosen.segment_seconds, chosen.enrollment_seconds)
    estimates = _estimates(extractor, data, config.batch_size)
    make_score = functools.partial(functools.partial, score_trial, sample_rate=rate, names=config.metrics)
    with contextlib.closing(ordered_map(make_score, estimates, jobs)) as scores:
        rows = list(tqdm(scores, total=len(trials), desc="eval", disable=None if progress else True))
    present = [row for row in rows if row.attenuation_db is None]
    return Report(
        rows,
        {name: summarize([row.values[name] for row in present]) for name in config.metrics},
        failure_rate([row.values["si_sdr_improvement"] for row in present])
        if "si_sdr_improvement" in config.metrics
        else None,
        opened.left_out,
        opened.notes,
    )


def save_report(report: Report, path: Path, about: Mapping[str, Any]) -> Path:
    """Write `about` and the statistics to `path` as JSON, and the rows to a CSV file beside it; return the latter."""
    rows = path.with_suffix(".csv")
    atomic_write(rows, report.to_csv().encode())
    atomic_write(path, (json.dumps({**about, **report.to_dict()}, indent=2, ensure_ascii=False) + "\n").encode())
    return rows


def format_report(report: Report) -> str:
    """Return the lines that `eval` prints."""
    lines = []
    for name in [name for name in TITLES if name in report.summaries]:
        s = report.summaries[name]
        if s.mean is None or s.median is None or s.percentile_5 is None or s.interval_95 is None:
            lines.append(f"{TITLES[name]:<8} no trial has a value")
            continue
        unit = " dB" if name in IN_DB else ""
        lines.append(
            f"{TITLES[name]:<8} mean {s.mean:.3f}{unit}  (95 % interval {s.interval_95[0]:.3f} to "
            f"{s.interval_95[1]:.3f}, median {s.median:.3f}, 5th percentile {s.percentile_5:.3f}, n = {s.count})"
        )
    if report.failure_rate is not None:
        lines.append(f"failures {100 * report.failure_rate:.1f} % of trials below {FAILURE_DB:g} dB SI-SDRi")
    if report.absent:
        s = summarize([trial.attenuation_db for trial in report.absent])
        lines.append(f"target absent: {s.count} trials, attenuation mean {s.mean:.2f} dB, median {s.median:.2f} dB")
    lines.append(f"trials   {len(report.present)} with the target, {len(report.absent)} without")
    if report.left_out:
        lines.append(f"skipped  {len(report.left_out)} trials that are missing or damaged, first {report.left_out[0]}")
    lines += [f"note     {note}" for note in report.notes]
    lines += [f"refused  {count} × {reason}" for reason, count in report.refusals().items()]
    return "\n".join(lines)


def require_metrics(names: Sequence[MetricName]) -> None:
    """Raise `MissingDependencyError` before any work if the package of a metric is missing."""
    packages = {"pesq": "pesq", "stoi": "pystoi", "estoi": "pystoi", "sdr": "fast_bss_eval"}
    missing = sorted({packages[name] for name in names if name in packages and find_spec(packages[name]) is None})
    if missing:
        raise MissingDependencyError(
            f'evaluation needs {", ".join(missing)}: pip install "onevoice[eval]" (pesq needs a C compiler), '
            "or choose other metrics (--metrics si_sdr si_sdr_improvement)"
        )


def require_rate(names: Sequence[MetricName], sample_rate: int) -> None:
    """Raise `ConfigError` before any work if PESQ is not defined at the network's rate."""
    if "pesq" in names and sample_rate not in (8000, 16000):
        raise ConfigError(
            f"metrics: PESQ is defined at 8000 and 16000 Hz, and the network works at {sample_rate} Hz; choose others "
            "(--metrics si_sdr si_sdr_improvement stoi)"
        )


def _estimates(extractor: Extractor, data: TrialDataset, batch_size: int) -> Iterator[EstimatedTrial]:
    """Yield the trials in order, each with its estimate."""
    sampler = EpochSampler(len(data), batch_size, 0, 0, shuffle=False)
    loader: DataLoader[Any] = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    for batch in read_batches(loader):
        estimates = extractor.estimate(batch).numpy()
        for row, name in enumerate(batch["name"]):
            length = int(batch["audio_length"][row])
            yield EstimatedTrial(
                name,
                estimates[row, :length].copy(),
                batch["target"][row, :length].numpy(),
                batch["audio"][row, :length].numpy(),
            )
