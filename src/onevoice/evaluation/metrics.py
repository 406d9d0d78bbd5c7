"""How good one estimate is: every metric of the reports, as pure functions of arrays, computed in float64.

Arguments are always (estimate, target); the libraries below take them the other way round. Nothing is rescaled,
shifted or cut before it is scored. This module does not import torch, so a worker process starts fast and stays small
(fast_bss_eval imports torch itself, if it is installed, at the first `sdr` of a process).

Conventions. *Silent* means that all samples are equal: digital silence, with or without DC.

- **Ratios in dB are limited to −60 and +100**, so that every mean is finite. An estimate without any target scores
  −10 log10(samples) on average, −45 dB for 4 s at 8 kHz, so only silence reaches the floor. 100 dB is the range of
  16-bit audio, so only a perfect estimate reaches the ceiling.
- **A silent estimate** of a target that speaks is a total failure: −60 dB SI-SDR and SDR, 0 STOI. PESQ has no value
  and raises `MetricError`.
- **A silent target** leaves every comparison undefined: `MetricError`. `attenuation_db` judges such trials.
- **A signal too short for a metric**, or one that a library refuses: `MetricError`. `compute_metrics` turns it into
  None and a reason, to be counted.
- Unequal lengths, NaN, an empty array, or a rate that a metric is not defined at: `AudioError`.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import numpy as np
from jaxtyping import Float

from onevoice.audio import require_finite
from onevoice.errors import AudioError, MetricError, MissingDependencyError

FLOOR_DB, CEILING_DB = -60.0, 100.0
"""Limits of every ratio in dB: a silent estimate scores the floor, a perfect one the ceiling."""

MAX_INPUT_DB = 60.0
"""A mixture that is this close to its target holds nothing else."""

SDR_TAPS = 512
"""Length in samples of the distortion filter that BSSEval allows."""

MAX_PESQ_UTTERANCES = 45
"""Utterances allowed in a target; the PESQ code has room for 50. A minute of natural speech has fewer."""

MIN_STOI_SECONDS = 0.4
"""30 frames of 25.6 ms with 12.8 ms hop: the shortest speech that STOI is defined on."""

Signal = Float[np.ndarray, "_samples"]
Metric = Callable[[Signal, Signal, Signal, int], float]
MetricName = Literal["si_sdr", "si_sdr_improvement", "sdr", "pesq", "stoi", "estoi"]


def si_sdr(estimate: Signal, target: Signal) -> float:
    """Return the scale-invariant signal-to-distortion ratio in dB; higher is better.

    With both signals centered and s = <e,t> t / |t|², the value is 10 log10(|s|² / |e − s|²) (Le Roux et al., "SDR —
    half-baked or well done?", ICASSP 2019, eq. 4). Scale, polarity and DC of either signal do not matter. A silent
    estimate gives the floor. Raises `MetricError` for a silent target.
    """
    estimate, target = _checked(estimate, target)
    if is_silent(estimate):
        return FLOOR_DB
    estimate, target = _unit(estimate), _unit(target)
    wanted = float(estimate @ target) * target
    return _ratio_db(wanted, estimate - wanted)


def si_sdr_improvement(estimate: Signal, mixture: Signal, target: Signal) -> float:
    """Return SI-SDR(estimate) − SI-SDR(mixture) in dB; positive if the estimate is better.

    Raises `MetricError` for a silent target.
    """
    return si_sdr(estimate, target) - si_sdr(mixture, target)


def interferer_improvement(estimate: Signal, mixture: Signal, target: Signal) -> float:
    """Return the SI-SDR improvement in dB toward all that is not the target; positive if the estimate has more of it.

    The reference is what is left of the mixture without its projection on the target, both centered: the interferer,
    up to its small correlation with the target. It needs no target at the scale of the mixture, and toward it the
    mixture has −SI-SDR(mixture, target). Raises `MetricError` for a silent target and for a mixture with nothing else
    in it (60 dB SI-SDR or more).
    """
    mixture, target = _checked(mixture, target)
    if is_silent(mixture):
        raise MetricError("the mixture is silent, so it holds no interferer")
    unit, centered = _unit(target), mixture - mixture.mean()
    wanted = float(centered @ unit) * unit
    rest = centered - wanted
    if _ratio_db(wanted, rest) >= MAX_INPUT_DB:
        raise MetricError("the mixture holds nothing but the target, so there is no interferer")
    return si_sdr(estimate, rest) - si_sdr(mixture, rest)


def sdr(estimate: Signal, target: Signal) -> float:
    """Return the BSSEval signal-to-distortion ratio in dB; higher is better.

    Everything that a filter of 512 taps can make of the target counts as target (Vincent et al., "Performance
    measurement in blind audio source separation", 2006, eq. 8); computed by fast_bss_eval. A silent estimate gives the
    floor. Raises `MetricError` for a silent target or signals shorter than the filter.
    """
    estimate, target = _checked(estimate, target)
    if len(target) < SDR_TAPS:
        raise MetricError(f"SDR needs {SDR_TAPS} samples or more, not {len(target)}")
    if is_silent(estimate):
        return FLOOR_DB
    library = _eval_package("fast_bss_eval")
    try:
        value = library.sdr(target[None], estimate[None], filter_length=SDR_TAPS, clamp_db=CEILING_DB)
    except np.linalg.LinAlgError as error:
        raise MetricError(f"SDR cannot be solved for this target ({error})") from error
    return _limited(float(value[0]), "SDR")


def pesq(estimate: Signal, target: Signal, sample_rate: int) -> float:
    """Return PESQ as MOS-LQO (1 to 4.6, higher is better): wide band at 16 kHz, narrow band at 8 kHz.

    ITU-T P.862.2 and P.862.1, by the `pesq` package. Raises `MetricError` if it has no value: a silent estimate or
    target, less than a quarter of a second, no utterance found, or so many that its code would overflow
    (`_max_utterances`). Raises `AudioError` for any other rate.
    """
    mode = {8000: "nb", 16000: "wb"}.get(sample_rate)
    if mode is None:
        raise AudioError(f"PESQ is defined at 8000 and 16000 Hz, not {sample_rate} Hz; resample first")
    estimate, target = _checked(estimate, target)
    if is_silent(estimate):
        raise MetricError("PESQ refused: the estimate is silent")
    if _max_utterances(target, sample_rate) > MAX_PESQ_UTTERANCES:
        raise MetricError(f"PESQ refused: over {MAX_PESQ_UTTERANCES} utterances; score shorter pieces")
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

    Taal et al., 2011, or with `extended` ESTOI of Jensen and Taal, 2016; by the `pystoi` package, which resamples to
    10 kHz. A silent estimate gives 0. Raises `MetricError` for a silent target, and for less than about 0.4 s of speech
    once pauses are removed.
    """
    estimate, target = _checked(estimate, target)
    if len(target) < MIN_STOI_SECONDS * sample_rate:
        raise MetricError(f"STOI needs {MIN_STOI_SECONDS} s of speech or more")
    if is_silent(estimate):
        return 0.0
    library = _eval_package("pystoi")
    with warnings.catch_warnings(record=True) as caught, _fixed_global_randomness():
        warnings.simplefilter("always", RuntimeWarning)
        value = float(library.stoi(target, estimate, sample_rate, extended=extended))
    if any("Not enough STFT frames" in str(warning.message) for warning in caught):
        raise MetricError(f"STOI needs {MIN_STOI_SECONDS} s of speech or more; the target has too much silence")
    if not math.isfinite(value):
        raise MetricError("STOI refused: its result is not a number")
    return value


def attenuation_db(mixture: Signal, estimate: Signal) -> float:
    """Return 10 log10(|mixture|² / |estimate|²) in dB; positive if the estimate is quieter.

    For trials in which the target is absent and a good extractor is silent. An estimate of zeros gives the ceiling.
    Raises `MetricError` for a silent mixture.
    """
    if mixture.shape != estimate.shape:
        raise AudioError(f"the mixture has {mixture.size} samples and the estimate {estimate.size}")
    require_finite(mixture, "mixture")
    require_finite(estimate, "estimate")
    if is_silent(mixture):
        raise MetricError("the mixture is silent, so nothing can be attenuated")
    return _ratio_db(mixture, estimate)


METRICS: Mapping[MetricName, Metric] = {
    "si_sdr": lambda estimate, target, mixture, sample_rate: si_sdr(estimate, target),
    "si_sdr_improvement": lambda estimate, target, mixture, sample_rate: si_sdr_improvement(estimate, mixture, target),
    "sdr": lambda estimate, target, mixture, sample_rate: sdr(estimate, target),
    "pesq": lambda estimate, target, mixture, sample_rate: pesq(estimate, target, sample_rate),
    "stoi": lambda estimate, target, mixture, sample_rate: stoi(estimate, target, sample_rate),
    "estoi": lambda estimate, target, mixture, sample_rate: stoi(estimate, target, sample_rate, True),
}
"""Every metric that compares an estimate with its target, called as (estimate, target, mixture, sample_rate)."""


TITLES: Mapping[MetricName, str] = {
    "si_sdr": "SI-SDR",
    "pesq": "PESQ",
    "si_sdr_improvement": "SI-SDRi",
    "sdr": "SDR",
    "stoi": "STOI",
    "estoi": "ESTOI",
}
"""What reports call each metric, in their order."""
IN_DB: frozenset[str] = frozenset({"si_sdr", "si_sdr_improvement", "sdr"})
"""The metrics in dB; the others have no unit."""


def compute_metrics(
    estimate: Signal,
    target: Signal,
    mixture: Signal,
    sample_rate: int,
    names: Sequence[MetricName] = tuple(METRICS),
) -> tuple[dict[MetricName, float | None], dict[MetricName, str]]:
    """Return the values of the metrics `names`, and the reason for each one that raises `MetricError`.

    Raises `AudioError` for signals that do not belong together, and `MissingDependencyError` if a package of the extra
    `eval` is missing.
    """
    values: dict[MetricName, float | None] = {}
    refusals: dict[MetricName, str] = {}
    for name in names:
        try:
            values[name] = METRICS[name](estimate, target, mixture, sample_rate)
        except MetricError as error:
            values[name], refusals[name] = None, str(error)
    return values, refusals


def _max_utterances(target: Signal, sample_rate: int) -> int:
    """Return an upper bound of the number of utterances that PESQ finds in the target.

    The code of P.862 has tables for 50 utterances and writes past their end without a check: first the score is wrong,
    then the process dies. An utterance is a run of 4-ms frames above a threshold that has 50 frames or more once gaps
    of up to 50 frames are closed and bursts of up to 4 frames are dropped (`apply_VAD` and `id_searchwindows` there).
    The threshold adapts to the filtered signal, within 40 dB below its loudest frame. Its value is not known here, so
    every 3 dB is tried and the largest count is returned.
    """
    frame = sample_rate // 250
    energy = np.square(target[: len(target) // frame * frame].reshape(-1, frame)).mean(axis=1)
    possible = (len(energy) + 51) // 101  # utterances of 50 frames with gaps of 51
    if possible <= MAX_PESQ_UTTERANCES:
        return possible
    largest = 0
    for below_peak_db in range(3, 42, 3):
        active = energy > energy.max() * 10 ** (-below_peak_db / 10)
        # Each run of active frames is [start, end).
        edges = np.flatnonzero(np.diff(active, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        # Drop bursts of up to 4 frames.
        lasting = ends - starts > 4
        starts, ends = starts[lasting], ends[lasting]
        # Close gaps of up to 50 frames: keep a start after a long gap, and an end before one.
        apart = starts[1:] - ends[:-1] > 50
        lengths = ends[np.append(apart, True)] - starts[np.insert(apart, 0, True)] if len(starts) else starts
        largest = max(largest, int(np.sum(lengths >= 50)))
    return largest


def _checked(estimate: Signal, target: Signal) -> tuple[Signal, Signal]:
    """Return both signals in float64 after checking that they can be compared."""
    if estimate.shape != target.shape:
        raise AudioError(f"the estimate has {estimate.size} samples and the target {target.size}")
    require_finite(estimate, "estimate")
    require_finite(target, "target")
    if is_silent(target):
        raise MetricError("the target is silent, so nothing can be compared with it")
    return estimate.astype(np.float64), target.astype(np.float64)


def is_silent(samples: Signal) -> bool:
    """Check whether all samples are equal."""
    return not np.ptp(samples) > 0


def _unit(samples: Signal) -> Signal:
    """Center `samples` and scale them to norm 1; by the peak first, so that no square underflows."""
    scaled = samples / np.abs(samples).max()
    centered = scaled - scaled.mean()
    unit: Signal = centered / np.linalg.norm(centered)
    return unit


def _ratio_db(wanted: Signal, unwanted: Signal) -> float:
    """Return the ratio of two powers in dB, limited to floor and ceiling. At most one signal may be zero."""
    wanted_power = float(np.mean(np.square(wanted, dtype=np.float64)))
    unwanted_power = float(np.mean(np.square(unwanted, dtype=np.float64)))
    if not unwanted_power > 0:
        return CEILING_DB
    if not wanted_power > 0:
        return FLOOR_DB
    return _limited(10 * math.log10(wanted_power / unwanted_power), "the ratio")


def _limited(value_db: float, name: str) -> float:
    if math.isnan(value_db):
        raise MetricError(f"{name} is not a number for these signals")
    return min(max(value_db, FLOOR_DB), CEILING_DB)


@contextmanager
def _fixed_global_randomness() -> Iterator[None]:
    """Seed NumPy's global generator, from which pystoi draws a tiny noise, and restore it afterwards."""
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
            f'{name} is not installed; pip install "onevoice[eval]" installs the packages of evaluation'
        ) from error
