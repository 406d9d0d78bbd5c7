"""A disk that is full or read-only at one write, and from then on; `benchmarks/faults.py` tries all commands."""

import errno
from pathlib import Path

import faults
import pytest
from tiny import command, save_tiny

from onevoice import files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_home(tmp_path_factory.mktemp("good") / "home", 1)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("name", "number", "step", "fewest"),
    [("enroll", errno.ENOSPC, 1, 5), ("pack", errno.EROFS, 2, 10), ("mix", errno.ENOSPC, 40, 3)],
)
def test_a_disk_that_fails(good: Path, tmp_path: Path, name: str, number: int, step: int, fewest: int) -> None:
    assert faults.fail_every_write(name, good, tmp_path, number, step) >= fewest


def test_a_file_left_half_written_is_seen(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check fails for a way of writing that is not atomic."""

    def write_in_place(path: Path, data: bytes, *, durable: bool = True) -> None:
        with files.storage_errors(path), _made(path).open("wb") as stream:
            stream.write(data)

    monkeypatch.setattr("onevoice.extraction.checkpoint.atomic_write", write_in_place)
    with pytest.raises(AssertionError, match=r"enroll: write \d left o\.voice"):
        faults.fail_every_write("enroll", good, tmp_path, errno.ENOSPC)


def test_a_run_that_stopped_between_its_first_two_writes_can_be_resumed(
    good: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = faults.words_of("train", good, tmp_path)
    assert command(capsys, *words.split(), "--minutes", "0").status == 0
    (tmp_path / "run" / "last.safetensors").unlink()
    done = command(capsys, *words.split())
    assert f"resume it with --r {tmp_path}/run/last.resume.pt, or" in done.err
    assert command(capsys, "train", "-r", tmp_path / "run" / "last.resume.pt", "--minutes", "0").status == 0
    assert (tmp_path / "run" / "last.safetensors").exists()


def test_a_run_that_stopped_between_its_last_two_writes_gets_its_weights(good: Path, tmp_path: Path) -> None:
    """All steps are done then, and the weights are those of the save before."""
    assert faults.run(faults.words_of("train", good, tmp_path))[0] == 0
    last = tmp_path / "run" / "last.safetensors"
    expected = faults.contents(tmp_path)
    save_tiny(last)
    assert faults.contents(tmp_path) != expected
    assert faults.run(f"train -r {last}")[0] == 0
    assert faults.contents(tmp_path) == expected
