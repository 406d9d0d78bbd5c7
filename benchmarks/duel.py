"""Train two or more configs for equal time on the same draws, in turns, and print their learning curves.

    python benchmarks/duel.py CONFIG.json --seconds 1500 [--turn 20] [--decay 0.3] [--validations 6]
        "plain" "wide: model.channels=64" "muon: optimizer.name=muon optimizer.learning_rate=0.002"

Each contender is a name, and after a colon the keys of CONFIG that it changes. All contenders see the same trials in
the same order (the same seed, unless a contender changes the data), and each trains for the same number of seconds:
of CPU time on a CPU, so that other work on the machine does not favor one of them, and of elapsed time on a GPU.
Drawing the batches is not counted. The learning rate warms up over 200 steps, stays, and falls over the last `--decay`
of the time.

The table gives after each sixth of the time the examples seen, examples per second, the training SI-SDR since the last
row, and on the validation trials the mean SI-SDRi with its standard error, the median and the share of failures
(below 1 dB). At the end every contender is compared with the first one, trial by trial: the mean difference in SI-SDRi
and its 95 % bootstrap interval. A choice made early can be wrong: compare at 40,000 examples or more.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from onevoice.config import load_config
from onevoice.evaluation.statistics import bootstrap_interval, failure_rate
from onevoice.processes import keep_freed_memory
from onevoice.training.experiment import ConstantConfig, Experiment
from onevoice.training.run import Trainer
from onevoice.training.validation import score_trials

WARM_UP_STEPS = 200
UNTIMED_STEPS = 2
"""Steps at the start in which the compiler works; they count as steps, but not as time."""


@dataclass
class Contender:
    """One config in training."""

    name: str
    trainer: Trainer
    used: float = 0.0
    """Seconds of training so far."""
    train_si_sdr: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """SI-SDRi in dB of each validation trial, from the last validation."""

    @classmethod
    def open(cls, config: Path, text: str) -> "Contender":
        """Read `NAME` or `NAME: key=value key=value`."""
        name, _, changes = text.partition(":")
        experiment = load_config(Experiment, config, [*changes.split(), "data.workers=0"])
        return cls(name.strip(), Trainer(replace(experiment, scheduler=ConstantConfig()), echo=lambda line: None))

    @property
    def examples(self) -> int:
        """The examples seen."""
        return self.trainer.state.progress.step * self.trainer.experiment.data.batch_size

    def train_until(self, seconds: float, total: float, decay: float) -> None:
        """Take steps until `seconds` are used, of `total` in the end."""
        trainer, state = self.trainer, self.trainer.state
        clock = time.process_time if trainer.device.type == "cpu" else time.perf_counter
        rates = [group.setdefault("stable_lr", group["lr"]) for group in state.optimizer.param_groups]
        while self.used < seconds:
            epoch, step = divmod(state.progress.step, trainer.steps_per_epoch)
            batch = next(iter(trainer.source.batches(epoch, step, step + 1)))
            falling = max(0.0, (self.used / total - 1 + decay) / decay) if decay else 0.0
            factor = min(1.0, (state.progress.step + 1) / WARM_UP_STEPS) * (1 - 0.99 * falling**0.5)
            for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            begin = clock()
            terms = trainer.learner.step(batch)
            self.train_si_sdr.append(float(terms.si_sdr))  # also waits for a GPU
            if state.progress.step > UNTIMED_STEPS:
                self.used += clock() - begin

    def validate(self) -> str:
        """Score the validation trials; return a row of the table."""
        trainer = self.trainer
        found = score_trials(trainer.state.weights, trainer.validation_trials, trainer.device, trainer.judge) or []
        self.scores = [score.improvement for score in found if score.improvement is not None]
        error = statistics.stdev(self.scores) / len(self.scores) ** 0.5
        failures = failure_rate(self.scores) or 0.0
        row = (
            f"{self.name:24}{self.used:8.0f}{self.examples:10}{self.examples / self.used:8.1f}"
            f"{statistics.fmean(self.train_si_sdr):8.2f}{statistics.fmean(self.scores):8.2f} ± {error:.2f}"
            f"{statistics.median(self.scores):8.2f}{failures:8.0%}"
        )
        self.train_si_sdr = []
        return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("contenders", nargs="+", help="NAME or 'NAME: key=value ...'")
    parser.add_argument("--seconds", type=float, default=1500.0, help="of training, for each contender")
    parser.add_argument("--turn", type=float, default=20.0, help="seconds of each turn")
    parser.add_argument("--decay", type=float, default=0.3, help="share of the time in which the learning rate falls")
    parser.add_argument("--validations", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    contenders = [Contender.open(options.config, text) for text in options.contenders]
    for each in contenders:
        size = sum(weight.numel() for weight in each.trainer.state.model.parameters())
        print(f"{each.name}: {size / 1e6:.2f} M parameters")
    print(
        f"{'contender':24}{'seconds':>8}{'examples':>10}{'per s':>8}{'train':>8}{'SI-SDRi':>15}"
        f"{'median':>8}{'failed':>8}"
    )
    for validation in range(1, options.validations + 1):
        end = options.seconds * validation / options.validations
        while any(each.used < end for each in contenders):
            for each in contenders:
                each.train_until(min(end, each.used + options.turn), options.seconds, options.decay)
        for each in contenders:
            print(each.validate(), flush=True)
    first, *others = contenders
    for each in others:
        gains = np.array(each.scores) - np.array(first.scores)
        low, high = bootstrap_interval(gains)
        print(f"{each.name} − {first.name}: {gains.mean():+.2f} dB SI-SDRi (95 % interval {low:+.2f} to {high:+.2f})")


if __name__ == "__main__":
    main()
