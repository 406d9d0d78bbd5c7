"""What the page plays and draws: copies for listening, pictures, and other formats, all made in blocks.

All sounds of an extraction share one gain and one scale, so that loudness, waveforms and spectrograms can be compared.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from onevoice.audio import Block, Mono, to_mono
from onevoice.extraction.presence import Presence
from onevoice.extraction.recording import FULL_SCALE
from onevoice.report.sounds import envelope_of, power_db_of, spectrogram_uri
from onevoice.server.schemas import Overview, Picture
from onevoice.streams import keeps_peaks, open_source, write_together

TRACKS = ("mixture", "voice", "residual")
COLUMNS = 1000
"""Of a waveform."""

Blocks = Callable[[], Iterator[Block]]
"""Reads a sound from its beginning."""


@dataclass(frozen=True)
class Look:
    """What one pass over a sound shows."""

    envelope: Float[np.ndarray, "2 _columns"]
    levels_db: Float[np.ndarray, "_rows _columns"]
    peak: float
    """The largest sample of any channel."""
    rms_db: float
    """Relative to full scale."""


def blocks_of(path: Path) -> Blocks:
    """Return what reads a recording."""

    def read() -> Iterator[Block]:
        with open_source(path) as source:
            yield from source.blocks()

    return read


def tracks_of(folder: Path) -> dict[str, Blocks]:
    """Return the sounds of an extraction in `folder`. The mixture is the sum of the others, by what a residual is."""
    voice, residual = (blocks_of(folder / f"{name}.wav") for name in ("voice", "residual"))

    def mixture() -> Iterator[Block]:
        for one, other in zip(voice(), residual(), strict=True):
            yield one + other

    return {"mixture": mixture, "voice": voice, "residual": residual}


def look(read: Blocks, samples: int, sample_rate: int) -> Look:
    """Return what a sound looks like; its channels are averaged for the pictures."""
    peak, energy, count = 0.0, 0.0, 0

    def measured() -> Iterator[Mono]:
        nonlocal peak, energy, count
        for block in read():
            peak = max(peak, float(np.abs(block).max()))
            energy += float(np.square(block, dtype=np.float64).sum())
            count += block.size
            yield to_mono(block.T)

    envelope = envelope_of(measured(), samples, COLUMNS)
    levels = power_db_of((to_mono(block.T) for block in read()), samples, sample_rate)
    return Look(envelope, levels, peak, float(10 * np.log10(energy / max(count, 1) + 1e-12)))


def overview(looks: Mapping[str, Look], samples: int, sample_rate: int, presence: Presence | None = None) -> Overview:
    """Return the pictures of sounds on one scale."""
    peak = max(float(np.abs(each.envelope).max()) for each in looks.values())
    loudest = max(float(each.levels_db.max()) for each in looks.values())
    pictures = {}
    for name, each in looks.items():
        low, high = np.round(each.envelope / max(peak, 1e-9), 3).tolist()
        pictures[name] = Picture(low=low, high=high, spectrogram=spectrogram_uri(each.levels_db, loudest))
    levels = None if presence is None else _thin(presence.levels_db).tolist()
    return Overview(
        seconds=samples / sample_rate, sample_rate=sample_rate, pictures=pictures, presence_db=levels
    )  # fmt: skip


def _thin(levels: Float[np.ndarray, " frames"]) -> Float[np.ndarray, " _columns"]:
    """Return at most `COLUMNS` levels: the highest of each column."""
    columns = min(COLUMNS, len(levels))
    return np.round(np.maximum.reduceat(levels, np.arange(columns) * len(levels) // columns), 1)


def write_copy(read: Blocks, path: Path, samples: int, sample_rate: int, channels: int, peak: float) -> None:
    """Write a sound to another format, turned down if `peak` exceeds full scale. Raises `AudioError`, `StorageError`.

    The file has its name only when it is complete.
    """
    gain = np.float32(1.0 if peak <= 1.0 or keeps_peaks(path) else FULL_SCALE / peak)
    with write_together([path], sample_rate, channels, samples) as (write,):
        for block in read():
            write(block if gain == 1 else block * gain)
