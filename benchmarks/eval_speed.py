"""Evaluation speed by number of processes: trials per second for SI-SDR, SI-SDRi, PESQ and STOI.

    python benchmarks/eval_speed.py [--trials 24] [--seconds 6] [--jobs 1 2 4] [--repeats 3]

Toy trials at 16 kHz go through a tiny network, so that the metrics take nearly all of the time. Every run includes the
start of its processes, as a user's run does. Runs alternate; the table shows medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    import torch  # not at the top: worker processes import this file and do not need torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from voices import make_trials

    from onevoice.evaluation.run import EvaluationConfig, evaluate
    from onevoice.extraction.checkpoint import Card
    from onevoice.extraction.extractor import Extractor
    from onevoice.models import SpExPlus, SpExPlusConfig

    torch.set_num_threads(1)
    config = SpExPlusConfig(
        window_seconds=(0.02, 0.04, 0.08), filters=8, channels=8, hidden=8, blocks=1, stacks=1, speaker_dim=8
    )
    extractor = Extractor(SpExPlus(config), Card(config))
    jobs = sorted(set(options.jobs))
    with tempfile.TemporaryDirectory() as folder:
        make_trials(Path(folder), options.trials, seconds=options.seconds, sample_rate=16000)
        times: dict[int, list[float]] = {count: [] for count in jobs}
        for _ in range(options.repeats):
            for count in jobs:
                begin = time.perf_counter()
                evaluate(extractor, EvaluationConfig(folder=folder, jobs=count), progress=False)
                times[count].append(time.perf_counter() - begin)
    print(f"{options.trials} trials of {options.seconds:g} s at 16 kHz, {os.cpu_count()} cores")
    print(f"{'processes':>10}{'trials/s':>12}{'ratio':>8}")
    base = statistics.median(times[jobs[0]])
    for count in jobs:
        middle = statistics.median(times[count])
        print(f"{count:10}{options.trials / middle:12.2f}{base / middle:7.2f}x")


if __name__ == "__main__":
    main()
