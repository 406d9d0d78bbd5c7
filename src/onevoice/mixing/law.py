"""The mixing law: how one trial is drawn from a corpus and rendered, as pure functions of their arguments.

1. Draw a target speaker, an interferer, one utterance of each, and an enrollment: another utterance of the target.
2. Convert to mono at one rate, remove the mean, bring target and interferer to −29 LUFS and the enrollment to
   −23 LUFS, and with `trim_db` cut off silence at their ends.
3. For training remove silence inside target and interferer by `vad_db` and cut both into consecutive segments of
   `segment_seconds`; for test keep their full length and pad the shorter with zeros.
4. Per segment scale the interferer so that 10 log10(|target|² / |interferer|²) is the drawn SNR, add, and bring the
   sum to −23 LUFS by one gain that target and mixture share, less where a peak would pass 0.99. So mixture − target
   is the interferer as it sounds in the mixture.

What cannot be used raises `Unusable`; the caller draws again. A trial is a function of (speakers, seed, index,
attempt) and the law alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from onevoice.audio import Mono, read_audio
from onevoice.corpus.listing import Speaker
from onevoice.errors import AudioError, ConfigError
from onevoice.mixing.levels import loudness_gain, trim, vad_merge
from onevoice.rng import derive
from onevoice.units import db_to_amplitude, rms_dbfs, to_samples

SOURCE_LUFS = -29.0
ENROLLMENT_LUFS = -23.0
MIXTURE_LUFS = -23.0
PEAK_LIMIT = 0.99
MIN_ENROLLMENT_SECONDS = 1.0
MAX_REFERENCES = 10
"""How many utterances are tried as enrollment before the whole trial is drawn again."""
SILENCE_DBFS = -70.0
"""A segment below this, after levelling its source to −29 LUFS, is silent and skipped."""

UNREADABLE = "unreadable file"
SILENT_FILE = "silent file"
SILENT_SEGMENT = "silent segment"
SHORT_REFERENCE = "reference shorter than 1 s"
SHORT_SOURCE = "too short for one segment"


@dataclass(frozen=True)
class MixingLaw:
    """The settings of the law; rates in Hz, thresholds in dB below the loudest frame (None: silence stays)."""

    sample_rate: int = 16000
    snr_levels: tuple[float, ...] = (0.0, 5.0)
    full_length: bool = False
    trim_db: float | None = None
    vad_db: float | None = 20.0
    segment_seconds: float = 3.0

    def __post_init__(self) -> None:
        if self.sample_rate < 1000:
            raise ConfigError(f"sample_rate: {self.sample_rate} Hz is no rate for speech; give 8000 or more")
        if not self.snr_levels or not np.isfinite(self.snr_levels).all():
            raise ConfigError(f"snr_levels: {list(self.snr_levels)} must be one or more numbers in dB")
        for name, value in (("trim_db", self.trim_db), ("vad_db", self.vad_db)):
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name}: {value} must be above 0 dB; leave it out (None) to keep silence")
        if not 0.1 <= self.segment_seconds < np.inf:
            raise ConfigError(
                f"segment_seconds (audioLen, --segment-seconds): {self.segment_seconds} must be 0.1 s or more"
            )


@dataclass(frozen=True)
class Draw:
    """What chance decided for one trial: `references` are tried in order until one can be the enrollment."""

    index: int
    attempt: int
    target_speaker: str
    interferer_speaker: str
    target: Path
    interferer: Path
    references: tuple[Path, ...]
    snr_db: float


@dataclass(frozen=True)
class Rejection:
    """Something drawn that was not used: one of the reasons above, the file, and what is wrong with it."""

    reason: str
    file: Path
    detail: str = ""


class Unusable(Exception):  # noqa: N818 - no error of the user: it asks for another draw
    """A draw cannot become a trial, for the reasons listed."""

    def __init__(self, *rejections: Rejection) -> None:
        super().__init__(*rejections)
        self.rejections = rejections


class Source(NamedTuple):
    """An utterance as the law uses it, and the gain in dB that brought its file there."""

    samples: Mono
    gain_db: float


class Pair(NamedTuple):
    """A stretch of target and of interferer of equal length; `segment` is None for full length."""

    segment: int | None
    start: int
    target: Mono
    interferer: Mono


class Mixed(NamedTuple):
    """A mixture and its target on one scale; the gains say what target and interferer were multiplied by."""

    segment: int | None
    start: int
    mixture: Mono
    target: Mono
    target_gain_db: float
    interferer_gain_db: float
    peak_limited: bool


class Rendered(NamedTuple):
    """A trial as sound: one or more mixtures, their enrollment, and what was passed over on the way."""

    mixed: list[Mixed]
    enrollment: Source
    enrollment_file: Path
    passed_over: list[Rejection]


Load = Callable[[Path], Source]


def draw_trial(
    speakers: Sequence[Speaker], seed: int, index: int, attempt: int = 0, snr_levels: Sequence[float] = (0.0, 5.0)
) -> Draw:
    """Draw who speaks in trial `index`, at which SNR in dB; every speaker is as likely, however many files they have.

    The enrollment is never the target's own file. `speakers` needs two entries, one of them with two files.
    """
    rng = derive(seed, "mix", index, attempt)
    targets = [speaker for speaker in speakers if len(speaker.files) > 1]
    target = targets[rng.integers(len(targets))]
    others = [speaker for speaker in speakers if speaker.id != target.id]
    interferer = others[rng.integers(len(others))]
    order = rng.choice(len(target.files), min(1 + MAX_REFERENCES, len(target.files)), replace=False)
    utterance, *references = (target.files[number] for number in order)
    return Draw(
        index=index,
        attempt=attempt,
        target_speaker=target.id,
        interferer_speaker=interferer.id,
        target=utterance,
        interferer=interferer.files[rng.integers(len(interferer.files))],
        references=tuple(references),
        snr_db=float(snr_levels[int(rng.integers(len(snr_levels)))]),
    )


def load_source(path: Path, law: MixingLaw) -> Source:
    """Read an utterance at the rate of the law, without its mean, at −29 LUFS, trimmed. Raises `Unusable`."""
    try:
        samples, _ = read_audio(path, law.sample_rate)
    except AudioError as error:
        raise Unusable(Rejection(UNREADABLE, path, str(error).removeprefix(f"{path}: "))) from error
    if samples.size:
        samples = samples - np.float32(samples.mean(dtype=np.float64))
    gain = loudness_gain(samples, law.sample_rate, SOURCE_LUFS)
    if not np.isfinite(gain):
        raise Unusable(Rejection(SILENT_FILE, path, "below −70 LUFS throughout"))
    samples = samples * np.float32(gain)
    return Source(samples if law.trim_db is None else trim(samples, law.trim_db), _db(gain))


def render(draw: Draw, law: MixingLaw, load: Load) -> Rendered:
    """Render a draw; `load` gives the utterance of a path as `load_source` does. Raises `Unusable`."""
    target, interferer = (_prepared(file, law, load) for file in (draw.target, draw.interferer))
    if law.full_length:
        pairs = [Pair(None, 0, *pad_to_longest(target.samples, interferer.samples))]
    else:
        pairs = cut_segments(target.samples, interferer.samples, to_samples(law.segment_seconds, law.sample_rate))
    mixed: list[Mixed] = []
    passed_over: list[Rejection] = []
    for pair in pairs:
        try:
            mixed.append(_mix(pair, draw, law, target.gain_db, interferer.gain_db))
        except Unusable as silent:
            passed_over += silent.rejections
    if not mixed:
        raise Unusable(*passed_over)
    try:
        enrollment, file, skipped = choose_enrollment(draw, law, load)
    except Unusable as none:
        raise Unusable(*passed_over, *none.rejections) from none
    return Rendered(mixed, enrollment, file, passed_over + skipped)


def choose_enrollment(draw: Draw, law: MixingLaw, load: Load) -> tuple[Source, Path, list[Rejection]]:
    """Return the first reference of at least 1 s at −23 LUFS, its path, and the references passed over.

    Peaks stay within 0.99. Raises `Unusable` when no reference serves.
    """
    passed_over: list[Rejection] = []
    for path in draw.references:
        try:
            samples, gain_db = load(path)
        except Unusable as broken:
            passed_over += broken.rejections
            continue
        if len(samples) < to_samples(MIN_ENROLLMENT_SECONDS, law.sample_rate):
            passed_over.append(Rejection(SHORT_REFERENCE, path, f"{len(samples) / law.sample_rate:.2f} s"))
            continue
        gain = min(db_to_amplitude(ENROLLMENT_LUFS - SOURCE_LUFS), PEAK_LIMIT / _peak(samples))
        return Source(samples * np.float32(gain), gain_db + _db(gain)), path, passed_over
    raise Unusable(*passed_over)


def mix_at_snr(
    target: Float[np.ndarray, "samples"], interferer: Float[np.ndarray, "samples"], snr_db: float
) -> tuple[Float[np.ndarray, "samples"], float]:
    """Return `target + gain · interferer` and the gain for which 10 log10(|target|² / |gain · interferer|²) = snr_db.

    A positive `snr_db` makes the target the louder one. Raises `AudioError` when either is silent.
    """
    energies = [float(np.square(part, dtype=np.float64).sum()) for part in (target, interferer)]
    if not min(energies) > 0:
        raise AudioError("a silent signal cannot be mixed at an SNR")
    gain = np.sqrt(energies[0] / energies[1]) * db_to_amplitude(-snr_db)
    return target + target.dtype.type(gain) * interferer, float(gain)


def shared_gain(mixture: Mono, target: Mono, sample_rate: int) -> tuple[float, bool]:
    """Return the factor that brings `mixture` to −23 LUFS, or less to keep both peaks within 0.99, and whether less.

    Infinite for a mixture that is silent by its loudness, such as one of inaudible rumble alone.
    """
    wanted = loudness_gain(mixture, sample_rate, MIXTURE_LUFS)
    if not np.isfinite(wanted):
        return wanted, False
    allowed = PEAK_LIMIT / max(_peak(mixture), _peak(target))
    return min(wanted, allowed), wanted > allowed


def cut_segments(target: Mono, interferer: Float[np.ndarray, "other_samples"], length: int) -> list[Pair]:
    """Cut both into as many consecutive segments of `length` samples as the shorter holds; the rest is dropped."""
    starts = range(0, min(len(target), len(interferer)) - length + 1, length)
    return [
        Pair(number, start, target[start : start + length], interferer[start : start + length])
        for number, start in enumerate(starts)
    ]


def pad_to_longest(
    first: Mono, second: Float[np.ndarray, "other_samples"]
) -> tuple[Float[np.ndarray, "longest"], Float[np.ndarray, "longest"]]:
    """Append zeros to the shorter one."""
    length = max(len(first), len(second))
    return np.pad(first, (0, length - len(first))), np.pad(second, (0, length - len(second)))


def _mix(pair: Pair, draw: Draw, law: MixingLaw, target_gain_db: float, interferer_gain_db: float) -> Mixed:
    for samples, file in ((pair.target, draw.target), (pair.interferer, draw.interferer)):
        if rms_dbfs(samples) < SILENCE_DBFS:
            raise Unusable(Rejection(SILENT_SEGMENT, file, f"at {pair.start / law.sample_rate:g} s"))
    mixture, interferer_gain = mix_at_snr(pair.target, pair.interferer, draw.snr_db)
    gain, limited = shared_gain(mixture, pair.target, law.sample_rate)
    if not np.isfinite(gain):
        raise Unusable(Rejection(SILENT_SEGMENT, draw.target, f"at {pair.start / law.sample_rate:g} s"))
    return Mixed(
        segment=pair.segment,
        start=pair.start,
        mixture=mixture * np.float32(gain),
        target=pair.target * np.float32(gain),
        target_gain_db=target_gain_db + _db(gain),
        interferer_gain_db=interferer_gain_db + _db(interferer_gain * gain),
        peak_limited=limited,
    )


def _prepared(file: Path, law: MixingLaw, load: Load) -> Source:
    """Return an utterance ready to be mixed: for segments, voiced parts only, and long enough for one."""
    source = load(file)
    if law.full_length:
        return source
    if law.vad_db is not None:
        source = source._replace(samples=vad_merge(source.samples, law.vad_db))
    if len(source.samples) < to_samples(law.segment_seconds, law.sample_rate):
        detail = f"{len(source.samples) / law.sample_rate:.2f} s without silence"
        raise Unusable(Rejection(SHORT_SOURCE, file, detail))
    return source


def _peak(samples: Mono) -> float:
    return float(max(samples.max(), -samples.min()))


def _db(gain: float) -> float:
    return float(20.0 * np.log10(gain))
