"""One trial of the mixing law: against a plain implementation with pyloudnorm, formulas, and edge cases."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
from plain_mixing import plain_trial
from voices import Voice

from onevoice.audio import read_audio, write_audio
from onevoice.corpus.listing import Speaker, scan
from onevoice.corpus.recordings import Recording
from onevoice.errors import AudioError, ConfigError
from onevoice.mixing.generator import to_recordings
from onevoice.mixing.law import (
    SHORT_REFERENCE,
    SHORT_UTTERANCE,
    SILENT_FILE,
    SILENT_SEGMENT,
    UNREADABLE,
    DrawnTrial,
    LeveledUtterance,
    MixingLaw,
    RenderedTrial,
    Unusable,
    cut_segments,
    draw_trial,
    load_utterance,
    mix_at_snr,
    pad_to_longest,
    render_trial,
    shared_gain,
)

RATE = 8000
LAW = MixingLaw(sample_rate=RATE)


def rendered(draw: DrawnTrial, law: MixingLaw) -> RenderedTrial:
    return render_trial(draw, law, lambda recording: load_utterance(recording, law))


def recording(path: Path) -> Recording:
    return Recording(path, str(path))


def draw_of(target: Path, interferer: Path, *references: Path, snr_db: float = 3.0) -> DrawnTrial:
    return DrawnTrial(
        0, 0, "a", "b", recording(target), recording(interferer), tuple(map(recording, references)), snr_db
    )


def write(path: Path, samples: np.ndarray, subtype: str = "FLOAT") -> Path:
    write_audio(path, samples.astype(np.float32), RATE, subtype=subtype)
    return path


@pytest.fixture
def utterances(tmp_path: Path) -> list[Path]:
    """Target, interferer and enrollment of 4, 7 and 2 s."""
    spoken = [Voice.number(0).say(0, 4, RATE), Voice.number(1).say(0, 7, RATE), Voice.number(0).say(1, 2, RATE)]
    return [write(tmp_path / f"{number}.wav", samples) for number, samples in enumerate(spoken)]


@pytest.mark.parametrize(
    "law",
    [
        LAW,
        dataclasses.replace(LAW, trim_db=20.0, segment_seconds=1.0),
        dataclasses.replace(LAW, vad_db=None, segment_seconds=0.7),
        dataclasses.replace(LAW, full_length=True),
        dataclasses.replace(LAW, full_length=True, trim_db=25.0, sample_rate=11025),
    ],
    ids=["segments", "short-trimmed", "no-vad", "full", "full-resampled"],
)
def test_equals_the_plain_law(corpus: Path, law: MixingLaw) -> None:
    speakers = to_recordings(scan(corpus))
    for index in range(4):
        draw = draw_trial(speakers, 7, index)
        expected, ours = plain_trial(draw, law), rendered(draw, law)
        assert len(ours.mixed) == len(expected) > 0
        for mixed, (mixture, target, enrollment) in zip(ours.mixed, expected, strict=True):
            np.testing.assert_allclose(mixed.mixture, mixture, atol=2e-6)
            np.testing.assert_allclose(mixed.target, target, atol=2e-6)
            np.testing.assert_allclose(ours.enrollment.samples, enrollment, atol=2e-6)


@pytest.mark.parametrize("full_length", [False, True])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 5.0])
def test_levels_of_a_rendered_trial(utterances: list[Path], full_length: bool, snr_db: float) -> None:
    law = dataclasses.replace(LAW, full_length=full_length, segment_seconds=1.0)
    trial = rendered(draw_of(*utterances, snr_db=snr_db), law)
    places = [(mixed.segment, mixed.start) for mixed in trial.mixed]
    assert places == ([(None, 0)] if full_length else [(number, number * RATE) for number in range(len(places))])
    meter = pyloudnorm.Meter(RATE)
    for mixed in trial.mixed:
        interferer = (mixed.mixture - mixed.target).astype(np.float64)
        snr = 10 * np.log10(np.square(mixed.target, dtype=np.float64).sum() / np.square(interferer).sum())
        assert snr == pytest.approx(snr_db, abs=1e-3)
        loudness = meter.integrated_loudness(mixed.mixture.astype(np.float64))
        peak = max(np.abs(mixed.mixture).max(), np.abs(mixed.target).max())
        if mixed.peak_limited:
            assert loudness < -23
            assert peak == pytest.approx(0.99, abs=1e-5)
        else:
            assert loudness == pytest.approx(-23, abs=1e-3)
            assert peak <= 0.99
    assert meter.integrated_loudness(trial.enrollment.samples.astype(np.float64)) == pytest.approx(-23, abs=1e-3)
    assert abs(trial.enrollment.samples.mean()) < 1e-6


def test_levels_and_offsets_of_the_files_do_not_matter(utterances: list[Path], tmp_path: Path) -> None:
    changed = [
        write(tmp_path / f"changed{number}.wav", gain * load_utterance(recording(path), LAW).samples + offset)
        for number, (path, gain, offset) in enumerate(zip(utterances, (0.01, 1.0, 0.2), (0.2, 0.0, -0.3), strict=True))
    ]
    before, after = rendered(draw_of(*utterances), LAW), rendered(draw_of(*changed), LAW)
    np.testing.assert_allclose(after.mixed[0].mixture, before.mixed[0].mixture, atol=1e-4)
    np.testing.assert_allclose(after.mixed[0].target, before.mixed[0].target, atol=1e-4)
    np.testing.assert_allclose(after.enrollment.samples, before.enrollment.samples, atol=1e-4)


def test_an_utterance_is_loaded_at_minus_29_lufs(utterances: list[Path]) -> None:
    samples, gain_db = load_utterance(recording(utterances[0]), LAW)
    assert pyloudnorm.Meter(RATE).integrated_loudness(samples.astype(np.float64)) == pytest.approx(-29, abs=1e-3)
    original, _ = read_audio(utterances[0])
    np.testing.assert_allclose(samples, 10 ** (gain_db / 20) * (original - original.mean()), atol=1e-6)


def test_the_peak_of_an_enrollment_stays_within_0_99(utterances: list[Path], tmp_path: Path) -> None:
    clicks = np.zeros(2 * RATE)
    clicks[::4000] = 0.5
    trial = rendered(draw_of(*utterances[:2], write(tmp_path / "clicks.wav", clicks)), LAW)
    assert trial.enrollment.samples.max() == pytest.approx(0.99)
    gain = 10 ** (trial.enrollment.gain_db / 20)
    np.testing.assert_allclose(trial.enrollment.samples, gain * (clicks - clicks.mean()), atol=1e-5)


@pytest.mark.parametrize("snr_db", [-20.0, 0.0, 7.5])
def test_mix_at_snr_by_its_formula(snr_db: float) -> None:
    time = np.arange(RATE) / RATE
    target, interferer = 0.5 * np.sin(2 * np.pi * 200 * time), 0.01 * np.sin(2 * np.pi * 300 * time)
    mixture, gain = mix_at_snr(target, interferer, snr_db)
    assert gain == pytest.approx(50 * 10 ** (-snr_db / 20))
    np.testing.assert_allclose(mixture, target + gain * interferer)


def test_silence_has_no_snr() -> None:
    for pair in ((np.zeros(9), np.ones(9)), (np.ones(9), np.zeros(9))):
        with pytest.raises(AudioError, match="silent"):
            mix_at_snr(*pair, 0.0)


def test_the_shared_gain_avoids_clipping() -> None:
    clicks = np.zeros(RATE, np.float32)
    clicks[::1000] = 0.5
    gain, limited = shared_gain(clicks, -clicks, RATE)
    assert limited
    assert gain == pytest.approx(0.99 / 0.5)
    assert shared_gain(-clicks, -clicks, RATE) == (pytest.approx(gain), True)
    steady = Voice.number(0).say(0, 1, RATE)
    quiet_gain, quiet_limited = shared_gain(steady, np.float32(100) * steady, RATE)
    assert quiet_limited
    assert quiet_gain * 100 * np.abs(steady).max() == pytest.approx(0.99)
    assert shared_gain(0 * steady, steady, RATE) == (np.inf, False)


@pytest.mark.parametrize(("lengths", "count"), [((8, 8), 2), ((11, 20), 2), ((12, 100), 3), ((3, 9), 0), ((4, 4), 1)])
def test_segments_of_exact_length_are_kept(lengths: tuple[int, int], count: int) -> None:
    first, second = np.arange(lengths[0], dtype=np.float32), -np.arange(lengths[1], dtype=np.float32)
    pairs = cut_segments(first, second, 4)
    assert [(pair.segment, pair.start) for pair in pairs] == [(number, 4 * number) for number in range(count)]
    for pair in pairs:
        np.testing.assert_array_equal(pair.target, first[pair.start : pair.start + 4])
        np.testing.assert_array_equal(pair.interferer, second[pair.start : pair.start + 4])


def test_padding_appends_zeros_to_the_shorter() -> None:
    short, long = np.ones(3, np.float32), np.full(5, 2, np.float32)
    np.testing.assert_array_equal(pad_to_longest(short, long)[0], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(pad_to_longest(long, short)[1], [1, 1, 1, 0, 0])


def test_a_draw_is_a_function_of_seed_index_and_attempt(corpus: Path) -> None:
    speakers = to_recordings(scan(corpus))
    assert draw_trial(speakers, 1, 5, 2) == draw_trial(speakers, 1, 5, 2)
    others = [draw_trial(speakers, *place) for place in ((1, 5, 2), (2, 5, 2), (1, 6, 2), (1, 5, 3))]
    assert len({(draw.target, draw.interferer, draw.references) for draw in others}) > 2


def test_what_is_drawn() -> None:
    speakers = [
        Speaker("many", tuple(Path(f"m{number}") for number in range(40))),
        Speaker("two", (Path("t0"), Path("t1"))),
        Speaker("one", (Path("o0"),)),
    ]
    speakers = to_recordings(speakers)
    draws = [draw_trial(speakers, 3, index, snr_levels=(-5.0, 0.0, 5.0)) for index in range(1500)]
    for draw in draws:
        assert draw.target not in draw.references
        assert {each.name[0] for each in (draw.target, *draw.references)} == {draw.target_speaker[0]}
        assert draw.interferer.name[0] == draw.interferer_speaker[0] != draw.target_speaker[0]
        assert 1 <= len(draw.references) == len(set(draw.references)) <= 10
    assert max(len(draw.references) for draw in draws) == 10
    targets = Counter(draw.target_speaker for draw in draws)
    assert set(targets) == {"many", "two"}
    assert abs(targets["many"] - 750) < 100  # by speaker, not by file; within 5 standard deviations
    assert all(abs(count - 500) < 100 for count in Counter(draw.snr_db for draw in draws).values())


def test_short_and_broken_references_are_replaced(utterances: list[Path], tmp_path: Path) -> None:
    target, interferer, good = utterances
    short = write(tmp_path / "short.wav", Voice.number(0).say(3, 0.9, RATE))
    silent = write(tmp_path / "silent.wav", np.zeros(RATE * 2))
    (broken := tmp_path / "broken.wav").write_text("not sound")
    trial = rendered(draw_of(target, interferer, short, silent, broken, good), LAW)
    assert trial.enrollment_recording.path == good
    assert [(each.reason, each.recording.path) for each in trial.skipped] == [
        (SHORT_REFERENCE, short),
        (SILENT_FILE, silent),
        (UNREADABLE, broken),
    ]
    assert trial.skipped[0].detail == "0.90 s"
    with pytest.raises(Unusable) as caught:
        rendered(draw_of(target, interferer, short, broken), LAW)
    assert [each.reason for each in caught.value.rejections] == [SHORT_REFERENCE, UNREADABLE]


def test_a_reference_is_measured_after_trimming(utterances: list[Path], tmp_path: Path) -> None:
    speech, pause = Voice.number(0).say(3, 0.5, RATE), np.zeros(RATE)
    padded = write(tmp_path / "padded.wav", np.concatenate([pause, speech, pause]))
    draw = draw_of(*utterances[:2], padded)
    assert rendered(draw, LAW).enrollment_recording.path == padded
    with pytest.raises(Unusable) as caught:
        rendered(draw, dataclasses.replace(LAW, trim_db=20.0))
    assert caught.value.rejections[0].reason == SHORT_REFERENCE


def test_an_exact_second_of_reference_is_enough(utterances: list[Path], tmp_path: Path) -> None:
    second = write(tmp_path / "second.wav", Voice.number(0).say(3, 1.0, RATE))
    assert rendered(draw_of(*utterances[:2], second), LAW).enrollment_recording.path == second


def test_silent_segments_are_skipped_and_the_others_keep_their_numbers(utterances: list[Path], tmp_path: Path) -> None:
    law = dataclasses.replace(LAW, vad_db=None, segment_seconds=1.0)
    speech = Voice.number(0).say(5, 3, RATE)
    speech[RATE : 2 * RATE] = 0
    target = write(tmp_path / "gap.wav", speech - speech.mean() / 1.5 * (speech != 0))
    trial = rendered(draw_of(target, *utterances[1:]), law)
    assert [(mixed.segment, mixed.start) for mixed in trial.mixed] == [(0, 0), (2, 2 * RATE)]
    assert [(each.reason, each.recording.path) for each in trial.skipped] == [(SILENT_SEGMENT, target)]


@pytest.mark.parametrize("silent", ["target", "interferer"])
@pytest.mark.parametrize(("dbfs", "kept"), [(-69.8, 2), (-70.2, 1)])
def test_a_segment_below_minus_70_dbfs_is_silent(silent: str, dbfs: float, kept: int) -> None:
    """Two segments of a 1 kHz tone, the second of one voice at `dbfs`; a sine has an RMS of its peak minus 3.01 dB."""
    law = dataclasses.replace(LAW, vad_db=None, segment_seconds=1.0)
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * RATE) / RATE).astype(np.float32)
    levels = np.repeat([0.05, 10 ** (dbfs / 20) * np.sqrt(2)], RATE).astype(np.float32)
    draw = draw_of(Path("target"), Path("interferer"), Path("reference"), snr_db=0.0)

    def load(recording: Recording) -> LeveledUtterance:
        return LeveledUtterance(levels * tone if recording.name == silent else np.float32(0.05) * tone, 0.0)

    trial = render_trial(draw, law, load)
    assert len(trial.mixed) == kept
    skipped = [(SILENT_SEGMENT, silent, "at 1 s")] * (2 - kept)
    assert [(each.reason, each.recording.name, each.detail) for each in trial.skipped] == skipped


def test_utterances_too_short_for_one_segment(utterances: list[Path], tmp_path: Path) -> None:
    short = write(tmp_path / "short.wav", Voice.number(0).say(3, 2.5, RATE))
    with pytest.raises(Unusable) as caught:
        rendered(draw_of(short, *utterances[1:]), LAW)
    assert [(each.reason, each.recording.path) for each in caught.value.rejections] == [(SHORT_UTTERANCE, short)]
    with pytest.raises(Unusable) as caught:
        rendered(draw_of(short, *utterances[1:]), dataclasses.replace(LAW, vad_db=None))
    assert caught.value.rejections[0].detail == "2.50 s without silence"
    assert len(rendered(draw_of(short, *utterances[1:]), dataclasses.replace(LAW, full_length=True)).mixed) == 1


@pytest.mark.parametrize("samples", [np.zeros(RATE * 4), np.full(RATE * 4, 0.5), 1e-6 * np.ones(3)])
def test_silent_utterances_are_refused(tmp_path: Path, samples: np.ndarray) -> None:
    with pytest.raises(Unusable) as caught:
        load_utterance(recording(write(tmp_path / "silent.wav", samples)), LAW)
    assert caught.value.rejections[0].reason == SILENT_FILE


def test_inaudible_rumble_is_not_mixed() -> None:
    """A mixture that is silent only after K-weighting is skipped, not amplified until it clips."""
    rumble = (0.001 * np.sin(2 * np.pi * 0.5 * np.arange(6 * RATE) / RATE)).astype(np.float32)
    utterance = LeveledUtterance(rumble, 0.0)
    with pytest.raises(Unusable) as caught:
        render_trial(draw_of(Path("t"), Path("i"), Path("r")), LAW, lambda _: utterance)
    assert [(each.reason, each.detail) for each in caught.value.rejections] == [
        (SILENT_SEGMENT, "at 0 s"),
        (SILENT_SEGMENT, "at 3 s"),
    ]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sample_rate": 0}, "sample_rate"),
        ({"snr_levels": ()}, "snr_levels"),
        ({"snr_levels": (0.0, float("nan"))}, "snr_levels"),
        ({"trim_db": -3.0}, "trim_db"),
        ({"vad_db": 0.0}, "vad_db"),
        ({"segment_seconds": 0.0}, "audioLen"),
        ({"segment_seconds": float("inf")}, "audioLen"),
        ({"trim_db": float("inf")}, "trim_db"),
    ],
)
def test_values_out_of_range(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        MixingLaw(**change)


def test_the_lowest_values_are_allowed() -> None:
    law = MixingLaw(sample_rate=1000, segment_seconds=0.1, trim_db=0.5)
    assert (law.sample_rate, law.segment_seconds, law.trim_db) == (1000, 0.1, 0.5)
