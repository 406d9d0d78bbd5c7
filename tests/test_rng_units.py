"""Random numbers by place, and conversions of units."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onevoice.rng import derive, derive_seed
from onevoice.units import db_to_amplitude, power, rms_dbfs, to_samples

PLACES = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4).map(tuple)


@given(st.integers(), PLACES, st.integers(), PLACES)
def test_only_equal_places_have_equal_seeds(seed: int, place: tuple, other: int, elsewhere: tuple) -> None:
    same = (seed, *place) == (other, *elsewhere) and [*map(type, place)] == [*map(type, elsewhere)]
    if not any("\x1f" in part for part in (*place, *elsewhere) if isinstance(part, str)):
        assert (derive_seed(seed, *place) == derive_seed(other, *elsewhere)) == same


def test_types_and_boundaries_of_places_matter() -> None:
    places: list[tuple[str | int, ...]] = [(), ("1",), (1,), ("a", "b"), ("ab",), ("b", "a"), ("a", 1), ("a1",)]
    assert len({derive_seed(0, *place) for place in places}) == len(places)
    assert all(0 <= derive_seed(0, *place) < 2**128 for place in places)


def test_another_process_draws_the_same() -> None:
    code = "from onevoice.rng import derive; print(derive(3, 'mix', 17).integers(2**60))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{derive(3, 'mix', 17).integers(2**60)}\n"}


def test_draws_of_neighboring_places_look_independent() -> None:
    """Means of neighboring places spread like those of independent draws: standard deviation 1/√12n, within 20 %."""
    means = [derive(0, "train", epoch, index).random(100).mean() for epoch in range(20) for index in range(50)]
    assert np.mean(means) == pytest.approx(0.5, abs=4 / np.sqrt(12 * 100 * 1000))
    assert np.std(means) == pytest.approx(1 / np.sqrt(12 * 100), rel=0.2)


@given(st.floats(-100, 40), st.integers(1, 60))
def test_levels(level_db: float, length: int) -> None:
    amplitude = db_to_amplitude(level_db)
    assert 20 * np.log10(amplitude) == pytest.approx(level_db, abs=1e-9)
    assert rms_dbfs(np.full(length, amplitude)) == pytest.approx(level_db, abs=1e-9)
    assert power(np.full((2, length), -amplitude)) == pytest.approx(amplitude**2)


def test_a_sine_is_3_db_below_its_peak() -> None:
    sine = np.sin(2 * np.pi * np.arange(1000) / 100).astype(np.float32)
    assert rms_dbfs(sine) == pytest.approx(10 * np.log10(0.5), abs=1e-4)


def test_silence_and_an_empty_array() -> None:
    assert rms_dbfs(np.zeros(5)) == rms_dbfs(np.zeros(0)) == -np.inf
    assert power(np.zeros(0, np.float32)) == 0


def test_power_does_not_underflow_in_float32() -> None:
    samples = np.full(3_000_000, 1e-25, np.float32)  # its square underflows in float32
    assert power(samples) == pytest.approx(1e-50, rel=1e-3, abs=0)


@pytest.mark.parametrize(
    ("seconds", "rate", "samples"), [(0.0025, 8000, 20), (0.0025, 44_100, 110), (3.0, 16_000, 48_000)]
)
def test_to_samples(seconds: float, rate: int, samples: int) -> None:
    assert to_samples(seconds, rate) == samples
