"""Where in a recording a voice is heard, and whether it is in it at all.

The evidence is the level of the network's estimate against that of the mixture, in short windows and before any gain.
A network trained with `loss.level` turns its estimate down where the voice is absent, so the level is near 0 dB where
the person speaks alone and −20 dB or less where somebody else does. Networks without a level of their own tell nothing.

- The score of a recording is the level that is exceeded for `NEEDED_SECONDS` in total, or for `NEEDED_SHARE` of a long
  recording. The voice is in the recording if the score reaches the threshold.
- A stretch in which the voice is heard stays above `OFF_DB` and reaches `ON_DB`.

`benchmarks/presence.py` measures how often both are wrong, and prints the threshold for new weights. The card of the
weights may name it as the fact `presence_threshold_db`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from onevoice.extraction.vad import runs_of
from onevoice.extraction.windows import Spool, measure_level
from onevoice.files import atomic_write

FRAME_SECONDS = 0.05
"""Time between two levels."""
WINDOW_FRAMES = 5
"""Frames around a level that count for it: an odd number."""
SILENCE_DB = -40.0
"""Windows of the mixture that are quieter than its mean power by this much hold no voice."""
FLOOR_DB = -60.0
"""The lowest level; also that of silence."""

THRESHOLD_DB = -2.3
"""The smallest score of a recording with the voice in it: the equal error rate of the default weights."""
NEEDED_SECONDS = 0.5
NEEDED_SHARE = 0.01

ON_DB, OFF_DB = -4.0, -10.0
MIN_STRETCH_SECONDS = 0.2
"""Shorter stretches are dropped."""
MIN_PAUSE_SECONDS = 0.3
"""Shorter pauses within a stretch are closed."""
MARGIN_SECONDS = 0.2
"""What `gains` keeps before and after a stretch."""


@dataclass(frozen=True)
class Presence:
    """How well a voice is heard over time, and what follows from it."""

    levels_db: Float[np.ndarray, " frames"]
    """Level of the voice against the mixture, one per `FRAME_SECONDS`."""
    seconds: float
    """Length of the recording."""
    threshold_db: float = THRESHOLD_DB

    @cached_property
    def score_db(self) -> float:
        """One number for the whole recording: the higher, the surer it is that the voice is in it."""
        needed = max(NEEDED_SECONDS / FRAME_SECONDS, NEEDED_SHARE * len(self.levels_db))
        rank = min(int(needed), len(self.levels_db) - 1)
        return float(np.sort(self.levels_db)[::-1][rank])

    @property
    def is_present(self) -> bool:
        """Whether the voice is in the recording."""
        return self.score_db >= self.threshold_db

    @cached_property
    def heard(self) -> Bool[np.ndarray, " frames"]:
        """Whether the voice is heard, per frame; nowhere in a recording without it."""
        if not self.is_present:
            return np.zeros(len(self.levels_db), bool)
        frames = _keep_runs(self.levels_db >= OFF_DB, containing=self.levels_db >= ON_DB)
        frames = ~_keep_runs(~frames, longer_than=round(MIN_PAUSE_SECONDS / FRAME_SECONDS), keep_ends=True)
        return _keep_runs(frames, longer_than=round(MIN_STRETCH_SECONDS / FRAME_SECONDS) - 1)

    @property
    def share(self) -> float:
        """The share of the recording in which the voice is heard, 0 to 1."""
        return float(self.heard.mean())

    @cached_property
    def stretches(self) -> list[tuple[float, float]]:
        """Begin and end, in seconds, of each stretch in which the voice is heard."""
        return [(first * FRAME_SECONDS, min(last * FRAME_SECONDS, self.seconds)) for first, last in runs_of(self.heard)]

    def text(self) -> str:
        """Return the result in a few words."""
        if not self.is_present:
            return "this voice does not seem to be in it"
        share = 100 * self.share
        return f"heard in {'less than 1' if share < 1 else f'{share:.0f}'} % of the recording"

    def gains(self, first: int, last: int, sample_rate: int, absent_db: float) -> Float[np.ndarray, " samples"]:
        """Return a factor per sample that turns the voice down by `absent_db` where it is not heard.

        It is 1 in each stretch and `MARGIN_SECONDS` around it, and fades over one frame. `first` and `last` bound the
        samples at `sample_rate`; an infinite `absent_db` mutes.
        """
        margin = round(MARGIN_SECONDS / FRAME_SECONDS)
        kept = np.convolve(np.pad(self.heard, margin), np.ones(2 * margin + 1), "valid") > 0.5
        factors = np.where(kept, 1.0, 10 ** (-absent_db / 20))
        position = (np.arange(first, last) + 0.5) / (sample_rate * FRAME_SECONDS) - 0.5
        return np.asarray(np.interp(position, np.arange(len(factors)), factors))


def measure_presence(mixture: Spool, estimate: Spool, sample_rate: int, threshold_db: float = THRESHOLD_DB) -> Presence:
    """Return the presence of a voice from the estimate of a network, before any gain, and its mixture.

    Memory grows by 8 bytes per frame, less than 2 MB per hour.
    """
    hop = round(FRAME_SECONDS * sample_rate)
    mean = measure_level(mixture).mean
    powers = [_frame_powers(mixture, hop, mean), _frame_powers(estimate, hop, 0.0)]
    window = np.ones(WINDOW_FRAMES) / WINDOW_FRAMES
    theirs, ours = (np.convolve(np.pad(power, WINDOW_FRAMES // 2), window, "valid") for power in powers)
    floor = 10 ** (SILENCE_DB / 10) * float(powers[0].mean())
    has_sound = theirs > max(floor, np.finfo(np.float32).tiny)
    ratio = np.divide(ours, theirs, out=np.zeros_like(ours), where=has_sound)
    levels = 10 * np.log10(np.maximum(ratio, 10 ** (FLOOR_DB / 10)))
    return Presence(levels, mixture.samples / sample_rate, threshold_db)


def join(tracks: Sequence[Presence]) -> Presence:
    """Return the presence in several channels of one recording: where the voice is heard in any of them."""
    levels = np.stack([each.levels_db for each in tracks]).max(axis=0)
    return Presence(levels, tracks[0].seconds, tracks[0].threshold_db)


def _frame_powers(spool: Spool, hop: int, mean: float) -> Float[np.ndarray, " frames"]:
    """Return the mean power of each frame of `hop` samples; the last one is padded with silence."""
    powers = []
    step = 1000 * hop
    for first in range(0, spool.samples, step):
        block = spool.read(first, first + step).astype(np.float64) - mean
        padded = np.pad(block, (0, -len(block) % hop))
        powers.append(np.square(padded.reshape(-1, hop)).mean(axis=1))
    return np.concatenate(powers) if powers else np.zeros(1)


def _keep_runs(
    frames: Bool[np.ndarray, " frames"],
    *,
    containing: Bool[np.ndarray, " frames"] | None = None,
    longer_than: int = 0,
    keep_ends: bool = False,
) -> Bool[np.ndarray, " frames"]:
    """Return `frames` without the runs that are too short or contain no frame of `containing`.

    With `keep_ends`, runs at the beginning and the end are kept.
    """
    kept = np.zeros(len(frames), bool)
    for first, last in runs_of(frames):
        is_end = keep_ends and (first == 0 or last == len(frames))
        if is_end or (last - first > longer_than and (containing is None or containing[first:last].any())):
            kept[first:last] = True
    return kept


def write_timeline(presence: Presence, path: Path, recording: str, voice: str) -> None:
    """Write the stretches in which the voice is heard, in the format of the extension (`TIMELINES`).

    `recording` and `voice` are names for the file. Raises `StorageError`.
    """
    atomic_write(path, TIMELINES[path.suffix.lower()](presence, _word(recording), _word(voice)).encode())


def _csv(presence: Presence, recording: str, voice: str) -> str:
    """Begin and end in seconds, and the mean level of the voice against the mixture in dB."""
    lines = ["recording,voice,begin_seconds,end_seconds,level_db"]
    for begin, end in presence.stretches:
        first, last = round(begin / FRAME_SECONDS), math.ceil(end / FRAME_SECONDS - 1e-6)
        level = float(presence.levels_db[first:last].mean())
        lines.append(f"{recording},{voice},{begin:.3f},{end:.3f},{level:.1f}")
    return "\n".join(lines) + "\n"


def _rttm(presence: Presence, recording: str, voice: str) -> str:
    """The Rich Transcription Time Marked format (NIST RT-09 evaluation plan, appendix A)."""
    return "".join(
        f"SPEAKER {recording} 1 {begin:.3f} {end - begin:.3f} <NA> <NA> {voice} <NA> <NA>\n"
        for begin, end in presence.stretches
    )


def _labels(presence: Presence, recording: str, voice: str) -> str:
    """A label track of Audacity."""
    return "".join(f"{begin:.3f}\t{end:.3f}\t{voice}\n" for begin, end in presence.stretches)


def _word(name: str) -> str:
    """Return a name without spaces, commas and quotes, which separate fields."""
    return re.sub(r"[\s,\"']+", "_", name) or "_"


TIMELINES: dict[str, Callable[[Presence, str, str], str]] = {".csv": _csv, ".rttm": _rttm, ".txt": _labels}
"""How a timeline is written, by extension; .txt is a label track of Audacity."""
