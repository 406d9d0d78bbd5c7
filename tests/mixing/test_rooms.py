"""Simulated rooms: the requested reverberation time, by Schroeder's backward integration, and the same every time."""

from pathlib import Path

import numpy as np
import pytest

from onevoice.audio import read_audio
from onevoice.cli import main
from onevoice.config import from_dict
from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.mixing.rooms import RoomConfig, simulate_room, simulate_rooms

CONFIG = RoomConfig(sample_rate=8000, talkers=2, reverberation_seconds=(0.1, 0.25))


def decay_seconds(response: np.ndarray, rate: int) -> float:
    """T60 extrapolated from the decay between −5 and −25 dB (ISO 3382)."""
    energy = np.cumsum(response[::-1].astype(float) ** 2)[::-1]
    level = 10 * np.log10(energy / energy[0])
    return 3 * (int(np.argmax(level < -25)) - int(np.argmax(level < -5))) / rate


@pytest.mark.parametrize("seconds", [0.25, 0.4])
def test_the_reverberation_time_is_about_the_requested_one(seconds: float) -> None:
    config = RoomConfig(sample_rate=8000, talkers=2, reverberation_seconds=(seconds, seconds))
    measured = [decay_seconds(response, 8000) for index in range(2) for response in simulate_room(config, 0, index)]
    assert np.median(measured) == pytest.approx(seconds, rel=0.35)  # Sabine's formula is this inaccurate in small rooms


def test_a_room_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    simulate_rooms(CONFIG, tmp_path / "one", 3, seed=5)
    simulate_rooms(CONFIG, tmp_path / "two", 3, seed=5, workers=2)
    names = [path.relative_to(tmp_path / "one") for path in sorted((tmp_path / "one").rglob("*.wav"))]
    assert len(names) == 6
    for name in names:
        np.testing.assert_array_equal(*(read_audio(tmp_path / part / name)[0] for part in ("one", "two")))
    written, rate = read_audio(tmp_path / "one" / names[3])
    np.testing.assert_array_equal(written, simulate_room(CONFIG, 5, 1)[1])
    assert rate == 8000
    assert not np.array_equal(written, simulate_room(CONFIG, 6, 1)[1][: len(written)])


def test_ranges_are_checked() -> None:
    with pytest.raises(ConfigError, match="length: the lowest value 5 is above the highest 3"):
        from_dict(RoomConfig, {"length": [5.0, 3.0]})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--t60", "0.5", "0.2"], "options: reverberation_seconds: the lowest"), (["--count", "0"], "count: 0 rooms")],
)
def test_wrong_options_are_one_line(
    options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["corpus", "rooms", str(tmp_path), *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_impossible_rooms() -> None:
    with pytest.raises(ConfigError, match="reverberation_seconds: too short"):
        simulate_room(RoomConfig(reverberation_seconds=(0.01, 0.02)), 0, 0)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyroomacoustics", None)
    with pytest.raises(MissingDependencyError, match=r"onevoice\[rooms\]"):
        simulate_room(CONFIG, 0, 0)
