"""Finding and removing silence by level, as `librosa.effects.trim` and `librosa.effects.split` do.

A frame is the 2048 samples centred on every 512th sample, zeros beyond the ends; it counts as sound when its
mean square is less than `top_db` below that of the loudest frame. Sound without any energy has no such frame.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

FRAME = 2048
HOP = 512

Mono = Float[np.ndarray, "samples"]


def trim(samples: Mono, top_db: float) -> Float[np.ndarray, "shorter"]:
    """Cut off what lies before the first and after the last frame of sound; empty for silence."""
    frames = np.flatnonzero(_sounding(samples, top_db))
    if not frames.size:
        return samples[:0]
    return samples[frames[0] * HOP : (frames[-1] + 1) * HOP]


def split(samples: Mono, top_db: float) -> Int[np.ndarray, "intervals 2"]:
    """Return first sample and last sample + 1 of each run of sounding frames, in order."""
    changes = np.diff(_sounding(samples, top_db).astype(np.int8), prepend=0, append=0)
    edges = np.flatnonzero(changes).reshape(-1, 2) * HOP
    return np.minimum(edges, len(samples))


def vad_merge(samples: Mono, top_db: float) -> Float[np.ndarray, "shorter"]:
    """Return the runs of sounding frames joined without what lay between them; empty for silence."""
    pieces = [samples[first:last] for first, last in split(samples, top_db)]
    return np.concatenate(pieces) if pieces else samples[:0]


def _sounding(samples: Mono, top_db: float) -> Bool[np.ndarray, "frames"]:
    """Say for each frame whether it is sound. A frame is four hops, so each square is summed once."""
    count = 1 + len(samples) // HOP
    reach = FRAME // HOP
    squares = np.zeros((count + reach - 1) * HOP)
    np.square(samples, out=squares[FRAME // 2 : FRAME // 2 + len(samples)], dtype=np.float64)
    hops = squares.reshape(-1, HOP).sum(axis=1)
    energies = sum(hops[offset : offset + count] for offset in range(reach))
    return np.asarray(energies > np.max(energies) * 10 ** (-top_db / 10))
