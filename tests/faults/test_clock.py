"""Nothing depends on the clock on the wall, which may be set back or forward while a command runs."""

import errno
import random
import sys
import time
from pathlib import Path

import faults
import pytest


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_home(tmp_path_factory.mktemp("good") / "home", 1)


class Clock:
    """A clock that jumps by up to 30 years at every look."""

    def __init__(self) -> None:
        self.draw, self.looks = random.Random(0), 0

    def __call__(self) -> float:
        self.looks += 1
        return self.draw.uniform(0.5e9, 2.5e9)


@pytest.mark.parametrize("name", ["train", "mix", "eval", "pack"])
def test_a_clock_that_jumps_changes_nothing(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Half of a command and the rest of it, under such a clock, give what an undisturbed run gives."""
    minutes = " --minutes 600" if name == "train" else ""
    counting = faults.Disk(sys.maxsize)
    with faults.faulty(counting):
        assert faults.run(faults.words_of(name, good, tmp_path / "whole") + minutes)[0] == 0
    expected = faults.contents(tmp_path / "whole")
    clock, out = Clock(), tmp_path / "out"
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * clock()))
    with faults.faulty(faults.Disk(counting.count // 2, errno.ENOSPC)):
        assert faults.run(faults.words_of(name, good, out) + minutes)[0] == 2
    status, line = faults.run(faults.words_of(name, good, out) + minutes)
    assert status == 0, line
    assert faults.contents(out) == expected
    assert clock.looks or name != "train"  # each line of a record has the time on it
