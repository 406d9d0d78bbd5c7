"""Mixtures drawn at every step of training: the random numbers of a whole batch, without any sound.

A trial is a function of (seed, epoch, index) alone. Each part of a trial (kind, speakers, levels, noise, room, ...)
draws from its own stream, so that switching one on does not change the draws of the others. Batch size, workers, device
and resuming do not matter. `onevoice.mixing.render` turns the numbers into sound.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from onevoice.corpus.pack import PackedCorpus
from onevoice.errors import CorpusError
from onevoice.mixing.steps import ChannelStep, MixingStep, NoiseStep, ReverbStep
from onevoice.rng import uniform
from onevoice.units import to_samples

Indices = Int[np.ndarray, " batch"]
Values = Float[np.ndarray, " batch"]


class Excerpts(NamedTuple):
    """An excerpt of an utterance for each trial, placed from sample `position` on in a signal of zeros."""

    utterance: Indices
    start: Indices
    length: Indices
    position: Indices


class NoisePlan(NamedTuple):
    """The noise of each trial: a recording, where it starts, its level. `on` is False for trials without noise."""

    on: Bool[np.ndarray, " batch"]
    recording: Indices
    start: Indices
    snr_db: Values


class RoomPlan(NamedTuple):
    """The room response of each voice of each trial: target, interferers, enrollment."""

    on: Bool[np.ndarray, " batch"]
    enrollment_on: Bool[np.ndarray, " batch"]
    responses: Int[np.ndarray, "batch voices"]


class ChannelPlan(NamedTuple):
    """The channel of the enrollment of each trial."""

    on: Bool[np.ndarray, " batch"]
    codec: Bool[np.ndarray, " batch"]
    low_cut_hz: Values
    high_cut_hz: Values
    tilt_db_per_octave: Values


class Plan(NamedTuple):
    """All random numbers of a batch of trials."""

    speaker: Indices
    """The speaker of the enrollment, who is the class for the speaker classifier."""
    target: Excerpts
    interferers: tuple[Excerpts, ...]
    interferer_on: Bool[np.ndarray, "batch interferers"]
    snr_db: Float[np.ndarray, "batch interferers"]
    enrollment: Excerpts
    absent: Bool[np.ndarray, " batch"]
    mixture_dbfs: Values
    enrollment_dbfs: Values
    noise: NoisePlan | None
    rooms: RoomPlan | None
    channel: ChannelPlan | None


class Planner:
    """Draws the plans of batches from packed corpora.

    Raises `CorpusError` when the speech has too few people with utterances that are long enough.
    """

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
        self._select_utterances(to_samples(mixing.min_utterance_seconds, speech.sample_rate))
        people, needed = len(np.unique(self.person)), mixing.interferers[1] + 1 + (mixing.absent > 0)
        if people < needed:
            raise CorpusError(
                f"{speech.path}: has {people} people with utterances of {mixing.min_utterance_seconds:g} s or more; "
                f"these mixtures need {needed}; add speech, or lower min_utterance_seconds"
            )

    def _select_utterances(self, min_length: int) -> None:
        """Select the utterances that are long enough and number them by speaker.

        `utterances` lists them; those of speaker s are at `start[s]` up to `start[s + 1]`. `speakers` are the speakers
        who have any, and `person` numbers the persons behind them.
        """
        speech = self.speech
        long_enough = speech.length >= min_length
        count = np.bincount(speech.speaker[long_enough], minlength=len(speech.speakers))
        # The only utterance of a speaker is both target and enrollment: each half must be long enough.
        halved = (count == 1)[speech.speaker]
        long_enough &= ~halved | (speech.length >= 2 * min_length)
        self.utterances = np.flatnonzero(long_enough)
        count = np.bincount(speech.speaker[long_enough], minlength=len(speech.speakers))
        self.start = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        self.speakers = np.flatnonzero(count)
        self.person = np.unique(speech.person_of_speaker[self.speakers], return_inverse=True)[1].astype(np.int64)

    def draw(self, epoch: int, index: Indices) -> Plan:
        """Return the plan of the trials `index` of an epoch."""
        mixing = self.mixing

        of_one_trial = ("kind", "absent", "channel")
        of_pair = index // 2 if mixing.paired else index

        def stream(step: str, count: int) -> Float[np.ndarray, "batch count"]:
            place = index if step in of_one_trial else of_pair
            return uniform(self.seed, "dynamic", step, epoch, index=place, count=count)

        # The kind of each trial: absent from the low end of [0, 1), alone from the high end.
        kinds, counts, levels, snrs = (stream(s, n) for s, n in (("kind", 1), ("count", 1), ("level", 2), ("snr", 2)))
        absent = kinds[:, 0] < mixing.absent
        alone = ~absent & (kinds[:, 0] >= 1 - mixing.alone)
        lowest, highest = mixing.interferers
        interferers_on = np.where(alone, 0, lowest + (counts[:, 0] * (highest - lowest + 1)).astype(np.int64))
        # Different people for target, interferers and, last, the enrollment of absent trials.
        voices = self.speakers[distinct_speakers(stream("speaker", highest + 2), self.person)]
        utterances = stream("utterance", highest + 2)
        crops = stream("crop", 2 * (highest + 1))
        target, enrollment = self._target_and_enrollment(
            voices[:, 0], utterances[:, 0], utterances[:, 1], crops, stream("enrollment", 3)
        )
        third = self._third_speaker(voices[:, -1], stream("absent", 4))
        enrollment = _choose(absent, third, enrollment)
        interferers = tuple(
            self._segment(
                self._utterance(voices[:, 1 + k], utterances[:, 2 + k]), crops[:, 2 * (k + 1)], crops[:, 2 * k + 3]
            )
            for k in range(highest)
        )
        plan = Plan(
            speaker=np.where(absent, voices[:, -1], voices[:, 0]),
            target=target,
            interferers=interferers,
            interferer_on=np.arange(highest) < interferers_on[:, None],
            snr_db=_in_range(snrs[:, :highest], mixing.snr_db),
            enrollment=enrollment,
            absent=absent,
            mixture_dbfs=_in_range(levels[:, 0], mixing.mixture_dbfs),
            enrollment_dbfs=_in_range(levels[:, 1], mixing.enrollment_dbfs),
            noise=None if self.noise is None else self._draw_noise(*self.noise, stream("noise", 5)),
            rooms=None if self.reverb is None else self._draw_rooms(*self.reverb, stream),
            channel=None if self.channel is None else _draw_channel(self.channel, stream("channel", 5)),
        )
        if not mixing.paired:
            return plan
        # In pairs the first interferer is drawn as the target is, with an enrollment.
        draws = stream("interferer", 4)
        other = self._target_and_enrollment(voices[:, 1], utterances[:, 2], draws[:, 3], crops[:, 2:], draws[:, :3])
        return _swap(plan._replace(interferers=(other[0], *interferers[1:])), index % 2 == 1, voices[:, 1], other[1])

    def _target_and_enrollment(
        self, speaker: Indices, first_pick: Values, second_pick: Values, crops: Float[np.ndarray, "batch crops"],
        draws: Float[np.ndarray, "batch 3"],
    ) -> tuple[Excerpts, Excerpts]:  # fmt: skip
        """Draw two utterances of each speaker; if there is only one, its two halves."""
        speech = self.speech
        # One utterance, and another by a step of 1 to count − 1 around the circle of the speaker's utterances.
        first = self.start[speaker]
        count = self.start[speaker + 1] - first
        number = (first_pick * count).astype(np.int64)
        other = (number + 1 + (second_pick * np.maximum(count - 1, 1)).astype(np.int64)) % count
        target, enrollment = self.utterances[first + number], self.utterances[first + other]
        # With a single utterance both are the same one: the target comes from one half, the enrollment from the other.
        single = count == 1
        half = speech.length[target] // 2
        second_half = single & (draws[:, 2] < 0.5)
        first_half = single & ~second_half
        target_begin = np.where(second_half, half, 0)
        target_end = np.where(first_half, half, speech.length[target])
        enrollment_begin = np.where(first_half, half, 0)
        enrollment_end = np.where(second_half, half, speech.length[enrollment])
        return (
            self._segment(target, crops[:, 0], crops[:, 1], target_begin, target_end),
            self._enrollment(enrollment, draws[:, 0], draws[:, 1], enrollment_begin, enrollment_end),
        )

    def _third_speaker(self, speaker: Indices, draws: Float[np.ndarray, "batch 4"]) -> Excerpts:
        utterance = self._utterance(speaker, draws[:, 0])
        return self._enrollment(
            utterance, draws[:, 1], draws[:, 2], np.zeros_like(utterance), self.speech.length[utterance]
        )

    def _utterance(self, speaker: Indices, draw: Values) -> Indices:
        """Return one of the selected utterances of each speaker."""
        first, after = self.start[speaker], self.start[speaker + 1]
        utterance: np.ndarray = self.utterances[first + (draw * (after - first)).astype(np.int64)]
        return utterance

    def _segment(
        self, utterance: Indices, where: Values, place: Values, begin: Indices | None = None, end: Indices | None = None
    ) -> Excerpts:
        """Cut a segment from [begin, end) of each utterance; a shorter one gets a random position in the segment."""
        begin = np.zeros_like(utterance) if begin is None else begin
        available = (self.speech.length[utterance] if end is None else end) - begin
        length = np.minimum(available, self.segment)
        start = begin + (where * (available - length + 1)).astype(np.int64)
        return Excerpts(utterance, start, length, (place * (self.segment - length + 1)).astype(np.int64))

    def _enrollment(self, utterance: Indices, size: Values, where: Values, begin: Indices, end: Indices) -> Excerpts:
        """Cut an enrollment of random length from [begin, end) of each utterance."""
        wanted = (_in_range(size, self.mixing.enrollment_seconds) * self.speech.sample_rate).astype(np.int64)
        length = np.minimum(end - begin, wanted)
        start = begin + (where * (end - begin - length + 1)).astype(np.int64)
        return Excerpts(utterance, start, length, np.zeros_like(length))

    def _draw_noise(self, step: NoiseStep, pack: PackedCorpus, draws: Float[np.ndarray, "batch 5"]) -> NoisePlan:
        recording = _pick(pack, (draws[:, 1] * len(pack.speakers)).astype(np.int64), draws[:, 2])
        start = (draws[:, 3] * pack.length[recording]).astype(np.int64)
        return NoisePlan(draws[:, 0] < step.probability, recording, start, _in_range(draws[:, 4], step.snr_db))

    def _draw_rooms(
        self, step: ReverbStep, pack: PackedCorpus, stream: Callable[[str, int], Float[np.ndarray, "batch count"]]
    ) -> RoomPlan:
        draws, rooms = stream("reverb", 5), len(pack.speakers)
        room = (draws[:, 2] * rooms).astype(np.int64)
        other_room = (room + 1 + (draws[:, 3] * max(rooms - 1, 1)).astype(np.int64)) % rooms
        first, count = pack.speaker_start[room], np.diff(pack.speaker_start)[room]
        # A random order of the places of each room: sort random keys, with those beyond its last place at the end.
        keys = stream("places", int(np.diff(pack.speaker_start).max()))
        keys = np.where(np.arange(keys.shape[1]) < count[:, None], keys, 1.0)
        order = np.argsort(keys, axis=1, kind="stable")
        # The voices take the places in this order, and start again if the room has too few.
        voices = np.arange(1 + self.mixing.interferers[1])
        places = np.take_along_axis(order, voices % count[:, None], axis=1)
        responses = np.column_stack([first[:, None] + places, _pick(pack, other_room, draws[:, 4])])
        return RoomPlan(draws[:, 0] < step.probability, draws[:, 1] < step.enrollment_probability, responses)


def _swap(plan: Plan, swapped: Bool[np.ndarray, " batch"], speaker: Indices, enrollment: Excerpts) -> Plan:
    """Exchange target and first interferer of the `swapped` trials; `speaker` and `enrollment` are the interferer's."""
    first, *others = plan.interferers
    # The levels against the new target: it stands −s₁ above the old one, and s₂ − s₁ above a second interferer.
    snr_db = plan.snr_db * (np.arange(plan.snr_db.shape[1]) > 0) - plan.snr_db[:, :1]
    enrolled, rooms = swapped & ~plan.absent, plan.rooms
    if rooms is not None:
        order = np.array([1, 0, *range(2, rooms.responses.shape[1])])
        responses = np.where(swapped[:, None], rooms.responses[:, order], rooms.responses)
        rooms = rooms._replace(responses=responses)
    return plan._replace(
        speaker=np.where(enrolled, speaker, plan.speaker),
        target=_choose(swapped, first, plan.target),
        interferers=(_choose(swapped, plan.target, first), *others),
        snr_db=np.where(swapped[:, None], snr_db, plan.snr_db),
        enrollment=_choose(enrolled, enrollment, plan.enrollment),
        rooms=rooms,
    )


def _choose(where: Bool[np.ndarray, " batch"], these: Excerpts, others: Excerpts) -> Excerpts:
    """Return `these` where `where` is True, else `others`."""
    return Excerpts(*(np.where(where, a, b) for a, b in zip(these, others, strict=True)))


def distinct_speakers(
    draws: Float[np.ndarray, "batch count"], person_of_speaker: Int[np.ndarray, " speakers"]
) -> Int[np.ndarray, "batch count"]:
    """Return speakers for each row, each uniform over those who are not the same person as an earlier one.

    `person_of_speaker` numbers the persons behind the speakers in rising order, so the speakers of a person are a block
    of consecutive numbers. Columns beyond the number of persons repeat some.
    """
    first = np.searchsorted(person_of_speaker, np.arange(person_of_speaker[-1] + 2))
    chosen: list[Indices] = []
    # The blocks taken so far in each row: their first speaker and their size.
    taken_first = np.empty((len(draws), 0), dtype=np.int64)
    taken_size = np.empty((len(draws), 0), dtype=np.int64)
    for draw in draws.T:
        # Draw a number among the speakers who are left.
        left = len(person_of_speaker) - taken_size.sum(axis=1)
        speaker = (draw * left).astype(np.int64)
        # Turn it into a number among all speakers: skip each taken block at or before it, the lowest block first.
        for column in np.argsort(taken_first, axis=1).T:
            block, size = (
                np.take_along_axis(part, column[:, None], axis=1)[:, 0] for part in (taken_first, taken_size)
            )
            speaker = np.where(speaker >= block, speaker + size, speaker)
        # With nobody left the number is too large; wrap around.
        speaker %= len(person_of_speaker)
        # Take the block of this person.
        person = person_of_speaker[speaker]
        taken_first = np.column_stack([taken_first, first[person]])
        taken_size = np.column_stack([taken_size, first[person + 1] - first[person]])
        chosen.append(speaker)
    return np.stack(chosen, axis=1)


def _pick(pack: PackedCorpus, speaker: Indices, draw: Values) -> Indices:
    """Return one utterance of each speaker of a pack."""
    first, after = pack.speaker_start[speaker], pack.speaker_start[speaker + 1]
    utterance: np.ndarray = first + (draw * (after - first)).astype(np.int64)
    return utterance


def _draw_channel(step: ChannelStep, draws: Float[np.ndarray, "batch 5"]) -> ChannelPlan:
    return ChannelPlan(
        on=draws[:, 0] < step.probability,
        codec=draws[:, 1] < step.codec_probability,
        low_cut_hz=_in_range(draws[:, 2], step.low_cut_hz),
        high_cut_hz=_in_range(draws[:, 3], step.high_cut_hz),
        tilt_db_per_octave=_in_range(draws[:, 4], step.tilt_db_per_octave),
    )


def _in_range(draw: Float[np.ndarray, "*any"], bounds: tuple[float, float]) -> Float[np.ndarray, "*any"]:
    """Scale draws from [0, 1) to a range."""
    value: np.ndarray = bounds[0] + draw * (bounds[1] - bounds[0])
    return value
