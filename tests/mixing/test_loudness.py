"""Loudness against pyloudnorm, formulas of the standard, and its invariances."""

import numpy as np
import pyloudnorm
import pytest
from voices import Voice

from onevoice.mixing.levels import integrated_loudness, loudness_gain

RATES = (8000, 11025, 16000, 22050, 44100, 48000)


def noise(seconds: float, sample_rate: int, seed: int = 0) -> np.ndarray:
    """White noise that comes and goes, so that both gates have work to do."""
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


def test_slow_rumble_is_weighted_as_by_the_filters_themselves() -> None:
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
def test_a_gain_in_db_moves_loudness_by_as_much(gain_db: float) -> None:
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
