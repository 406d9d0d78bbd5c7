"""Two processes on one run folder or one output: the second one ends at once, with one line."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import command, process
from toy_runs import PATIENCE, write_experiment

from onevoice.errors import ConfigError
from onevoice.evaluation.journal import Journal
from onevoice.evaluation.results import TrialRow
from onevoice.files import sole_writer

BUSY = "another process is writing to it; let it finish, or choose another place"


def commands(corpus: Path, trials: Path, folder: Path) -> dict[str, tuple[str, Path]]:
    """Return command lines, and the folder that each locks."""
    config = write_experiment(folder / "toy.json", trials)
    options = "--workers 1 --sample-rate 8000"
    return {
        "mix": (f"mix {corpus} {folder}/mixed --count 2 --segment-seconds 0.5 {options}", folder / "mixed"),
        "pack": (f"corpus pack {corpus} {folder}/pack {options}", folder / "pack.part"),
        "train": (f"train -c {config} --minutes 0", folder / "runs" / "toy"),
    }


@pytest.mark.parametrize("verb", ["mix", "pack", "train"])
def test_the_second_writer_is_refused(
    corpus: Path, trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    words, folder = commands(corpus, trials, tmp_path)[verb]
    with sole_writer(folder):
        (folder / "samples.int16").write_bytes(b"of the first")
        done = command(capsys, *words.split())
        assert (done.status, done.err) == (2, f"onevoice: error: {folder}: {BUSY}\n")
        assert [path.name for path in folder.iterdir()] == ["samples.int16"]
    (folder / "samples.int16").unlink()
    assert command(capsys, *words.split()).status == 0


def test_two_commands_with_one_output(corpus: Path, tmp_path: Path) -> None:
    """Two interpreters; the first one is held in the middle of its work, and then killed."""
    out = tmp_path / "mixed"
    options = "--count 100000 --segment-seconds 0.5 --workers 1 --sample-rate 8000"
    words = ["-m", "onevoice", "mix", corpus, out, *options.split()]
    with subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL) as first:
        try:
            end = time.monotonic() + PATIENCE
            while first.poll() is None and time.monotonic() < end and not (out / "mixture.json").exists():
                time.sleep(0.01)
            first.send_signal(signal.SIGSTOP)
            assert process(words) == (2, "", f"onevoice: error: {out}: {BUSY}\n")
            assert first.poll() is None
        finally:
            first.kill()
    with sole_writer(out):
        assert (out / "mixture.json").exists()


def test_the_second_evaluation_leaves_the_journal_of_the_first(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path / "r.json", {"data": 1}) for _ in range(2))
    row = TrialRow("a", 1.0, {}, {})
    first.append(row)
    before = first.path.read_bytes()
    with pytest.raises(ConfigError, match=r"r\.journal\.jsonl: another process is writing to it"):
        second.append(row)
    second.close()
    assert first.path.read_bytes() == before
    first.close()
    assert [each.name for each in second.resume(["a"])] == ["a"]


def test_a_forked_reader_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Data readers of a killed run live for some seconds more, and the run must be resumable at once."""
    context = multiprocessing.get_context("fork")
    started, ending = context.Event(), context.Event()

    def read() -> None:
        started.set()
        ending.wait(60)

    with sole_writer(tmp_path):
        reader = context.Process(target=read)
        reader.start()
        started.wait(60)
    with sole_writer(tmp_path):
        assert reader.is_alive()
    ending.set()
    reader.join()


def test_the_lock_is_for_one_process_and_ends(tmp_path: Path) -> None:
    for _ in range(2):
        with sole_writer(tmp_path), pytest.raises(ConfigError, match="another process"), sole_writer(tmp_path):
            raise AssertionError("two have the lock")
    with sole_writer(tmp_path, is_needed=False), sole_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
