"""Make conversations from a corpus of speech by speaker:

    python3 scripts/make_conversations.py CORPUS FOLDER [--count 4] [--people 2 3 4] [--overlap 0 0.2 0.4]

CORPUS is whatever `onevoice corpus scan` reads. FOLDER gets one folder per conversation: mixture.wav, SPEAKER.wav for
each person alone (they add up to the mixture, with a noise floor at −70 dBFS), and truth.rttm. People take turns of 2
to 6 s in random order, each at a level of its own, ±3 dB. `--overlap` is the share of the time with speech in which two
people are meant to speak; between turns without overlap there are up to 0.6 s of pause. A conversation ends after
`--seconds`, or when the next speaker has nothing left to say.
"""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onevoice.audio import Mono, write_audio
from onevoice.corpus.listing import Corpus, list_corpus
from onevoice.corpus.recordings import Utterance
from onevoice.rng import derive

RATE = 16_000
LEVEL = 0.05
"""RMS of a person at 0 dB."""
FLOOR = 10 ** (-70 / 20)
MIN_TURN, MAX_TURN = 2.0, 6.0
FADE = 320
"""Samples over which a turn begins and ends, 20 ms."""


@dataclass(frozen=True)
class Conversation:
    """A made conversation."""

    tracks: dict[str, Mono]
    """Each person alone, as long as the mixture."""
    mixture: Mono


def make_conversation(
    speech: dict[str, Mono], overlap: float, seconds: float, rng: np.random.Generator
) -> Conversation:
    """Let people take turns. `speech` is all that each can say, at unit power; `overlap` is a share of time."""
    length = round(seconds * RATE)
    tracks = {name: np.zeros(length, np.float32) for name in speech}
    gains = {name: LEVEL * 10 ** (rng.uniform(-3, 3) / 20) for name in speech}
    said = dict.fromkeys(speech, 0)
    end, last_turn, last = round(0.3 * RATE), 0, ""
    while True:
        able = [name for name in speech if name != last and said[name] + MIN_TURN * RATE <= len(speech[name])]
        if not able:
            break
        name = able[rng.integers(len(able))]
        turn = min(round(rng.uniform(MIN_TURN, MAX_TURN) * RATE), len(speech[name]) - said[name])
        # If turns of equal length share the time o · T of T with speech, each shares about o · turn / (1 + o) at its
        # begin and as much at its end.
        shared = min(round(overlap * turn / (1 + overlap) * 1.2), last_turn // 2, turn // 2)
        begin = end - shared if overlap else end + round(rng.uniform(0, 0.6) * RATE)
        if begin + turn > length:
            break
        sound = gains[name] * speech[name][said[name] : said[name] + turn]
        ramp = np.linspace(0, 1, FADE, dtype=np.float32)
        sound[:FADE] *= ramp
        sound[-FADE:] *= ramp[::-1]
        tracks[name][begin : begin + turn] += sound.astype(np.float32)
        said[name] += turn
        end, last_turn, last = begin + turn, turn, name
    tracks = {name: track[: end + round(0.3 * RATE)] for name, track in tracks.items()}
    total = np.sum(list(tracks.values()), axis=0)
    mixture = total + FLOOR * rng.standard_normal(len(total))
    return Conversation(tracks, mixture.astype(np.float32))


def read_speech(utterances: tuple[Utterance, ...], rng: np.random.Generator, seconds: float) -> Mono:
    """Return up to `seconds` of what a speaker says, in random order, at unit power."""
    pieces: list[Mono] = []
    for index in rng.permutation(len(utterances)):
        sound, _ = utterances[index].recording.read(RATE)
        sound = sound - sound.mean()
        pieces.append(sound / max(float(sound.std()), 1e-6))
        if sum(map(len, pieces)) >= seconds * RATE:
            break
    return np.concatenate(pieces)


def draw_speech(corpus: Corpus, people: int, seconds: float, rng: np.random.Generator) -> dict[str, Mono]:
    """Return the speech of people who have enough to say for a conversation of this length."""
    speech: dict[str, Mono] = {}
    for name in rng.permutation(sorted(corpus.speakers)):
        said = read_speech(corpus.speakers[str(name)], rng, 1.5 * seconds / people)
        if len(said) >= 0.7 * seconds / people * RATE:
            speech[str(name)] = said
        if len(speech) == people:
            return speech
    raise SystemExit(f"fewer than {people} speakers have {0.7 * seconds / people:.0f} s of speech; lower --seconds")


def is_speaking(track: Mono, hop: int = RATE // 100) -> np.ndarray:
    """Return True for each 10 ms with speech: up to 32 dB below the loud ones; pauses below 0.3 s count."""
    frames = track[: len(track) // hop * hop].reshape(-1, hop).astype(np.float64)
    level = 10 * np.log10(np.convolve((frames**2).mean(axis=1), np.ones(3) / 3, "same") + 1e-12)
    heard = level[level > -100]
    if not len(heard):
        return np.zeros(len(level), bool)
    mask = level > np.percentile(heard, 95) - 32
    speaking = np.flatnonzero(mask)
    for one, other in itertools.pairwise(speaking):
        if other - one <= 30:
            mask[one:other] = True
    return mask


def draw_conversations(
    corpus: Corpus, people: list[int], overlaps: list[float], count: int, seconds: float, seed: int = 0
) -> list[tuple[str, Conversation]]:
    """Return `count` conversations for each number of people and each overlap, with their names."""
    made = []
    for number in people:
        for overlap in overlaps:
            for index in range(count):
                rng = derive(seed, "conversation", number, round(100 * overlap), index)
                speech = draw_speech(corpus, number, seconds, rng)
                name = f"{number}-people-{round(100 * overlap)}-percent-{index}"
                made.append((name, make_conversation(speech, overlap, seconds, rng)))
    return made


def main() -> None:
    """Write the conversations that the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="+")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--people", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--overlap", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    corpus = list_corpus(args.corpus)
    for name, made in draw_conversations(corpus, args.people, args.overlap, args.count, args.seconds, args.seed):
        folder = args.folder / name
        write_audio(folder / "mixture.wav", made.mixture, RATE, subtype="FLOAT")
        lines = []
        for speaker, track in made.tracks.items():
            write_audio(folder / f"{speaker}.wav", track, RATE, subtype="FLOAT")
            edges = np.flatnonzero(np.diff(np.concatenate([[False], is_speaking(track), [False]]).astype(int)))
            for first, last in edges.reshape(-1, 2):
                times = f"{first / 100:.2f} {(last - first) / 100:.2f}"
                lines.append(f"SPEAKER {name} 1 {times} <NA> <NA> {speaker} <NA> <NA>")
        (folder / "truth.rttm").write_text("\n".join(lines) + "\n")
        print(folder)


if __name__ == "__main__":
    main()
