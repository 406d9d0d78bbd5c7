"""Loudness against pyloudnorm and the formulas of the standard, silence against plain loops over frames."""

import numpy as np
import pyloudnorm
import pytest
import torch
from voices import Voice

from onevoice.mixing.levels import (
    integrated_loudness,
    loudness_gain,
    remove_silence,
    snr_gain,
    sound_intervals,
    trim_silence,
)

RATES = (8000, 11025, 16000, 22050, 44100, 48000)


def noise(seconds: float, sample_rate: int, seed: int = 0) -> np.ndarray:
    """White noise whose level changes, so that both gates reject blocks."""
    rng = np.random.default_rng(seed)
    samples = 0.1 * rng.standard_normal(round(seconds * sample_rate))
    levels = rng.choice([1e-5, 3e-3, 0.1, 1.0], 20).repeat(-(-len(samples) // 20))
    return (samples * levels[: len(samples)]).astype(np.float32)


@pytest.mark.parametrize("sample_rate", RATES)
@pytest.mark.parametrize("seconds", [0.4, 0.55, 1.234, 3.0, 7.77])
def test_equals_pyloudnorm_on_noise(sample_rate: int, seconds: float) -> None:
    samples = noise(seconds, sample_rate, seed=sample_rate)
    expected = pyloudnorm.Meter(sample_rate).integrated_loudness(samples.astype(np.float64))
    assert integrated_loudness(samples, sample_rate) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("sample_rate", [8000, 16000])
@pytest.mark.parametrize("number", range(4))
def test_equals_pyloudnorm_on_speech(sample_rate: int, number: int) -> None:
    speech = Voice.number(number).say(0, 3.3, sample_rate)
    expected = pyloudnorm.Meter(sample_rate).integrated_loudness(speech.astype(np.float64))
    assert integrated_loudness(speech, sample_rate) == pytest.approx(expected, abs=1e-5)


def test_slow_rumble_is_weighted_as_by_the_time_domain_filters() -> None:
    time = np.arange(4 * 16000) / 16000
    rumble = (0.5 * np.sin(2 * np.pi * 25 * time) + 0.3).astype(np.float32)
    expected = pyloudnorm.Meter(16000).integrated_loudness(rumble.astype(np.float64))
    assert integrated_loudness(rumble, 16000) == pytest.approx(expected, abs=1e-4)


def test_sine_of_the_standard() -> None:
    """ITU-R BS.1770-4: a 997 Hz sine of full scale in one channel reads −3.01 LKFS."""
    time = np.arange(5 * 48000) / 48000
    sine = np.sin(2 * np.pi * 997 * time)
    assert integrated_loudness(sine, 48000) == pytest.approx(-3.01, abs=0.05)
    assert integrated_loudness(10 ** (-20 / 20) * sine, 48000) == pytest.approx(-23.01, abs=0.05)


@pytest.mark.parametrize("gain_db", [-20.0, -6.0, 3.5, 12.0])
def test_a_gain_in_db_changes_the_loudness_by_as_much(gain_db: float) -> None:
    speech = Voice.number(1).say(0, 3.0, 16000)
    moved = integrated_loudness((speech * 10 ** (gain_db / 20)).astype(np.float32), 16000)
    assert moved - integrated_loudness(speech, 16000) == pytest.approx(gain_db, abs=1e-4)


def test_silence_around_speech_is_gated_away() -> None:
    speech = Voice.number(2).say(0, 4.0, 16000)
    silence = np.zeros(16000 * 4, np.float32)
    alone = integrated_loudness(speech, 16000)
    assert integrated_loudness(np.concatenate([silence, speech, silence]), 16000) == pytest.approx(alone, abs=0.3)


def test_gain_brings_speech_to_the_wanted_loudness() -> None:
    speech = Voice.number(3).say(0, 2.0, 16000)
    gain = loudness_gain(speech, 16000, -23.0)
    assert integrated_loudness((speech * gain).astype(np.float32), 16000) == pytest.approx(-23.0, abs=1e-4)


@pytest.mark.parametrize("length", [0, 1, 100, 6400, 40000])
def test_silence_is_minus_infinity(length: int) -> None:
    assert integrated_loudness(np.zeros(length, np.float32), 16000) == -np.inf
    assert loudness_gain(np.zeros(length, np.float32), 16000, -23.0) == np.inf


def test_short_sound_is_one_block_of_its_own_length() -> None:
    rng = np.random.default_rng(0)
    short = rng.standard_normal(3200).astype(np.float32) * 0.1
    padded = np.concatenate([short, np.zeros(3200, np.float32)])  # one block, half of it empty: 3.01 dB less
    difference = integrated_loudness(short, 16000) - integrated_loudness(padded, 16000)
    assert difference == pytest.approx(10 * np.log10(2), abs=0.01)


@pytest.mark.parametrize(("lufs", "measured"), [(-69.9, -69.9), (-70.1, -np.inf)])
def test_the_absolute_gate(lufs: float, measured: float) -> None:
    """The absolute gate of BS.1770 is at -70 LUFS."""
    sine = np.sin(2 * np.pi * 997 * np.arange(2 * 16000) / 16000)
    level = 10 ** ((lufs - integrated_loudness(sine, 16000)) / 20)
    assert integrated_loudness(level * sine, 16000) == pytest.approx(measured, abs=1e-6)


@pytest.mark.parametrize(("quiet_db", "counts"), [(-12.4, True), (-13.2, False)])
def test_the_relative_gate(quiet_db: float, counts: bool) -> None:
    """Half of the sound is quieter by x dB: the gate is 10 dB below the mean, so 12.81 dB below the loud half."""
    sine = 0.1 * np.sin(2 * np.pi * 997 * np.arange(20 * 16000) / 16000)
    both = np.concatenate([sine, 10 ** (quiet_db / 20) * sine])
    mean_db = 10 * np.log10((1 + 10 ** (quiet_db / 10)) / 2) if counts else 0.0
    assert integrated_loudness(both, 16000) - integrated_loudness(sine, 16000) == pytest.approx(mean_db, abs=0.05)


@pytest.mark.parametrize("snr_db", [-7.0, 0.0, 12.5])
def test_an_snr_is_the_same_gain_for_floats_arrays_and_tensors(snr_db: float) -> None:
    reference, energy = 3.0, 0.2
    gain = snr_gain(reference, energy, snr_db)
    assert 10 * np.log10(reference / (gain**2 * energy)) == pytest.approx(snr_db)
    for kind in (np.array, torch.tensor):
        same = snr_gain(kind([reference]), kind([energy]), kind([snr_db]))
        assert same.tolist() == pytest.approx([gain])


# Silence


def plain_is_sound(samples: np.ndarray, top_db: float) -> list[bool]:
    """Frame by frame, as written in librosa's documentation: centered frames, zeros beyond the ends."""
    padded = np.concatenate([np.zeros(1024), samples.astype(np.float64), np.zeros(1024)])
    powers = []
    for start in range(0, len(padded) - 2048 + 1, 512):
        frame = padded[start : start + 2048]
        powers.append(sum(value * value for value in frame) / 2048)
    loudest = max(powers)
    return [power > 0 and 10 * np.log10(power / loudest) > -top_db for power in powers]


def plain_intervals(samples: np.ndarray, top_db: float) -> list[tuple[int, int]]:
    intervals: list[tuple[int, int]] = []
    start = None
    flags = [*plain_is_sound(samples, top_db), False]
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
def test_intervals_and_trimming_equal_the_plain_loop(length: int, top_db: float) -> None:
    for seed in range(3):
        samples = speech_with_gaps(seed, length)
        samples[length // 2] = 1.0
        expected = plain_intervals(samples, top_db)
        assert [tuple(pair) for pair in sound_intervals(samples, top_db).tolist()] == expected
        np.testing.assert_array_equal(trim_silence(samples, top_db), samples[expected[0][0] : expected[-1][1]])
        merged = np.concatenate([samples[first:last] for first, last in expected])
        np.testing.assert_array_equal(remove_silence(samples, top_db), merged)


def test_silence_around_speech_is_cut_off_and_inside_it_kept() -> None:
    speech, pause = Voice.number(0).say(0, 1.0, 16000), np.zeros(16000, np.float32)
    trimmed = trim_silence(np.concatenate([pause, speech, pause, speech, pause]), 30.0)
    assert len(trimmed) == pytest.approx(3 * 16000, abs=2048 + 512)
    merged = remove_silence(np.concatenate([pause, speech, pause, speech, pause]), 30.0)
    assert len(merged) == pytest.approx(2 * 16000, abs=4 * 2048)


@pytest.mark.parametrize("gain", [1e-3, 7.0])
def test_the_level_does_not_matter(gain: float) -> None:
    samples = speech_with_gaps(5, 12345)
    np.testing.assert_array_equal(sound_intervals(np.float32(gain) * samples, 20.0), sound_intervals(samples, 20.0))


@pytest.mark.parametrize("length", [0, 10, 5000])
def test_digital_silence_has_no_sound(length: int) -> None:
    silence = np.zeros(length, np.float32)
    assert (
        len(trim_silence(silence, 20.0))
        == len(remove_silence(silence, 20.0))
        == len(sound_intervals(silence, 20.0))
        == 0
    )
