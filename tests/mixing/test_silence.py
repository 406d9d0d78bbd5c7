"""Trimming and splitting by level against plain loops over frames."""

import numpy as np
import pytest
from voices import Voice

from onevoice.mixing.levels import split, trim, vad_merge


def plain_sounding(samples: np.ndarray, top_db: float) -> list[bool]:
    """Frame by frame, as written in librosa's documentation: centred frames, zeros beyond the ends."""
    padded = np.concatenate([np.zeros(1024), samples.astype(np.float64), np.zeros(1024)])
    powers = []
    for start in range(0, len(padded) - 2048 + 1, 512):
        frame = padded[start : start + 2048]
        powers.append(sum(value * value for value in frame) / 2048)
    loudest = max(powers)
    return [power > 0 and 10 * np.log10(power / loudest) > -top_db for power in powers]


def plain_split(samples: np.ndarray, top_db: float) -> list[tuple[int, int]]:
    intervals: list[tuple[int, int]] = []
    start = None
    flags = [*plain_sounding(samples, top_db), False]
    for number, sounding in enumerate(flags):
        if sounding and start is None:
            start = number
        if not sounding and start is not None:
            intervals.append((min(start * 512, len(samples)), min(number * 512, len(samples))))
            start = None
    return intervals


def speech_with_gaps(seed: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    levels = rng.choice([0.0, 1e-4, 1e-2, 1.0], 9).repeat(-(-length // 9))[:length]
    return (levels * rng.standard_normal(length)).astype(np.float32)


@pytest.mark.parametrize("length", [100, 512, 2048, 9999, 20480])
@pytest.mark.parametrize("top_db", [20.0, 45.0])
def test_split_and_trim_equal_the_plain_loop(length: int, top_db: float) -> None:
    for seed in range(3):
        samples = speech_with_gaps(seed, length)
        samples[length // 2] = 1.0
        expected = plain_split(samples, top_db)
        assert [tuple(pair) for pair in split(samples, top_db).tolist()] == expected
        np.testing.assert_array_equal(trim(samples, top_db), samples[expected[0][0] : expected[-1][1]])
        merged = np.concatenate([samples[first:last] for first, last in expected])
        np.testing.assert_array_equal(vad_merge(samples, top_db), merged)


def test_silence_around_speech_is_cut_off_and_inside_it_kept() -> None:
    speech, pause = Voice.number(0).say(0, 1.0, 16000), np.zeros(16000, np.float32)
    trimmed = trim(np.concatenate([pause, speech, pause, speech, pause]), 30.0)
    assert len(trimmed) == pytest.approx(3 * 16000, abs=2048 + 512)
    merged = vad_merge(np.concatenate([pause, speech, pause, speech, pause]), 30.0)
    assert len(merged) == pytest.approx(2 * 16000, abs=4 * 2048)


@pytest.mark.parametrize("gain", [1e-3, 7.0])
def test_the_level_does_not_matter(gain: float) -> None:
    samples = speech_with_gaps(5, 12345)
    np.testing.assert_array_equal(split(np.float32(gain) * samples, 20.0), split(samples, 20.0))


@pytest.mark.parametrize("length", [0, 10, 5000])
def test_digital_silence_has_no_sound(length: int) -> None:
    silence = np.zeros(length, np.float32)
    assert len(trim(silence, 20.0)) == len(vad_merge(silence, 20.0)) == len(split(silence, 20.0)) == 0
