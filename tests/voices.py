"""Toy voices: deterministic synthetic speakers that differ in pitch, formants and rhythm.

An utterance is a chain of syllables with pauses between them. A syllable is a sum of harmonics of a gliding pitch,
shaped by the resonances of one of five vowels, whose formants are scaled by the speaker's vocal tract length. Some
syllables start with a burst of noise. No two speakers share pitch or tract, so even a tiny network can tell them apart.

    python3 tests/voices.py FOLDER --speakers 20

writes a corpus of such speakers at 8 kHz, ten utterances each.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onevoice.audio import write_audio
from onevoice.rng import derive

VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
BANDWIDTHS = (90.0, 110.0, 170.0)


@dataclass(frozen=True)
class Voice:
    """One speaker: mean pitch in Hz, vocal tract factor on the formants, seconds per syllable."""

    name: str
    pitch: float
    tract: float
    syllable_seconds: float

    @classmethod
    def number(cls, index: int) -> "Voice":
        """Return the `index`-th speaker; pitches lie between 85 and 300 Hz and never repeat."""
        steps = [(index * irrational) % 1.0 for irrational in (0.618034, 0.414214, 0.732051)]
        return cls(f"spk{index:03d}", 85 * (300 / 85) ** steps[0], 0.85 + 0.4 * steps[1], 0.16 + 0.1 * steps[2])

    def say(self, index: int, seconds: float, sample_rate: int = 8000) -> np.ndarray:
        """Return the speaker's `index`-th utterance, `(samples,)` float32 with peak 0.5."""
        rng = derive(20, self.name, index)
        total = round(seconds * sample_rate)
        pieces: list[np.ndarray] = []
        while sum(map(len, pieces)) < total:
            pieces.append(self._syllable(rng, sample_rate))
            if rng.random() < 0.25:
                pieces.append(np.zeros(round(rng.uniform(0.05, 0.2) * sample_rate)))
        speech = np.concatenate(pieces)[:total]
        speech += 1e-4 * rng.standard_normal(total)
        return (0.5 * speech / np.abs(speech).max()).astype(np.float32)

    def _syllable(self, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
        length = round(self.syllable_seconds * rng.uniform(0.7, 1.3) * sample_rate)
        time = np.arange(length) / sample_rate
        pitch = self.pitch * rng.uniform(0.85, 1.15) * (1 + rng.uniform(-0.15, 0.15) * time / time[-1])
        phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
        formants = self.tract * np.array(VOWELS[rng.integers(len(VOWELS))])
        wave = np.zeros(length)
        for harmonic in range(1, int(0.45 * sample_rate / pitch.max()) + 1):
            frequency = harmonic * self.pitch
            response = sum(1 / (1 + ((frequency - f) / b) ** 2) for f, b in zip(formants, BANDWIDTHS, strict=True))
            wave += (0.02 + response) * np.sin(harmonic * phase) / np.sqrt(harmonic)
        if rng.random() < 0.4:
            wave[: length // 5] += 0.3 * rng.standard_normal(length // 5)
        return wave * np.sin(np.pi * np.arange(length) / length) ** 0.5


def make_corpus(
    root: Path, speakers: int = 4, utterances: int = 4, seconds: float = 4.0, sample_rate: int = 8000, first: int = 0
) -> Path:
    """Write `root/speaker/chapter/speaker-chapter-NNNN.flac`, the layout of LibriSpeech; return `root`."""
    for number in range(first, first + speakers):
        voice = Voice.number(number)
        for index in range(utterances):
            chapter = f"{index % 2:02d}"
            path = root / voice.name / chapter / f"{voice.name}-{chapter}-{index:04d}.flac"
            write_audio(path, voice.say(index, seconds, sample_rate), sample_rate)
    return root


def make_trials(
    folder: Path, count: int, speakers: int = 4, seconds: float = 1.0, sample_rate: int = 8000, seed: int = 0
) -> Path:
    """Write `count` trials at 0 dB, `<target>_<interferer>_<index>-mixed|-target|-ref.wav`; return `folder`."""
    for index in range(count):
        rng = derive(seed, "trial", index)
        target, interferer = (Voice.number(int(k)) for k in rng.choice(speakers, 2, replace=False))
        first, second, reference = (int(k) for k in rng.choice(1000, 3, replace=False))
        wanted = target.say(first, seconds, sample_rate)
        other = interferer.say(second, seconds, sample_rate)
        other *= np.linalg.norm(wanted) / np.linalg.norm(other)
        name = f"{target.name}_{interferer.name}_{index:06d}"
        gain = 0.5 / np.abs(wanted + other).max()
        sounds = {
            "mixed": (wanted + other) * gain,
            "target": wanted * gain,
            "ref": target.say(reference, 1.5, sample_rate),
        }
        for kind, sound in sounds.items():
            write_audio(folder / f"{name}-{kind}.wav", sound.astype(np.float32), sample_rate)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a corpus of toy voices.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--speakers", type=int, default=20, help="how many speakers")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    options = parser.parse_args()
    make_corpus(options.folder, options.speakers, utterances=10, first=options.first)
    print(f"{options.speakers} speakers in {options.folder}")
