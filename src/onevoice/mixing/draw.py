"""Mixtures drawn anew at every step: what chance decides, for a whole batch at once, as plain numbers.

A trial is a function of (seed, epoch, index) alone. Each step of the law draws from a stream of its own, so that
switching one on leaves the draws of all others as they were; batch size, workers, device and resuming do not enter.
`onevoice.mixing.render` turns the numbers into sound, the same on any device.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from onevoice.config import STRICT, Fraction, PositiveRange, require_rising
from onevoice.corpus.pack import PackedCorpus
from onevoice.errors import CorpusError
from onevoice.rng import uniform
from onevoice.units import to_samples

Level = Annotated[float, Field(ge=-100, le=100)]
LevelRange = Annotated[tuple[Level, Level], AfterValidator(require_rising)]
"""Lowest and highest value in dB of a uniform draw."""
Seconds = Annotated[float, Field(ge=0.1, le=60)]
Number = Annotated[int, Field(ge=1, le=2)]
Range = tuple[float, float]

Indices = Int[np.ndarray, " batch"]
Values = Float[np.ndarray, " batch"]


@dataclass(frozen=True, config=STRICT)
class NoiseStep:
    """Add a stretch of a noise recording; short ones are repeated."""

    pack: str
    probability: Fraction = 1.0
    snr_db: LevelRange = (0.0, 20.0)
    """Level of the voices above the noise."""


@dataclass(frozen=True, config=STRICT)
class ReverbStep:
    """Put every voice into a room: a response each, drawn from one folder (room) of the pack without repeating.

    The target of training is its direct sound with the reflections of the first `early_seconds`.
    """

    pack: str
    probability: Fraction = 1.0
    early_seconds: PositiveFloat = 0.05
    enrollment_probability: Fraction = 0.0
    """How often the enrollment, too, is heard in a room: another one, where the pack has several."""


@dataclass(frozen=True, config=STRICT)
class ChannelStep:
    """Give the enrollment another channel than the mixture: band limits, a spectral tilt, a telephone codec."""

    probability: Fraction = 0.5
    low_cut_hz: PositiveRange = (20.0, 300.0)
    high_cut_hz: PositiveRange = (3000.0, 8000.0)
    tilt_db_per_octave: LevelRange = (-3.0, 3.0)
    codec_probability: Fraction = 0.0
    """How often the samples pass 8-bit mu-law (ITU-T G.711)."""


@dataclass(frozen=True, config=STRICT)
class MixingStep:
    """How the voices of a mixture stand to each other, in time and level."""

    segment_seconds: Seconds = 4.0
    """Length of every mixture; shorter utterances lie somewhere in it."""
    enrollment_seconds: Annotated[tuple[Seconds, Seconds], AfterValidator(require_rising)] = (3.0, 10.0)
    """Length of an enrollment, as far as its utterance goes."""
    min_utterance_seconds: NonNegativeFloat = 1.0
    """Shorter utterances are not used (twice that for a speaker with a single one, which is halved)."""
    interferers: Annotated[tuple[Number, Number], AfterValidator(require_rising)] = (1, 1)
    """Fewest and most interfering speakers."""
    snr_db: LevelRange = (-5.0, 5.0)
    """Level of the target above each interferer, by energy over the segment."""
    mixture_dbfs: LevelRange = (-35.0, -20.0)
    """RMS level of the mixture; less where a peak would pass 0.9."""
    enrollment_dbfs: LevelRange = (-35.0, -20.0)
    absent: Fraction = 0.0
    """How often the enrollment is a third speaker's, and the target silence."""
    alone: Fraction = 0.0
    """How often there is no interferer."""

    def __post_init__(self) -> None:
        """Check that the kinds of trial leave room for each other."""
        if self.absent + self.alone > 1:
            raise ValueError(f"absent + alone must not pass 1, and are {self.absent + self.alone:g}")


class Part(NamedTuple):
    """A stretch of an utterance for each trial: it lies in the signal from `place` on, zeros around it."""

    utterance: Indices
    start: Indices
    length: Indices
    place: Indices


class Noise(NamedTuple):
    """A noise for each trial; `on` is False where there is none."""

    on: Bool[np.ndarray, " batch"]
    clip: Indices
    start: Indices
    snr_db: Values


class Rooms(NamedTuple):
    """A room response for each voice of each trial: target, interferers, enrollment."""

    on: Bool[np.ndarray, " batch"]
    enrollment_on: Bool[np.ndarray, " batch"]
    responses: Int[np.ndarray, "batch voices"]


class Channel(NamedTuple):
    """A channel for the enrollment of each trial."""

    on: Bool[np.ndarray, " batch"]
    codec: Bool[np.ndarray, " batch"]
    low_cut_hz: Values
    high_cut_hz: Values
    tilt_db_per_octave: Values


class Plan(NamedTuple):
    """All numbers of a batch of trials."""

    speaker: Indices
    """Whose voice the enrollment is; the speaker for the classifier."""
    target: Part
    interferers: tuple[Part, ...]
    interferer_on: Bool[np.ndarray, "batch interferers"]
    snr_db: Float[np.ndarray, "batch interferers"]
    enrollment: Part
    absent: Bool[np.ndarray, " batch"]
    mixture_dbfs: Values
    enrollment_dbfs: Values
    noise: Noise | None
    rooms: Rooms | None
    channel: Channel | None


class Drawer:
    """Draws plans from packed corpora."""

    def __init__(
        self,
        speech: PackedCorpus,
        mixing: MixingStep,
        noise: tuple[NoiseStep, PackedCorpus] | None = None,
        reverb: tuple[ReverbStep, PackedCorpus] | None = None,
        channel: ChannelStep | None = None,
        seed: int = 0,
    ) -> None:
        self.speech, self.mixing, self.noise, self.reverb, self.channel = speech, mixing, noise, reverb, channel
        self.seed = seed
        self.segment = to_samples(mixing.segment_seconds, speech.sample_rate)
        self._choose(to_samples(mixing.min_utterance_seconds, speech.sample_rate))
        people, fewest = len(np.unique(self.base)), mixing.interferers[1] + 1 + (mixing.absent > 0)
        if people < fewest:
            raise CorpusError(
                f"{speech.path}: holds {people} people with utterances of {mixing.min_utterance_seconds:g} s or more; "
                f"such mixtures need {fewest}"
            )

    def _choose(self, least: int) -> None:
        """Set the utterances of at least `least` samples, where those of each speaker begin, and who has any."""
        speech = self.speech
        long_enough = speech.length >= least
        count = np.bincount(speech.speaker[long_enough], minlength=len(speech.speakers))
        halved = (count == 1)[speech.speaker]  # the only one of its speaker must serve for target and enrollment
        long_enough &= ~halved | (speech.length >= 2 * least)
        self.utterances = np.flatnonzero(long_enough)
        count = np.bincount(speech.speaker[long_enough], minlength=len(speech.speakers))
        self.start = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        self.speakers = np.flatnonzero(count)
        self.base = np.unique(speech.person_of_speaker[self.speakers], return_inverse=True)[1].astype(np.int64)

    def draw(self, epoch: int, index: Indices) -> Plan:
        """Return the plan of the trials `index` of an epoch."""
        mixing = self.mixing

        def stream(step: str, count: int) -> Float[np.ndarray, "batch count"]:
            return uniform(self.seed, "dynamic", step, epoch, index=index, count=count)

        kinds, counts, levels, snrs = (stream(s, n) for s, n in (("kind", 1), ("count", 1), ("level", 2), ("snr", 2)))
        absent = kinds[:, 0] < mixing.absent
        alone = ~absent & (kinds[:, 0] >= 1 - mixing.alone)
        fewest, most = mixing.interferers
        how_many = np.where(alone, 0, fewest + (counts[:, 0] * (most - fewest + 1)).astype(np.int64))
        voices = self.speakers[distinct_speakers(stream("speaker", most + 2), self.base)]
        utterances = stream("utterance", most + 2)
        crops = stream("crop", 2 * (most + 1))
        target, enrollment = self._target_and_enrollment(
            voices[:, 0], utterances[:, 0], utterances[:, 1], crops, stream("enrollment", 3)
        )
        third = self._third_speaker(voices[:, -1], stream("absent", 4))
        enrollment = Part(*(np.where(absent, b, a) for a, b in zip(enrollment, third, strict=True)))
        interferers = tuple(
            self._segment(
                self._utterance(voices[:, 1 + k], utterances[:, 2 + k]), crops[:, 2 * (k + 1)], crops[:, 2 * k + 3]
            )
            for k in range(most)
        )
        return Plan(
            speaker=np.where(absent, voices[:, -1], voices[:, 0]),
            target=target,
            interferers=interferers,
            interferer_on=np.arange(most) < how_many[:, None],
            snr_db=_within(snrs[:, :most], mixing.snr_db),
            enrollment=enrollment,
            absent=absent,
            mixture_dbfs=_within(levels[:, 0], mixing.mixture_dbfs),
            enrollment_dbfs=_within(levels[:, 1], mixing.enrollment_dbfs),
            noise=None if self.noise is None else self._draw_noise(*self.noise, stream("noise", 5)),
            rooms=None if self.reverb is None else self._draw_rooms(*self.reverb, stream),
            channel=None if self.channel is None else _draw_channel(self.channel, stream("channel", 5)),
        )

    def _target_and_enrollment(
        self, speaker: Indices, pick: Values, other: Values, crops: Float[np.ndarray, "batch crops"],
        part: Float[np.ndarray, "batch 3"],
    ) -> tuple[Part, Part]:  # fmt: skip
        """Draw two utterances of a speaker; of a single one, a stretch of one half and a stretch of the other."""
        speech = self.speech
        first = self.start[speaker]
        count = self.start[speaker + 1] - first
        number = (pick * count).astype(np.int64)
        next_number = (number + 1 + (other * np.maximum(count - 1, 1)).astype(np.int64)) % count
        target, enrollment = self.utterances[first + number], self.utterances[first + next_number]
        single = count == 1
        half = speech.length[target] // 2
        back = single & (part[:, 2] < 0.5)  # which half the target is cut from
        begin = np.where(back, half, 0)
        end = np.where(single & ~back, half, speech.length[target])
        other_begin = np.where(single & ~back, half, 0)
        other_end = np.where(back, half, speech.length[enrollment])
        return (
            self._segment(target, crops[:, 0], crops[:, 1], begin, end),
            self._enrollment(enrollment, part[:, 0], part[:, 1], other_begin, other_end),
        )

    def _third_speaker(self, speaker: Indices, draws: Float[np.ndarray, "batch 4"]) -> Part:
        utterance = self._utterance(speaker, draws[:, 0])
        return self._enrollment(
            utterance, draws[:, 1], draws[:, 2], np.zeros_like(utterance), self.speech.length[utterance]
        )

    def _utterance(self, speaker: Indices, draw: Values) -> Indices:
        """Return one of the utterances chosen for each speaker."""
        first, after = self.start[speaker], self.start[speaker + 1]
        utterance: np.ndarray = self.utterances[first + (draw * (after - first)).astype(np.int64)]
        return utterance

    def _segment(
        self, utterance: Indices, where: Values, place: Values, begin: Indices | None = None, end: Indices | None = None
    ) -> Part:
        """Cut a segment from [begin, end) of each utterance; what is shorter is laid somewhere into the segment."""
        begin = np.zeros_like(utterance) if begin is None else begin
        available = (self.speech.length[utterance] if end is None else end) - begin
        length = np.minimum(available, self.segment)
        start = begin + (where * (available - length + 1)).astype(np.int64)
        return Part(utterance, start, length, (place * (self.segment - length + 1)).astype(np.int64))

    def _enrollment(self, utterance: Indices, size: Values, where: Values, begin: Indices, end: Indices) -> Part:
        wanted = (_within(size, self.mixing.enrollment_seconds) * self.speech.sample_rate).astype(np.int64)
        length = np.minimum(end - begin, wanted)
        start = begin + (where * (end - begin - length + 1)).astype(np.int64)
        return Part(utterance, start, length, np.zeros_like(length))

    def _draw_noise(self, step: NoiseStep, pack: PackedCorpus, draws: Float[np.ndarray, "batch 5"]) -> Noise:
        clip = _pick(pack, (draws[:, 1] * len(pack.speakers)).astype(np.int64), draws[:, 2])
        start = (draws[:, 3] * pack.length[clip]).astype(np.int64)
        return Noise(draws[:, 0] < step.probability, clip, start, _within(draws[:, 4], step.snr_db))

    def _draw_rooms(
        self, step: ReverbStep, pack: PackedCorpus, stream: Callable[[str, int], Float[np.ndarray, "batch count"]]
    ) -> Rooms:
        draws, rooms = stream("reverb", 5), len(pack.speakers)
        room = (draws[:, 2] * rooms).astype(np.int64)
        other = (room + 1 + (draws[:, 3] * max(rooms - 1, 1)).astype(np.int64)) % rooms
        first, count = pack.speaker_start[room], np.diff(pack.speaker_start)[room]
        keys = stream("places", int(np.diff(pack.speaker_start).max()))
        keys = np.where(np.arange(keys.shape[1]) < count[:, None], keys, 1.0)
        order = np.argsort(keys, axis=1, kind="stable")  # a random order of the places of each room
        voices = np.arange(1 + self.mixing.interferers[1])
        places = np.take_along_axis(order, voices % count[:, None], axis=1)
        responses = np.column_stack([first[:, None] + places, _pick(pack, other, draws[:, 4])])
        return Rooms(draws[:, 0] < step.probability, draws[:, 1] < step.enrollment_probability, responses)


def distinct_speakers(
    draws: Float[np.ndarray, "batch count"], person_of_speaker: Int[np.ndarray, " speakers"]
) -> Int[np.ndarray, "batch count"]:
    """Return speakers for each row, each uniform over those who are not the same person as an earlier one.

    `person_of_speaker` numbers the persons behind the speakers, who come one after the other. Columns beyond the
    number of persons repeat some.
    """
    first = np.searchsorted(person_of_speaker, np.arange(person_of_speaker[-1] + 2))
    chosen: list[Indices] = []
    taken_first = np.empty((len(draws), 0), dtype=np.int64)
    taken_size = np.empty((len(draws), 0), dtype=np.int64)
    for draw in draws.T:
        left = len(person_of_speaker) - taken_size.sum(axis=1)
        speaker = (draw * left).astype(np.int64)
        for column in np.argsort(taken_first, axis=1).T:  # step over the people taken, the lowest first
            block, size = (
                np.take_along_axis(part, column[:, None], axis=1)[:, 0] for part in (taken_first, taken_size)
            )
            speaker = np.where(speaker >= block, speaker + size, speaker)
        speaker %= len(person_of_speaker)
        person = person_of_speaker[speaker]
        taken_first = np.column_stack([taken_first, first[person]])
        taken_size = np.column_stack([taken_size, first[person + 1] - first[person]])
        chosen.append(speaker)
    return np.stack(chosen, axis=1)


def _pick(pack: PackedCorpus, speaker: Indices, draw: Values) -> Indices:
    """Return one utterance of each speaker."""
    first, after = pack.speaker_start[speaker], pack.speaker_start[speaker + 1]
    utterance: np.ndarray = first + (draw * (after - first)).astype(np.int64)
    return utterance


def _draw_channel(step: ChannelStep, draws: Float[np.ndarray, "batch 5"]) -> Channel:
    return Channel(
        on=draws[:, 0] < step.probability,
        codec=draws[:, 1] < step.codec_probability,
        low_cut_hz=_within(draws[:, 2], step.low_cut_hz),
        high_cut_hz=_within(draws[:, 3], step.high_cut_hz),
        tilt_db_per_octave=_within(draws[:, 4], step.tilt_db_per_octave),
    )


def _within(draw: Float[np.ndarray, "*any"], bounds: Range) -> Float[np.ndarray, "*any"]:
    value: np.ndarray = bounds[0] + draw * (bounds[1] - bounds[0])
    return value
