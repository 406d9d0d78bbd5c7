"""How fast SpEx+ runs: forward and training step, at 8 and 16 kHz, in seconds of audio per second.

    python benchmarks/model_speed.py [--seconds 4] [--batch 2] [--repeats 5] [--threads 2]

The sizes are the paper's. The device is the CPU, or a GPU with --device cuda. The plain column is the same network
written with torch's own layers in the obvious way (`plain_layers.py`): concatenated embedding, gLN from means and
variances, transposed convolutions. Runs alternate; the table shows medians and the median ratio within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from plain_layers import PlainSpExPlus

from onevoice.models import Network, SpExPlus, SpExPlusConfig
from onevoice.processes import keep_freed_memory
from onevoice.training.loss import MultiLoss


def batch_of(config: SpExPlusConfig, size: int, seconds: float) -> dict[str, torch.Tensor]:
    samples = round(seconds * config.sample_rate)
    return {"audio": torch.randn(size, samples), "ref": torch.randn(size, samples)}


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(batch)

    return run


def training_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    target, speaker, loss = (
        torch.randn_like(batch["audio"]),
        torch.zeros(len(batch["audio"]), dtype=torch.long),
        MultiLoss(),
    )

    def run() -> None:
        terms = loss(model(batch), target, speaker.to(target.device))
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        optimizer.step()

    return run


def seconds_of(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in training; it helps both columns
    torch.manual_seed(0)
    print(f"batch {options.batch} × {options.seconds:g} s, {options.threads} threads, torch {torch.__version__}")
    print(f"{'rate':>6}  {'pass':14}{'onevoice':>12}{'plain':>12}{'ratio':>8}   (seconds of audio per second)")
    for rate in (8000, 16000):
        config = SpExPlusConfig(sample_rate=rate)
        networks: list[Network | PlainSpExPlus] = [SpExPlus(config), PlainSpExPlus(config)]
        networks = [network.to(options.device) for network in networks]
        batch = {k: v.to(options.device) for k, v in batch_of(config, options.batch, options.seconds).items()}
        for name, make in (("forward", forward), ("training step", training_step)):
            runs = [make(network, batch) for network in networks]
            for run in runs:
                run()
            times = [[seconds_of(run, options.device) for run in runs] for _ in range(options.repeats)]
            audio = options.batch * options.seconds
            ours, plain = (audio / statistics.median(pair[k] for pair in times) for k in (0, 1))
            ratio = statistics.median(pair[1] / pair[0] for pair in times)
            print(f"{rate:6}  {name:14}{ours:12.2f}{plain:12.2f}{ratio:7.2f}x", flush=True)


if __name__ == "__main__":
    main()
