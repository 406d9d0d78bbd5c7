"""Random numbers that depend on a place, not on an order.

`derive(seed, "mix", 17)` returns the same generator at any time and in any process, so the number of workers, resuming
and the order of work never change what is drawn.
"""

import hashlib

import numpy as np
from jaxtyping import Float, Int, UInt64


def derive_seed(seed: int, *place: str | int) -> int:
    """Return a 128-bit seed for one place, for example `derive_seed(0, "train", epoch, index)`."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in place)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def derive(seed: int, *place: str | int) -> np.random.Generator:
    """Return a generator that depends only on `seed` and `place`."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *place)))


def uniform(
    seed: int, *place: str | int, index: Int[np.ndarray, " draws"], count: int
) -> Float[np.ndarray, "draws count"]:
    """Return `count` numbers in [0, 1) for each of many indices of one place, for example all trials of a batch.

    As with `derive`, row i depends only on (seed, place, index[i]), but thousands of rows cost no more than creating
    one generator: the counter (index, column) goes through the finalizer of SplitMix64 (Steele et al., OOPSLA 2014),
    keyed by the place.
    """
    low, high = divmod(derive_seed(seed, *place), 2**64)
    columns = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        state = _mix64(index.astype(np.uint64)[:, None] * _GOLDEN + np.uint64(low))
        state = _mix64(state + columns * _GOLDEN + np.uint64(high))
    numbers: np.ndarray = (state >> np.uint64(11)) * 2.0**-53
    return numbers


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix64(state: UInt64[np.ndarray, "*any"]) -> UInt64[np.ndarray, "*any"]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed
