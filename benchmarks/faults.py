"""Faults that a run survives: a disk that is full or read-only at every write, and SIGKILL at random moments.

    python benchmarks/faults.py [--kills 50] [--writes 1] [--only extract] [--seed 0]

For each command, every write in turn fails, and all later ones, until the command succeeds: after each failure there is
one line of error and nothing half-written under a final name, and the same command then gives the same bytes. The same
commands are killed at random moments, and run again until they end; the bytes must be those of an undisturbed run. Each
of these runs is a process of its own, forked from one that has loaded the package already.
"""

import argparse
import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import fuzz  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402

from onevoice.cli import main  # noqa: E402
from onevoice.extraction.checkpoint import load_tensors  # noqa: E402

COMMANDS = {
    "extract": "extract {home}/long.wav {home}/ref.wav {out}/o.wav --residual {out}/r.flac"
    " --pretrained {home}/tiny.safetensors --device cpu --force",
    "enroll": "enroll {home}/ref.wav -o {out}/o.voice --pretrained {home}/tiny.safetensors --device cpu --force",
    "convert": "convert {home}/original.pth {out}/o.safetensors",
    "mix": "mix {home}/corpus {out}/mixed --count 4 --workers 1 --segment-seconds 0.5 --sample-rate 8000",
    "pack": "corpus pack {home}/corpus {out}/pack --workers 1 --sample-rate 8000",
    "eval": "eval -r {home}/tiny.safetensors -t {home}/trials -j 1 --metrics si_sdr -o {out}/r.json",
    "train": "train -c {home}/train.json --set runs_folder={out} training.epochs=2 training.save_every_steps=1",
}
TIMES = ("network_seconds", "wall_time", "steps_per_second", "seconds_per", "real_time", "speed", "written", "elapsed")


class Disk:
    """Counts writes, and fails from the `first` one on: opening to write, writing, flushing, renaming, new folders."""

    def __init__(self, first: int, number: int = errno.ENOSPC) -> None:
        self.first, self.number, self.count = first, number, 0

    def write(self) -> None:
        self.count += 1
        if self.count >= self.first:
            raise OSError(self.number, os.strerror(self.number))


@contextlib.contextmanager
def faulty(disk: Disk) -> Iterator[None]:
    """Let everything that this process writes through `pathlib` pass by `disk`."""
    open_path, mkdir, replace, touch, fsync = Path.open, Path.mkdir, Path.replace, Path.touch, os.fsync

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            disk.write()
            return super().write(data)

    def open_counted(self: Path, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if not set(mode) & set("wax+") or (str(self).startswith(("/dev", "/proc")) and "shm" not in str(self)):
            return open_path(self, mode, buffering, **options)
        disk.write()
        raw = File(self, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **options)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            disk.write()
            return call(*arguments, **options)

        return wrapped

    with (
        mock.patch.object(Path, "open", open_counted),
        mock.patch.object(Path, "mkdir", lambda self, *a, **o: self.is_dir() or counted(mkdir)(self, *a, **o)),
        mock.patch.object(Path, "replace", counted(replace)),
        mock.patch.object(Path, "touch", counted(touch)),
        mock.patch.object(os, "fsync", counted(fsync)),
    ):
        yield


def run(words: str) -> tuple[int, str]:
    """Run a command in this process; return its status and its last line on standard error."""
    status = 0
    with fuzz.quiet() as (_, err):
        try:
            main(words.split())
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
    err.seek(0)
    return status, (err.read().splitlines() or [""])[-1]


def contents(folder: Path) -> dict[str, Any]:
    """Return what a command has left, without times and other things that differ between equal runs."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name == "environment.json":
            continue
        if path.suffix == ".safetensors":
            found[name] = {key: value.numpy().tobytes() for key, value in load_tensors(path)[0].items()}
        elif path.name.endswith(".resume.pt"):
            saved = torch.load(path, weights_only=True)
            found[name] = {key: value.numpy().tobytes() for key, value in saved["model"].items()}
        elif path.suffix in (".json", ".jsonl"):
            found[name] = [untimed(json.loads(line)) for line in documents(path)]
        elif path.suffix == ".csv":
            found[name] = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def untimed(value: Any) -> Any:
    """Return a document without its times."""
    if isinstance(value, dict):
        return {
            k: untimed(each) for k, each in value.items() if not any(word in k for word in TIMES) and k != "runs_folder"
        }
    return [untimed(each) for each in value] if isinstance(value, list) else value


def make_home(home: Path, copies: int = 60) -> Path:
    """Write good files, and a recording of so many seconds."""
    fuzz.make_home(home)
    samples, rate = soundfile.read(home / "m.wav", dtype="float32")
    soundfile.write(home / "long.wav", np.tile(samples, copies), rate)
    return home


def words_of(name: str, home: Path, out: Path) -> str:
    words = COMMANDS[name].format(home=home, out=out)
    last = out / "run" / "last.safetensors"
    saved = last.with_suffix(".resume.pt")
    if name == "train" and saved.exists():
        return f"train -r {last if last.exists() else saved}"
    return words


def fail_every_write(name: str, home: Path, place: Path, number: int, step: int = 1) -> int:
    """Let each `step`-th write of a command fail in turn; return how many failures it survived."""
    whole, out = place / "whole", place / "out"
    shutil.rmtree(whole, ignore_errors=True)
    assert run(words_of(name, home, whole))[0] == 0
    expected = contents(whole)
    survived, first = 0, 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        disk = Disk(first, number)
        with faulty(disk):
            status, line = run(words_of(name, home, out))
        if disk.count < first:
            assert (status, contents(out)) == (0, expected), f"{name}: other bytes without a fault"
            return survived
        assert status != 0 or name == "eval", f"{name}: write {first} failed unnoticed"
        if status:
            assert line.startswith("onevoice: error: "), f"{name}, write {first}: {line}"
            assert "cannot be written" in line, f"{name}, write {first}: {line}"
            check_left(name, out, expected, first)
        else:
            assert contents(out) == expected, f"{name}: write {first} changed the result"
        status, line = run(words_of(name, home, out))
        assert status == 0, f"{name}: after a failure of write {first} the same command fails: {line}"
        assert contents(out) == expected, f"{name}: after a failure of write {first} the result differs"
        survived, first = survived + 1, first + step


def check_left(name: str, out: Path, expected: dict[str, Any], first: int) -> None:
    """Check that nothing half-written is left under a final name."""
    left = [path for path in out.rglob("*") if path.is_file()]
    parts = [path for path in left if path.name.endswith(".part")]
    assert not parts, f"{name}: write {first} left {parts[0].name}"
    if name in ("mix", "train"):
        sounds = {path: path.read_bytes() for path in left if path.suffix == ".wav"}
        wrong = [path.name for path, data in sounds.items() if data != expected.get(path.relative_to(out).as_posix())]
        assert not wrong, f"{name}: write {first} left a damaged {wrong[0]}"
        [load_tensors(path) for path in left if path.suffix == ".safetensors"]
    else:
        left = [path for path in left if path.name not in ("r.journal.jsonl", "r.csv")]  # whole; eval resumes
        assert not left, f"{name}: write {first} left {left[0].name}"


def kill_at_random(name: str, home: Path, place: Path, kills: int, seed: int) -> int:
    """Kill a command at random moments until it was killed so often; return the number of kills.

    A command is killed up to three times in a row, and then ends. Raises `AssertionError` if its result differs.
    """
    whole, out, draw = place / "whole", place / "out", random.Random(f"{seed} {name}")
    shutil.rmtree(whole, ignore_errors=True)
    begin = time.monotonic()
    finish(words_of(name, home, whole))
    seconds, expected, done = time.monotonic() - begin, contents(whole), 0
    while done < kills:
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(3):
            begin = time.monotonic()
            if finish(restart(name, home, out), draw.uniform(0.0, 1.0) * seconds):
                done += 1
            elif name != "train":  # the next one is late as well, so kill it earlier
                seconds = time.monotonic() - begin
        finish(restart(name, home, out))
        assert contents(out) == expected, f"{name}: after {done} kills the result differs"
    return done


def restart(name: str, home: Path, out: Path) -> str:
    """Return the words with which a user goes on after a kill."""
    words = words_of(name, home, out)
    if name == "train" and words.startswith("train -c") and out.exists():
        shutil.rmtree(out)  # killed before its first checkpoint
    return words


def finish(words: str, seconds: float | None = None) -> bool:
    """Run a command in a forked process; kill it after some time and return True, unless it has ended before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(run(words)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return True
    assert ours.poll(), f"{words}: ended with {process.exitcode}"
    status, last = ours.recv()
    assert status == 0 or "exists" in last or "are done" in last, last
    return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count the faults that commands survive.")
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs per command; 0 for none")
    parser.add_argument("--writes", type=int, default=1, metavar="N", help="let each N-th write fail; 0 for none")
    parser.add_argument("--only", default="", help="a part of the names of the commands to use")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        home, place = make_home(Path(folder) / "home"), Path(folder)
        for name in (each for each in COMMANDS if options.only in each):
            counts = (
                {"SIGKILL": kill_at_random(name, home, place, options.kills, options.seed)} if options.kills else {}
            )
            for word, number in (("full disk", errno.ENOSPC), ("read-only disk", errno.EROFS)):
                if options.writes:
                    counts[word] = fail_every_write(name, home, place, number, options.writes)
            print(f"{name:8}", ", ".join(f"{word} {count}" for word, count in counts.items()), "survived", flush=True)
