"""Statistics over trials: of one metric, of failures and confusions, and of groups of trials.

A trial without a value is None; statistics leave it out and count it. Nothing here depends on the order of the trials
but the bootstrap, whose seed is fixed, so equal rows give equal statistics.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from onevoice.evaluation.results import TrialRow

FAILURE_DB = 1.0
"""A trial counts as failed if its SI-SDR improvement is below this many dB."""

BOOTSTRAP_SEED = 0xC8991C33C70A4A4BE5AC2582569305CB
"""The seed of the bootstrap interval, which thus depends on the values alone."""
BOOTSTRAP_RESAMPLES = 2000
DRAWS_AT_ONCE = 2**20
"""Values that the bootstrap draws at a time, which limits its memory to a few megabytes."""

SNR_EDGES_DB = (-7.5, -2.5, 2.5, 7.5)
"""Edges between groups by input SNR: data sets mix at multiples of 5 dB, which lie inside the groups."""
ENROLLMENT_EDGES_SECONDS = (3.0, 5.0, 10.0, 30.0)
"""Edges between groups by length of the enrollment."""


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
    values: Float[np.ndarray, "trials"],
    seed: int = BOOTSTRAP_SEED,
    resamples: int = BOOTSTRAP_RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (low, high) of the mean (Efron, 1979).

    It draws `resamples` sets of trials with replacement, and the interval covers the middle `level` of their means.
    Raises `ValueError` for no values.
    """
    if not values.size:
        raise ValueError("no values to draw from")
    rng = np.random.Generator(np.random.PCG64(seed))
    sets_at_once = max(DRAWS_AT_ONCE // len(values), 1)
    means = np.concatenate(
        [
            values[rng.integers(len(values), size=(min(sets_at_once, resamples - first), len(values)))].mean(axis=1)
            for first in range(0, resamples, sets_at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def failure_rate(improvements: Sequence[float | None], threshold_db: float = FAILURE_DB) -> float | None:
    """Return the share of trials (0 to 1) whose SI-SDR improvement in dB is below `threshold_db`.

    None in `improvements` stands for a trial without a value, which is left out. Returns None if no trial is left.
    """
    known = _known(improvements)
    return float(np.mean(known < threshold_db)) if known.size else None


def confusion_rate(rows: Iterable[TrialRow]) -> float | None:
    """Return the share of trials (0 to 1) whose estimate gains more toward the interferer than toward the target.

    Returns None if no trial has both.
    """
    known = [row.confused for row in rows if row.confused is not None]
    return float(np.mean(known)) if known else None


def equal_error(present: Sequence[float], absent: Sequence[float]) -> tuple[float, float]:
    """Return the equal error rate (0 to 1) of scores that are higher if the target is present, and its threshold."""
    thresholds = np.sort(np.concatenate([present, absent]))
    misses = np.searchsorted(np.sort(present), thresholds) / len(present)
    alarms = 1 - np.searchsorted(np.sort(absent), thresholds) / len(absent)
    best = int(np.abs(misses - alarms).argmin())
    return float(misses[best] + alarms[best]) / 2, float(thresholds[best])


def summarize_presence(rows: Sequence[TrialRow]) -> dict[str, float | None] | None:
    """Return how often it is wrong whether the voice is there: None unless the network gives a score of it.

    The equal error rate is None without trials of both kinds, and a rate without trials of its own.
    """
    scored = [(row.absent, row.heard, row.presence_db) for row in rows if row.presence_db is not None]
    if not scored:
        return None
    present, absent = ([score for is_absent, _, score in scored if is_absent == kind] for kind in (False, True))
    silences = [not heard for is_absent, heard, _ in scored if not is_absent]
    outputs = [bool(heard) for is_absent, heard, _ in scored if is_absent]
    rate, threshold = equal_error(present, absent) if present and absent else (None, None)
    return {
        "false_silence_rate": float(np.mean(silences)) if silences else None,
        "false_output_rate": float(np.mean(outputs)) if outputs else None,
        "equal_error_rate": rate,
        "equal_error_threshold_db": threshold,
    }


def summarize_rows(rows: Sequence[TrialRow]) -> dict[str, Any]:
    """Return the statistics of trials with a target, by the keys that the summary and each of its groups have."""
    names = dict.fromkeys(name for row in rows for name in row.numbers)
    improvements = [row.values["si_sdr_improvement"] for row in rows if "si_sdr_improvement" in row.values]
    return {
        "trials": len(rows),
        "failure_rate": failure_rate(improvements),
        "confusion_rate": confusion_rate(rows),
        "metrics": {name: asdict(summarize([row.numbers.get(name) for row in rows])) for name in names},
    }


def summarize_groups(rows: Sequence[TrialRow]) -> dict[str, dict[str, Any]]:
    """Return the statistics of groups of trials with a target, by what groups them; trials of no group are left out.

    A group by input SNR or enrollment length includes its lower edge.
    """
    groupings: dict[str, Callable[[TrialRow], str | None]] = {
        "gender_pair": lambda row: row.gender_pair,
        "input_snr_db": lambda row: bin_of(row.input_snr_db, SNR_EDGES_DB),
        "enrollment_seconds": lambda row: bin_of(row.enrollment_seconds, ENROLLMENT_EDGES_SECONDS),
        "corpus": lambda row: row.corpus,
    }
    order = [*bins_of(SNR_EDGES_DB), *bins_of(ENROLLMENT_EDGES_SECONDS)]
    result = {}
    for name, group_of in groupings.items():
        groups: dict[str, list[TrialRow]] = {}
        for row in rows:
            group = group_of(row)
            if group is not None:
                groups.setdefault(group, []).append(row)
        ordered = sorted(groups, key=lambda group: (order.index(group) if group in order else 0, group))
        result[name] = {group: summarize_rows(groups[group]) for group in ordered}
    return result


def bins_of(edges: Sequence[float]) -> list[str]:
    """Return the names of the groups between the edges, for example "below -7.5", "-7.5 to -2.5" and "7.5 or more"."""
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return [f"below {edges[0]:g}", *inner, f"{edges[-1]:g} or more"]


def bin_of(value: float | None, edges: Sequence[float]) -> str | None:
    """Return the name of the group that a value belongs to."""
    return None if value is None else bins_of(edges)[int(np.searchsorted(edges, value, side="right"))]


def _known(values: Sequence[float | None]) -> Float[np.ndarray, "trials"]:
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not np.isfinite(known).all():
        raise ValueError("a metric without a value is None, never NaN or infinite")
    return known
