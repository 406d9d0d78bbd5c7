"""How good an estimate is: every metric of the reports, as pure functions of float64 arrays.

Arguments always come as (estimate, target); the libraries below take them the other way round. Nothing is
rescaled, shifted or cut before it is scored, and nothing here imports torch, so a worker process stays small
(fast_bss_eval imports torch by itself, where it is installed, at the first `sdr` of a process).

Decided once, here. *Silent* means that all samples are equal: digital silence, with or without DC.

- **Ratios in dB stay within −60 and +100**, so that every mean is finite. An estimate free of the target
  scores −10 log10(samples) on average, −45 dB for 4 s at 8 kHz, so only silence reaches the floor; 100 dB is
  the range of 16-bit audio, so only a perfect estimate reaches the ceiling.
- **A silent estimate** of a target that speaks is a total failure and counts as one: −60 dB SI-SDR and SDR, 0
  STOI. PESQ has no value for it and refuses.
- **A silent target** leaves every comparison with it undefined: `MetricError`. Trials without their target
  are judged by `attenuation_db`.
- **Too short for a metric**, or any other refusal of a library: `MetricError`. `score_trial` turns it into
  None and a reason, for the caller to count.
- Unequal lengths, NaN, an empty array or a rate that a metric does not know: `AudioError`.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
from jaxtyping import Float

from onevoice.audio import require_finite
from onevoice.errors import AudioError, MetricError, MissingDependencyError
from onevoice.rng import derive
from onevoice.units import power

FLOOR_DB, CEILING_DB = -60.0, 100.0
"""The range of every ratio in dB: a silent estimate scores the floor, a perfect one the ceiling."""

FAILURE_DB = 1.0
"""A trial has failed when its SI-SDR improvement is below this many dB."""

SDR_TAPS = 512
"""The length in samples of the distortion filter that BSSEval forgives."""

Signal = Float[np.ndarray, "_samples"]
Metric = Callable[[Signal, Signal, Signal, int], float]
MetricName = Literal["si_sdr", "si_sdr_improvement", "sdr", "pesq", "stoi", "estoi"]


def si_sdr(estimate: Signal, target: Signal) -> float:
    """Return the scale-invariant signal-to-distortion ratio in dB; higher is better.

    Both signals are centred; s = <e,t> t / |t|², and the value is 10 log10(|s|² / |e − s|²) (Le Roux et al.,
    "SDR — half-baked or well done?", ICASSP 2019, eq. 4). Scale, polarity and DC of either do not matter. A
    silent estimate gives the floor. Raises `MetricError` for a silent target.
    """
    estimate, target = _checked(estimate, target)
    if _is_silent(estimate):
        return FLOOR_DB
    estimate, target = _unit(estimate), _unit(target)
    wanted = float(estimate @ target) * target
    return _ratio_db(power(wanted), power(estimate - wanted))


def si_sdr_improvement(estimate: Signal, mixture: Signal, target: Signal) -> float:
    """Return SI-SDR(estimate) − SI-SDR(mixture) in dB; positive when the estimate is the better of the two.

    Raises `MetricError` for a silent target.
    """
    return si_sdr(estimate, target) - si_sdr(mixture, target)


def sdr(estimate: Signal, target: Signal) -> float:
    """Return the BSSEval signal-to-distortion ratio in dB; higher is better.

    What a filter of 512 taps can make of the target counts as target (Vincent et al., "Performance
    measurement in blind audio source separation", 2006, eq. 8); solved by fast_bss_eval. A silent estimate
    gives the floor. Raises `MetricError` for a silent target or signals shorter than the filter.
    """
    estimate, target = _checked(estimate, target)
    if len(target) < SDR_TAPS:
        raise MetricError(f"SDR needs {SDR_TAPS} samples or more, not {len(target)}")
    if _is_silent(estimate):
        return FLOOR_DB
    library = _eval_package("fast_bss_eval")
    try:
        value = library.sdr(target[None], estimate[None], filter_length=SDR_TAPS, clamp_db=CEILING_DB)
    except np.linalg.LinAlgError as error:
        raise MetricError(f"SDR cannot be solved for this target ({error})") from error
    return _in_range(float(value[0]), "SDR")


def pesq(estimate: Signal, target: Signal, sample_rate: int) -> float:
    """Return PESQ as MOS-LQO (1 to 4.6, higher is better): wide band at 16 kHz, narrow band at 8 kHz.

    ITU-T P.862.2 and P.862.1, by the `pesq` package. Raises `MetricError` where it has no value: a silent
    estimate or target, less than a quarter of a second, no utterance found, or so many that its code would
    overflow (see `_utterances_at_most`); `AudioError` for any other rate.
    """
    mode = {8000: "nb", 16000: "wb"}.get(sample_rate)
    if mode is None:
        raise AudioError(f"PESQ is defined at 8000 and 16000 Hz, not {sample_rate} Hz; resample first")
    estimate, target = _checked(estimate, target)
    if _is_silent(estimate):
        raise MetricError("PESQ refused: the estimate is silent")
    if _utterances_at_most(target, sample_rate) > PESQ_UTTERANCES:
        raise MetricError(f"PESQ refused: over {PESQ_UTTERANCES} utterances; score shorter pieces")
    library = _eval_package("pesq")
    try:
        value = float(library.pesq(sample_rate, target, estimate, mode))
    except (RuntimeError, ValueError) as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode() if isinstance(reason, bytes) else reason
        raise MetricError(f"PESQ refused: {reason}") from error
    if not math.isfinite(value):
        raise MetricError("PESQ refused: its result is not a number")
    return value


def stoi(estimate: Signal, target: Signal, sample_rate: int, extended: bool = False) -> float:
    """Return the short-time objective intelligibility, about 0 to 1; higher is better.

    Taal et al., 2011; with `extended` ESTOI of Jensen and Taal, 2016; by the `pystoi` package, which converts
    to 10 kHz. A silent estimate gives 0. Raises `MetricError` for a silent target and for less than about
    0.4 s of speech after pauses are removed.
    """
    estimate, target = _checked(estimate, target)
    if len(target) < STOI_SECONDS * sample_rate:
        raise MetricError(f"STOI needs {STOI_SECONDS} s of speech or more")
    if _is_silent(estimate):
        return 0.0
    library = _eval_package("pystoi")
    with warnings.catch_warnings(record=True) as caught, _fixed_global_randomness():
        warnings.simplefilter("always", RuntimeWarning)
        value = float(library.stoi(target, estimate, sample_rate, extended=extended))
    if any("Not enough STFT frames" in str(warning.message) for warning in caught):
        raise MetricError(f"STOI needs {STOI_SECONDS} s of speech or more; the target has too much silence")
    if not math.isfinite(value):
        raise MetricError("STOI refused: its result is not a number")
    return value


def attenuation_db(mixture: Signal, estimate: Signal) -> float:
    """Return 10 log10(|mixture|² / |estimate|²) in dB; positive when the estimate is quieter.

    For trials without their target, where a good extractor is silent: an estimate of zeros gives the ceiling.
    Raises `MetricError` for a silent mixture.
    """
    if mixture.shape != estimate.shape:
        raise AudioError(f"the mixture has {mixture.size} samples and the estimate {estimate.size}")
    require_finite(mixture, "mixture")
    require_finite(estimate, "estimate")
    if _is_silent(mixture):
        raise MetricError("the mixture is silent, so nothing can be attenuated")
    return _ratio_db(power(mixture), power(estimate))


METRICS: Mapping[MetricName, Metric] = {
    "si_sdr": lambda estimate, target, mixture, sample_rate: si_sdr(estimate, target),
    "si_sdr_improvement": lambda estimate, target, mixture, sample_rate: si_sdr_improvement(estimate, mixture, target),
    "sdr": lambda estimate, target, mixture, sample_rate: sdr(estimate, target),
    "pesq": lambda estimate, target, mixture, sample_rate: pesq(estimate, target, sample_rate),
    "stoi": lambda estimate, target, mixture, sample_rate: stoi(estimate, target, sample_rate),
    "estoi": lambda estimate, target, mixture, sample_rate: stoi(estimate, target, sample_rate, True),
}
"""Every metric that compares with the target, called as (estimate, target, mixture, sample_rate)."""


@dataclass(frozen=True)
class Score:
    """The metrics of one trial: `values` by name, None where refused; `refusals` says why, by name."""

    values: dict[MetricName, float | None]
    refusals: dict[MetricName, str]


def score_trial(
    estimate: Signal,
    target: Signal,
    mixture: Signal,
    sample_rate: int,
    names: Sequence[MetricName] = tuple(METRICS),
) -> Score:
    """Return the metrics `names` of one trial; a `MetricError` becomes None with its reason.

    Made for process pools: the arguments and the result are picklable. Raises `AudioError` for signals that
    do not belong together, and `MissingDependencyError` when a package of the extra `eval` is missing.
    """
    values: dict[MetricName, float | None] = {}
    refusals: dict[MetricName, str] = {}
    for name in names:
        try:
            values[name] = METRICS[name](estimate, target, mixture, sample_rate)
        except MetricError as error:
            values[name], refusals[name] = None, str(error)
    return Score(values, refusals)


@dataclass(frozen=True)
class Summary:
    """One metric over all trials. The statistics are None when no trial has a value."""

    count: int
    """Trials with a value."""
    missing: int
    """Trials without one, which no statistic contains."""
    mean: float | None
    median: float | None
    percentile_5: float | None
    interval_95: tuple[float, float] | None
    """Bootstrap 95 % interval of the mean."""


def summarize(values: Sequence[float | None], seed: int = 0) -> Summary:
    """Return the summary of one metric over trials, None standing for a trial that was refused.

    Raises `ValueError` for NaN or infinity, which no metric of this module returns.
    """
    known = _known(values)
    missing = len(values) - len(known)
    if not known.size:
        return Summary(0, missing, None, None, None, None)
    return Summary(
        count=len(known),
        missing=missing,
        mean=float(known.mean()),
        median=float(np.median(known)),
        percentile_5=float(np.percentile(known, 5)),
        interval_95=bootstrap_interval(known, seed),
    )


def bootstrap_interval(
    values: Float[np.ndarray, "trials"], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (low, high) of the mean (Efron, 1979).

    `resamples` sets of trials are drawn with replacement from those given, and the middle `level` of their
    means is kept. A function of values and seed alone. Raises `ValueError` for no values.
    """
    if not values.size:
        raise ValueError("no values to draw from")
    rng = derive(seed, "bootstrap")
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def failure_rate(improvements: Sequence[float | None], threshold_db: float = FAILURE_DB) -> float | None:
    """Return the share of trials (0 to 1) whose SI-SDR improvement in dB is below `threshold_db`.

    None stands for a trial whose target is silent: it is left out. None comes back when no trial is left.
    """
    known = _known(improvements)
    return float(np.mean(known < threshold_db)) if known.size else None


PESQ_UTTERANCES = 45
"""Utterances allowed in a target: the PESQ code has room for 50. A minute of natural speech has fewer."""

STOI_SECONDS = 0.4
"""30 frames of 25.6 ms with 12.8 ms hop: the shortest speech that STOI is defined on."""


def _utterances_at_most(target: Signal, sample_rate: int) -> int:
    """Bound the number of utterances that PESQ finds in the target.

    The code of P.862 has tables for 50 utterances and writes past them without a check: the score is wrong
    first, then the process dies. An utterance is a run of 4-ms frames above a threshold, 50 frames or longer
    once gaps up to 50 frames are closed and bursts up to 4 frames are dropped (`apply_VAD` and
    `id_searchwindows` there). The threshold, which adapts to the filtered signal within 40 dB below its
    loudest frame, is not known here, so the worst one counts.
    """
    frame = sample_rate // 250
    energy = np.square(target[: len(target) // frame * frame].reshape(-1, frame)).mean(axis=1)
    possible = (len(energy) + 51) // 101
    if possible <= PESQ_UTTERANCES:
        return possible
    most = 0
    for below_peak_db in range(3, 42, 3):
        active = energy > energy.max() * 10 ** (-below_peak_db / 10)
        edges = np.flatnonzero(np.diff(active, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        lasting = ends - starts > 4
        starts, ends = starts[lasting], ends[lasting]
        apart = starts[1:] - ends[:-1] > 50
        lengths = ends[np.append(apart, True)] - starts[np.insert(apart, 0, True)] if len(starts) else starts
        most = max(most, int(np.sum(lengths >= 50)))
    return most


def _checked(estimate: Signal, target: Signal) -> tuple[Signal, Signal]:
    """Return both in float64 after checking that they can be compared."""
    if estimate.shape != target.shape:
        raise AudioError(f"the estimate has {estimate.size} samples and the target {target.size}")
    require_finite(estimate, "estimate")
    require_finite(target, "target")
    if _is_silent(target):
        raise MetricError("the target is silent, so nothing can be compared with it")
    return estimate.astype(np.float64), target.astype(np.float64)


def _is_silent(samples: Signal) -> bool:
    return not np.ptp(samples) > 0


def _unit(samples: Signal) -> Signal:
    """Centre and scale to norm 1; by the peak first, so that no square underflows."""
    scaled = samples / np.abs(samples).max()
    centred = scaled - scaled.mean()
    unit: Signal = centred / np.linalg.norm(centred)
    return unit


def _ratio_db(wanted: float, unwanted: float) -> float:
    """Return a power ratio in dB within the floor and the ceiling; not both powers may be 0."""
    if not unwanted > 0:
        return CEILING_DB
    if not wanted > 0:
        return FLOOR_DB
    return _in_range(10 * math.log10(wanted / unwanted), "the ratio")


def _in_range(value_db: float, name: str) -> float:
    if math.isnan(value_db):
        raise MetricError(f"{name} is not a number for these signals")
    return min(max(value_db, FLOOR_DB), CEILING_DB)


def _known(values: Sequence[float | None]) -> Float[np.ndarray, "trials"]:
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not np.isfinite(known).all():
        raise ValueError("a metric is None where it has no value, never NaN or infinite")
    return known


@contextmanager
def _fixed_global_randomness() -> Iterator[None]:
    """Seed NumPy's global generator inside and restore it after: pystoi draws its tiny noise from there."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _eval_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f'{name} is not installed; pip install "onevoice[eval]" brings the packages of evaluation'
        ) from error
