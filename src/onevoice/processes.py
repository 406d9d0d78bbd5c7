"""Work spread over processes whose results come back in order.

Processes are spawned, so nothing of the parent's threads or open files leaks into them, and what they do must be
importable. They die with their parent, even one that was killed. Their numerical libraries use one thread each: the
work is spread over the cores already, and threads on top of it only stand in each other's way.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, TypeVar

from onevoice.errors import OnevoiceError

Item = TypeVar("Item")
Result = TypeVar("Result")

THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
AHEAD = 4
"""Items in the hands of each worker, so that none waits for the slowest."""

_work: Callable[[Any], Any] | None = None


def ordered_map(
    make_work: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield `work(item)` for each of `items`, in their order; each process makes its own `work` by `make_work()`.

    One worker means this process. An error of `work` is raised here, and what had not begun is dropped. Close the
    iterator (`contextlib.closing`) to end the processes early. Raises `OnevoiceError` when a process dies.
    """
    if workers == 1:
        yield from map(make_work(), items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make_work,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            with _one_thread_each():  # the pool starts its processes as work comes in
                pending.append(pool.submit(_do, item))
            if len(pending) >= AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OnevoiceError(
            "a worker process died: too little memory, or a script that lacks `if __name__ == '__main__':`; "
            "run again with fewer workers to go on where it stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Set what the numerical libraries of processes started inside read, and restore it after."""
    before = {name: os.environ.get(name) for name in THREAD_LIMITS}
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(make_work: Callable[[], Callable[[Any], Any]]) -> None:
    """Prepare a worker: Ctrl-C is for the parent to handle, and its death is watched."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _work = make_work()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _do(item: Any) -> Any:
    assert _work is not None, "a worker starts with _start"
    return _work(item)


STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the process was asked to stop, and by which signal."""

    signal: str | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them, and restore the handlers after.

    A second signal of the kind does what it always did. Outside the main thread, where Python delivers no signals,
    nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        signal.signal(number, before[number])

    for number in STOPPING:
        before[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield request
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


def ignore_stop_requests() -> None:
    """Leave stopping to the parent: for its helper processes, which get the signals of the whole group too."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next allocation; return False where it is not glibc.

    For the rest of the life of the process: large blocks come from the heap too, and the heap is never trimmed.
    Memory in use then stays at its peak, which training reaches in its first steps anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
