"""Mixtures drawn at every step: properties of the draws, and the sound against a plain NumPy rendering."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runs import experiment
from voices import Voice, make_corpus, make_trials

from onevoice.audio import write_audio
from onevoice.config import from_dict
from onevoice.corpus.listing import list_corpus
from onevoice.corpus.pack import PackedCorpus
from onevoice.corpus.packing import pack_corpus
from onevoice.errors import ConfigError, CorpusError
from onevoice.extraction.checkpoint import load_checkpoint
from onevoice.mixing import render as rendering
from onevoice.mixing.draw import Plan, Planner, distinct_speakers
from onevoice.mixing.render import Renderer, fetch, fetch_repeated, gather, mu_law
from onevoice.mixing.steps import ChannelStep, MixingStep, NoiseStep, ReverbStep
from onevoice.rng import uniform
from onevoice.training.run import Trainer, train

RATE = 8000
MIXING = MixingStep(segment_seconds=0.8, enrollment_seconds=(0.5, 2.0), min_utterance_seconds=0.3)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackedCorpus]:
    """Speech of five voices (one has a single utterance, one utterances shorter than a segment), noise, rooms."""
    root = tmp_path_factory.mktemp("packs")
    make_corpus(root / "speech", speakers=3, utterances=3, seconds=1.5)
    write_audio(root / "speech/single/only.flac", Voice.number(7).say(0, 2.5, RATE), RATE)
    for number in range(3):
        write_audio(root / f"speech/short/{number}.flac", Voice.number(8).say(number, 0.6, RATE), RATE)
    rng = np.random.default_rng(0)
    for name, seconds in (("hum", 0.3), ("rain", 2.0)):
        noise = 0.1 * rng.standard_normal(round(seconds * RATE))
        write_audio(root / f"noise/{name}/{name}.wav", noise.astype(np.float32), RATE)
    for room in range(2):
        for place in range(4):
            response = np.zeros(1200, np.float32)
            response[40 + 10 * place] = 0.9
            tail = rng.standard_normal(1000) * np.exp(-np.arange(1000) / 200)
            response[200:] += (0.1 * tail).astype(np.float32)
            write_audio(root / f"rooms/room{room}/{place}.wav", response, RATE)
    return {
        name: pack_corpus(
            list_corpus([root / name]), root / f"{name}.pack", sample_rate=RATE, keep_mean=name == "rooms"
        )
        for name in ("speech", "noise", "rooms")
    }


NOISE = NoiseStep(pack="", snr_db=(3.0, 12.0))
REVERB = ReverbStep(pack="", early_seconds=0.025)
CHANNEL = ChannelStep(probability=1.0, high_cut_hz=(2000, 3500))


def planner(
    packs: dict[str, PackedCorpus],
    *,
    seed: int = 0,
    noise: NoiseStep | None = None,
    reverb: ReverbStep | None = None,
    channel: ChannelStep | None = None,
    **mixing: Any,
) -> Planner:
    return Planner(
        packs["speech"],
        replace(MIXING, **mixing),
        None if noise is None else (noise, packs["noise"]),
        None if reverb is None else (reverb, packs["rooms"]),
        channel,
        seed,
    )


def flat(plan: Plan) -> dict[str, np.ndarray]:
    """All arrays of a plan by name."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, np.ndarray):
            found[name] = value
        elif hasattr(value, "_asdict"):
            for key, part in value._asdict().items():
                visit(f"{name}.{key}", part)
        elif isinstance(value, tuple):
            for number, part in enumerate(value):
                visit(f"{name}.{number}", part)

    visit("plan", plan)
    return found


# The numbers


@given(st.integers(0, 2**40), st.integers(0, 2**60))
@settings(max_examples=30, deadline=None)
def test_uniform_depends_on_its_place_alone(seed: int, index: int) -> None:
    rows = np.array([index, index + 5, index + 1])  # three different ones
    together = uniform(seed, "x", 1, index=rows, count=4)
    alone = uniform(seed, "x", 1, index=rows[2:], count=2)
    np.testing.assert_array_equal(together[2:, :2], alone)
    assert ((together >= 0) & (together < 1)).all()
    assert not np.array_equal(together, uniform(seed, "x", 2, index=rows, count=4))
    assert len(np.unique(together)) == 12


def test_uniform_is_uniform_and_uncorrelated() -> None:
    numbers = uniform(5, "place", index=np.arange(40_000), count=3)
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in numbers.T])
    assert (((counts - 2000) ** 2 / 2000).sum(1) < 50).all()  # chi-square of 19 degrees, p = 1e-4
    pairs = np.corrcoef(np.column_stack([numbers[:-1], numbers[1:]]).T) - np.eye(6)
    assert np.abs(pairs).max() < 0.025  # five standard errors


def test_speakers_are_distinct_persons_and_all_equally_likely() -> None:
    base = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 4])
    chosen = distinct_speakers(uniform(0, "s", index=np.arange(30_000), count=3), base)
    persons = base[chosen]
    assert all(len(set(row)) == 3 for row in persons[:2000].tolist())
    assert (persons[:, 0] != persons[:, 1]).all()
    assert (persons[:, 1] != persons[:, 2]).all()
    assert (persons[:, 0] != persons[:, 2]).all()
    first = np.bincount(chosen[:, 0], minlength=10)
    assert np.abs(first - 3000).max() < 5 * np.sqrt(3000)
    given_first = chosen[chosen[:, 0] == 4, 1]  # the second is uniform over the speakers of others
    others = np.bincount(given_first, minlength=10)
    assert others[base == 2].sum() == 0
    assert np.abs(others[base != 2] - len(given_first) / 8).max() < 5 * np.sqrt(len(given_first) / 8)


@given(st.integers(0, 1000), st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_trial_does_not_depend_on_its_batch(packs: dict[str, PackedCorpus], epoch: int, index: list[int]) -> None:
    draw = planner(packs, noise=NOISE, reverb=REVERB, channel=CHANNEL, absent=0.3, alone=0.3)
    together, alone = flat(draw.draw(epoch, np.array(index))), flat(draw.draw(epoch, np.array(index[-1:])))
    for name, values in together.items():
        np.testing.assert_array_equal(values[-1:], alone[name], err_msg=name)


@pytest.mark.parametrize(
    "step", [{"noise": NOISE}, {"reverb": REVERB}, {"channel": CHANNEL}], ids=lambda step: next(iter(step))
)
def test_adding_a_step_does_not_change_the_other_draws(packs: dict[str, PackedCorpus], step: dict[str, Any]) -> None:
    index = np.arange(50)
    without, with_step = (flat(planner(packs, **steps).draw(0, index)) for steps in ({}, step))
    assert len(with_step) > len(without)
    for name, values in without.items():
        np.testing.assert_array_equal(values, with_step[name], err_msg=name)


def test_changing_a_range_changes_only_that_draw(packs: dict[str, PackedCorpus]) -> None:
    index = np.arange(50)
    before, after = (flat(planner(packs, snr_db=bounds).draw(0, index)) for bounds in ((-5.0, 5.0), (0.0, 1.0)))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"plan.snr_db"}


def test_targets_and_enrollments_never_share_a_sample(packs: dict[str, PackedCorpus]) -> None:
    speech = packs["speech"]
    plan = planner(packs).draw(0, np.arange(3000))
    target, ref = plan.target, plan.enrollment
    np.testing.assert_array_equal(speech.speaker[target.utterance], speech.speaker[ref.utterance])
    np.testing.assert_array_equal(speech.speaker[target.utterance], plan.speaker)
    same = target.utterance == ref.utterance
    single = np.isin(target.utterance, [speech.utterances_of(speech.speakers.index("single")).start])
    np.testing.assert_array_equal(same, single)
    assert single.any()
    disjoint = (target.start + target.length <= ref.start) | (ref.start + ref.length <= target.start)
    assert disjoint[same].all()
    for part in (target, ref, *plan.interferers):
        assert (part.start >= 0).all()
        assert (part.start + part.length <= speech.length[part.utterance]).all()
        assert (part.length > 0).all()
    for part in (target, *plan.interferers):
        assert (part.position + part.length <= round(0.8 * RATE)).all()
    assert (speech.speaker[plan.interferers[0].utterance] != plan.speaker).all()


def test_the_halves_of_a_single_utterance(packs: dict[str, PackedCorpus]) -> None:
    """The third number of the stream "enrollment" says which half is the target; the other half is the enrollment."""
    speech, index = packs["speech"], np.arange(3000)
    plan = planner(packs, seed=4).draw(1, index)
    target, ref = plan.target, plan.enrollment
    single = target.utterance == ref.utterance
    half = speech.length[target.utterance] // 2
    from_second_half = uniform(4, "dynamic", "enrollment", 1, index=index, count=3)[:, 2] < 0.5
    assert from_second_half[single].mean() == pytest.approx(0.5, abs=0.1)
    for part, second in ((target, from_second_half), (ref, ~from_second_half)):
        first_only, second_only = single & ~second, single & second
        assert (part.start[second_only] >= half[second_only]).all()
        assert ((part.start + part.length)[first_only] <= half[first_only]).all()
    # Speakers with several utterances use the whole of each.
    ends = (target.start + target.length)[~single]
    assert (target.start[~single] < half[~single]).any()
    assert (ends > half[~single]).any()
    assert (ends == speech.length[target.utterance][~single]).any()


def stream_of(name: str, count: int) -> np.ndarray:
    """The numbers of a stream for the first 300 trials of epoch 2 with seed 3."""
    return uniform(3, "dynamic", name, 2, index=np.arange(300), count=count)


def pick(pack: PackedCorpus, folder: int, draw: float) -> int:
    choices = pack.utterances_of(folder)
    return choices[int(draw * len(choices))]


@pytest.mark.parametrize("interferers", [1, 2])
def test_each_voice_is_cut_by_its_own_columns_of_the_streams(packs: dict[str, PackedCorpus], interferers: int) -> None:
    """A plan, number by number, so that a seed keeps its trials: which column of which stream says what."""
    speech, segment = packs["speech"], round(0.8 * RATE)
    plan = planner(packs, seed=3, interferers=(1, interferers)).draw(2, np.arange(300))
    crop, said, halves = stream_of("crop", 6), stream_of("utterance", 4), stream_of("enrollment", 3)[:, 2]
    voices = distinct_speakers(stream_of("speaker", 3), speech.person_of_speaker)
    np.testing.assert_array_equal(plan.speaker, voices[:, 0])
    count = 1 + (stream_of("count", 1)[:, 0] * interferers).astype(int)
    np.testing.assert_array_equal(plan.interferer_on.sum(axis=1), count)
    assert plan.interferer_on[:, 0].all()
    for row in range(300):
        for k, part in enumerate((plan.target, *plan.interferers)):
            begin, end = 0, speech.length[part.utterance[row]]
            if k == 0 and len(speech.utterances_of(voices[row, 0])) == 1:
                begin, end = (end // 2, end) if halves[row] < 0.5 else (0, end // 2)
            length = min(end - begin, segment)
            # Column 1 of the utterances is the enrollment's.
            assert part.utterance[row] == pick(speech, voices[row, k], said[row, 1 + k if k else 0])
            assert part.length[row] == length
            assert part.start[row] == begin + int(crop[row, 2 * k] * (end - begin - length + 1))
            assert part.position[row] == int(crop[row, 2 * k + 1] * (segment - length + 1))


@pytest.mark.parametrize("interferers", [(1, 1), (2, 2)])
def test_a_pair_has_one_mixture_and_two_targets(packs: dict[str, PackedCorpus], interferers: tuple[int, int]) -> None:
    """The second target is the first interferer: as loud in both mixtures, in the same place of the same room."""
    planned = planner(packs, reverb=REVERB, noise=NOISE, seed=3, paired=True, interferers=interferers)
    sound = Renderer(planned)(planned.draw(1, np.arange(40)))
    first, second = slice(0, None, 2), slice(1, None, 2)
    levels = sound.audio.square().sum(1).sqrt()
    mixtures = sound.audio / levels[:, None]  # the peak of a target may lower the level of its mixture
    torch.testing.assert_close(mixtures[first], mixtures[second], atol=1e-6, rtol=1e-4)
    person = planned.speech.person_of_speaker[sound.speaker]
    assert (person[first] != person[second]).all()
    if interferers == (1, 1):  # what is left of a mixture without room and noise is the other target
        plain = planner(packs, seed=3, paired=True)
        plain.noise = plain.reverb = None
        sound = Renderer(plain)(plain.draw(1, np.arange(40)))
        levels = sound.audio.square().sum(1, keepdim=True).sqrt()
        mixtures, targets = sound.audio / levels, sound.target / levels
        torch.testing.assert_close(mixtures[first], targets[first] + targets[second], atol=1e-6, rtol=1e-4)


def test_absent_trials_of_pairs_keep_the_third_speaker(packs: dict[str, PackedCorpus]) -> None:
    plan = planner(packs, paired=True, absent=0.4).draw(0, np.arange(400))
    speech = packs["speech"]
    present = ~plan.absent
    assert 100 < plan.absent.sum() < 220
    assert (plan.absent[::2] != plan.absent[1::2]).any()
    assert (speech.speaker[plan.target.utterance] == plan.speaker)[present].all()
    assert (speech.speaker[plan.enrollment.utterance] == plan.speaker).all()
    for voice in (plan.target, plan.interferers[0]):
        assert (speech.speaker[voice.utterance] != plan.speaker)[plan.absent].all()


def test_each_enrollment_is_cut_by_its_own_columns_of_the_streams(packs: dict[str, PackedCorpus]) -> None:
    speech = packs["speech"]
    plan = planner(packs, seed=3, absent=0.3).draw(2, np.arange(300))
    said, own, third = stream_of("utterance", 2), stream_of("enrollment", 3), stream_of("absent", 3)
    voices = distinct_speakers(stream_of("speaker", 3), speech.person_of_speaker)
    np.testing.assert_array_equal(plan.absent, stream_of("kind", 1)[:, 0] < 0.3)
    np.testing.assert_array_equal(plan.speaker, np.where(plan.absent, voices[:, 2], voices[:, 0]))
    for row in range(300):
        utterance, start, length, position = (values[row] for values in plan.enrollment)
        begin, end = 0, speech.length[utterance]
        if plan.absent[row]:
            assert utterance == pick(speech, plan.speaker[row], third[row, 0])
            size, where = third[row, 1:]
        else:
            size, where, half = own[row]
            choices = speech.utterances_of(plan.speaker[row])
            step = 1 + int(said[row, 1] * max(len(choices) - 1, 1))
            assert utterance == choices[(int(said[row, 0] * len(choices)) + step) % len(choices)]
            if len(choices) == 1:
                begin, end = (0, end // 2) if half < 0.5 else (end // 2, end)
        assert length == min(end - begin, int((0.5 + 1.5 * size) * RATE))
        assert start == begin + int(where * (end - begin - length + 1))
        assert position == 0


def test_levels_noise_rooms_and_channels_have_their_own_columns_of_the_streams(packs: dict[str, PackedCorpus]) -> None:
    noises, rooms = packs["noise"], packs["rooms"]
    plan = planner(
        packs,
        seed=3,
        interferers=(1, 2),
        noise=replace(NOISE, probability=0.4),
        reverb=replace(REVERB, probability=0.6, enrollment_probability=0.3),
        channel=replace(CHANNEL, probability=0.5, codec_probability=0.25),
    ).draw(2, np.arange(300))
    noise, reverb = stream_of("noise", 5), stream_of("reverb", 5)
    for row in range(300):
        recording, responses = plan.noise.recording[row], plan.rooms.responses[row]
        assert recording == pick(noises, int(2 * noise[row, 1]), noise[row, 2])
        assert plan.noise.start[row] == int(noise[row, 3] * noises.length[recording])
        room = int(2 * reverb[row, 2])
        assert rooms.speaker[responses[0]] == room
        assert responses[-1] == pick(rooms, 1 - room, reverb[row, 4])
    for values, name, column, (low, high) in (
        (plan.snr_db[:, 0], "snr", 0, MIXING.snr_db),
        (plan.snr_db[:, 1], "snr", 1, MIXING.snr_db),
        (plan.mixture_dbfs, "level", 0, MIXING.mixture_dbfs),
        (plan.enrollment_dbfs, "level", 1, MIXING.enrollment_dbfs),
        (plan.noise.snr_db, "noise", 4, NOISE.snr_db),
        (plan.channel.low_cut_hz, "channel", 2, CHANNEL.low_cut_hz),
        (plan.channel.high_cut_hz, "channel", 3, CHANNEL.high_cut_hz),
        (plan.channel.tilt_db_per_octave, "channel", 4, CHANNEL.tilt_db_per_octave),
    ):
        np.testing.assert_allclose(values, low + (high - low) * stream_of(name, 5)[:, column])
    for switch, name, column, probability in (
        (plan.noise.on, "noise", 0, 0.4),
        (plan.rooms.on, "reverb", 0, 0.6),
        (plan.rooms.enrollment_on, "reverb", 1, 0.3),
        (plan.channel.on, "channel", 0, 0.5),
        (plan.channel.codec, "channel", 1, 0.25),
    ):
        np.testing.assert_array_equal(switch, stream_of(name, 5)[:, column] < probability)


def test_shares_of_absent_and_alone_trials(packs: dict[str, PackedCorpus]) -> None:
    speech = packs["speech"]
    plan = planner(packs, absent=0.2, alone=0.3, interferers=(1, 2)).draw(0, np.arange(4000))
    assert plan.absent.mean() == pytest.approx(0.2, abs=0.03)
    assert (~plan.interferer_on[:, 0]).mean() == pytest.approx(0.3, abs=0.03)
    assert plan.interferer_on[:, 1].mean() == pytest.approx(0.35, abs=0.03)
    speakers = [speech.speaker[part.utterance] for part in (plan.target, *plan.interferers)]
    enrolled = speech.speaker[plan.enrollment.utterance]
    np.testing.assert_array_equal(enrolled, plan.speaker)
    assert all((enrolled != other)[plan.absent].all() for other in speakers)
    assert (enrolled == speakers[0])[~plan.absent].all()


def test_shares_of_noise_rooms_and_channels(packs: dict[str, PackedCorpus]) -> None:
    reverb = replace(REVERB, probability=0.6, enrollment_probability=0.3)
    channel = replace(CHANNEL, probability=0.4, codec_probability=0.25)
    plan = planner(packs, noise=replace(NOISE, probability=0.2), reverb=reverb, channel=channel).draw(
        0, np.arange(4000)
    )
    drawn = (plan.noise.on, plan.rooms.on, plan.rooms.enrollment_on, plan.channel.on, plan.channel.codec)
    assert [on.mean() for on in drawn] == pytest.approx([0.2, 0.6, 0.3, 0.4, 0.25], abs=0.04)
    length = packs["noise"].length[plan.noise.recording]
    assert (plan.noise.start < length).all()
    assert (plan.noise.start / length).mean() == pytest.approx(0.5, abs=0.03)


def test_two_interferers_in_every_trial(packs: dict[str, PackedCorpus]) -> None:
    assert planner(packs, interferers=(2, 2)).draw(0, np.arange(100)).interferer_on.all()


def test_too_few_people(packs: dict[str, PackedCorpus], tmp_path: Path) -> None:
    make_corpus(tmp_path / "two", speakers=2, utterances=2, seconds=1.0)
    two = pack_corpus(list_corpus([tmp_path / "two"]), tmp_path / "pack", sample_rate=RATE)
    plan = Planner(two, MIXING).draw(0, np.arange(100))
    assert (plan.target.utterance != plan.enrollment.utterance).all()  # with two utterances, always one of each
    with pytest.raises(CorpusError, match=r"has 2 people with utterances of 0\.3 s or more; these mixtures need 3"):
        Planner(two, replace(MIXING, absent=0.1))


def test_short_utterances_are_not_used(packs: dict[str, PackedCorpus]) -> None:
    """A minimum of 1 s drops the voice with 0.6 s, and 1.3 s the single utterance of 2.5 s: its halves are shorter."""
    speech = packs["speech"]
    for minimum, gone in ((0.3, set()), (0.6, set()), (1.0, {"short"}), (1.25, {"short"}), (1.3, {"short", "single"})):
        plan = planner(packs, min_utterance_seconds=minimum, absent=0.2).draw(0, np.arange(2000))
        used = {
            speech.speakers[speech.speaker[u]]
            for u in np.concatenate([plan.target.utterance, plan.enrollment.utterance])
        }
        assert used == set(speech.speakers) - gone
        for part in (plan.target, plan.enrollment, *plan.interferers):
            assert speech.length[part.utterance].min() >= minimum * RATE


def test_voices_have_different_places_in_one_room_and_the_enrollment_has_another_room(
    packs: dict[str, PackedCorpus],
) -> None:
    rooms = packs["rooms"]
    responses = planner(packs, reverb=REVERB, interferers=(1, 2)).draw(0, np.arange(2000)).rooms.responses
    voices, enrolled = responses[:, :3], responses[:, 3]
    assert all(len(set(row)) == 3 for row in voices.tolist())
    assert (rooms.speaker[voices] == rooms.speaker[voices[:, :1]]).all()
    assert (rooms.speaker[enrolled] != rooms.speaker[voices[:, 0]]).all()
    assert np.bincount(voices[:, 1], minlength=8).min() > 150  # 250 each if they are all equally likely


def test_rooms_with_different_numbers_of_places(packs: dict[str, PackedCorpus], tmp_path: Path) -> None:
    """Voices stay in their room, and share places only if it has too few. The enrollment has any of the others."""
    for name, places in (("small", 2), ("large", 5), ("third", 3)):
        for place in range(places):
            write_audio(tmp_path / f"rooms/{name}/{place}.wav", np.eye(1, 100, place, dtype=np.float32)[0], RATE)
    rooms = pack_corpus(list_corpus([tmp_path / "rooms"]), tmp_path / "pack", sample_rate=RATE, keep_mean=True)
    plan = planner({**packs, "rooms": rooms}, reverb=REVERB, interferers=(1, 2)).draw(0, np.arange(400))
    voices = plan.rooms.responses[:, :3]
    assert (rooms.speaker[voices] == rooms.speaker[voices[:, :1]]).all()
    number_of_places = np.array([5, 2, 3])[rooms.speaker[voices[:, 0]]]
    assert [len(set(row)) for row in voices.tolist()] == np.minimum(3, number_of_places).tolist()
    pairs = Counter(zip(*rooms.speaker[plan.rooms.responses[:, [0, 3]]].T.tolist(), strict=True))
    assert len(pairs) == 6
    assert min(pairs.values()) > 30  # 67 each if they are all equally likely


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enrollment_seconds": [-1, -0.5]}, "enrollment_seconds.0: input should be greater than or equal to 0.1"),
        ({"enrollment_seconds": [5.0, 2.0]}, "enrollment_seconds: the lowest value 5 is above the highest 2"),
        ({"segment_seconds": 0.00001}, "segment_seconds: "),
        ({"interferers": [2, 1]}, "interferers: the lowest value 2 is above the highest 1"),
        ({"absent": 0.8, "alone": 0.8}, r"absent \+ alone is 1\.6 and must not exceed 1"),
        ({"snr_db": [1e9, 1e9]}, "snr_db.0: "),
    ],
)
def test_ranges_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(MixingStep, change)


# The sound


def plain(plan: Plan, row: int, speech: PackedCorpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mixing and levels in float64, one trial at a time."""

    def stretch(part: Any, size: int) -> np.ndarray:
        out = np.zeros(size)
        at, length = part.position[row], part.length[row]
        out[at : at + length] = speech.crop(part.utterance[row], part.start[row], length)
        return out

    size = round(0.8 * RATE)
    target = stretch(plan.target, size)
    mixture = target.copy()
    for number, part in enumerate(plan.interferers):
        if plan.interferer_on[row, number]:
            other = stretch(part, size)
            ratio = np.sum(target**2) / np.sum(other**2)
            mixture += other * np.sqrt(ratio / 10 ** (plan.snr_db[row, number] / 10))
    gain = 10 ** (plan.mixture_dbfs[row] / 20) / np.sqrt(np.mean(mixture**2))
    gain = min(gain, 0.9 / np.abs(mixture).max(), 0.9 / np.abs(target).max())
    ref = speech.crop(plan.enrollment.utterance[row], plan.enrollment.start[row], plan.enrollment.length[row]).astype(
        float
    )
    ref *= min(10 ** (plan.enrollment_dbfs[row] / 20) / np.sqrt(np.mean(ref**2)), 0.9 / np.abs(ref).max())
    return gain * mixture, gain * target * (not plan.absent[row]), ref


@pytest.mark.parametrize("indexing", [False, True], ids=["slices", "gather"])
def test_the_batch_equals_a_plain_rendering(
    packs: dict[str, PackedCorpus], indexing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if indexing:  # as on a GPU, but with CPU tensors
        monkeypatch.setattr(
            rendering,
            "fetch",
            lambda s, offset, length, place, size: gather(s, offset - place, place, place + length, size),
        )
    draw = planner(packs, interferers=(1, 2), absent=0.2, alone=0.2)
    plan = draw.draw(3, np.arange(40))
    sound = Renderer(draw)(plan)
    for row in range(40):
        mixture, target, ref = plain(plan, row, packs["speech"])
        np.testing.assert_allclose(sound.audio[row].numpy(), mixture, atol=1e-5)
        np.testing.assert_allclose(sound.target[row].numpy(), target, atol=1e-5)
        length = int(sound.ref_length[row])
        np.testing.assert_allclose(sound.ref[row, :length].numpy(), ref, atol=1e-5)
        assert sound.ref[row, length:].abs().sum() == 0
    np.testing.assert_array_equal(sound.speaker.numpy(), plan.speaker)


def test_loud_levels_stop_at_a_peak_of_0_9(packs: dict[str, PackedCorpus]) -> None:
    """At a high SNR the higher peak is that of the mixture in some trials and that of the target in others."""
    planned = planner(packs, mixture_dbfs=(-3.0, -1.0), enrollment_dbfs=(-3.0, -1.0), snr_db=(15.0, 20.0))
    plan = planned.draw(0, np.arange(40))
    sound = Renderer(planned)(plan)
    peaks = torch.maximum(sound.audio.abs().amax(1), sound.target.abs().amax(1))
    torch.testing.assert_close(peaks, torch.full((40,), 0.9))
    torch.testing.assert_close(sound.ref.abs().amax(1), torch.full((40,), 0.9))
    for row in range(40):
        for ours, expected in zip((sound.audio, sound.target), plain(plan, row, packs["speech"]), strict=False):
            np.testing.assert_allclose(ours[row].numpy(), expected, atol=1e-5)


def test_measured_snr_and_levels_are_as_drawn(packs: dict[str, PackedCorpus]) -> None:
    draw = planner(packs)
    plan = draw.draw(0, np.arange(60))
    sound = Renderer(draw)(plan)
    rest = (sound.audio - sound.target).double()
    measured = 10 * torch.log10(sound.target.double().square().sum(1) / rest.square().sum(1))
    np.testing.assert_allclose(measured.numpy(), plan.snr_db[:, 0], atol=1e-3)
    assert np.ptp(plan.snr_db) > 7
    level = 10 * torch.log10(sound.audio.double().square().mean(1)).numpy()
    limited = sound.audio.abs().amax(1).numpy() > 0.899
    np.testing.assert_allclose(level[~limited], plan.mixture_dbfs[~limited], atol=1e-3)
    assert (level <= plan.mixture_dbfs + 1e-3).all()


def test_noise_is_below_the_voices_as_drawn(packs: dict[str, PackedCorpus]) -> None:
    quiet, noisy = planner(packs), planner(packs, noise=NOISE)
    plan = noisy.draw(0, np.arange(30))
    voices, sound = Renderer(quiet)(plan._replace(noise=None)), Renderer(noisy)(plan)
    scale = (sound.target.square().sum(1) / voices.target.square().sum(1)).sqrt()[:, None]
    noise = (sound.audio - scale * voices.audio).double()
    measured = 10 * torch.log10((scale * voices.audio).double().square().sum(1) / noise.square().sum(1))
    np.testing.assert_allclose(measured.numpy(), plan.noise.snr_db, atol=0.01)


def test_noise_is_added_only_where_it_is_on(packs: dict[str, PackedCorpus]) -> None:
    quiet, noisy = planner(packs), planner(packs, noise=replace(NOISE, probability=0.5))
    plan = noisy.draw(0, np.arange(30))
    same = (Renderer(quiet)(plan._replace(noise=None)).audio == Renderer(noisy)(plan).audio).all(1)
    np.testing.assert_array_equal(same.numpy(), ~plan.noise.on)


def test_silence_keeps_the_scale_of_what_is_added(packs: dict[str, PackedCorpus]) -> None:
    gain = rendering._snr_gain_or_one(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3))
    assert gain.tolist() == [1.0, 1.0, 2.0]
    faint = torch.tensor([1e-6])
    assert rendering._snr_gain_or_one(4 * faint, faint, torch.zeros(1)).tolist() == pytest.approx([2.0])


def test_short_noises_are_repeated() -> None:
    samples = torch.tensor([9, 1, 2, 3, 9], dtype=torch.int16)
    out = fetch_repeated(samples, np.array([1]), np.array([3]), np.array([2]), 7) * 32768
    assert out.tolist() == [[3, 1, 2, 3, 1, 2, 3]]


def test_fetching_by_slices_and_by_indices_is_the_same() -> None:
    rng = np.random.default_rng(1)
    samples = torch.from_numpy(rng.integers(-32768, 32767, 500).astype(np.int16))
    offset, length, place = rng.integers(0, 300, 20), rng.integers(1, 50, 20), rng.integers(0, 30, 20)
    expected = fetch(samples, offset, length, place, 90)
    torch.testing.assert_close(gather(samples, offset - place, place, place + length, 90), expected, rtol=0, atol=0)


def test_rooms_keep_the_target_aligned_and_early(packs: dict[str, PackedCorpus]) -> None:
    """Against np.convolve: the target has the first 25 ms of the response, the mixture all of it."""
    dry_planner, draw = planner(packs), planner(packs, reverb=REVERB, alone=1.0)
    plan = draw.draw(0, np.arange(12))
    sound = Renderer(draw)(plan)
    rooms, speech = packs["rooms"], packs["speech"]
    for row in range(12):
        dry = np.zeros(dry_planner.segment)
        part = plan.target
        dry[part.position[row] : part.position[row] + part.length[row]] = speech.crop(
            part.utterance[row], part.start[row], part.length[row]
        )
        response = rooms.read(plan.rooms.responses[row, 0]).astype(float)
        response = response[np.abs(response).argmax() :]
        early = response[: round(0.025 * RATE)]
        whole, wanted = np.convolve(dry, response)[: len(dry)], np.convolve(dry, early)[: len(dry)]
        scale = float(sound.audio[row].double() @ torch.from_numpy(whole)) / (whole @ whole)
        np.testing.assert_allclose(sound.audio[row].numpy(), scale * whole, atol=1e-4)
        np.testing.assert_allclose(sound.target[row].numpy(), scale * wanted, atol=1e-4)


def test_interferers_sound_from_their_own_places_in_the_room(packs: dict[str, PackedCorpus]) -> None:
    """Against np.convolve: each voice with its own response, and the SNR between the voices as they sound there."""
    planned = planner(packs, reverb=REVERB, interferers=(2, 2))
    plan = planned.draw(0, np.arange(8))
    sound, rooms, speech = Renderer(planned)(plan), packs["rooms"], packs["speech"]
    for row in range(8):
        voices = []
        for k, part in enumerate((plan.target, *plan.interferers)):
            dry, length = np.zeros(planned.segment), part.length[row]
            dry[part.position[row] :][:length] = speech.crop(part.utterance[row], part.start[row], length)
            response = rooms.read(plan.rooms.responses[row, k]).astype(float)
            voices.append(np.convolve(dry, response[np.abs(response).argmax() :])[: len(dry)])
        target, *others = voices
        ratios = 10 ** (plan.snr_db[row] / 10)
        gains = [
            np.sqrt(np.sum(target**2) / np.sum(other**2) / ratio) for other, ratio in zip(others, ratios, strict=True)
        ]
        mixture = target + sum(gain * other for gain, other in zip(gains, others, strict=True))
        scale = float(sound.audio[row].double() @ torch.from_numpy(mixture)) / (mixture @ mixture)
        np.testing.assert_allclose(sound.audio[row].numpy(), scale * mixture, atol=1e-4)


def test_the_enrollment_has_its_own_room_and_no_tail(packs: dict[str, PackedCorpus]) -> None:
    """Against np.convolve with the whole response; beyond the end of its utterance an enrollment is zero."""
    planned = planner(packs, reverb=replace(REVERB, probability=0.0, enrollment_probability=1.0))
    plan = planned.draw(0, np.arange(12))
    sound, dry = Renderer(planned)(plan), Renderer(planner(packs))(plan._replace(rooms=None))
    torch.testing.assert_close(sound.audio, dry.audio)
    rooms, part = packs["rooms"], plan.enrollment
    assert len(set(part.length.tolist())) > 1
    for row, length in enumerate(part.length.tolist()):
        response = rooms.read(plan.rooms.responses[row, -1]).astype(float)
        said = packs["speech"].crop(part.utterance[row], part.start[row], length)
        wet = np.convolve(said, response[np.abs(response).argmax() :])[:length]
        wet *= 10 ** (plan.enrollment_dbfs[row] / 20) / np.sqrt(np.mean(wet**2))
        np.testing.assert_allclose(sound.ref[row, :length].numpy(), wet, atol=1e-4)
        assert sound.ref[row, length:].abs().sum() == 0


def test_the_filters_of_a_channel_leave_no_tail_and_keep_the_level(packs: dict[str, PackedCorpus]) -> None:
    planned = planner(packs, channel=CHANNEL)
    plan = planned.draw(0, np.arange(12))
    sound = Renderer(planned)(plan)
    assert len(set(plan.enrollment.length.tolist())) > 1
    for row, length in enumerate(plan.enrollment.length.tolist()):
        said = sound.ref[row, :length].double()
        assert float(10 * torch.log10(said.square().mean())) == pytest.approx(plan.enrollment_dbfs[row], abs=1e-3)
        assert sound.ref[row, length:].abs().sum() == 0


def test_the_band_limits_of_a_channel(packs: dict[str, PackedCorpus]) -> None:
    draw = planner(packs, channel=CHANNEL)
    renderer, plan = Renderer(draw), draw.draw(0, np.arange(4))
    time = torch.arange(RATE) / RATE
    flat_channel = plan.channel._replace(
        on=np.array([True, True, True, False]), low_cut_hz=np.full(4, 200.0), high_cut_hz=np.full(4, 2500.0),
        tilt_db_per_octave=np.array([0.0, 3.0, -3.0, 3.0]),
    )  # fmt: skip
    beyond = -10 * np.log10(1 + 1.4**8)  # a 4th-order Butterworth filter, at 1.4 times its band limit
    for hz, cut in ((200, -3.01), (1000, 0.0), (2500, -3.01), (3500, beyond), (200 / 1.4, beyond)):
        tone = torch.sin(2 * torch.pi * hz * time).expand(4, -1)
        out = renderer._through_channel(tone, flat_channel)[:, 2000:6000]
        measured = 10 * np.log10(out.square().mean(1).numpy() / 0.5)
        expected = [cut, cut + 3 * np.log2(hz / 1000), cut - 3 * np.log2(hz / 1000), 0.0]
        np.testing.assert_allclose(measured, expected, atol=0.15)


def test_a_filtered_enrollment_does_not_depend_on_its_batch(packs: dict[str, PackedCorpus]) -> None:
    planned = planner(packs, channel=CHANNEL)
    together = Renderer(planned)(planned.draw(0, np.arange(12))).ref
    for row in range(12):
        alone = Renderer(planned)(planned.draw(0, np.array([row]))).ref[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=0, atol=1e-7)


def test_the_codec_of_a_channel_follows_its_filters(packs: dict[str, PackedCorpus]) -> None:
    draw = planner(packs, channel=CHANNEL)
    renderer, plan = Renderer(draw), draw.draw(0, np.arange(3))
    said = torch.from_numpy(Voice.number(0).say(0, 1.0, RATE)).expand(3, -1)
    narrow = plan.channel._replace(
        low_cut_hz=np.full(3, 200.0), high_cut_hz=np.full(3, 2500.0), tilt_db_per_octave=np.zeros(3)
    )
    on, coded = np.array([True, True, False]), np.array([True, False, True])
    filtered = renderer._through_channel(said, narrow._replace(on=np.full(3, True), codec=np.full(3, False)))
    out = renderer._through_channel(said, narrow._replace(on=on, codec=coded))
    torch.testing.assert_close(out[0], mu_law(filtered)[0])
    torch.testing.assert_close(out[1], filtered[1])
    torch.testing.assert_close(out[2], said[2])


def test_mu_law_is_eight_bits_of_a_known_curve() -> None:
    samples = torch.linspace(-0.5, 0.5, 2001)[None]
    coded = mu_law(samples)
    assert len(torch.unique(coded)) <= 256
    levels = 0.5 * (256 ** (np.arange(128) / 127) - 1) / 255  # the inverse of ln(1 + 255 x) / ln 256
    assert np.abs(coded.abs().numpy()[..., None] - levels).min(-1).max() < 1e-6
    signal_to_noise = 10 * torch.log10(samples.square().sum() / (coded - samples).square().sum())
    assert 35 < signal_to_noise < 42  # G.711 gives about 38 dB


# In training


def dynamic_settings(packs: dict[str, PackedCorpus], **changes: Any) -> dict[str, Any]:
    mixing = {
        "segment_seconds": 0.5,
        "enrollment_seconds": [0.5, 1.0],
        "min_utterance_seconds": 0.3,
        "absent": 0.1,
        "alone": 0.1,
    }
    return {"kind": "dynamic", "pack": str(packs["speech"].path), "examples_per_epoch": 12, "mixing": mixing,
            "noise": {"pack": str(packs["noise"].path)}, **changes}  # fmt: skip


def test_workers_device_and_resuming_do_not_change_the_weights(packs: dict[str, PackedCorpus], tmp_path: Path) -> None:
    trials = make_trials(tmp_path / "trials", 2)
    states = []
    for name, workers, on_device in (("plain", 0, False), ("workers", 2, False), ("device", 0, True)):
        config = experiment(
            trials, tmp_path, name=name, data__train=dynamic_settings(packs, on_device=on_device), data__workers=workers
        )
        states.append(load_checkpoint(train(config, echo=lambda line: None) / "last.safetensors")[0])
    config = experiment(trials, tmp_path, name="pieces", data__train=dynamic_settings(packs))
    folder = train(config, minutes=0.0, echo=lambda line: None)
    for _ in range(6):  # one step each time, and none once the run is complete
        train(config, resume=folder / "last.safetensors", minutes=0.0, echo=lambda line: None)
    states.append(load_checkpoint(folder / "last.safetensors")[0])
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_a_pack_of_another_rate_is_refused(packs: dict[str, PackedCorpus], tmp_path: Path) -> None:
    trials = make_trials(tmp_path / "trials", 2)
    config = experiment(trials, tmp_path, data__train=dynamic_settings(packs), model__sample_rate=16000)
    with pytest.raises(
        ConfigError, match=r"data\.train\.pack: .* is packed at 8000 Hz and the model works at 16000 Hz"
    ):
        Trainer(config)
