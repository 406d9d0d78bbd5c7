"""The summary of an evaluation: its rows and their statistics, as JSON values and as printed lines.

A metric without a value for a trial (PESQ has none for a silent estimate) is counted. Trials with a silent target are
summarized by attenuation alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onevoice.evaluation.listening import pool_word_errors
from onevoice.evaluation.metrics import IN_DB, TITLES, MetricName
from onevoice.evaluation.results import TrialRow, hash_trials, to_csv, write_result
from onevoice.evaluation.statistics import (
    FAILURE_DB,
    Statistics,
    confusion_rate,
    failure_rate,
    summarize,
    summarize_groups,
    summarize_presence,
    summarize_rows,
)


@dataclass(frozen=True)
class Report:
    """All trials of one evaluation."""

    trials: list[TrialRow]
    summaries: dict[MetricName, Statistics]
    failure_rate: float | None
    """Share of the trials with a target whose SI-SDRi is below 1 dB; None without SI-SDRi."""
    left_out: Sequence[str] = ()
    """One line per trial that was skipped because it is missing or damaged."""
    notes: Sequence[str] = ()
    """What is unusual about the data set."""

    @property
    def present(self) -> list[TrialRow]:
        """The trials in which the target speaks."""
        return [trial for trial in self.trials if not trial.absent]

    @property
    def absent(self) -> list[TrialRow]:
        """The trials with a silent target."""
        return [trial for trial in self.trials if trial.absent]

    def refusals(self) -> dict[str, int]:
        """Count the metrics without a value, by metric and reason."""
        return dict(Counter(f"{name}: {why}" for trial in self.trials for name, why in trial.refusals.items()))

    @property
    def confusion_rate(self) -> float | None:
        """Share of the trials with a target whose estimate gains more toward the interferer."""
        return confusion_rate(self.present)

    def speed(self) -> dict[str, float] | None:
        """Return the computing time of the network against the length of the mixtures; None without a network."""
        timed = [trial for trial in self.trials if trial.network_seconds is not None]
        if not timed:
            return None
        spent, length = sum(t.network_seconds or 0.0 for t in timed), sum(t.seconds for t in timed)
        return {"network_seconds": spent, "sound_seconds": length, "real_time_factor": spent / length}

    def word_error_rates(self) -> dict[str, float | None] | None:
        """Return the word error rates of estimates, mixtures and targets over all words; None without a recognizer."""
        heard = [trial.more for trial in self.trials if "words" in trial.more]
        return (pool_word_errors(heard) or None) if heard else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the rows as JSON values."""
        mixture = dict.fromkeys(name for trial in self.present for name in trial.mixture)
        before = {name: asdict(summarize([trial.mixture.get(name) for trial in self.present])) for name in mixture}
        chosen = {name: asdict(statistics) for name, statistics in self.summaries.items()}
        return {
            "trials": len(self.trials),
            "target_present": len(self.present),
            "target_absent": len(self.absent),
            "failure_rate": self.failure_rate,
            "failure_threshold_db": FAILURE_DB,
            "confusion_rate": self.confusion_rate,
            "attenuation_db": asdict(summarize([t.attenuation_db for t in self.absent])) if self.absent else None,
            "presence": summarize_presence(self.trials),
            "refusals": self.refusals(),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "metrics": {**summarize_rows(self.present)["metrics"], **chosen},
            "mixture": before,
            "groups": summarize_groups(self.present),
            "word_error_rates": self.word_error_rates(),
            "speed": self.speed(),
            "trials_hash": hash_trials(self.trials),
        }

    def to_csv(self) -> str:
        """Return one row per trial."""
        return to_csv(self.trials)


def make_report(
    rows: list[TrialRow], names: Sequence[MetricName], left_out: Sequence[str] = (), notes: Sequence[str] = ()
) -> Report:
    """Return the report of an evaluation by the metrics `names`."""
    present = [row for row in rows if not row.absent]
    improvement: MetricName = "si_sdr_improvement"
    failures = failure_rate([row.values[improvement] for row in present]) if improvement in names else None
    summaries = {name: summarize([row.values[name] for row in present]) for name in names}
    return Report(rows, summaries, failures, left_out, notes)


def save_report(report: Report, path: Path, about: Mapping[str, Any]) -> Path:
    """Write `about` and the statistics as JSON, and the rows beside them as `results` describes; return the latter."""
    return write_result(path, {**about, **report.to_dict()}, report.trials)


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
    if report.confusion_rate is not None:
        lines.append(f"confused {100 * report.confusion_rate:.1f} % of trials gain more toward the interferer")
    if report.absent:
        s = summarize([trial.attenuation_db for trial in report.absent])
        lines.append(f"target absent: {s.count} trials, attenuation mean {s.mean:.2f} dB, median {s.median:.2f} dB")
    lines += _lines_of_listening(report)
    presence = summarize_presence(report.trials)
    if presence is not None and presence["equal_error_rate"] is not None:
        lines.append(
            "presence false output {:.1f} %, false silence {:.1f} %, equal error rate {:.1f} %".format(
                *(100 * (presence[f"{key}_rate"] or 0.0) for key in ("false_output", "false_silence", "equal_error"))
            )
        )
    lines.append(f"trials   {len(report.present)} with the target, {len(report.absent)} without")
    if report.left_out:
        lines.append(f"skipped  {len(report.left_out)} trials that are missing or damaged, first {report.left_out[0]}")
    speed = report.speed()
    if speed is not None:
        lines.append(f"speed    {speed['real_time_factor']:.3f} s of the network per second of sound")
    lines += [f"note     {note}" for note in report.notes]
    lines += [f"refused  {count} × {reason}" for reason, count in report.refusals().items()]
    return "\n".join(lines)


def _lines_of_listening(report: Report) -> list[str]:
    """Return a line for each number that came from listening, and one for the word errors."""
    columns = dict.fromkeys(column for trial in report.trials for column in trial.more)
    lines = []
    for column in columns:
        mean = summarize([trial.more.get(column) for trial in report.present]).mean
        if mean is not None and "wer" not in column and column != "words":
            lines.append(f"{column} mean {mean:.3f}")
    rates = report.word_error_rates()
    if rates is not None:
        mixture, estimate, target = (100 * (rates[name] or 0) for name in ("mixture_wer", "wer", "target_wer"))
        lines.append(f"words    {estimate:.1f} % errors; {mixture:.1f} % in the mixture, {target:.1f} % in the target")
    return lines
