"""Measure what a Ray cluster costs per item, beside the pool of processes of this machine, and whether it loses any.

    python benchmarks/scale.py [--items 8] [--seconds 10] [--rounds 3] [--workers 2] [--empty 400]

Both engines do the same extractions of toy mixtures of 10 s, with the default weights, from file to file. They
alternate, with the order reversed in every other round, because this machine may be busy; compare the ratios within a
round, not the times. The time of an item is that between the first and the last result, times the workers, so it is
without the start of the engine, which is printed by itself. The cost of an engine is then measured with items that do
nothing. At last, a worker of the cluster is killed with SIGKILL at the fourth of 40 items, and the results are counted.
"""

import argparse
import functools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from voices import Voice

from onevoice.audio import write_audio
from onevoice.cluster import Cluster, Workers
from onevoice.extraction.extractor import load
from onevoice.extraction.jobs import Failure, Job, Settings, run_jobs
from onevoice.processes import ordered_map

RATE = 16_000


class Run(NamedTuple):
    start: float
    """Seconds until the first result."""
    item: float
    """Seconds of one worker per item after that."""
    results: list[Any]


def timed(results: Iterator[Any], workers: int) -> Run:
    begin = time.perf_counter()
    found, times = [], []
    for result in results:
        found.append(result)
        times.append(time.perf_counter())
    return Run(times[0] - begin, workers * (times[-1] - times[0]) / (len(times) - 1), found)


def make_nothing() -> Callable[[int], int]:
    return abs


def make_fatal() -> Callable[[tuple[int, str]], int]:
    """Work that kills its own process at item 3, the first time."""

    def work(item: tuple[int, str]) -> int:
        number, mark = item
        if number == 3 and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return work


def write_jobs(folder: Path, count: int, seconds: float) -> list[Job]:
    write_audio(folder / "voice.wav", Voice.number(0).say(99, 4.0, RATE), RATE)
    jobs = []
    for number in range(count):
        sound = (Voice.number(0).say(number, seconds, RATE) + Voice.number(1).say(number, seconds, RATE)) / 2
        write_audio(folder / f"{number}.wav", sound, RATE)
        jobs.append(Job(str(folder / f"{number}.wav"), str(folder / "voice.wav"), str(folder / f"out{number}.wav")))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (
        ("items", int, 8), ("seconds", float, 10.0), ("rounds", int, 3), ("workers", int, 2), ("empty", int, 400),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    options = parser.parse_args()
    import ray

    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    begin = time.perf_counter()
    ray.init("local", num_cpus=options.workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    print(f"starting a local cluster: {time.perf_counter() - begin:.1f} s", flush=True)
    engines: dict[str, Workers] = {"pool": options.workers, "Ray": Cluster(workers=options.workers)}
    with tempfile.TemporaryDirectory() as folder:
        compare(options, engines, Path(folder))
        marked = [(number, f"{folder}/mark") for number in range(40)]
        survived = list(ordered_map(make_fatal, marked, engines["Ray"]))
        print(f"after the SIGKILL of a worker: {len(marked)} pieces, {len(marked) - len(set(survived))} lost")
    ray.shutdown()


def compare(options: argparse.Namespace, engines: dict[str, Workers], folder: Path) -> None:
    jobs = write_jobs(folder, options.items, options.seconds)
    opening = functools.partial(load, None, None, "cpu", "auto")
    results = run_jobs(jobs, opening, Settings(force=True))
    next(results)
    begin = time.process_time()
    done = sum(result.seconds for _, result in results if not isinstance(result, Failure))
    spent = time.process_time() - begin
    print(f"one process: {done / spent:.1f} s of sound per second of processor time, after the first item", flush=True)
    print(f"{'':8}{'start, s':>10}{'item, s':>10}{'Ray / pool':>12}{'empty, ms':>11}")
    ratios, extra, items = [], [], []
    for number in range(options.rounds):
        runs, nothing = {}, {}
        for name in sorted(engines, reverse=number % 2 == 0):
            workers = engines[name]
            runs[name] = timed(run_jobs(jobs, opening, Settings(force=True), workers), options.workers)
            assert not any(isinstance(result, Failure) for _, result in runs[name].results)
            nothing[name] = timed(ordered_map(make_nothing, range(options.empty), workers), options.workers).item
        ratios.append(runs["Ray"].item / runs["pool"].item)
        extra.append(nothing["Ray"] - nothing["pool"])
        items.append(min(run.item for run in runs.values()))
        for name, run in runs.items():
            ratio = f"{ratios[-1]:.3f}" if name == "Ray" else ""
            print(f"{name:8}{run.start:10.1f}{run.item:10.2f}{ratio:>12}{1e3 * nothing[name]:11.2f}", flush=True)
    share = 100 * statistics.median(extra) / min(items)
    print(f"median ratio of an item, Ray / pool: {statistics.median(ratios):.3f}")
    print(f"cost of Ray beyond the pool: {1e3 * statistics.median(extra):.2f} ms, {share:.2f} % of the fastest item")


if __name__ == "__main__":
    main()
