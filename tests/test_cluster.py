"""A Ray cluster in place of processes: the same results, lost workers replaced, poisonous items set aside."""

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onevoice.errors import ConfigError, CorpusError, WorkerError
from onevoice.processes import ITEMS_PER_WORKER, TRIES, Cluster, _Piece, ordered_map

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "onevoice[ray]"')
CLUSTER = Cluster(workers=2)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster of two cores for all tests of this file; its workers find the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


def make_square() -> Callable[[int], int]:
    return lambda number: number * number


def make_refuser() -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 5:
            raise CorpusError("number 5 is refused")
        return number

    return work


def refuse_to_start() -> Callable[[int], int]:
    raise ConfigError("no such weights")


def make_mortal(folder: Path, poison: int) -> Callable[[int], tuple[int, str | None]]:
    """Work that kills its process: once for number 3, and always for `poison`. Each try leaves a file."""

    def work(number: int) -> tuple[int, str | None]:
        tries = len(list(folder.glob(f"{number}.*")))
        (folder / f"{number}.{tries}").touch()
        if number == poison or (number == 3 and tries == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return number, os.environ.get("OMP_NUM_THREADS")

    return work


def test_an_error_comes_after_the_results_before_it() -> None:
    results: list[int] = []
    with pytest.raises(CorpusError, match="number 5 is refused"):
        results.extend(ordered_map(make_refuser, range(50), CLUSTER))
    assert results == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="no such weights"):
        next(ordered_map(refuse_to_start, range(3), CLUSTER))


def test_lost_workers_are_replaced_and_a_poisonous_item_is_set_aside(tmp_path: Path) -> None:
    """Workers have one thread each, as on this machine."""
    work = functools.partial(make_mortal, tmp_path, 6)
    results = list(ordered_map(work, range(12), CLUSTER, lambda number, reason: (number, reason)))
    reason = "took down its worker 3 times (out of memory, or a crash)"
    assert results == [(number, reason if number == 6 else "1") for number in range(12)]
    tried = [len(list(tmp_path.glob(f"{number}.*"))) for number in range(12)]
    assert tried == [{3: 2, 6: TRIES}.get(number, 1) for number in range(12)]


def test_results_in_order_of_items_that_are_taken_only_some_way_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    with contextlib.closing(ordered_map(make_square, items(), Cluster())) as results:  # one worker per core
        for number in range(40):
            assert next(results) == number**2
            assert len(taken) <= number + 1 + ITEMS_PER_WORKER * 2


def test_a_poisonous_item_that_nobody_expects_is_one_clear_error() -> None:
    piece = _Piece("a.wav")
    piece.set_aside(None)
    with pytest.raises(WorkerError, match=r"a\.wav: took down its worker 3 times"):
        piece.outcome()
