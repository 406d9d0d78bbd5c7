"""Processes: work spread over several of them or over a Ray cluster, requests to stop, the memory that one keeps.

Workers are spawned, so they inherit no threads or open files, and the work must be importable. They end when their
parent ends, even if it was killed. Their numerical libraries use one thread each, as the workers keep all cores busy.
"""

import contextlib
import ctypes
import importlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from onevoice.errors import ConfigError, MissingDependencyError, OnevoiceError, WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")

THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ITEMS_PER_WORKER = 4
"""Items submitted ahead for each worker, so that no worker waits for the slowest one."""
TRIES = 3
"""How often an item may take down its worker on a cluster before it is set aside."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

_work: Callable[[Any], Any] | None = None
"""What this process does with each item, if it is a worker."""


def wait_asleep() -> None:
    """Let the threads of torch sleep while they wait for each other, in place of spinning. Call it before torch loads.

    On cores that other programs use, too, spinning takes twenty times as long as the work.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, to be used in place of processes on this machine."""

    address: str | None = None
    """Where it is; None for that of RAY_ADDRESS, or for a new one on this machine."""
    workers: int | None = None
    """Number of workers; None for one per core, or per GPU if a worker needs one."""
    gpus: int = 0
    """GPUs for each worker."""


Workers = int | Cluster  # processes on this machine, or a cluster


def choose_workers(
    engine: str, address: str | None, workers: int | None, default: int, name: str = "workers", gpus: int = 0
) -> Workers:
    """Return what the options --engine, --address and the number of workers, `name`, mean; `default` is for local.

    Raises `ConfigError`, and `MissingDependencyError` without Ray.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"{name}: must be 1 or more, not {workers}")
    if engine == "ray":
        _import_ray()
        return Cluster(address, workers, gpus)
    if engine != "local":
        raise ConfigError(f"--engine: {engine!r} is none; choose local or ray")
    if address is not None:
        raise ConfigError("--address: is for a cluster; add --engine ray")
    return workers or default


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
        yield from _map_on_cluster(make_work, items, workers, set_aside)
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


class _Piece:
    """An item on its way through a cluster."""

    def __init__(self, item: Any) -> None:
        self.item, self.losses, self.is_done, self.result = item, 0, False, None
        self.error: Exception | None = None

    def set_aside(self, make_result: Callable[[Any, str], Any] | None) -> None:
        """Settle a piece that took down too many workers."""
        self.is_done = True
        reason = f"took down its worker {TRIES} times (out of memory, or a crash)"
        if make_result is not None:
            self.result = make_result(self.item, reason)
        else:
            self.error = WorkerError(f"{str(self.item)[:100]}: {reason}")

    def outcome(self) -> Any:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.result


class _RemoteWorker:
    """What runs in a process of the cluster. Errors of the user are results, since Ray adds a traceback to errors."""

    def __init__(self) -> None:
        os.environ |= dict.fromkeys(THREAD_LIMITS, "1")  # before the work and its libraries are loaded

    def start(self, folder: str, make_work: Callable[[], Callable[[Any], Any]]) -> tuple[None, OnevoiceError | None]:
        """Go to the folder of the command, if it is there too, and load what the work needs."""
        with contextlib.suppress(OSError):
            os.chdir(folder)
        try:
            self.work = make_work()
            return None, None
        except OnevoiceError as error:
            return None, error

    def do(self, item: Any) -> tuple[Any, OnevoiceError | None]:
        """Do one item."""
        try:
            return self.work(item), None
        except OnevoiceError as error:
            return None, error


class _Crew:
    """The workers of a cluster: each has at most one piece, so that the loss of a worker tells which piece it was.

    A lost worker is replaced. Only workers that have started get pieces, so none waits for a machine that is gone.
    """

    def __init__(self, ray: Any, make_work: Callable[[], Callable[[Any], Any]], size: int, gpus: int) -> None:
        self.ray, self.size = ray, size
        self._kind = ray.remote(_RemoteWorker).options(num_cpus=1, num_gpus=gpus, max_restarts=0)
        self._make_work = ray.put(make_work)
        self._failed_starts = 0
        self.idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, _Piece | None]] = {}
        for _ in range(size):
            self._hire()

    def give(self, piece: _Piece) -> None:
        """Let an idle worker do a piece."""
        worker = self.idle.pop()
        self._busy[worker.do.remote(piece.item)] = (worker, piece)

    def wait(self, timeout: float | None) -> _Piece | None:
        """Wait until something happens, at most for a time in seconds; return a piece that is done or was lost.

        Raises `WorkerError` if workers cannot start, and the error of a worker that cannot load what it needs.
        """
        found, _ = self.ray.wait(list(self._busy), num_returns=1, timeout=timeout)
        if not found:
            return None
        worker, piece = self._busy.pop(found[0])
        try:
            result, error = self.ray.get(found[0])
        except self.ray.exceptions.RayTaskError as bug:
            result, error = None, bug
        except self.ray.exceptions.RayError as loss:
            self._replace(worker, piece, loss)
            return piece
        if piece is None and error is not None:
            raise error if isinstance(error, OnevoiceError) else _cannot_start(error)
        self.idle.append(worker)
        self._failed_starts = 0
        if piece is not None:
            piece.result, piece.error, piece.is_done = result, error, True
        return piece

    def _hire(self) -> None:
        worker = self._kind.remote()
        self._busy[worker.start.remote(str(Path.cwd()), self._make_work)] = (worker, None)

    def _replace(self, worker: Any, piece: _Piece | None, loss: Exception) -> None:
        if piece is None:
            self._failed_starts += 1
            if self._failed_starts >= TRIES * self.size:
                raise _cannot_start(loss)
        elif not getattr(loss, "preempted", False):
            piece.losses += 1
        self.ray.kill(worker)  # if it can only not be reached
        self._hire()

    def dismiss(self) -> None:
        """End all workers."""
        for worker in [*self.idle, *(worker for worker, _ in self._busy.values())]:
            self.ray.kill(worker)


def _map_on_cluster(
    make_work: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    cluster: Cluster,
    set_aside: Callable[[Item, str], Result] | None,
) -> Generator[Result, None, None]:
    """Do what `ordered_map` does, on a cluster. Items are taken only a bounded number ahead of the results."""
    if isinstance(items, Sized) and not len(items):
        return
    ray, items_left = _import_ray(), iter(items)
    with _connection(ray, cluster):
        size = _size_of(ray, cluster)
        crew = _Crew(ray, make_work, min(size, len(items)) if isinstance(items, Sized) else size, cluster.gpus)
        ordered, waiting = deque[_Piece](), deque[_Piece]()
        try:
            while True:
                ahead = ITEMS_PER_WORKER * crew.size - len(ordered)
                new = [_Piece(item) for item in itertools.islice(items_left, ahead)]
                ordered.extend(new)
                waiting.extend(new)
                if not ordered:
                    return
                while crew.idle and waiting:
                    crew.give(waiting.popleft())
                piece = crew.wait(0.0 if ordered[0].is_done else None)
                if piece is not None and not piece.is_done:
                    if piece.losses < TRIES:
                        waiting.appendleft(piece)
                    else:
                        piece.set_aside(set_aside)
                if ordered[0].is_done:
                    yield ordered.popleft().outcome()
        finally:
            crew.dismiss()


def _cannot_start(error: Exception) -> WorkerError:
    last = str(error).strip().splitlines()[-1]
    return WorkerError(f"a worker of the cluster cannot start ({last}); is the same onevoice on all its machines?")


def _import_ray() -> Any:
    """Return Ray, which is imported only if a cluster is asked for."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingDependencyError('--engine ray: needs Ray: pip install "onevoice[ray]"') from error


@contextlib.contextmanager
def _connection(ray: Any, cluster: Cluster) -> Iterator[None]:
    """Connect this process to the cluster, unless it already is; end a cluster that was started here."""
    if ray.is_initialized():
        yield
        return
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness"):  # by default, it reports home, and yields to all
        os.environ.setdefault(name, "0")
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    own = {"num_cpus": cluster.workers, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **own)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(f"--address: {address}: is no Ray cluster that answers ({reason})") from error
    try:
        yield
    finally:
        ray.shutdown()


def _size_of(ray: Any, cluster: Cluster) -> int:
    """Return the number of workers that a cluster is to have. Raises `ConfigError` if it has room for none."""
    kind, share = ("GPU", cluster.gpus) if cluster.gpus else ("CPU", 1)
    size = cluster.workers or int(ray.cluster_resources().get(kind, 0)) // share
    if not size:
        raise ConfigError(f"--engine ray: the cluster has no {kind} for a worker; start a node with one")
    return size
