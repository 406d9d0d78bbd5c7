"""How well people are found in conversations, and separated:

    python benchmarks/voices_quality.py CORPUS [--count 4] [--people 2 3 4] [--overlap 0 0.2 0.4] [--no-separation]

Conversations come from `scripts/make_conversations.py`. Per number of people and overlap: in how many conversations the
number of people is right; the diarization error rate (DER), in per cent of the speech of all people: missed speech,
false speech and wrong person, without the 0.25 s on both sides of each true turn (collar), people assigned one to one
so that it is least; the SI-SDRi of each person over the whole conversation, with the voice that was found in the
mixture (found), and with 10 s of the person's track as the enrollment (given).

The last columns are about the given voice: the level of the output where only other people speak, in dB relative to the
mixture there, and the SI-SDR of the output where only the target speaks.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

from onevoice.corpus.listing import list_corpus
from onevoice.evaluation.metrics import si_sdr
from onevoice.extraction.discovery import FoundVoice, find_voices
from onevoice.extraction.extractor import Extractor, load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from make_conversations import RATE, Conversation, draw_conversations, is_speaking

COLLAR = 25
"""Frames of 10 ms."""
Numbers = dict[str, list[float]]


def hypothesis(found: list[FoundVoice], frames: int) -> np.ndarray:
    masks = np.zeros((len(found), frames), bool)
    for mask, voice in zip(masks, found, strict=True):
        for begin, end in voice.turns:
            mask[round(100 * begin) : round(100 * end)] = True
    return masks


def diarization_error(truth: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Return missed, false and confused speech as shares of the true speech, and the found number of each person."""
    keep = np.ones(truth.shape[1], bool)
    for person in truth:
        for edge in np.flatnonzero(np.diff(person.astype(int))) + 1:
            keep[max(0, edge - COLLAR) : edge + COLLAR] = False
    true, ours = truth[:, keep].astype(float), found[:, keep].astype(float)
    size = max(len(true), len(ours))
    shared = np.zeros((size, size))
    shared[: len(true), : len(ours)] = true @ ours.T
    best = max(itertools.permutations(range(size)), key=lambda order: sum(shared[i, j] for i, j in enumerate(order)))
    correct = sum(shared[i, j] for i, j in enumerate(best))
    spoken, said = true.sum(axis=0), ours.sum(axis=0)
    errors = np.array(
        [
            np.maximum(spoken - said, 0).sum(),
            np.maximum(said - spoken, 0).sum(),
            np.minimum(spoken, said).sum() - correct,
        ]
    )
    pairs = {i: j for i, j in enumerate(best) if i < len(true) and j < len(ours) and shared[i, j] > 0}
    return errors / spoken.sum(), pairs


def measure(made: Conversation, extractor: Extractor | None, numbers: Numbers) -> None:
    names, tracks = list(made.tracks), list(made.tracks.values())
    truth = np.stack([is_speaking(track) for track in tracks])
    found = find_voices(made.mixture, RATE)[:6]
    errors, pairs = diarization_error(truth, hypothesis(found, truth.shape[1]))
    add(numbers, "count right %", 100.0 * (len(found) == len(names)))
    for name, value in zip(("missed %", "false %", "confused %", "DER %"), (*errors, errors.sum()), strict=True):
        add(numbers, name, 100 * float(value))
    add(numbers, "overlap %", 100 * float((truth.sum(0) > 1).sum() / (truth.sum(0) > 0).sum()))
    if extractor is None:
        return
    for index, track in enumerate(tracks):
        own, other = truth[index], np.delete(truth, index, 0).any(axis=0)
        if index in pairs:
            piece = found[pairs[index]].enrollment(made.mixture, RATE)
            score(made, track, extractor.extract(made.mixture, RATE, extractor.enroll(piece, RATE)), numbers, "found")
        spoken = np.repeat(own, RATE // 100)
        given = extractor.enroll(track[: len(spoken)][spoken][: 10 * RATE], RATE)
        estimate = extractor.extract(made.mixture, RATE, given)
        score(made, track, estimate, numbers, "given")
        alone, absent = (np.repeat(mask, RATE // 100) for mask in (own & ~other, other & ~own))
        size = len(alone)
        if absent.sum() > RATE:
            ratio = np.square(estimate[:size][absent]).sum() / np.square(made.mixture[:size][absent]).sum()
            add(numbers, "other alone dB", float(10 * np.log10(ratio + 1e-12)))
        if alone.sum() > RATE:
            add(numbers, "own alone SI-SDR", float(si_sdr(estimate[:size][alone], track[:size][alone])))


def score(made: Conversation, track: np.ndarray, estimate: np.ndarray, numbers: Numbers, name: str) -> None:
    add(numbers, f"SI-SDRi {name}", float(si_sdr(estimate, track) - si_sdr(made.mixture, track)))


def add(numbers: Numbers, name: str, value: float) -> None:
    numbers.setdefault(name, []).append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--people", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--overlap", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-separation", action="store_true")
    args = parser.parse_args()
    corpus = list_corpus(args.corpus)
    extractor = None if args.no_separation else load(device="cpu")
    everything: Numbers = {}
    for people, overlap in itertools.product(args.people, args.overlap):
        numbers: Numbers = {}
        for _, made in draw_conversations(corpus, [people], [overlap], args.count, args.seconds, args.seed):
            measure(made, extractor, numbers)
        show(f"{people} people, {100 * overlap:.0f} % overlap", numbers)
        for name, values in numbers.items():
            everything.setdefault(name, []).extend(values)
    show("all", everything)


def show(title: str, numbers: Numbers) -> None:
    print(f"{title}: " + ", ".join(f"{name} {np.mean(values):.1f}" for name, values in numbers.items()), flush=True)


if __name__ == "__main__":
    main()
