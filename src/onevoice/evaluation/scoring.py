"""The work of one process of an evaluation: one trial and its estimate in, one row out.

This module does not import torch, so that a worker process starts fast and stays small.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from onevoice.errors import AudioError, MetricError
from onevoice.evaluation.metrics import (
    MetricName,
    Signal,
    attenuation_db,
    compute_metrics,
    interferer_improvement,
    is_silent,
    si_sdr,
)
from onevoice.evaluation.results import IMPROVEMENT, TrialRow


class TrialFacts(NamedTuple):
    """What is known about one trial; None where it is not known."""

    corpus: str | None = None
    target_speaker: str | None = None
    interferer_speaker: str | None = None
    gender_pair: str | None = None
    """Gender of the target, then of the interferer."""


class EstimatedTrial(NamedTuple):
    """One trial and its estimate, all at one rate. All signals have the same length."""

    name: str
    estimate: Signal
    target: Signal
    mixture: Signal
    facts: TrialFacts = TrialFacts()
    enrollment_seconds: float | None = None
    audio_hash: str | None = None
    network_seconds: float | None = None
    more: dict[str, float | None] | None = None
    presence_db: float | None = None
    heard: bool | None = None
    """Other numbers of the estimate, by the name of their column."""


def score_trial(trial: EstimatedTrial, sample_rate: int, names: Sequence[MetricName]) -> TrialRow:
    """Score one trial: by the metrics `names` if the target speaks, otherwise by attenuation.

    Worker processes run this: arguments and result can be pickled. Raises `AudioError`, naming the trial, for signals
    that cannot be judged.
    """
    known: dict[str, Any] = {
        **trial.facts._asdict(),
        "enrollment_seconds": trial.enrollment_seconds,
        "presence_db": trial.presence_db,
        "heard": trial.heard,
        "audio_hash": trial.audio_hash,
        "network_seconds": trial.network_seconds,
        "more": trial.more or {},
    }
    seconds = len(trial.target) / sample_rate
    try:
        if is_silent(trial.target):
            return TrialRow(trial.name, seconds, {}, {}, attenuation_db(trial.mixture, trial.estimate), **known)
        values, refusals = compute_metrics(trial.estimate, trial.target, trial.mixture, sample_rate, names)
        input_snr_db = si_sdr(trial.mixture, trial.target)
        own = [name for name in names if not name.endswith(IMPROVEMENT)]
        others = [name for name in own if name != "si_sdr"]
        mixture, _ = compute_metrics(trial.mixture, trial.target, trial.mixture, sample_rate, others)
        mixture = {name: input_snr_db if name == "si_sdr" else mixture[name] for name in own}
        toward_target = values.get("si_sdr_improvement")
        if toward_target is None:
            toward_target = si_sdr(trial.estimate, trial.target) - input_snr_db
        toward_interferer = _toward_interferer(trial)
    except AudioError as error:
        raise AudioError(f"trial {trial.name}: {error}") from error
    return TrialRow(
        trial.name,
        seconds,
        values,
        refusals,
        mixture=mixture,
        input_snr_db=input_snr_db,
        interferer_improvement_db=toward_interferer,
        confused=None if toward_interferer is None else toward_interferer > max(toward_target, 0.0),
        **known,
    )


def _toward_interferer(trial: EstimatedTrial) -> float | None:
    """Return the improvement toward the interferer; None if the mixture has none."""
    try:
        return interferer_improvement(trial.estimate, trial.mixture, trial.target)
    except MetricError:
        return None
