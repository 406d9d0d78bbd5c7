"""Processes: results in order, errors raised in the parent, stop requests recorded, freed memory kept."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from onevoice.errors import CorpusError, WorkerError
from onevoice.processes import STOP_SIGNALS, ordered_map, stop_requests, wait_asleep


def make_adder(amount: int) -> Callable[[int], int]:
    return lambda number: number + amount


def make_refuser() -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 5:
            raise CorpusError("number 5 is refused")
        return number

    return work


def make_killer() -> Callable[[int], int]:
    return lambda number: os._exit(9)


def make_reader_of_variables() -> Callable[[str], str | None]:
    return os.environ.get


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    work = functools.partial(make_adder, 100)
    assert list(ordered_map(work, range(50), workers)) == list(range(100, 150))
    assert list(ordered_map(work, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_after_the_results_before_it(workers: int) -> None:
    results: list[int] = []
    with pytest.raises(CorpusError, match="number 5 is refused"):
        results.extend(ordered_map(make_refuser, range(50), workers))
    assert results == [0, 1, 2, 3, 4]


def test_the_iterator_can_be_closed_early() -> None:
    with contextlib.closing(ordered_map(functools.partial(make_adder, 0), range(10_000), 2)) as results:
        assert next(results) == 0


def test_a_dead_worker_is_one_clear_error() -> None:
    with pytest.raises(WorkerError, match=r"a worker process died: .*; run again with fewer workers"):
        list(ordered_map(make_killer, range(3), 2))


def test_workers_use_one_thread_and_the_parent_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    assert list(ordered_map(make_reader_of_variables, names, 2)) == ["1", "1"]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_threads_wait_asleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(("verb", "is_set"), [("extract", True), ("train", False)])
def test_commands_set_it_before_torch_loads(verb: str, is_set: bool) -> None:
    code = "import os, sys\nfrom onevoice import cli\n"
    code += "cli.app = lambda *_, **__: print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)\n"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", f"{code}cli.main(['{verb}'])"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str("passive" if is_set else None), "False"]


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_requests() as request:
        assert request.signal is None
        signal.raise_signal(signal.SIGINT)
        assert request.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):  # the second one stops at once
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    with pytest.raises(ZeroDivisionError), stop_requests():
        _ = 1 / 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_nothing_changes_outside_the_main_thread() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen: list[Any] = []

    def work() -> None:
        with stop_requests() as request:
            seen.extend([request.signal, *(signal.getsignal(number) for number in STOP_SIGNALS)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, *before]


COUNT_PAGE_FAULTS = """
import ctypes, resource, sys
from onevoice.processes import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def touch():
    blocks = [malloc(ctypes.c_size_t(40 << 20)) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, 40 << 20)
    for block in blocks:
        free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    """Count the page faults of allocating blocks that were allocated and freed before."""
    done = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS, mode], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_freed_memory_is_kept() -> None:
    assert page_faults("keep") < 100
    assert page_faults("default") > 100  # without it, every block faults in again
