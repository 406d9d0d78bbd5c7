"""The sound of judged trials, to listen to: read as it was judged, with the estimate, saved or computed again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onevoice.audio import Mono, read_audio
from onevoice.config import from_dict
from onevoice.errors import CheckpointError, ConfigError, CorpusError
from onevoice.evaluation.metrics import si_sdr
from onevoice.evaluation.results import Result
from onevoice.evaluation.run import EvaluationConfig, baseline, network
from onevoice.extraction.extractor import load, match_level
from onevoice.trials import open_trials
from onevoice.trials.reading import Item, TrialDataset, collate

AGREES_DB = 0.1
"""An estimate whose SI-SDR differs by more from that of its row is another one."""


@dataclass(frozen=True)
class Sounds:
    """One trial as sound, all at one rate."""

    item: Item
    estimate: Mono
    """At the level that an extraction gives it, since SI-SDR leaves the level open."""
    sample_rate: int
    note: str = ""
    """What is wrong with the estimate."""


def open_sounds(result: Result, device: str = "auto") -> Callable[[str], Sounds]:
    """Return a function that gives the sound of a trial by its name.

    Estimates come from the folder where they were saved or scored, or from the same weights or baseline. Raises
    `ConfigError`, `CorpusError`, or `CheckpointError` if the trials or the estimates are not there anymore.
    """
    summary = result.summary
    try:
        config = from_dict(EvaluationConfig, {"data": summary["data"]}, name=str(result.path)).trials
        rate = int(summary["provenance"]["sample_rate"])
    except KeyError as error:
        raise ConfigError(f"{result.path}: does not name its {error.args[0]}; evaluate again to listen") from error
    opened = open_trials(config)
    numbers = {trial.name: number for number, trial in enumerate(opened.trials)}
    data = TrialDataset(opened.trials, rate, (), config.segment_seconds, config.enrollment_seconds)
    make_estimate = _estimator(result, rate, device)

    def sounds(name: str) -> Sounds:
        if name not in numbers:
            raise CorpusError(f"{result.path}: its trial {name} is not in the data set anymore")
        item = data[0, numbers[name]]
        estimate = make_estimate(item)
        return Sounds(item, match_level(estimate, item.mixture), rate, _check(result, item, estimate))

    return sounds


def _estimator(result: Result, rate: int, device: str) -> Callable[[Item], Mono]:
    summary = result.summary
    saved = summary.get("estimates") or summary.get("saved_estimates")
    if saved:
        folder = Path(saved)

        def read(item: Item) -> Mono:
            paths = [folder / f"{item.name}{suffix}" for suffix in (".wav", ".flac")]
            return read_audio(next((path for path in paths if path.exists()), paths[0]), rate)[0]

        return read
    if summary.get("baseline"):
        estimator = baseline(summary["baseline"], rate)
    else:
        extractor = load(summary["checkpoint"], device=device)
        known = summary["provenance"].get("estimator", {}).get("weights_hash", extractor.model_hash)
        if known != extractor.model_hash:
            raise CheckpointError(f"{summary['checkpoint']}: holds other weights than those that {result.path} judged")
        estimator = network(extractor)
    return lambda item: estimator.estimate(collate([item]))[0]


def _check(result: Result, item: Item, estimate: Mono) -> str:
    """Return a sentence if the SI-SDR of the estimate is not that of its row."""
    row = result.row(item.name)
    before = None if row is None else row.values.get("si_sdr")
    if before is None:
        return ""
    if len(estimate) != len(item.target):
        return f"The estimate of {result.name} has another length than its mixture."
    now = si_sdr(np.asarray(estimate), item.target)
    if abs(now - before) <= AGREES_DB:
        return ""
    return f"The estimate of {result.name} has {now:.2f} dB SI-SDR now and had {before:.2f} dB when it was judged."
