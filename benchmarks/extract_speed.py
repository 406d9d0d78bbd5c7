"""How fast a voice is extracted: the network alone, and the command on files of any length.

    python benchmarks/extract_speed.py [--threads 2] [--repeats 5] [--seconds 10 600 3600] [--pretrained NAME]
        [--device cpu]

The first table is for 10 s of sound on the processor: the plain layers of torch with the same sizes
(`plain_layers.py`), ours in float32 and bfloat16, and the exported network in ONNX Runtime and OpenVINO if they are
installed. Runs alternate; the table shows medians, and how far an estimate is from that of float32.
Then a list of 32 mixtures of 1 to 10 s goes through the network of a device one by one, and in batches by length.
The last table runs the command as a process on the sample recording, tiled to a length, in stereo at 44.1 kHz:
seconds of sound per second of time and of processor time, and peak memory. Its first row is the start-up.

On a free machine, compare the times; on a busy one, the processor times with `--threads 1`, because threads that wait
for each other use processor time too.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from plain_layers import PlainBandSplit, PlainSpExPlus

from onevoice.audio import read_audio, resample
from onevoice.evaluation.demo import SAMPLES
from onevoice.evaluation.metrics import si_sdr
from onevoice.extraction import onnx
from onevoice.extraction.export import export
from onevoice.extraction.extractor import Extractor, load
from onevoice.extraction.voice import Voice
from onevoice.models import SpExPlusConfig
from onevoice.models.bandsplit import BandSplitExtractor
from onevoice.processes import keep_freed_memory

Run = Callable[[], Any]
COMMAND = [sys.executable, "-m", "onevoice", "extract"]


def exported_networks(extractor: Extractor, sound: np.ndarray, voice: Voice, threads: int) -> dict[str, Run]:
    """Return the exported network in ONNX Runtime and in OpenVINO, if they are installed."""
    runs: dict[str, Run] = {}
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        return runs
    with tempfile.TemporaryDirectory() as folder:
        export(extractor, Path(folder) / "graphs")
        network = onnx.load(Path(folder) / "graphs", threads)
        its_voice = onnx.OnnxVoice(voice.embedding.numpy(), network.model_hash)
        network.extract(sound, extractor.sample_rate, its_voice)  # opens what it needs before the folder goes
        runs["ONNX Runtime"] = lambda: network.extract(sound, extractor.sample_rate, its_voice)
        if importlib.util.find_spec("openvino"):
            openvino: Any = importlib.import_module("openvino")
            limits = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
            graph = openvino.Core().compile_model(str(Path(folder) / "graphs" / "extract.onnx"), "CPU", limits)
            multiple = network.facts["multiple_of"]
            audio = np.pad((sound - sound.mean()) / sound.std(), (0, -len(sound) % multiple))[None]
            runs["OpenVINO"] = lambda: graph({"audio": audio, "embedding": voice.embedding.numpy()})[0][0, : len(sound)]
    return runs


def measure_network(pretrained: str | None, repeats: int, threads: int) -> None:
    ours = load(pretrained, device="cpu")
    voice = ours.enroll(read_audio(SAMPLES / "enrollment.flac")[0], 16_000)
    sound = np.resize(read_audio(SAMPLES / "mixture.flac", ours.sample_rate)[0], 10 * ours.sample_rate)
    runs: dict[str, Run] = {}
    audio = torch.from_numpy(sound)[None]
    if isinstance(ours.card.config, SpExPlusConfig):
        layers = PlainSpExPlus(ours.card.config).eval()
        runs["plain layers"] = lambda: layers({"audio": audio, "ref": audio[:, :8000]})
    if isinstance(ours.model, BandSplitExtractor) and not ours.model.config.causal:
        scaled, plain = (audio - audio.mean()) / audio.std(), PlainBandSplit(ours.model)
        runs["plain layers"] = lambda: plain(scaled, voice.embedding)[0].numpy()
    for name in ("float32", "bfloat16"):
        extractor = Extractor(ours.model, ours.card, name)
        runs[name] = functools.partial(extractor.extract, sound, ours.sample_rate, voice)
    runs.update(exported_networks(ours, sound, voice, threads))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, run in runs.items():
                begin, cpu = time.perf_counter(), time.process_time()
                results[name] = run()
                if turn:  # the first one warms up
                    times[name].append((time.perf_counter() - begin, time.process_time() - cpu))
    reference = results["float32"].astype(float)
    middles = {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in times.items()}
    base = middles[next(iter(middles))]
    print(f"{'':14}{'real time':>11}{'ratio':>8}{'by processor time':>20}{'ratio':>8}")
    for name, (taken, cpu) in middles.items():
        far = ""
        if isinstance(results[name], np.ndarray):  # the plain layers of SpEx+ have random weights
            level = -si_sdr(results[name], reference)
            far = f"{max(level, -200):8.1f} dB from float32"
        speeds = f"{10 / taken:10.1f}x{base[0] / taken:7.2f}x{10 * threads / cpu:19.1f}x{base[1] / cpu:7.2f}x"
        print(f"{name:14}{speeds}{far}", flush=True)


def measure_batches(pretrained: str | None, device: str, repeats: int) -> None:
    """Print the speed of a list of mixtures, one by one and in batches; runs alternate."""
    extractor = load(pretrained, device=device, precision="auto")
    rate = extractor.sample_rate
    voice = extractor.enroll(read_audio(SAMPLES / "enrollment.flac")[0], 16_000)
    sound = read_audio(SAMPLES / "mixture.flac", rate)[0]
    sounds = [np.resize(sound, round(seconds * rate)) for seconds in np.linspace(1, 10, 32)]
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(repeats + 1):
        for extractor.takes_batches in times:
            begin = time.perf_counter()
            extractor.extract(sounds, rate, voice)
            if turn:  # the first one warms up
                times[extractor.takes_batches].append(time.perf_counter() - begin)
    total = sum(map(len, sounds)) / rate
    single, together = (total / statistics.median(each) for each in times.values())
    words = f"one by one {single:.1f}x real time, in batches {together:.1f}x ({together / single:.2f}x)"
    print(f"32 mixtures of 1 to 10 s on {device}: {words}", flush=True)


def write_recording(path: Path, seconds: float) -> None:
    sound = resample(read_audio(SAMPLES / "mixture.flac")[0], 16_000, 44_100)
    left = round(seconds * 44_100)
    with soundfile.SoundFile(path, "w", 44_100, 2) as file:
        while left > 0:
            file.write(np.stack([sound, 0.8 * np.roll(sound, 300)], axis=1)[:left])
            left -= len(sound)


def run_command(folder: Path, seconds: float, options: list[str]) -> tuple[float, float, float]:
    """Return the time, the processor time and the peak memory in GB of the command on a recording of a length."""
    mixture = folder / f"{seconds:g}.wav"
    write_recording(mixture, seconds)
    begin = time.perf_counter()
    arguments = [mixture, SAMPLES / "enrollment.flac", folder / "voice.wav", "--force", *options]
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    mixture.unlink()
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, nargs="*", default=[10, 600, 3600])
    parser.add_argument("--pretrained")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    keep_freed_memory()
    measure_network(options.pretrained, options.repeats, options.threads)
    measure_batches(options.pretrained, options.device, options.repeats)
    chosen = ["--precision", options.precision, "--device", options.device]
    chosen += ["--pretrained", options.pretrained] if options.pretrained else []
    with tempfile.TemporaryDirectory() as folder:
        starts = [run_command(Path(folder), 1, chosen) for _ in range(3)]
        start, cpu = (statistics.median(column) for column in list(zip(*starts, strict=True))[:2])
        print(f"command, 1 s of sound: {start:.2f} s, {cpu:.2f} s of processor time")
        for seconds in options.seconds:
            taken, cpu, memory = run_command(Path(folder), seconds, chosen)
            speeds = f"{seconds / taken:8.1f}x real time {seconds / cpu:8.1f}x by processor time"
            print(f"{seconds:8g} s {speeds} {memory:6.2f} GB peak", flush=True)


if __name__ == "__main__":
    main()
