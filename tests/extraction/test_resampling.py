"""Conversion of a stream's rate: against soxr, for any division into blocks, with its delay as stated."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onevoice.audio import Mono, resample
from onevoice.extraction.resampling import RateConverter

PAIRS = [(44_100, 16_000), (48_000, 16_000), (8_000, 16_000), (16_000, 44_100), (16_000, 48_000), (16_000, 8_000)]


def sound(rate: int, seconds: float = 0.5) -> Mono:
    """Tones up to 3 kHz."""
    time = np.arange(round(rate * seconds)) / rate
    tones = [np.sin(2 * np.pi * frequency * time + frequency) for frequency in (90, 440, 1234.5, 2900)]
    return (0.2 * np.hanning(len(time)) * sum(tones)).astype(np.float32)


def convert(converter: RateConverter, samples: Mono, sizes: list[int]) -> Mono:
    state, parts, first = converter.start(), [], 0
    while first < len(samples):
        size = sizes[len(parts) % len(sizes)]
        part, state = converter.convert(samples[first : first + size], state)
        parts.append(part)
        first += size
    return np.concatenate([*parts, converter.convert(np.zeros(0, np.float32), state, last=True)[0]])


@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
def test_it_equals_soxr_where_neither_filter_cuts(from_rate: int, to_rate: int) -> None:
    samples = sound(from_rate)
    ours, theirs = convert(RateConverter(from_rate, to_rate), samples, [from_rate // 100]), resample(
        samples, from_rate, to_rate
    )  # fmt: skip
    assert len(ours) == -(-len(samples) * to_rate // from_rate)
    size = min(len(ours), len(theirs))
    assert np.abs(ours[:size] - theirs[:size]).max() < 2e-4 * np.abs(theirs).max()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.sampled_from(PAIRS))
def test_blocks_change_nothing(sizes: list[int], pair: tuple[int, int]) -> None:
    converter, samples = RateConverter(*pair), sound(pair[0], 0.2)
    assert np.abs(convert(converter, samples, sizes) - convert(converter, samples, [10**6])).max() < 1e-6


@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
def test_outputs_come_after_the_stated_delay(from_rate: int, to_rate: int) -> None:
    converter = RateConverter(from_rate, to_rate)
    assert converter.delay_seconds <= 32 / min(from_rate, to_rate) + 1 / from_rate
    state, heard, made = converter.start(), 0, 0
    for size in (1, 500, 7, 441, 441):
        part, state = converter.convert(np.ones(size, np.float32), state)
        heard, made = heard + size, made + len(part)
        # Every output at least the delay before the end is out, and none is later.
        assert made == max(0, -(-(heard - converter.reach) * to_rate // from_rate))
    assert len(state.recent) <= 2 * converter.reach + 1


def test_no_tone_above_half_the_lower_rate_comes_through() -> None:
    time = np.arange(24_000) / 48_000
    for frequency in (8_100, 12_000, 23_000):
        tone = np.sin(2 * np.pi * frequency * time).astype(np.float32)
        output = convert(RateConverter(48_000, 16_000), tone, [480])
        assert np.abs(output[100:-100]).max() < 10 ** (-60 / 20)
