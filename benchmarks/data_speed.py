"""How fast mixtures are drawn and rendered from a packed corpus, compared to what a training step of SpEx+ consumes.

    python benchmarks/data_speed.py [--pack PACK] [--batch 32] [--repeats 5] [--step-batch 4] [--device cpu]

Examples have 4 s at 16 kHz. One row per path: reading trials from disk, rendering on one thread (as a data loader
worker does), the same with each optional step switched on, and rendering by indexing on `--device` (as on a GPU). The
last row is the training step of the paper's SpEx+ on the same machine. `share` is the time of the data of a step
relative to the step, when one core renders. Without a pack, toy voices are packed into a temporary folder.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from voices import make_corpus, make_trials

from onevoice.audio import write_audio
from onevoice.corpus.listing import list_corpus
from onevoice.corpus.pack import PackedCorpus
from onevoice.corpus.packing import pack_corpus
from onevoice.mixing import render as rendering
from onevoice.mixing.draw import Planner
from onevoice.mixing.render import Renderer
from onevoice.mixing.steps import ChannelStep, MixingStep, NoiseStep, ReverbStep
from onevoice.models import SpExPlus, SpExPlusConfig
from onevoice.processes import keep_freed_memory
from onevoice.training.loss import MultiLoss
from onevoice.trials.reading import TrialDataset, collate, find_trials

RATE, SECONDS = 16_000, 4.0


def toy_packs(root: Path) -> dict[str, PackedCorpus]:
    make_corpus(root / "speech", speakers=8, utterances=4, seconds=12.0, sample_rate=RATE)
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(10 * RATE)
    write_audio(root / "noise/rain/rain.wav", noise.astype(np.float32), RATE)
    for place in range(4):
        response = 0.1 * rng.standard_normal(RATE // 2) * np.exp(-np.arange(RATE // 2) / 1500)
        response[100] = 1.0
        write_audio(root / f"rooms/room/{place}.wav", (0.9 * response).astype(np.float32), RATE)
    return {
        name: pack_corpus(list_corpus([root / name]), root / f"{name}.pack") for name in ("speech", "noise", "rooms")
    }


def by_indexing(
    samples: torch.Tensor, offset: np.ndarray, length: np.ndarray, place: np.ndarray, size: int
) -> torch.Tensor:
    return rendering.gather(samples, offset - place, place, place + length, size)


def examples_per_second(run: Callable[[int], None], examples: int, repeats: int, device: str) -> float:
    times = []
    for number in range(repeats + 1):
        begin = time.perf_counter()
        run(number)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return examples / statistics.median(times[1:])


def rendered(planner: Planner, batch: int, device: str) -> Callable[[int], None]:
    renderer = Renderer(planner, device)
    return lambda number: (
        [  # four batches, each new
            renderer(planner.draw(number, np.arange(k * batch, (k + 1) * batch))) for k in range(4)
        ]
        and None
    )


def training_step(batch: int, device: str) -> Callable[[int], None]:
    model = SpExPlus(SpExPlusConfig(num_classes=1000)).to(device).train()
    optimizer, loss = torch.optim.Adam(model.parameters()), MultiLoss()
    audio, ref = torch.randn(2, batch, round(SECONDS * RATE), device=device)
    speaker = torch.zeros(batch, dtype=torch.long, device=device)

    def run(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model({"audio": audio, "ref": ref}), audio, speaker).total.backward()
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as data loader workers do
    with tempfile.TemporaryDirectory() as folder:
        packs = toy_packs(Path(folder))
        speech = packs["speech"] if options.pack is None else PackedCorpus.open(options.pack)
        mixing = MixingStep(segment_seconds=SECONDS, enrollment_seconds=(SECONDS, SECONDS))
        steps: dict[str, dict[str, Any]] = {
            "noise": {"noise": (NoiseStep(pack=""), packs["noise"])},
            "channel": {"channel": ChannelStep(probability=1.0)},
            "reverb": {"reverb": (ReverbStep(pack=""), packs["rooms"])},
        }
        make_trials(Path(folder) / "trials", 16, seconds=SECONDS, sample_rate=RATE)
        trials = TrialDataset(find_trials(Path(folder) / "trials"), RATE)
        count = 4 * options.batch

        def rate(planner: Planner, device: str = "cpu") -> float:
            return examples_per_second(rendered(planner, options.batch, device), count, options.repeats, device)

        def read(number: int) -> None:
            collate([trials[number, k] for k in range(16)])

        rates = {"trials from disk": examples_per_second(read, 16, options.repeats, "cpu")}
        rates["mixing"] = rate(Planner(speech, mixing))
        for name, step in steps.items():
            rates[f"mixing + {name}"] = rate(Planner(speech, mixing, **step))
        with mock.patch.object(rendering, "fetch", by_indexing):
            rates[f"mixing, by indexing on {options.device}"] = rate(Planner(speech, mixing), options.device)
    torch.set_num_threads(2)
    size = options.step_batch
    consumed = examples_per_second(
        training_step(size, options.device), size, max(2, options.repeats // 2), options.device
    )
    print(f"{'path':34}{'examples/s':>12}{'share of a step':>18}   (4 s at 16 kHz, one thread)")
    for name, rate in rates.items():
        print(f"{name:34}{rate:12.0f}{consumed / rate:17.2%}")
    print(f"{'SpEx+ training step, ' + options.device:34}{consumed:12.1f}")


if __name__ == "__main__":
    main()
