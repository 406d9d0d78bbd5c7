"""Evaluation speed by number of processes: trials per second, and where the time of the metrics goes.

    python benchmarks/eval_speed.py [--trials 24] [--seconds 6] [--jobs 1 2 4] [--repeats 3]
                                    [--metrics si_sdr si_sdr_improvement pesq stoi]

Toy trials at 16 kHz go through a tiny network, so that the metrics take nearly all of the time. Every run includes the
start of its processes, as a user's run does. Runs alternate; the table shows medians.

per core trials per second of computing scores: what one core can do, whatever else the machine does
busy     share of the time of all processes in which they compute scores; starting them lowers it
PESQ     share of that in PESQ's own C code
pystoi   share of that in pystoi, which is Python over NumPy and SciPy
rest     share of that in SI-SDR and everything else
network  share of the whole time in which the network runs
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = ("score", "PESQ", "pystoi")
spent = dict.fromkeys(STAGES, 0.0)


def timed(stage: str, function: Any) -> Any:
    """Return `function` with its seconds of computing added to those of the stage."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            spent[stage] += time.thread_time() - begin

    return call


@functools.cache
def watch_packages() -> None:
    """Time the C function of pesq and the function of pystoi in this process."""
    import pesq._pesq
    import pystoi

    pesq._pesq.cypesq = timed("PESQ", pesq._pesq.cypesq)
    pystoi.stoi = timed("pystoi", pystoi.stoi)


def timed_score(trial: Any, sample_rate: int, names: Sequence[Any]) -> Any:
    """Score a trial as an evaluation does; return the row with the seconds of each stage among its other numbers."""
    from dataclasses import replace

    from onevoice.evaluation.scoring import score_trial

    watch_packages()
    before = dict(spent)
    row = timed("score", score_trial)(trial, sample_rate, names)
    return replace(row, more={stage: spent[stage] - before[stage] for stage in STAGES})


def run(extractor: Any, config: Any, jobs: int) -> dict[str, float]:
    """Evaluate once and return trials per second and the shares."""
    from onevoice.evaluation.run import evaluate

    begin = time.perf_counter()
    rows = evaluate(extractor, config, progress=False).trials
    wall = time.perf_counter() - begin
    score, pesq, pystoi = (sum(row.more[stage] for row in rows) for stage in STAGES)
    return {
        "trials/s": len(rows) / wall,
        "per core": len(rows) / score,
        "busy": score / jobs / wall,
        "PESQ": pesq / score,
        "pystoi": pystoi / score,
        "rest": (score - pesq - pystoi) / score,
        "network": sum(row.network_seconds for row in rows) / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--metrics", nargs="+", default=["si_sdr", "si_sdr_improvement", "pesq", "stoi"])
    options = parser.parse_args()
    import torch  # not at the top: worker processes import this file and do not need torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from voices import make_trials

    from onevoice.evaluation import run as evaluation
    from onevoice.extraction.checkpoint import Card
    from onevoice.extraction.extractor import Extractor
    from onevoice.models import SpExPlus, SpExPlusConfig

    torch.set_num_threads(1)
    config = SpExPlusConfig(
        window_seconds=(0.02, 0.04, 0.08), filters=8, channels=8, hidden=8, blocks=1, stacks=1, speaker_dim=8
    )
    extractor = Extractor(SpExPlus(config), Card(config))
    evaluation.score_trial = timed_score
    jobs = sorted(set(options.jobs))
    with tempfile.TemporaryDirectory() as folder:
        make_trials(Path(folder), options.trials, seconds=options.seconds, sample_rate=16000)
        runs: dict[int, list[dict[str, float]]] = {count: [] for count in jobs}
        for _ in range(options.repeats):
            for count in jobs:
                settings = evaluation.EvaluationConfig(folder=folder, jobs=count, metrics=tuple(options.metrics))
                runs[count].append(run(extractor, settings, count))
    print(f"{options.trials} trials of {options.seconds:g} s at 16 kHz, {os.cpu_count()} cores")
    columns = list(runs[jobs[0]][0])
    print(f"{'processes':>10}" + "".join(f"{column:>10}" for column in columns))
    for count in jobs:
        middle = {column: statistics.median(each[column] for each in runs[count]) for column in columns}
        shares = "".join(f"{100 * middle[column]:8.1f} %" for column in columns[2:])
        print(f"{count:10}{middle['trials/s']:10.2f}{middle['per core']:10.2f}{shares}")


if __name__ == "__main__":
    main()
