"""Measure how fast a corpus is packed, and how fast crops are read from the pack instead of the audio files.

    python benchmarks/pack_speed.py [--corpus SOURCE ...] [--workers 1] [--crops 300] [--repeats 5] [--seconds 4]

Packing is timed in full, with the SHA-256 and the flush to disk. Then the same crops, drawn by speaker, are read in
three ways: from the pack, by decoding the whole utterance (as compressed files require), and from the middle of a WAV
file. The three alternate in one process, and medians are printed. The pack and the files are in the page cache. By
default, the corpus consists of toy voices of 6 to 16 s at 16 kHz, written to a temporary folder as FLAC.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from voices import Voice

from onevoice.audio import write_audio
from onevoice.corpus.listing import Corpus, list_corpus
from onevoice.corpus.pack import PackedCorpus
from onevoice.corpus.packing import pack_corpus

RATE = 16_000
Crop = tuple[int, int]


def toy_corpus(root: Path) -> Path:
    for number in range(6):
        for index in range(6):
            path = root / Voice.number(number).name / f"{index}.flac"
            write_audio(path, Voice.number(number).say(index, 6 + 2 * index, RATE), RATE)
    return root


def draw_crops(packed: PackedCorpus, length: int, count: int) -> list[Crop]:
    rng = np.random.default_rng(0)
    crops: list[Crop] = []
    while len(crops) < count:
        mine = packed.utterances_of(rng.integers(len(packed.speakers)))
        utterance = int(rng.integers(mine.start, mine.stop))
        if packed.length[utterance] > length:
            crops.append((utterance, int(rng.integers(packed.length[utterance] - length))))
    return crops


def by_pack(packed: PackedCorpus, crops: Sequence[Crop], length: int) -> Callable[[], float]:
    return lambda: sum(float(packed.crop(utterance, start, length)[0]) for utterance, start in crops)


def by_decoding(corpus: Corpus, crops: Sequence[Crop], length: int) -> Callable[[], float]:
    recordings = [utterance.recording for utterance in corpus.utterances]
    return lambda: sum(float(recordings[n].read(RATE)[0][start : start + length][0]) for n, start in crops)


def by_wav(files: Sequence[Path], crops: Sequence[Crop], length: int) -> Callable[[], float]:
    return lambda: sum(
        float(soundfile.read(files[n], frames=length, start=start, dtype="float32")[0][0]) for n, start in crops
    )


def seconds_of(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="+", help="sources as for `onevoice corpus pack`")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--crops", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = list_corpus(options.corpus or [toy_corpus(Path(folder) / "toy")])
        begin = time.perf_counter()
        packed = pack_corpus(corpus, Path(folder) / "pack", workers=options.workers)
        elapsed = time.perf_counter() - begin
        print(
            f"packing, {options.workers} workers: {len(packed) / elapsed:.0f} utterances/s, "
            f"{packed.seconds / 3600 / elapsed * 60:.2f} h of audio per minute"
        )
        opened = statistics.median(seconds_of(lambda: PackedCorpus.open(packed.path)) for _ in range(options.repeats))
        print(f"opening the pack: {1e3 * opened:.2f} ms")
        length = round(options.seconds * RATE)
        crops = draw_crops(packed, length, options.crops)
        files = [Path(folder) / f"{number}.wav" for number in range(len(packed))]
        for number in {utterance for utterance, _ in crops}:
            write_audio(files[number], packed.read(number), RATE, durable=False)
        runs = {
            "pack": by_pack(packed, crops, length),
            "files or shards": by_decoding(corpus, crops, length),
            "part of a WAV": by_wav(files, crops, length),
        }
        times = [{name: seconds_of(run) for name, run in runs.items()} for _ in range(options.repeats)]
        print(f"{f'crops of {options.seconds:g} s from':22}{'crops/s':>10}{'µs each':>10}{'pack is':>10}")
        for name in runs:
            each = statistics.median(row[name] for row in times) / len(crops)
            ratio = statistics.median(row[name] / row["pack"] for row in times)
            print(f"{name:22}{1 / each:10.0f}{1e6 * each:10.1f}{ratio:9.1f}x")


if __name__ == "__main__":
    main()
