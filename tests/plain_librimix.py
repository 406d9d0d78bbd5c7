"""A second, independent LibriMix generator: it writes a whole tree of files with soundfile, one mixture at a time.

It follows the documentation of the official generator, uses nothing of the package, and is the reference for
`test_librimix.py`. It also makes the toy LibriSpeech, noise and metadata that the tests need.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from voices import Voice

RATE = 16_000
TYPES = ("mix_clean", "mix_both", "mix_single")


@dataclass(frozen=True)
class Toy:
    """The folders of a toy LibriSpeech and its noise, and the metadata for 2 and 3 speakers."""

    librispeech: Path
    wham: Path
    metadata: dict[int, Path]


def make_toy(root: Path, speakers: int = 4, utterances: int = 3) -> Toy:
    """Write utterances of different lengths, noise longer and much shorter than those, and metadata CSVs."""
    toy = Toy(root / "LibriSpeech", root / "wham_noise", {n: root / "metadata" / f"libri{n}mix.csv" for n in (2, 3)})
    rng = np.random.default_rng(7)
    paths = []
    for number in range(speakers):
        voice = Voice.number(number)
        for index in range(utterances):
            seconds = 0.9 + 0.37 * ((3 * number + 2 * index) % 5) + 0.0001 * index
            path = Path("test-clean") / voice.name / "07" / f"{voice.name}-07-{index:04d}.flac"
            write(toy.librispeech / path, 1.9 * voice.say(index, seconds, RATE))
            paths.append(path)
    for name, seconds, channels in (("long", 3.3, 2), ("short", 1.13, 2), ("mono", 1.02, 1)):
        write(toy.wham / "tt" / f"{name}.wav", 0.1 * rng.standard_normal((round(seconds * RATE), channels)))
    for sources, path in toy.metadata.items():
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            columns = [f"source_{k}_{what}" for k in range(1, sources + 1) for what in ("path", "gain")]
            writer.writerow(["mixture_ID", *columns, "noise_path", "noise_gain"])
            for mixture in range(8):
                chosen = [paths[(mixture + k * utterances + k) % len(paths)] for k in range(sources)]
                gains = [float(gain) for gain in rng.uniform(0.3, 1.6, sources + 1)]
                cells = [cell for pair in zip(chosen, gains, strict=False) for cell in pair]
                noise = f"tt/{('long', 'short', 'mono')[mixture % 3]}.wav"
                writer.writerow(["_".join(path.stem for path in chosen), *cells, noise, gains[-1]])
    return toy


def write(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE)


def plain_tree(toy: Toy, sources: int, rate: int, mode: str, out: Path) -> Path:
    """Write `out/wav<rate>k/<mode>/test/{s1,s2,…,noise,mix_*}` and its metadata; return `out`."""
    base = out / f"wav{rate // 1000}k" / mode
    (base / "metadata").mkdir(parents=True)
    rows = list(csv.DictReader(toy.metadata[sources].open()))
    for row in rows:
        for folder, samples in plain_mixture(toy, row, sources, rate, mode).items():
            path = base / "test" / folder / f"{row['mixture_ID']}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, samples, rate)
    for kind in TYPES:
        lines = ["mixture_ID,mixture_path,length", *(f"{row['mixture_ID']},/elsewhere/x.wav,1" for row in rows)]
        (base / "metadata" / f"mixture_test_{kind}.csv").write_text("\n".join(lines) + "\n")
    return out


def plain_mixture(toy: Toy, row: dict[str, str], sources: int, rate: int, mode: str) -> dict[str, np.ndarray]:
    """Return the samples of each file of one mixture as floats."""
    sounds = [
        soundfile.read(toy.librispeech / row[f"source_{k}_path"], dtype="float32")[0] for k in range(1, sources + 1)
    ]
    longest = max(len(sound) for sound in sounds)
    noise = soundfile.read(toy.wham / row["noise_path"], dtype="float32", always_2d=True)[0][:longest, 0]
    sounds.append(noise if len(noise) == longest else overlapped(noise, longest))
    gains = [float(row[f"source_{k}_gain"]) for k in range(1, sources + 1)] + [float(row["noise_gain"])]
    sounds = [resample_poly(sound * gain, rate, RATE) for sound, gain in zip(sounds, gains, strict=True)]
    lengths = [len(sound) for sound in sounds]
    if mode == "min":
        sounds = [sound[: min(lengths)] for sound in sounds]
    else:
        sounds = [np.concatenate([s, np.zeros(max(lengths) - len(s), s.dtype)]) for s in sounds]
    files = {f"s{k + 1}": sounds[k] for k in range(sources)} | {"noise": sounds[-1]}
    for kind, parts in zip(TYPES, (sounds[:-1], sounds, [sounds[0], sounds[-1]]), strict=True):
        total = np.zeros(len(sounds[0]), np.float32)
        for part in parts:
            total = (total + part).astype(np.float32)
        files[kind] = total
    return files


def overlapped(noise: np.ndarray, length: int) -> np.ndarray:
    """Overlap copies of `noise`, each fading into the next over 8,001 samples (needs more than twice that)."""
    fade = 8001
    window = np.hanning(16_001)
    step = len(noise) - fade
    count = -(-(length - fade) // step)
    total = np.zeros(count * step + fade)
    for number in range(count):
        copy = noise.astype(np.float64)
        if number > 0:
            copy[:fade] *= window[:fade]
        if number < count - 1:
            copy[-fade:] *= window[fade - 1 :]
        total[number * step : number * step + len(noise)] += copy
    return total[:length]
