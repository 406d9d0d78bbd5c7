"""How often `onevoice extract` is wrong about whether, and when, a voice is heard; and the threshold for new weights.

    python benchmarks/presence.py TRIALS [--pretrained NAME] [--table FILE.csv] [--limit N]

TRIALS is a folder of NAME-mixed.wav, NAME-ref.wav and NAME-target.wav; the target of an absent trial is silent. Each
present mixture is used twice more: with the enrollment of a third person, as an absent trial, and as a conversation
whose quarters hold the target alone, the other alone (twice) or both, in random order.

- Trials: the equal error rate, and the false silences and false outputs at the threshold in use.
- Halves: the threshold of equal error on the trials whose speakers are all in one half, and the errors that it gives
  on those of the other half. Needs the manifest of `onevoice mix`, or --table with the columns trial, target_spk,
  interferer_spk and enrollment_spk.
- Conversations: the share of frames that count as heard, by who speaks; and the output with and without muting, as the
  level where the other speaks alone, and as the SI-SDR where the target speaks alone and of the whole.
"""

import argparse
import csv
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onevoice.audio import Mono, read_audio
from onevoice.evaluation.metrics import si_sdr
from onevoice.evaluation.statistics import equal_error
from onevoice.extraction.extractor import Extractor, at_rate, load
from onevoice.extraction.presence import FRAME_SECONDS, Presence
from onevoice.extraction.windows import Spool

ACTIVE_DB = -30.0
"""A person speaks in frames that are not quieter than their loud frames by more than this."""


@dataclass(frozen=True)
class Outcome:
    """One trial: what was found, and what is true."""

    name: str
    speakers: frozenset[str]
    is_present: bool
    is_given: bool
    """Whether it is one of the folder, rather than one with a third enrollment."""
    presence: Presence


def run(extractor: Extractor, mixture: Mono, enrollment: Mono) -> tuple[Presence, Mono, Mono]:
    """Return the presence, and the output kept and muted."""
    rate = extractor.sample_rate
    with Spool() as heard, Spool() as estimate:
        heard.append(mixture)
        gain = extractor.separate(heard, estimate, extractor.enroll(enrollment, rate))
        presence = extractor.presence(heard, estimate)
        kept, muted = (
            np.concatenate(list(at_rate(estimate, gain, rate, rate, len(mixture), presence, absent_db)))
            for absent_db in (0.0, math.inf)
        )
    return presence, kept, muted


def errors(outcomes: Sequence[Outcome], threshold: float | None = None) -> str:
    """Describe the errors at a threshold, or at the one in use."""
    present, absent = ([each.presence for each in outcomes if each.is_present == kind] for kind in (True, False))
    used = present[0].threshold_db if threshold is None else threshold
    rate, best = equal_error([each.score_db for each in present], [each.score_db for each in absent])
    silences = np.mean([each.score_db < used for each in present])
    outputs = np.mean([each.score_db >= used for each in absent])
    return (
        f"{len(present)} present, {len(absent)} absent: EER {100 * rate:.1f} % (at {best:.2f} dB); at {used:.2f} dB "
        f"false silence {100 * silences:.1f} %, false output {100 * outputs:.1f} %"
    )


def conversation(mixture: Mono, target: Mono, rate: int, generator: np.random.Generator) -> tuple[Mono, Mono, Mono]:
    """Return target and other, each with its turns only, and their sum."""
    edges = np.linspace(0, len(mixture), 5).astype(int)
    turns = np.zeros((2, len(mixture)))
    for (first, last), kind in zip(
        itertools.pairwise(edges), generator.permutation([(1, 0), (0, 1), (0, 1), (1, 1)]), strict=True
    ):
        turns[:, first:last] = np.array(kind)[:, None]
    fade = np.hanning(rate // 50)
    ours, theirs = (np.convolve(turn, fade / fade.sum(), "same") for turn in turns)
    one, other = (ours * target).astype(np.float32), (theirs * (mixture - target)).astype(np.float32)
    return one, other, one + other


def is_active(sound: Mono, frames: int, rate: int) -> np.ndarray:
    """Return in which frames a person speaks."""
    hop = round(FRAME_SECONDS * rate)
    power = np.square(np.pad(sound, (0, frames * hop - len(sound))).astype(float).reshape(frames, hop)).mean(1)
    return np.asarray(power > 10 ** (ACTIVE_DB / 10) * np.percentile(power, 95))


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Return the level of one sound against another."""
    return float(10 * np.log10((np.square(one, dtype=float).sum() + 1e-20) / np.square(other, dtype=float).sum()))


class Conversations:
    """The counts and figures of all conversations."""

    def __init__(self) -> None:
        self.heard: dict[str, list[np.ndarray]] = {"target alone": [], "both": [], "other alone": []}
        self.figures: dict[str, list[float]] = {}
        self.missed = 0

    def add(self, extractor: Extractor, target: Mono, other: Mono, enrollment: Mono) -> None:
        """Extract from one conversation."""
        rate, mixture = extractor.sample_rate, target + other
        presence, kept, muted = run(extractor, mixture, enrollment)
        frames = len(presence.heard)
        ours, theirs = is_active(target, frames, rate), is_active(other, frames, rate)
        who = {"target alone": ours & ~theirs, "both": ours & theirs, "other alone": theirs & ~ours}
        for kind, where in who.items():
            self.heard[kind].append(presence.heard[where])
        self.missed += not presence.is_present
        hop = round(FRAME_SECONDS * rate)
        samples = {kind: np.repeat(where, hop)[: len(mixture)] for kind, where in who.items()}
        for name, output in (("kept", kept), ("muted", muted)):
            there, alone = samples["other alone"], samples["target alone"]
            if there.any():
                self._note(f"level where the other speaks alone, {name}", decibels(output[there], mixture[there]))
            if alone.sum() > rate // 2:
                self._note(f"SI-SDR where the target speaks alone, {name}", si_sdr(output[alone], target[alone]))
            self._note(f"SI-SDR of the whole, {name}", si_sdr(output, target) if output.any() else -60.0)

    def _note(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(max(value, -100.0))

    def print(self) -> None:
        """Print the figures."""
        for kind, frames in self.heard.items():
            print(f"  {kind}: {100 * np.concatenate(frames).mean():.1f} % of the frames are heard")
        for name, values in self.figures.items():
            print(f"  {name}: median {np.median(values):.1f} dB, quartiles {np.percentile(values, [25, 75]).round(1)}")
        print(f"  {self.missed} of {len(self.figures['SI-SDR of the whole, kept'])} count as without the voice")


def read_speakers(trials: Path, table: Path | None) -> dict[str, frozenset[str]]:
    """Return who takes part in each trial, from the table or from the manifest of `onevoice mix`."""
    manifest = trials / "manifest.jsonl"
    if table is not None:
        with table.open(newline="") as file:
            columns = ("target_spk", "interferer_spk", "enrollment_spk")
            return {row["trial"]: frozenset(row[key] for key in columns) for row in csv.DictReader(file)}
    if manifest.exists():
        rows = map(json.loads, manifest.read_text().splitlines())
        return {row["name"]: frozenset((row["target_speaker"], row["interferer_speaker"])) for row in rows}
    return {}


def measure(
    extractor: Extractor, sounds: dict[str, list[Mono]], speakers: dict[str, frozenset[str]]
) -> tuple[list[Outcome], Conversations]:
    """Extract from each trial, with a third enrollment, and from the conversation made of it."""
    outcomes, talks, names = [], Conversations(), list(sounds)
    for index, name in enumerate(names):
        mixture, enrollment, target = sounds[name]
        is_present = bool(np.abs(target).max() > 1e-6)
        known = speakers.get(name, frozenset())
        outcomes.append(Outcome(name, known, is_present, True, run(extractor, mixture, enrollment)[0]))
        if not is_present:
            continue
        generator = np.random.default_rng(index)
        strangers = [each for each in names if not speakers.get(each, frozenset([each])) & (known or {name})]
        other = strangers[generator.integers(len(strangers))]
        everyone = known | speakers.get(other, frozenset())
        outcomes.append(Outcome(name, everyone, False, False, run(extractor, mixture, sounds[other][1])[0]))
        one, theirs, _ = conversation(mixture, target, extractor.sample_rate, generator)
        if np.square(one).sum() < 0.05 * np.square(target).sum():
            continue  # the turns of the target are pauses
        talks.add(extractor, one, theirs, enrollment)
    return outcomes, talks


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="presence of a voice: errors and threshold")
    parser.add_argument("trials", type=Path)
    parser.add_argument("--pretrained")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    extractor = load(options.pretrained, device="cpu")
    extractor.require_level()
    rate = extractor.sample_rate
    speakers = read_speakers(options.trials, options.table)
    names = sorted(path.name.removesuffix("-mixed.wav") for path in options.trials.glob("*-mixed.wav"))
    names = names if options.limit is None else names[:: max(1, len(names) // options.limit)][: options.limit]
    sounds = {
        name: [read_audio(options.trials / f"{name}-{part}.wav", rate)[0] for part in ("mixed", "ref", "target")]
        for name in names
    }
    outcomes, talks = measure(extractor, sounds, speakers)
    if not all(each.is_present for each in outcomes if each.is_given):
        print("trials of the folder:", errors([each for each in outcomes if each.is_given]))
    print("and third enrollments:", errors(outcomes))
    everybody = sorted(set().union(*(each.speakers for each in outcomes)))
    if everybody:
        shuffled = np.random.default_rng(0).permutation(everybody)
        one_half = [each for each in outcomes if each.speakers <= set(shuffled[::2])]
        other_half = [each for each in outcomes if each.speakers <= set(shuffled[1::2])]
        scores = [[each.presence.score_db for each in one_half if each.is_present == kind] for kind in (True, False)]
        if all(scores) and {each.is_present for each in other_half} == {True, False}:
            print("one half of the speakers:", errors(one_half, threshold := equal_error(*scores)[1]))
            print("the other half:", errors(other_half, threshold))
    print("conversations:")
    talks.print()


if __name__ == "__main__":
    main()
