"""A Ray cluster in place of processes: the same results and bytes, workers lost and replaced, items set aside."""

import contextlib
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import command, save_tiny

from onevoice.cluster import ITEMS_PER_WORKER, TRIES, Cluster, _Piece
from onevoice.corpus.pack import PackedCorpus
from onevoice.errors import ConfigError, CorpusError, WorkerError
from onevoice.evaluation.results import read_result
from onevoice.extraction.jobs import ExtractBatch
from onevoice.processes import ordered_map

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "onevoice[ray]"')
CLUSTER = Cluster(workers=2)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster of two cores for all tests of this file; its workers find the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


def make_refuser() -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 40:
            raise CorpusError("number 40 is refused")
        return number * number

    return work


def refuse_to_start() -> Callable[[int], int]:
    raise ConfigError("no such weights")


def make_mortal(folder: Path) -> Callable[[int], str | None]:
    """Work that leaves a file and says how many threads it may use; number 2 kills its process."""

    def work(number: int) -> str | None:
        (folder / f"{number}.{len(list(folder.iterdir()))}").touch()
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.environ.get("OMP_NUM_THREADS")

    return work


def test_items_are_taken_only_some_way_ahead_and_an_error_comes_after_the_results_before_it() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    with contextlib.closing(ordered_map(make_refuser, items(), Cluster())) as results:  # one worker per core
        for number in range(40):
            assert next(results) == number**2
            assert len(taken) <= number + 1 + ITEMS_PER_WORKER * 2
        with pytest.raises(CorpusError, match="number 40 is refused"):
            next(results)


def test_workers_that_cannot_load_what_they_need() -> None:
    with pytest.raises(ConfigError, match="no such weights"):
        next(ordered_map(refuse_to_start, range(3), Cluster(workers=1)))


def test_a_poisonous_item_is_set_aside(tmp_path: Path) -> None:
    """The other items are done once, by workers that have one thread each, as on this machine."""
    results = ordered_map(functools.partial(make_mortal, tmp_path), range(8), CLUSTER, lambda _, reason: reason)
    reason = "took down its worker 3 times (out of memory, or a crash)"
    assert list(results) == [reason if number == 2 else "1" for number in range(8)]
    tries = [len(list(tmp_path.glob(f"{number}.*"))) for number in range(8)]
    assert tries == [TRIES if number == 2 else 1 for number in range(8)]


def test_a_poisonous_item_that_nobody_expects_is_one_clear_error() -> None:
    piece = _Piece("a.wav")
    piece.set_aside(None)
    with pytest.raises(WorkerError, match=r"a\.wav: took down its worker 3 times"):
        piece.outcome()


# Commands -------------------------------------------------------------------------------------------------------

RAY = ("--engine", "ray")


def parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return found


def kill_a_worker() -> int:
    """Kill a worker of this process's cluster, one with work if there is one; return its id."""
    parent, workers = parents(), []
    for pid in parent:
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_text()
            above, root = pid, os.getpid()
            while above > 1 and above != root:
                above = parent.get(above, 0)
            if title.startswith("ray::_RemoteWorker") and above == root:
                workers.append((".do" in title, pid))
    os.kill(max(workers)[1], signal.SIGKILL)
    return max(workers)[1]


def killing_results(killed: list[int]) -> Callable[..., Iterator[Any]]:
    """Return a way to pass results on that kills a worker after the first of them."""

    def recorded(results: Iterator[tuple[Any, Any]], append: Any) -> Iterator[Any]:
        for _, result in results:
            if not killed:
                killed.append(kill_a_worker())
            yield result

    return recorded


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_extractions_have_the_same_bytes_although_a_worker_is_killed(
    trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name.removesuffix("-mixed.wav") for path in trials.glob("*-mixed.wav"))[:12]
    for kind in ("local", "cluster"):
        rows = [
            {
                "mixture": f"{trials}/{name}-mixed.wav",
                "voice": f"{trials}/{name}-ref.wav",
                "output": f"{kind}/{name}.wav",
            }
            for name in names
        ]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_tiny(tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)  # workers find relative names
    options = ("--pretrained", "tiny.safetensors", "--precision", "float32", "--device", "cpu")
    assert command(capsys, "extract", "--list", "local.jsonl", *options).status == 0
    killed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("onevoice.cli.using._recorded", killing_results(killed))
        done = command(capsys, "extract", "--list", "cluster.jsonl", *options, *RAY)
    assert (done.status, done.err) == (0, "")
    assert f"{len(names)} of {len(names)} recordings" in done.out
    assert len(killed) == 1
    assert contents(tmp_path / "cluster") == contents(tmp_path / "local")


def test_ray_data_maps_batches(
    trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our command, with the names of files in the rows."""
    pytest.importorskip("pandas", reason='Ray Data needs pandas: pip install "ray[data]"')
    import ray.data

    weights = save_tiny(tmp_path / "tiny.safetensors")
    names = sorted(path.name.removesuffix("-mixed.wav") for path in trials.glob("*-mixed.wav"))[:3]
    rows = [
        {
            "mixture": f"{trials}/{name}-mixed.wav",
            "voice": f"{trials}/{name}-ref.wav",
            "output": f"{tmp_path}/{name}.wav",
        }
        for name in names
    ]
    options = {"checkpoint": str(weights), "device": "cpu", "precision": "float32"}
    mapped = ray.data.from_items(rows).map_batches(
        ExtractBatch, fn_constructor_kwargs=options, batch_size=2, compute=ray.data.ActorPoolStrategy(size=1)
    )
    found = {row["output"]: (row["seconds"], row["error"]) for row in mapped.take_all()}
    assert found == {row["output"]: (1.0, "") for row in rows}
    expected = ("--pretrained", weights, "--precision", "float32", "--device", "cpu")
    done = command(capsys, "extract", rows[0]["mixture"], rows[0]["voice"], tmp_path / "one.wav", *expected)
    assert done.status == 0, done.err
    assert Path(rows[0]["output"]).read_bytes() == (tmp_path / "one.wav").read_bytes()


def test_mixtures_have_the_same_bytes(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--count", 30, "--segment-seconds", 0.5, "--sample-rate", 8000)
    assert command(capsys, "mix", corpus, tmp_path / "local", *options, "--workers", 1).status == 0
    done = command(capsys, "mix", corpus, tmp_path / "cluster", *options, *RAY)
    assert done.status == 0, done.err
    assert contents(tmp_path / "cluster") == contents(tmp_path / "local")


def test_packs_have_the_same_bytes(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, options in (("local", ("--workers", 1)), ("cluster", RAY)):
        done = command(capsys, "corpus", "pack", corpus, tmp_path / folder, "--sample-rate", 8000, *options)
        assert done.status == 0, done.err
    assert contents(tmp_path / "cluster") == contents(tmp_path / "local")
    PackedCorpus.open(tmp_path / "cluster").verify()


def test_evaluations_have_the_same_rows(trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_tiny(tmp_path / "tiny.safetensors")
    asked = ("-r", weights, "-t", trials, "--metrics", "si_sdr", "si_sdr_improvement", "-b", 5, "--device", "cpu")
    for name, options in (("local", ("-j", 1)), ("cluster", RAY)):
        done = command(capsys, "eval", *asked, *options, "-o", tmp_path / f"{name}.json")
        assert done.status == 0, done.err
    local, cluster = (
        [replace(row, network_seconds=None) for row in read_result(tmp_path / f"{name}.json").rows]
        for name in ("local", "cluster")
    )
    assert cluster == local
