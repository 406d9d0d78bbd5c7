"""A Ray cluster in place of processes on this machine: a lost worker is replaced, and its item done again."""

import contextlib
import importlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from onevoice.errors import ConfigError, MissingDependencyError, OnevoiceError, WorkerError

Item = TypeVar("Item")
Result = TypeVar("Result")

THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ITEMS_PER_WORKER = 4
"""Items submitted ahead for each worker, so that no worker waits for the slowest one."""
TRIES = 3
"""How often an item may take down its worker on a cluster before it is set aside."""


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


def map_on_cluster(
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
