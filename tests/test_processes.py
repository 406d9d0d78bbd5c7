"""Work in processes: results in order, errors raised here, a dead worker said clearly."""

import contextlib
import functools
import os
from collections.abc import Callable

import pytest

from onevoice.errors import CorpusError, OnevoiceError
from onevoice.processes import ordered_map


def shifting(shift: int) -> Callable[[int], int]:
    return lambda number: number + shift


def refusing() -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 5:
            raise CorpusError("number 5 is refused")
        return number

    return work


def dying() -> Callable[[int], int]:
    return lambda number: os._exit(9)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    work = functools.partial(shifting, 100)
    assert list(ordered_map(work, range(50), workers)) == list(range(100, 150))
    assert list(ordered_map(work, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_after_the_results_before_it(workers: int) -> None:
    results: list[int] = []
    with pytest.raises(CorpusError, match="number 5 is refused"):
        results.extend(ordered_map(refusing, range(50), workers))
    assert results == [0, 1, 2, 3, 4]


def test_it_can_be_left_early() -> None:
    with contextlib.closing(ordered_map(functools.partial(shifting, 0), range(10_000), 2)) as results:
        assert next(results) == 0


def test_a_dead_worker_is_one_clear_error() -> None:
    with pytest.raises(OnevoiceError, match="a worker process died"):
        list(ordered_map(dying, range(3), 2))


def asking() -> Callable[[str], str | None]:
    return os.environ.get


def test_each_process_has_one_thread_and_the_parent_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    assert list(ordered_map(asking, ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"], 2)) == ["1", "1"]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OPENBLAS_NUM_THREADS" not in os.environ
