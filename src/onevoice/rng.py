"""Randomness that belongs to a place, not to an order.

`derive(seed, "mix", 17)` is the same generator whoever asks for it, whenever and in whichever process, so
worker counts, resuming and the order of work never change what is drawn.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, *place: str | int) -> int:
    """Return a 128-bit seed for one place, e.g. `derive_seed(0, "train", epoch, index)`."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in place)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def derive(seed: int, *place: str | int) -> np.random.Generator:
    """Return a generator that is a function of `seed` and `place` alone."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *place)))
