"""The mixing law: the rules by which one trial on disk is drawn from a corpus and made, as pure functions.

1. Draw a target speaker, an interferer, one utterance of each, and an enrollment: another utterance of the target.
2. Convert to mono at one rate, remove the mean, bring target and interferer to −29 LUFS and the enrollment to
   −23 LUFS, and with `trim_db` cut off silence at their ends.
3. For training, remove silence inside target and interferer by `vad_db` and cut both into consecutive segments of
   `segment_seconds`. For test, keep their full length and pad the shorter with zeros.
4. Per segment, scale the interferer so that 10 log10(|target|² / |interferer|²) is the drawn SNR, add, and bring the
   sum to −23 LUFS by one gain that target and mixture share, or by less if a peak would exceed 0.99. So
   mixture − target is the interferer as it sounds in the mixture.

A draw that cannot be used raises `Unusable`, and the caller draws again. A trial is a function of (speakers, seed,
index, attempt) and the law alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from onevoice.audio import Mono
from onevoice.corpus.recordings import Recording
from onevoice.errors import AudioError, ConfigError
from onevoice.mixing.levels import loudness_gain, remove_silence, snr_gain, trim_silence
from onevoice.rng import derive
from onevoice.units import db_to_amplitude, rms_dbfs, to_samples

UTTERANCE_LUFS = -29.0
ENROLLMENT_LUFS = -23.0
MIXTURE_LUFS = -23.0
MAX_FILE_PEAK = 0.99
"""The highest peak that the gain of a written file may reach."""
MIN_ENROLLMENT_SECONDS = 1.0
MAX_REFERENCES = 10
"""How many utterances are tried as enrollment before the whole trial is drawn again."""
SILENCE_DBFS = -70.0
"""A segment below this RMS level, after its utterance was brought to −29 LUFS, is silent and skipped."""

UNREADABLE = "unreadable file"
SILENT_FILE = "silent file"
SILENT_SEGMENT = "silent segment"
SHORT_REFERENCE = "reference shorter than 1 s"
SHORT_UTTERANCE = "too short for one segment"


@dataclass(frozen=True)
class MixingLaw:
    """The settings of the law; rates in Hz, thresholds in dB below the loudest frame (None keeps silence)."""

    sample_rate: int = 16000
    snr_levels: tuple[float, ...] = (0.0, 5.0)
    full_length: bool = False
    trim_db: float | None = None
    vad_db: float | None = 20.0
    segment_seconds: float = 3.0

    def __post_init__(self) -> None:
        if self.sample_rate < 1000:
            raise ConfigError(f"sample_rate: {self.sample_rate} Hz is too low for speech; give 8000 or more")
        if not self.snr_levels or not np.isfinite(self.snr_levels).all():
            raise ConfigError(f"snr_levels: {list(self.snr_levels)} must be one or more finite numbers in dB")
        for name, value in (("trim_db", self.trim_db), ("vad_db", self.vad_db)):
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name}: {value} must be above 0 dB; leave it out (None) to keep silence")
        if not 0.1 <= self.segment_seconds < np.inf:
            raise ConfigError(
                f"segment_seconds (audioLen, --segment-seconds): {self.segment_seconds} must be 0.1 s or more"
            )


@dataclass(frozen=True)
class SpeakerRecordings:
    """A speaker and their recordings, in a fixed order."""

    id: str
    recordings: tuple[Recording, ...]


@dataclass(frozen=True)
class DrawnTrial:
    """The draws of one trial; `references` are tried in order until one can be the enrollment."""

    index: int
    attempt: int
    target_speaker: str
    interferer_speaker: str
    target: Recording
    interferer: Recording
    references: tuple[Recording, ...]
    snr_db: float


@dataclass(frozen=True)
class Rejection:
    """A recording that was drawn and not used: one of the reasons above, and the detail."""

    reason: str
    recording: Recording
    detail: str = ""


class Unusable(Exception):  # noqa: N818 - not a user's error: it asks for another draw
    """A drawn trial cannot be made, for the reasons listed."""

    def __init__(self, *rejections: Rejection) -> None:
        super().__init__(*rejections)
        self.rejections = rejections


class LeveledUtterance(NamedTuple):
    """An utterance at its level, and the gain in dB that brought the recording there."""

    samples: Mono
    gain_db: float


class SegmentPair(NamedTuple):
    """A stretch of target and interferer of equal length; `segment` is None for full length."""

    segment: int | None
    start: int
    target: Mono
    interferer: Mono


class MixedSegment(NamedTuple):
    """A mixture and its target on one scale; the gains are those of the recordings of target and interferer."""

    segment: int | None
    start: int
    mixture: Mono
    target: Mono
    target_gain_db: float
    interferer_gain_db: float
    peak_limited: bool


class RenderedTrial(NamedTuple):
    """A trial as sound: one or more mixtures, their enrollment, and the recordings that were skipped."""

    mixed: list[MixedSegment]
    enrollment: LeveledUtterance
    enrollment_recording: Recording
    skipped: list[Rejection]


LoadUtterance = Callable[[Recording], LeveledUtterance]


def draw_trial(
    speakers: Sequence[SpeakerRecordings],
    seed: int,
    index: int,
    attempt: int = 0,
    snr_levels: Sequence[float] = (0.0, 5.0),
) -> DrawnTrial:
    """Draw who speaks in trial `index`, at which SNR in dB; all speakers are equally likely.

    The enrollment is never the target's own recording. `speakers` needs two entries, one of them with two recordings.
    """
    rng = derive(seed, "mix", index, attempt)
    targets = [speaker for speaker in speakers if len(speaker.recordings) > 1]
    target = targets[rng.integers(len(targets))]
    others = [speaker for speaker in speakers if speaker.id != target.id]
    interferer = others[rng.integers(len(others))]
    order = rng.choice(len(target.recordings), min(1 + MAX_REFERENCES, len(target.recordings)), replace=False)
    utterance, *references = (target.recordings[number] for number in order)
    return DrawnTrial(
        index=index,
        attempt=attempt,
        target_speaker=target.id,
        interferer_speaker=interferer.id,
        target=utterance,
        interferer=interferer.recordings[rng.integers(len(interferer.recordings))],
        references=tuple(references),
        snr_db=float(snr_levels[int(rng.integers(len(snr_levels)))]),
    )


def load_utterance(recording: Recording, law: MixingLaw) -> LeveledUtterance:
    """Read an utterance at the rate of the law, without its mean, at −29 LUFS, trimmed. Raises `Unusable`."""
    try:
        samples, _ = recording.read(law.sample_rate)
    except AudioError as error:
        raise Unusable(Rejection(UNREADABLE, recording, recording.fault(error).reason)) from error
    if samples.size:
        samples = samples - np.float32(samples.mean(dtype=np.float64))
    gain = loudness_gain(samples, law.sample_rate, UTTERANCE_LUFS)
    if not np.isfinite(gain):
        raise Unusable(Rejection(SILENT_FILE, recording, "below −70 LUFS throughout"))
    samples = samples * np.float32(gain)
    return LeveledUtterance(samples if law.trim_db is None else trim_silence(samples, law.trim_db), _db(gain))


def render_trial(draw: DrawnTrial, law: MixingLaw, load: LoadUtterance) -> RenderedTrial:
    """Render a drawn trial; `load` returns the utterance of a recording (`load_utterance`). Raises `Unusable`."""
    target, interferer = (_load_for_mixing(recording, law, load) for recording in (draw.target, draw.interferer))
    if law.full_length:
        pairs = [SegmentPair(None, 0, *pad_to_longest(target.samples, interferer.samples))]
    else:
        pairs = cut_segments(target.samples, interferer.samples, to_samples(law.segment_seconds, law.sample_rate))
    mixed: list[MixedSegment] = []
    skipped: list[Rejection] = []
    for pair in pairs:
        try:
            mixed.append(_mix(pair, draw, law, target.gain_db, interferer.gain_db))
        except Unusable as silent:
            skipped += silent.rejections
    if not mixed:
        raise Unusable(*skipped)
    try:
        enrollment, recording, unused = choose_enrollment(draw, law, load)
    except Unusable as none:
        raise Unusable(*skipped, *none.rejections) from none
    return RenderedTrial(mixed, enrollment, recording, skipped + unused)


def choose_enrollment(
    draw: DrawnTrial, law: MixingLaw, load: LoadUtterance
) -> tuple[LeveledUtterance, Recording, list[Rejection]]:
    """Return the first reference of 1 s or more at −23 LUFS, its recording, and the references skipped.

    Peaks stay within 0.99. Raises `Unusable` when no reference can be used.
    """
    skipped: list[Rejection] = []
    for recording in draw.references:
        try:
            samples, gain_db = load(recording)
        except Unusable as broken:
            skipped += broken.rejections
            continue
        if len(samples) < to_samples(MIN_ENROLLMENT_SECONDS, law.sample_rate):
            skipped.append(Rejection(SHORT_REFERENCE, recording, f"{len(samples) / law.sample_rate:.2f} s"))
            continue
        gain = min(db_to_amplitude(ENROLLMENT_LUFS - UTTERANCE_LUFS), MAX_FILE_PEAK / _peak(samples))
        return LeveledUtterance(samples * np.float32(gain), gain_db + _db(gain)), recording, skipped
    raise Unusable(*skipped)


def mix_at_snr(
    target: Float[np.ndarray, "samples"], interferer: Float[np.ndarray, "samples"], snr_db: float
) -> tuple[Float[np.ndarray, "samples"], float]:
    """Return `target + gain · interferer` and the gain for which 10 log10(|target|² / |gain · interferer|²) = snr_db.

    A positive `snr_db` makes the target the louder one. Raises `AudioError` when either is silent.
    """
    target_energy, energy = (float(np.square(part, dtype=np.float64).sum()) for part in (target, interferer))
    if not min(target_energy, energy) > 0:
        raise AudioError("a silent signal cannot be mixed at an SNR")
    gain = snr_gain(target_energy, energy, snr_db)
    return target + target.dtype.type(gain) * interferer, gain


def shared_gain(mixture: Mono, target: Mono, sample_rate: int) -> tuple[float, bool]:
    """Return the gain that brings `mixture` to −23 LUFS, less if a peak would exceed 0.99, and whether it is less.

    Infinite for a mixture that is silent by its loudness, such as inaudible rumble.
    """
    wanted = loudness_gain(mixture, sample_rate, MIXTURE_LUFS)
    if not np.isfinite(wanted):
        return wanted, False
    allowed = MAX_FILE_PEAK / max(_peak(mixture), _peak(target))
    return min(wanted, allowed), wanted > allowed


def cut_segments(target: Mono, interferer: Mono, length: int) -> list[SegmentPair]:
    """Cut both into as many consecutive segments of `length` samples as fit into the shorter; drop the rest."""
    starts = range(0, min(len(target), len(interferer)) - length + 1, length)
    return [
        SegmentPair(number, start, target[start : start + length], interferer[start : start + length])
        for number, start in enumerate(starts)
    ]


def pad_to_longest(first: Mono, second: Mono) -> tuple[Float[np.ndarray, "longest"], Float[np.ndarray, "longest"]]:
    """Append zeros to the shorter one."""
    length = max(len(first), len(second))
    return np.pad(first, (0, length - len(first))), np.pad(second, (0, length - len(second)))


def _mix(
    pair: SegmentPair, draw: DrawnTrial, law: MixingLaw, target_gain_db: float, interferer_gain_db: float
) -> MixedSegment:
    for samples, recording in ((pair.target, draw.target), (pair.interferer, draw.interferer)):
        if rms_dbfs(samples) < SILENCE_DBFS:
            raise Unusable(Rejection(SILENT_SEGMENT, recording, f"at {pair.start / law.sample_rate:g} s"))
    mixture, interferer_gain = mix_at_snr(pair.target, pair.interferer, draw.snr_db)
    gain, limited = shared_gain(mixture, pair.target, law.sample_rate)
    if not np.isfinite(gain):
        raise Unusable(Rejection(SILENT_SEGMENT, draw.target, f"at {pair.start / law.sample_rate:g} s"))
    return MixedSegment(
        segment=pair.segment,
        start=pair.start,
        mixture=mixture * np.float32(gain),
        target=pair.target * np.float32(gain),
        target_gain_db=target_gain_db + _db(gain),
        interferer_gain_db=interferer_gain_db + _db(interferer_gain * gain),
        peak_limited=limited,
    )


def _load_for_mixing(recording: Recording, law: MixingLaw, load: LoadUtterance) -> LeveledUtterance:
    """Load an utterance; for segments, remove its silence and check that it is long enough for one."""
    utterance = load(recording)
    if law.full_length:
        return utterance
    if law.vad_db is not None:
        utterance = utterance._replace(samples=remove_silence(utterance.samples, law.vad_db))
    if len(utterance.samples) < to_samples(law.segment_seconds, law.sample_rate):
        detail = f"{len(utterance.samples) / law.sample_rate:.2f} s without silence"
        raise Unusable(Rejection(SHORT_UTTERANCE, recording, detail))
    return utterance


def _peak(samples: Mono) -> float:
    return float(max(samples.max(), -samples.min()))


def _db(gain: float) -> float:
    return float(20.0 * np.log10(gain))
