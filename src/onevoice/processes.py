"""Processes: work spread over several of them or over a cluster, requests to stop, the memory that one keeps.

Workers are spawned, so they inherit no threads or open files, and the work must be importable. They end when their
parent ends, even if it was killed. Their numerical libraries use one thread each, as the workers keep all cores busy.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from onevoice.cluster import ITEMS_PER_WORKER, THREAD_LIMITS, Cluster, Item, Result, Workers, map_on_cluster
from onevoice.errors import WorkerError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

_work: Callable[[Any], Any] | None = None
"""What this process does with each item, if it is a worker."""


def wait_asleep() -> None:
    """Let the threads of torch sleep while they wait for each other, in place of spinning. Call it before torch loads.

    On cores that other programs use, too, spinning takes twenty times as long as the work.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def ordered_map(
    make_work: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    workers: Workers,
    set_aside: Callable[[Item, str], Result] | None = None,
) -> Generator[Result, None, None]:
    """Yield `work(item)` for each item, in order; each process creates its own `work` with `make_work()`.

    One worker means the current process. An error in `work` is raised here, and items not yet started are dropped.
    To stop early, close the iterator (`contextlib.closing`). Raises `WorkerError` if a worker process dies.

    On a `Cluster`, the item of a worker that dies is done again. An item that takes down three workers is set aside:
    its result is then `set_aside(item, reason)`, or without that function a `WorkerError`.
    """
    if isinstance(workers, Cluster):
        yield from map_on_cluster(make_work, items, workers, set_aside)
        return
    if isinstance(items, Sized):
        workers = min(workers, len(items))
    if workers <= 1:
        yield from map(make_work(), items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(make_work,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            with _one_thread_each():  # submitting an item may start a process
                pending.append(pool.submit(_work_on, item))
            while pending and (len(pending) >= ITEMS_PER_WORKER * workers or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process died: out of memory, or a script without `if __name__ == '__main__':`; "
            "run again with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class StopRequest:
    """The name of the signal that asked this process to stop, if any."""

    signal: str | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGINT in a `StopRequest` instead of ending the process; restore the handlers on exit.

    A second signal of the same kind has its usual effect. Outside the main thread, where Python delivers no signals,
    this does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous: dict[int, Any] = {}

    def record(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        signal.signal(number, previous[number])

    for number in STOP_SIGNALS:
        previous[number] = signal.signal(number, record) or signal.SIG_DFL
    try:
        yield request
    finally:
        for recorded, handler in previous.items():
            signal.signal(recorded, handler)


def ignore_stop_requests() -> None:
    """Ignore SIGTERM and SIGINT: a helper process gets the signals sent to its group, but its parent decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next allocation; return False if it is not glibc.

    This lasts as long as the process: large blocks come from the heap too, and the heap is never trimmed. Memory use
    then stays at its peak, which training reaches in its first steps anyway.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Limit the numerical libraries of processes started inside to one thread; restore the environment on exit."""
    previous = {name: os.environ.get(name) for name in THREAD_LIMITS}
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker(make_work: Callable[[], Callable[[Any], Any]]) -> None:
    """Prepare a worker: it leaves Ctrl-C to its parent, and ends when its parent ends."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _work = make_work()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work_on(item: Any) -> Any:
    assert _work is not None, "_start_worker runs first"
    return _work(item)
