"""Scoring estimates on trials: estimates are made in batches in this process, and scored in worker processes.

An `Estimator` makes estimates: a network, a baseline, or a folder that another toolkit filled. It runs ahead of the
metrics by a bounded number of trials (`processes.ordered_map`). On a cluster, each worker has an estimator of its own,
and a piece of work is a batch. Estimates are scored at the estimator's rate and never rescaled. The number of
processes, shards and interruptions change nothing; batch size and padding change nothing but rounding.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass as section
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from onevoice.audio import Mono, write_audio
from onevoice.cluster import Cluster
from onevoice.config import STRICT, Location
from onevoice.errors import AudioError, ConfigError, MissingDependencyError
from onevoice.evaluation.baselines import BaselineName, estimate_baseline
from onevoice.evaluation.facts import trial_facts
from onevoice.evaluation.journal import Journal
from onevoice.evaluation.listening import Heard, Kind, Listener, make_listener
from onevoice.evaluation.metrics import MetricName
from onevoice.evaluation.results import TrialRow
from onevoice.evaluation.scoring import EstimatedTrial, TrialFacts, score_trial
from onevoice.evaluation.summary import Report, make_report
from onevoice.extraction.extractor import Extractor, load
from onevoice.extraction.presence import Presence
from onevoice.extraction.windows import Spool
from onevoice.files import Shard
from onevoice.models import ModelConfig
from onevoice.processes import ordered_map
from onevoice.trials import FolderTrials, TrialsConfig, open_trials
from onevoice.trials.reading import TrialBatch, TrialDataset, collate, read_batches

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
    genders: Location | None = None
    """A CSV or JSONL table with the columns `speaker` and `gender` (F or M), to group trials by; null for none."""
    listen: tuple[Kind, ...] = ()
    """What else listens: `similarity` of the voices by a speaker encoder, and `dnsmos`, quality without a reference."""
    asr: str | None = None
    """A recognizer as MODULE:NAME, for word error rates; null for none."""
    texts: Location | None = None
    """What is said in each trial: a CSV or JSONL table with the columns `trial` and `text`; needed for `asr`."""
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


Estimates = list[Float[np.ndarray, "_samples"]]


@dataclass(frozen=True)
class Estimator:
    """What makes the estimates that are judged."""

    estimate: Callable[[TrialBatch], Estimates]
    """Returns the estimates of a batch, each as long as its mixture."""
    sample_rate: int
    """The rate in Hz at which the trials are read and judged."""
    is_timed: bool = False
    """Whether the time of `estimate` says something about speed."""
    presence: Callable[[Mono, Mono], Presence] | None = None
    """Returns where the voice is heard, from mixture and estimate; None if the estimates do not tell."""
    notes: tuple[str, ...] = ()
    """What is unusual about the estimates."""


def network(extractor: Extractor) -> Estimator:
    """Return the estimator of a network: its first estimate, at its own level."""

    def estimate(batch: TrialBatch) -> Estimates:
        waves = extractor.estimate(batch).numpy()
        return [wave[:length].copy() for wave, length in zip(waves, batch["audio_length"].tolist(), strict=True)]

    def presence(mixture: Mono, estimate: Mono) -> Presence:
        with Spool() as heard, Spool() as estimated:
            heard.append(mixture)
            estimated.append(estimate)
            return extractor.presence(heard, estimated)

    has_level = extractor.card.config.has_level
    return Estimator(estimate, extractor.sample_rate, is_timed=True, presence=presence if has_level else None)


def baseline(name: BaselineName, sample_rate: int) -> Estimator:
    """Return the estimator of a baseline at a rate in Hz."""

    def estimate(batch: TrialBatch) -> Estimates:
        trials = zip(batch["audio"], batch["target"], batch["audio_length"].tolist(), strict=True)
        return [
            estimate_baseline(name, mixture[:length], target[:length], sample_rate).numpy()
            for mixture, target, length in trials
        ]

    return Estimator(estimate, sample_rate)


def evaluate(extractor: Extractor, config: EvaluationConfig, *, progress: bool = True) -> Report:
    """Score a network on the trials of `config.folder` or `config.data`, in the order of the data set.

    Raises `CorpusError` or `AudioError` for unusable trials, `MissingDependencyError` without the extra `eval`.
    """
    return judge(network(extractor), config, progress=progress)


@dataclass(frozen=True)
class Keeping:
    """What an evaluation leaves on disk while it runs."""

    journal: Journal | None = None
    """Where rows go as they come, and where those of a killed evaluation are."""
    estimates_folder: Path | None = None
    """Where estimates go, as NAME.wav in 32-bit float."""


@dataclass(frozen=True)
class Spread:
    """How an evaluation is spread over machines."""

    cluster: Cluster | None = None
    load: Callable[[], Estimator] | None = None
    """Loads the estimator in a worker of the cluster; it can be pickled."""
    shard: Shard | None = None
    """The part of the batches to judge; None for all."""


def load_network(checkpoint: str, model: ModelConfig | None, device: str) -> Estimator:
    """Load weights, and return their estimator."""
    return network(load(checkpoint, model, device))


def judge(
    estimator: Estimator,
    config: EvaluationConfig,
    *,
    progress: bool = True,
    keeping: Keeping = Keeping(),
    spread: Spread = Spread(),
) -> Report:
    """Score the estimates of any estimator as `evaluate` does; resume what a killed evaluation left in the journal."""
    chosen = config.trials
    opened = open_trials(chosen)
    trials, rate = opened.trials, estimator.sample_rate
    names, journal = [trial.name for trial in trials], keeping.journal
    rows = {row.name: row for row in ([] if journal is None else journal.resume(names))}
    facts = trial_facts(chosen, trials, None if config.genders is None else Path(config.genders))
    data = TrialDataset(trials, rate, (), chosen.segment_seconds, chosen.enrollment_seconds)
    judging = _Judging(data, facts, config, frozenset(rows), keeping.estimates_folder)
    if config.listen or config.asr or config.texts:
        judging.make_listener()  # whatever is missing is missed now
    batches: Sequence[int] = range(-(-len(trials) // config.batch_size))
    batches = [n for n in (spread.shard.of(batches) if spread.shard else batches) if judging.left(n)]
    if spread.cluster is None or spread.load is None:
        make_score = functools.partial(functools.partial, score_trial, sample_rate=rate, names=config.metrics)
        estimates = judging.estimates(estimator, batches)
        found = ordered_map(make_score, estimates, min(config.jobs or os.cpu_count() or 1, len(trials)))
    else:
        start = functools.partial(judging.start, spread.load)
        found = _each_row(ordered_map(start, batches, spread.cluster, judging.set_aside))
    with (
        contextlib.closing(found) as scores,
        contextlib.ExitStack() as stack,
        tqdm(total=len(trials), initial=len(rows), desc="eval", disable=None if progress else True) as bar,
    ):
        if journal is not None:
            stack.callback(journal.close)
        for row in scores:
            if journal is not None:
                journal.append(row)
            rows[row.name] = row
            bar.update()
    ordered = [rows[name] for name in names if name in rows]
    return make_report(ordered, config.metrics, opened.left_out, [*opened.notes, *estimator.notes])


def _each_row(batches: Generator[list[TrialRow], None, None]) -> Generator[TrialRow, None, None]:
    with contextlib.closing(batches):
        for rows in batches:
            yield from rows


@dataclass(frozen=True)
class _Judging:
    """What is judged: batches of trials, without those that are `done`.

    The batches are always those of an evaluation from the start, so that neither resuming nor shards change the
    rounding.
    """

    data: TrialDataset
    facts: list[TrialFacts]
    config: EvaluationConfig
    done: frozenset[str]
    folder: Path | None

    def indices(self, batch: int) -> range:
        """The trials of a batch."""
        first = batch * self.config.batch_size
        return range(first, min(first + self.config.batch_size, len(self.data)))

    def left(self, batch: int) -> list[str]:
        """Return the names of the trials of a batch that are not done."""
        names = (self.data.trials[index].name for index in self.indices(batch))
        return [name for name in names if name not in self.done]

    def make_listener(self) -> Listener:
        """Return what else listens."""
        names = [trial.name for trial in self.data.trials]
        config = self.config
        return make_listener(config.listen, config.asr, config.texts, names, self.data.sample_rate)

    def start(self, load_estimator: Callable[[], Estimator]) -> Callable[[int], list[TrialRow]]:
        """Return the work of a worker of a cluster: a batch in, its rows out."""
        estimator, rate, names = load_estimator(), self.data.sample_rate, self.config.metrics
        return lambda batch: [score_trial(each, rate, names) for each in self.estimates(estimator, [batch])]

    def set_aside(self, batch: int, reason: str) -> list[TrialRow]:
        """Return rows without any value for a batch that took down its workers."""
        metrics = self.config.metrics
        refusals = dict.fromkeys(metrics, reason)
        return [TrialRow(name, 0.0, dict.fromkeys(metrics), refusals) for name in self.left(batch)]

    def estimates(self, estimator: Estimator, batches: Sequence[int]) -> Iterator[EstimatedTrial]:
        """Yield the trials of some batches that are not done, each with its estimate."""
        config = self.config
        listener = self.make_listener() if config.listen or config.asr or config.texts else None
        keys = [[(0, index) for index in self.indices(batch)] for batch in batches]
        loader: DataLoader[Any] = DataLoader(self.data, batch_sampler=keys, collate_fn=collate)
        for batch, indices in zip(read_batches(loader), map(self.indices, batches), strict=True):
            begin = time.perf_counter()
            estimates = estimator.estimate(batch)
            seconds = time.perf_counter() - begin
            total = int(batch["audio_length"].sum())
            for row, (index, estimate) in enumerate(zip(indices, estimates, strict=True)):
                if batch["name"][row] in self.done:
                    continue
                if self.folder is not None:
                    _save(self.folder / f"{batch['name'][row]}.wav", estimate, self.data.sample_rate)
                spent = seconds * int(batch["audio_length"][row]) / total if estimator.is_timed else None
                yield self._estimated(estimator, batch, row, estimate, self.facts[index], spent, listener)

    def _estimated(
        self,
        estimator: Estimator,
        batch: TrialBatch,
        row: int,
        estimate: Float[np.ndarray, "_samples"],
        facts: TrialFacts,
        seconds: float | None,
        listener: Listener | None,
    ) -> EstimatedTrial:
        name, length, rate = batch["name"][row], int(batch["audio_length"][row]), self.data.sample_rate
        target, mixture = batch["target"][row, :length].numpy(), batch["audio"][row, :length].numpy()
        enrollment = batch["ref"][row, : int(batch["ref_length"][row])].numpy()
        heard = Heard(name, estimate, target, mixture, enrollment, rate)
        presence = None if estimator.presence is None else estimator.presence(mixture, estimate)
        return EstimatedTrial(
            name,
            estimate,
            target,
            mixture,
            facts,
            len(enrollment) / rate,
            _hash_audio(batch, row, rate),
            None if seconds is None else round(seconds, 6),
            None if listener is None else listener(heard),
            None if presence is None else presence.score_db,
            None if presence is None else presence.is_present,
        )


def _save(path: Path, estimate: Float[np.ndarray, "_samples"], sample_rate: int) -> None:
    try:
        write_audio(path, estimate, sample_rate, subtype="FLOAT", durable=False)
    except AudioError as error:
        raise AudioError(f"{path}: the estimate cannot be saved ({error})") from error


def _hash_audio(batch: TrialBatch, row: int, sample_rate: int) -> str:
    """Return the hash of the audio of one trial as it is judged, whatever file it came from."""
    length, ref_length = int(batch["audio_length"][row]), int(batch["ref_length"][row])
    digest = hashlib.blake2b(f"{sample_rate} {length} {ref_length}".encode(), digest_size=16)
    waves: tuple[Tensor, ...] = (
        batch["audio"][row, :length],
        batch["target"][row, :length],
        batch["ref"][row, :ref_length],
    )
    for wave in waves:
        digest.update(wave.to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def require_metrics(names: tuple[MetricName, ...]) -> None:
    """Raise `MissingDependencyError` before any work if the package of a metric is missing."""
    packages = {"pesq": "pesq", "stoi": "pystoi", "estoi": "pystoi", "sdr": "fast_bss_eval"}
    missing = sorted({packages[name] for name in names if name in packages and find_spec(packages[name]) is None})
    if missing:
        raise MissingDependencyError(
            f'evaluation needs {", ".join(missing)}: pip install "onevoice[eval]" (pesq needs a C compiler), '
            "or choose other metrics (--metrics si_sdr si_sdr_improvement)"
        )


def require_rate(names: tuple[MetricName, ...], sample_rate: int) -> None:
    """Raise `ConfigError` before any work if PESQ is not defined at the network's rate."""
    if "pesq" in names and sample_rate not in (8000, 16000):
        raise ConfigError(
            f"metrics: PESQ is defined at 8000 and 16000 Hz, and the network works at {sample_rate} Hz; choose others "
            "(--metrics si_sdr si_sdr_improvement stoi)"
        )
