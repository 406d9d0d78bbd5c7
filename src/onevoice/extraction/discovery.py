"""Finds who speaks when in a recording, without any enrollment.

1. `vad` finds the speech, which is cut into overlapping windows.
2. Each window is embedded by an encoder that is always the same, whatever network extracts: the speaker encoder of the
   published weights `ENCODER`. For 1.6 s of dev speech, two windows of one person have a cosine above 0.39 in 92 % of
   the cases, and two of different people in 8 %.
3. Windows are clustered: the two clusters of the highest mean similarity are joined until it falls below a threshold.
   Clusters of few windows are dropped.
4. Every window gets the nearest cluster. Changing the person from one window to the next has a price (Viterbi).

One person is named at a time: where two speak at once, it is the one who is heard better. docs/voices.md has the
measured errors.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn import functional as F

from onevoice.audio import Mono, resample
from onevoice.extraction.checkpoint import load_model, resolve
from onevoice.extraction.vad import Stretch, find_speech, runs_of
from onevoice.models import Network

RATE = 16_000
"""The rate in Hz of the sound to embed."""
ENCODER = "spexplus-small-16k-v1"
"""Published weights, whose bytes never change."""
BATCH = 16
WINDOW_SECONDS = 1.6
STEP_SECONDS = 0.4
"""From one window to the next."""
MIN_SIMILARITY = 0.65
"""Two clusters of a lower mean similarity are two people."""
MIN_WINDOWS = 5
"""Smaller clusters are dropped, unless none is left."""
CHANGE_PRICE = 0.1
"""What a change of the person must gain in similarity."""
MAX_CLUSTERED = 1500
"""Windows of long recordings that are clustered, evenly picked; the others get the nearest cluster."""
ENROLLMENT_SECONDS = 15.0
"""Solo speech that makes an enrollment."""

Embeddings = Float[np.ndarray, "_stretches dim"]
Centers = Float[np.ndarray, "_people dim"]


@dataclass(frozen=True)
class FoundVoice:
    """One person in a recording."""

    number: int
    """Counted from 1, in the order in which people begin to speak."""
    turns: tuple[Stretch, ...]
    """When the person speaks, in order."""
    solo: Stretch
    """The stretch in which this voice is heard best."""

    @property
    def seconds(self) -> float:
        """How long the person speaks in total."""
        return sum(end - begin for begin, end in self.turns)

    def enrollment(self, sound: Mono, sample_rate: int) -> Mono:
        """Return the best stretch and the longest turns, up to `ENROLLMENT_SECONDS`, as one sound."""
        chosen, seconds = [self.solo], self.solo[1] - self.solo[0]
        for begin, end in sorted(self.turns, key=lambda turn: turn[0] - turn[1]):
            if seconds >= ENROLLMENT_SECONDS / 2:
                break
            if end <= self.solo[0] or begin >= self.solo[1]:
                chosen.append((begin, end))
                seconds += end - begin
        pieces = [sound[round(begin * sample_rate) : round(end * sample_rate)] for begin, end in sorted(chosen)]
        return np.concatenate(pieces)[: round(ENROLLMENT_SECONDS * sample_rate)]


@torch.inference_mode()
def embed_stretches(stretches: Sequence[Mono]) -> Embeddings:
    """Return one embedding of length 1 for each stretch, all equally long; the product of two is their similarity."""
    parts = [torch.from_numpy(np.stack(stretches[first : first + BATCH])) for first in range(0, len(stretches), BATCH)]
    embeddings = torch.cat([F.normalize(_load_encoder().embed(part)) for part in parts])
    return np.asarray(embeddings.numpy())


@functools.cache
def _load_encoder() -> Network:
    """Load the encoder once."""
    return load_model(resolve(ENCODER))[0]


def find_voices(sound: Mono, sample_rate: int, speech: list[Stretch] | None = None) -> list[FoundVoice]:
    """Return the people who speak in a recording, in the order in which they begin; nobody for no speech.

    `speech` is what `find_speech` returned for the recording, if that was called before.
    """
    heard = resample(sound, sample_rate, RATE)
    speech = find_speech(heard, RATE) if speech is None else speech
    centers = [center for begin, end in speech for center in _window_centers(begin, end)]
    if not centers or len(heard) < RATE * WINDOW_SECONDS:
        return [FoundVoice(1, tuple(speech), max(speech, key=lambda turn: turn[1] - turn[0]))] if speech else []
    size = round(WINDOW_SECONDS * RATE)
    starts = np.clip(np.round(np.array(centers) * RATE).astype(int) - size // 2, 0, len(heard) - size)
    embeddings = embed_stretches([heard[start : start + size] for start in starts])
    picked = np.linspace(0, len(embeddings) - 1, min(len(embeddings), MAX_CLUSTERED)).round().astype(int)
    similarity = embeddings @ _find_people(embeddings[picked]).T
    labels = _label(similarity)
    turns = _turns(np.array(centers), labels, speech)
    found = [
        (turns[person], _best_stretch(np.array(centers), similarity, labels, person, turns[person]))
        for person in sorted(turns, key=lambda person: turns[person][0])
    ]
    return [FoundVoice(number, tuple(each), solo) for number, (each, solo) in enumerate(found, 1)]


def _window_centers(begin: float, end: float) -> list[float]:
    """Return the centers of windows over a stretch of speech, about `STEP_SECONDS` apart."""
    left = end - begin - WINDOW_SECONDS
    if left <= 0:
        return [(begin + end) / 2]
    half = WINDOW_SECONDS / 2
    return [float(center) for center in np.linspace(begin + half, end - half, int(np.ceil(left / STEP_SECONDS)) + 1)]


def cluster(embeddings: Embeddings, min_similarity: float) -> Int[np.ndarray, "_stretches"]:
    """Return a label from 0 for each embedding, by agglomerative clustering with average linkage."""
    count = len(embeddings)
    similarity = (embeddings @ embeddings.T).astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    sizes, labels = np.ones(count), np.arange(count)
    for _ in range(count - 1):
        kept, gone = divmod(int(similarity.argmax()), count)
        if similarity[kept, gone] < min_similarity:
            break
        joined = (sizes[kept] * similarity[kept] + sizes[gone] * similarity[gone]) / (sizes[kept] + sizes[gone])
        similarity[kept], similarity[:, kept] = joined, joined
        similarity[gone], similarity[:, gone] = -np.inf, -np.inf
        similarity[kept, kept] = -np.inf
        sizes[kept] += sizes[gone]
        labels[labels == gone] = kept
    return np.unique(labels, return_inverse=True)[1]


def _find_people(embeddings: Embeddings) -> Centers:
    """Return one center of length 1 for each person, the most frequent first; each is refined once."""
    labels = cluster(embeddings, MIN_SIMILARITY)
    sizes = np.bincount(labels)
    order = np.argsort(-sizes, kind="stable")
    kept = [label for label in order if sizes[label] >= MIN_WINDOWS] or [order[0]]
    centers = _normalize(np.stack([embeddings[labels == label].sum(axis=0) for label in kept]))
    nearest = (embeddings @ centers.T).argmax(axis=1)
    present = [person for person in range(len(centers)) if (nearest == person).any()]
    return _normalize(np.stack([embeddings[nearest == person].sum(axis=0) for person in present]))


def _normalize(vectors: Centers) -> Centers:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _label(similarity: Float[np.ndarray, "windows people"]) -> Int[np.ndarray, "_windows"]:
    """Return the person of each window: the path of the highest similarity, less the price of its changes."""
    windows, people = similarity.shape
    best = similarity[0].copy()
    came_from = np.tile(np.arange(people), (windows, 1))
    for window in range(1, windows):
        leader = int(best.argmax())
        is_change = best[leader] - CHANGE_PRICE > best
        came_from[window, is_change] = leader
        best = np.where(is_change, best[leader] - CHANGE_PRICE, best) + similarity[window]
    labels = np.full(windows, int(best.argmax()))
    for window in range(windows - 1, 0, -1):
        labels[window - 1] = came_from[window, labels[window]]
    return labels


def _turns(
    centers: Float[np.ndarray, "_windows"], labels: Int[np.ndarray, "_windows"], speech: list[Stretch]
) -> dict[int, list[Stretch]]:
    """Cut the speech halfway between windows of different people; return the turns of each person."""
    turns: dict[int, list[Stretch]] = {}
    for begin, end in speech:
        inside = np.flatnonzero((centers >= begin) & (centers <= end))
        changes = [index for index in inside[1:] if labels[index] != labels[index - 1]]
        cuts = [begin, *(float(centers[index - 1] + centers[index]) / 2 for index in changes), end]
        people = [labels[inside[0]], *(labels[index] for index in changes)]
        for person, first, last in zip(people, cuts, cuts[1:], strict=False):
            turns.setdefault(int(person), []).append((first, last))
    return turns


def _best_stretch(
    centers: Float[np.ndarray, "_windows"],
    similarity: Float[np.ndarray, "windows people"],
    labels: Int[np.ndarray, "_windows"],
    person: int,
    turns: list[Stretch],
) -> Stretch:
    """Return the part of a turn in which the person is clear: at least as similar as in half of all their windows.

    Of these parts it is the longest.
    """
    own = similarity[:, person]
    clear = (labels == person) & (own >= np.median(own[labels == person]))
    best = max(turns, key=lambda turn: turn[1] - turn[0])
    found = 0.0
    for begin, end in turns:
        inside = np.flatnonzero((centers >= begin) & (centers <= end))
        for first, last in runs_of(clear[inside]):
            part = (
                max(begin, float(centers[inside[first]]) - WINDOW_SECONDS / 2),
                min(end, float(centers[inside[last - 1]]) + WINDOW_SECONDS / 2),
            )
            if part[1] - part[0] > found:
                best, found = part, part[1] - part[0]
    return best
