"""The scores of one trial, as a worker process of the evaluation makes them; without torch, so it starts at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from onevoice.audio import Mono
from onevoice.evaluation.metrics import MetricName, Score, attenuation_db, score_trial


class Estimated(NamedTuple):
    """One trial with what the network made of it, at one rate."""

    name: str
    estimate: Mono
    target: Mono
    mixture: Mono


@dataclass(frozen=True)
class TrialScore:
    """The scores of one trial. A value is None where the metric refused it, and `refusals` says why."""

    name: str
    seconds: float
    values: dict[MetricName, float | None]
    refusals: dict[MetricName, str]
    attenuation_db: float | None = None
    """Only for trials without their target: how much quieter the estimate is than the mixture."""


def score(trial: Estimated, sample_rate: int, metrics: Sequence[MetricName]) -> TrialScore:
    """Score one trial; run in a worker process."""
    name, estimate, target, mixture = trial
    seconds = len(target) / sample_rate
    if not np.ptp(target) > 0:
        return TrialScore(name, seconds, {}, {}, attenuation_db(mixture, estimate))
    result: Score = score_trial(estimate, target, mixture, sample_rate, metrics)
    return TrialScore(name, seconds, result.values, result.refusals)
