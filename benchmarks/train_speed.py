"""How fast a training step of SpEx+ is: ours, the plain network, and any other network, side by side in one run.

    python benchmarks/train_speed.py [--batch 2] [--seconds 4] [--repeats 5] [--threads 2] [--device cpu] [--small]
        [--sample-rate 16000] [--peer FILE.py:CLASS] [--peer-arguments '{"norm": "gLN"}']

A step is forward, loss, backward, clipping and Adam, on the same batch. The sizes are the paper's, or with --small
those of configs/small.json (a peer keeps its own). "plain" is the network written with torch's layers in the obvious
way (`plain_layers.py`); in eager float32 it is the base of the ratios. Runs alternate, after two warm-up runs in which
the compiler works for a minute or two. The table shows medians, and the median ratio within a round.

A peer is a class whose instance is called as (mixture, enrollment[, lengths]) and returns estimates of shape (batch,
samples), nested in any way, with the speaker logits as the last tensor. It is trained with our loss. Its imports are
also searched in the folder of its file. For the published code of SpEx+, whose windows are those of 8 kHz:

    git clone https://github.com/gemengtju/SpEx_Plus
    python benchmarks/train_speed.py --sample-rate 8000 --peer SpEx_Plus/nnet/conv_tas_net.py:ConvTasNet \
        --peer-arguments '{"norm": "gLN"}'
"""

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from model_speed import batch_of, seconds_of
from plain_layers import PlainSpExPlus
from torch.nn import functional as F

from onevoice.config import load_config
from onevoice.models import SpExPlus, SpExPlusConfig
from onevoice.processes import keep_freed_memory
from onevoice.training.experiment import Experiment
from onevoice.training.loss import MultiLoss

ROOT = Path(__file__).parents[1]
Batch = dict[str, torch.Tensor]


class Peer(torch.nn.Module):
    """A network from elsewhere behind our contract."""

    def __init__(self, spec: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        path, _, name = spec.rpartition(":")
        sys.path.insert(0, str(Path(path).parent))
        self.network = getattr(importlib.import_module(Path(path).stem), name)(**arguments)

    def forward(self, batch: Batch) -> dict[str, Any]:
        audio, ref = batch["audio"], batch["ref"]
        lengths = torch.full((len(ref),), ref.shape[1], device=ref.device)
        try:
            found = list(_tensors(self.network(audio, ref, lengths)))
        except TypeError:
            found = list(_tensors(self.network(audio, ref)))
        estimates = [F.pad(e, (0, audio.shape[1]))[:, : audio.shape[1]] for e in found[:-1]]
        return {"predicted_audio": tuple(estimates * 3)[:3], "predicted_logits": found[-1]}


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    else:
        for value in values:
            yield from _tensors(value)


def step_of(network: torch.nn.Module, batch: Batch, precision: torch.dtype, fused: bool) -> Callable[[], None]:
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=fused)
    loss, device = MultiLoss(), batch["audio"].device
    target, speaker = torch.randn_like(batch["audio"]), torch.zeros(len(batch["audio"]), dtype=torch.long)
    speaker = speaker.to(device)

    def run() -> None:
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            prediction: Any = network(batch)
        optimizer.zero_grad(set_to_none=True)
        loss(prediction, target, speaker).total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return run


def runs(config: SpExPlusConfig, batch: Batch, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    ours = [SpExPlus(config).to(options.device).train() for _ in range(4)]
    for network in ours[2:]:
        network.compiled = True
    single, half = torch.float32, torch.bfloat16
    found = {
        "plain, float32": step_of(PlainSpExPlus(config).to(options.device), batch, single, fused=False),
        "plain, bfloat16": step_of(PlainSpExPlus(config).to(options.device), batch, half, fused=False),
        "onevoice, float32": step_of(ours[0], batch, single, fused=True),
        "onevoice, bfloat16": step_of(ours[1], batch, half, fused=True),
        "onevoice compiled, float32": step_of(ours[2], batch, single, fused=True),
        "onevoice compiled, bfloat16": step_of(ours[3], batch, half, fused=True),
    }
    if options.peer is not None:
        peer = Peer(options.peer, json.loads(options.peer_arguments)).to(options.device).train()
        found["peer, float32"] = step_of(peer, batch, single, fused=False)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sample-rate", type=int, default=16_000)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--peer")
    parser.add_argument("--peer-arguments", default="{}")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in training; it helps all rows
    torch.manual_seed(0)
    config = SpExPlusConfig(sample_rate=options.sample_rate)
    if options.small:
        config = load_config(Experiment, ROOT / "configs/small.json", ["model.num_classes=101"]).model
    batch = {k: v.to(options.device) for k, v in batch_of(config, options.batch, options.seconds).items()}
    steps = runs(config, batch, options)
    memory: dict[str, float] = {}
    for name, run in steps.items():
        run()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run()
        if options.device == "cuda":
            memory[name] = torch.cuda.max_memory_allocated() / 1e9
    times = [{name: seconds_of(run, options.device) for name, run in steps.items()} for _ in range(options.repeats)]
    print(
        f"batch {options.batch} × {options.seconds:g} s at {config.sample_rate} Hz, {options.threads} threads, "
        f"{options.device}, torch {torch.__version__}"
    )
    print(f"{'network':30}{'step, ms':>10}{'examples/s':>12}{'to plain':>10}{'GB' if memory else '':>8}")
    for name in steps:
        middle = statistics.median(each[name] for each in times)
        ratio = statistics.median(each["plain, float32"] / each[name] for each in times)
        peak = f"{memory[name]:8.1f}" if memory else ""
        print(f"{name:30}{1e3 * middle:10.0f}{options.batch / middle:12.2f}{ratio:9.2f}x{peak}", flush=True)


if __name__ == "__main__":
    main()
