"""Converts the sample rate of a stream, block by block, with its state as a value.

A low-pass filter (a sinc in a Kaiser window) with one phase for each position of an output sample between two input
samples. It looks ahead by `HALF_WIDTH` samples of the lower rate, 2 ms at 16 kHz, and outputs each sample as soon as
that much is known. soxr, which converts files, works in blocks of its own: its outputs come 37 ms late between 48 and
16 kHz and 115 ms late between 8 and 16 kHz.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from onevoice.audio import Mono, require_sample_rate

HALF_WIDTH = 32
"""Samples of the lower rate on each side of a position that its value depends on."""
CUTOFF = 0.92
"""Where the filter falls to one half, as a share of half the lower rate. It is 80 dB down at about that half."""
BETA = 8.0
"""Shape of the Kaiser window; 8 leaves 80 dB of attenuation."""


@dataclass(frozen=True)
class RateState:
    """The state of a conversion."""

    recent: Mono
    """The last input samples, which later outputs depend on."""
    first: int
    """Index of the first of them in the stream."""
    made: int = 0
    """Output samples so far."""


class RateConverter:
    """A conversion from one rate in Hz to another. It holds no state, so streams and threads may share it."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        for rate in (from_rate, to_rate):
            require_sample_rate(rate, "stream")
        common = math.gcd(from_rate, to_rate)
        self.up, self.down = to_rate // common, from_rate // common
        self.reach = 0 if self.up == self.down else math.ceil(HALF_WIDTH * max(1.0, from_rate / to_rate))
        """Input samples on each side of an output sample that it depends on."""
        self.delay_seconds = self.reach / from_rate

    def start(self) -> RateState:
        """Return the state at the start of a stream."""
        return RateState(np.zeros(self.reach, np.float32), -self.reach)

    def convert(self, samples: Mono, state: RateState, last: bool = False) -> tuple[Mono, RateState]:
        """Return the output samples that are known after `samples`, and the next state.

        Output sample i is at the time of sample i · down / up of the input. With `last`, silence follows the input, and
        the outputs cover its whole length.
        """
        if not self.reach:
            return samples, RateState(state.recent, state.first + len(samples), state.made + len(samples))
        heard = np.concatenate([state.recent, samples])
        end = state.first + len(heard)
        if last:
            heard = np.concatenate([heard, np.zeros(self.reach + 1, np.float32)])
        # The last output is the one whose last tap, at its whole position plus reach, has come in.
        known = -(-end * self.up // self.down) if last else max(0, end - self.reach) * self.up
        count = known if last else -(-known // self.down)
        place = np.arange(state.made, max(count, state.made), dtype=np.int64) * self.down
        output = self._at(heard, place // self.up - state.first, place % self.up)
        first = max(count, state.made) * self.down // self.up - self.reach + 1
        keep = max(0, min(first - state.first, len(heard)))
        return output, RateState(heard[keep:].copy(), state.first + keep, max(count, state.made))

    def _at(self, heard: Mono, whole: Int[np.ndarray, " out"], phase: Int[np.ndarray, " out"]) -> Mono:
        """Return the values at whole positions of `heard` plus a phase."""
        if not len(whole):
            return np.zeros(0, np.float32)
        taps = filter_bank(self.up, self.down)
        windows = np.lib.stride_tricks.sliding_window_view(heard, 2 * self.reach)
        return np.asarray(np.einsum("ot,ot->o", windows[whole - self.reach + 1], taps[phase]))


@functools.lru_cache(maxsize=8)
def filter_bank(up: int, down: int) -> Float[np.ndarray, "up taps"]:
    """Return the taps of each phase, from `reach` − 1 samples before the whole position to `reach` after it."""
    width = max(1.0, down / up)
    reach = math.ceil(HALF_WIDTH * width)
    offset = np.arange(1 - reach, reach + 1) - np.arange(up)[:, None] / up
    window = np.i0(BETA * np.sqrt(np.clip(1 - (offset / reach) ** 2, 0, None))) / np.i0(BETA)
    taps = np.sinc(offset * CUTOFF / width) * window
    return np.asarray(taps / taps.sum(1, keepdims=True), np.float32)
