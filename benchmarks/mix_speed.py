"""How fast mixtures are made, per core: `onevoice` against a plain loop with pyloudnorm.

    python benchmarks/mix_speed.py [--corpus DIR] [--trials 30] [--repeats 5]

Both render the same draws by the same mixing law and write the same files in one process. The loop filters with scipy
inside pyloudnorm, finds silence frame by frame, and writes with soundfile. Runs alternate; the table gives medians.
Without a corpus, toy voices of 6–16 s at 16 kHz are written to a temporary folder. The cache of decoded files is off,
as if the corpus were far larger than the cache.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import soundfile

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from plain_mixing import plain_trial
from voices import Voice

from onevoice.audio import write_audio
from onevoice.corpus.listing import scan
from onevoice.mixing import generator
from onevoice.mixing.folder import TrialWriter
from onevoice.mixing.law import MixingLaw, SpeakerRecordings, draw_trial

SEED = 0


def toy_corpus(root: Path, sample_rate: int = 16000) -> Path:
    for number in range(6):
        for index in range(6):
            path = root / Voice.number(number).name / f"{index}.flac"
            write_audio(path, Voice.number(number).say(index, 6 + 2 * index, sample_rate), sample_rate)
    return root


def by_onevoice(speakers: list[SpeakerRecordings], root: Path, law: MixingLaw, trials: int) -> Callable[[Path], int]:
    def run(out: Path) -> int:
        writer = TrialWriter(out, functools.partial(generator.TrialMaker, speakers, root, law, SEED))
        return sum(len(writer(index).rows) for index in range(trials))

    return run


def by_plain_loop(speakers: list[SpeakerRecordings], law: MixingLaw, trials: int) -> Callable[[Path], int]:
    def run(out: Path) -> int:
        written = 0
        for index in range(trials):
            for attempt in range(generator.MAX_ATTEMPTS):
                draw = draw_trial(speakers, SEED, index, attempt, law.snr_levels)
                triples = plain_trial(draw, law)
                for number, triple in enumerate(triples):
                    for samples, kind in zip(triple, ("mixed", "target", "ref"), strict=True):
                        path = out / f"{index}_{number}-{kind}.wav"
                        soundfile.write(path, samples, law.sample_rate, subtype="PCM_16")
                    written += 1
                if triples:
                    break
        return written

    return run


def seconds_of(run: Callable[[Path], int]) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as out:
        begin = time.process_time()
        written = run(Path(out))
        return time.process_time() - begin, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a folder of speaker folders")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(generator, "CACHED_UTTERANCES", 0):
        root = options.corpus or toy_corpus(Path(folder))
        speakers = generator.to_recordings(scan(root))
        print(f"{'mode':10}{'trials':>8}{'mixtures':>10}{'onevoice':>12}{'plain loop':>12}{'ratio':>8}")
        print(f"{'':28}{'trials/s':>12}{'trials/s':>12}")
        for name, law in (("training", MixingLaw(trim_db=20.0)), ("test", MixingLaw(full_length=True))):
            runs = (by_onevoice(speakers, root, law, options.trials), by_plain_loop(speakers, law, options.trials))
            seconds_of(runs[0])  # fills the caches of files and of filters
            times = [[seconds_of(run) for run in runs] for _ in range(options.repeats)]
            ours, plain = (statistics.median(pair[side][0] for pair in times) for side in (0, 1))
            ratio = statistics.median(pair[1][0] / pair[0][0] for pair in times)
            rates = f"{options.trials / ours:12.1f}{options.trials / plain:12.1f}"
            print(f"{name:10}{options.trials:8}{times[0][0][1]:10}{rates}{ratio:7.2f}x")


if __name__ == "__main__":
    main()
