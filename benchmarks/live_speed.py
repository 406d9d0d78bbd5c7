"""How long a block of a stream takes: PyTorch eager and compiled, and ONNX Runtime, each on one thread.

    python benchmarks/live_speed.py [--seconds 20] [--engines eager compiled onnx] [--rate 16000] [--pretrained PATH]
    python benchmarks/live_speed.py --dev FOLDER [--limit 100] [--absent-db 0] --pretrained PATH

Blocks of 10 ms are pushed one by one. The table shows percentiles of wall and of processor time per block, processor
time as a share of real time, and how much the peak memory of the process grew. Without weights, the network of
configs/causal_pool.json is used as it is initialized. On a busy machine, processor time is the figure to compare.

With `--dev`, the streamed output of the first trials (NAME-mixed, NAME-ref and NAME-target files in a folder) is scored
by SI-SDRi beside the estimate for the whole. That of the first trials with a silent target is scored by its level
against the mixture. `--absent-db` turns streams down where the voice is not heard.
"""

import argparse
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from onevoice.audio import read_audio
from onevoice.config import from_dict
from onevoice.evaluation.metrics import attenuation_db, si_sdr_improvement
from onevoice.extraction import onnx
from onevoice.extraction.checkpoint import Card
from onevoice.extraction.engine import TorchEngine
from onevoice.extraction.export import export
from onevoice.extraction.extractor import Extractor, load
from onevoice.extraction.stream import Engine, Stream
from onevoice.models import BandSplitConfig, build

CONFIG = Path(__file__).parents[1] / "configs" / "causal_pool.json"
WARM_UP = 50
"""Blocks that are not counted."""


def open_extractor(pretrained: str | None) -> Extractor:
    if pretrained is not None:
        return load(pretrained, device="cpu")
    torch.manual_seed(0)
    config = from_dict(BandSplitConfig, json.loads(CONFIG.read_text())["model"])
    return Extractor(build(config), Card(config))


def open_engine(name: str, extractor: Extractor, folder: Path) -> Engine:
    if name != "onnx":
        return TorchEngine(extractor.model, extractor.model_hash, compiled=name == "compiled")
    if not folder.joinpath("step.onnx").exists():
        export(extractor, folder)
    return onnx.load(folder).engine


def measure(name: str, extractor: Extractor, seconds: float, rate: int, folder: Path) -> None:
    voice = extractor.embed([np.random.default_rng(1).standard_normal(6 * extractor.sample_rate).astype(np.float32)])
    given = onnx.OnnxVoice(voice.embedding.numpy(), voice.model_hash) if name == "onnx" else voice
    stream = Stream(open_engine(name, extractor, folder), given, rate)
    sound = 0.1 * np.random.default_rng(0).standard_normal((WARM_UP + round(100 * seconds), rate // 100))
    wall, processor, before = [], [], 0
    for number, block in enumerate(sound.astype(np.float32)):
        if number == WARM_UP:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin, begin_processor = time.perf_counter(), time.process_time()
        stream.push(block)
        wall.append(1000 * (time.perf_counter() - begin))
        processor.append(1000 * (time.process_time() - begin_processor))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    figures = [np.percentile(times[WARM_UP:], (50, 99, 99.9)) for times in (wall, processor)]
    cells = "".join(f"{value:9.2f}" for each in figures for value in each)
    print(f"{name:10}{cells}{np.mean(processor[WARM_UP:]) / 10:9.0%}{grown:9.1f}", flush=True)


def score(extractor: Extractor, folder: Path, limit: int, absent_db: float) -> None:
    streamed, whole, down = [], [], []
    for mixed in sorted(folder.glob("*-mixed.wav")):
        mixture, rate = read_audio(mixed)
        target, _ = read_audio(mixed.with_name(mixed.name.replace("mixed", "target")))
        if len(streamed if target.any() else down) == limit:
            continue
        voice = extractor.enroll(*read_audio(mixed.with_name(mixed.name.replace("mixed", "ref"))))
        stream, size = extractor.stream(voice, rate, absent_db=absent_db), rate // 10
        blocks = [stream.push(mixture[first : first + size]) for first in range(0, len(mixture), size)]
        output = np.concatenate([*blocks, stream.flush()])
        if not target.any():
            down.append(attenuation_db(mixture, output))
            continue
        streamed.append(si_sdr_improvement(output, mixture, target))
        whole.append(si_sdr_improvement(extractor.extract(mixture, rate, voice), mixture, target))
    print(f"SI-SDRi of {len(whole)} trials: streamed {np.mean(streamed):.2f} dB, whole {np.mean(whole):.2f} dB")
    if down:
        mean, median = np.mean(down), np.median(down)
        print(f"target absent: {len(down)} trials, attenuation mean {mean:.2f} dB, median {median:.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--engines", nargs="+", default=["eager", "compiled", "onnx"])
    parser.add_argument("--rate", type=int, default=16_000)
    parser.add_argument("--pretrained")
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--absent-db", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    extractor = open_extractor(options.pretrained)
    if options.dev is not None:
        return score(extractor, options.dev, options.limit, options.absent_db)
    heads = "".join(f"{head:>9}" for head in ("wall p50", "p99", "p99.9", "CPU p50", "p99", "p99.9"))
    print(f"{'ms/block':10}{heads}{'CPU':>9}{'MB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.engines:
            measure(name, extractor, options.seconds, options.rate, Path(folder))
    return None


if __name__ == "__main__":
    main()
