"""One voice out of a running stream: blocks in, what is ready out, and the whole state as a value.

- The output is aligned with the input: `push` and `flush` together return as many samples as went in, in the type of
  the blocks. A sample comes out `latency_seconds` later: one window of the network, and the reach of the filters that
  convert the rate.
- The mixture is delayed by the same time, so that the estimate can be blended with it (`strength`) or replaced by it
  (no voice). Changes are faded over one hop.
- The level of the network's estimate stays as it is; a gain that fits a whole recording is not known in a stream. Where
  the voice has not been heard for a while, `absent_db` can turn it down.
- A block with NaN or infinite samples is replaced by silence and counted.

This module does not know how the network is run: an `Engine` does that, in PyTorch (`engine`) or ONNX Runtime
(`onnx`). The state has the same arrays for both.
"""

import math
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from onevoice.audio import Mono
from onevoice.errors import AudioError, ConfigError
from onevoice.extraction.resampling import RateConverter, RateState

Arrays = Mapping[str, Shaped[np.ndarray, "..."]]
Prepared = tuple[Any, ...]
"""What an engine makes of a voice."""
NETWORK = "network."
"""The beginning of the names of the network's own arrays in a state."""

HEARD_DB, ABSENT_DB = -6.0, -16.0
"""Levels of the estimate against the mixture: at the first, the voice is heard, at the second, it is not."""
WINDOW_SECONDS = 1.0
"""The time over which these levels fade by 1 / e."""
MOST_DB = 80.0
"""How far infinity turns down."""
POWER_FLOOR = 1e-10
"""−100 dB of full scale, so that silence has a level."""


@runtime_checkable
class Engine(Protocol):
    """Runs the steps of one network."""

    @property
    def sample_rate(self) -> int:
        """The rate in Hz at which the network works."""

    @property
    def hop(self) -> int:
        """Samples of one step; the output is one hop late."""

    def start(self) -> Arrays:
        """Return the state at the start of a stream."""

    def prepare(self, voice: Any) -> Prepared:
        """Return what the steps need of a voice. Raises `CheckpointError` for the voice of other weights."""

    def step(self, samples: Mono, voice: Prepared, state: Arrays) -> tuple[Mono, Arrays]:
        """Return the estimate, one hop behind `samples`, which are whole hops, and the next state."""


class Stream:
    """A stream of blocks out of which one voice is taken. Threads may share one stream, or one engine."""

    def __init__(
        self,
        engine: Engine,
        voice: Any,
        sample_rate: int,
        strength: float = 1.0,
        listen: Callable[[Mono], Any] | None = None,
        absent_db: float = 0.0,
    ) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._to_network = RateConverter(sample_rate, engine.sample_rate)
        self._from_network = RateConverter(engine.sample_rate, sample_rate)
        self.sample_rate = sample_rate
        """In Hz, of the blocks."""
        self.strength = strength
        self.absent_db = absent_db
        self._listen = listen
        """Gets each block until it returns a voice, which is then extracted."""
        self.voice: Any = voice
        """The voice to extract; None passes the mixture through."""
        self._prepared = None if voice is None else engine.prepare(voice)
        """The voice for the engine; also that of the last voice, until the fade away from it is over."""
        self.silenced_blocks = 0
        """Blocks that were replaced by silence because they had NaN or infinite samples."""
        self._input: RateState
        self._output: RateState
        self._network: Arrays
        self._waiting: Mono
        """Samples at the network's rate that do not fill a hop yet."""
        self._mixture: Mono
        """The last hop of the mixture, which the next one pushes out."""
        self._share: float
        """The share of the estimate at the end of the last hop."""
        self._powers: Shaped[np.ndarray, " two"]
        """Powers of mixture and estimate over the last time, summed with weights that fade."""
        self._gain: float
        """The gain for the estimate at the end of the last hop."""
        self._skip: int
        """Samples still to drop: the hop from before the start."""
        self._received: int
        self._returned: int
        self._dtype: np.dtype[Any]
        self._restart()

    @property
    def strength(self) -> float:
        """The share of the estimate in the output, from 0, the mixture, to 1."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if not 0 <= strength <= 1:
            raise ConfigError(f"strength: must lie between 0 and 1, not {strength}")
        self._strength = float(strength)

    @property
    def absent_db(self) -> float:
        """How far the estimate is turned down where the voice is not heard, in dB; infinity mutes, 0 leaves it."""
        return self._absent_db

    @absent_db.setter
    def absent_db(self, absent_db: float) -> None:
        if not absent_db >= 0:
            raise ConfigError(f"absent_db: must be 0 dB or more, not {absent_db}")
        self._absent_db = float(absent_db)

    @property
    def latency_seconds(self) -> float:
        """How much later than a sample went in it comes out, apart from the time to fill and compute a block."""
        converters = self._to_network.delay_seconds + self._from_network.delay_seconds
        return 2 * self._engine.hop / self._engine.sample_rate + converters

    def set_voice(self, voice: Any) -> None:
        """Extract another voice from now on; None passes the mixture through, with the same latency."""
        prepared = None if voice is None else self._engine.prepare(voice)
        with self._lock:
            self._set_voice(voice, prepared)

    def push(self, block: Shaped[np.ndarray, "..."], sample_rate: int | None = None) -> Shaped[np.ndarray, " _samples"]:
        """Return the samples that are ready after this block, in its type.

        A block is int16, or floats with full scale 1.0, `(samples,)` or `(channels, samples)`, of any length. Raises
        `AudioError` for other arrays, and for a `sample_rate` that is not that of the stream.
        """
        if sample_rate is not None and sample_rate != self.sample_rate:
            raise AudioError(
                f"stream: the rate changed from {self.sample_rate} to {sample_rate} Hz; flush, and open another stream"
            )
        samples, dtype = self._read(block)
        with self._lock:
            if self._listen is not None and (voice := self._listen(samples)) is not None:
                self._listen = None
                self._set_voice(voice, self._engine.prepare(voice))
            self._received += len(samples)
            heard, self._input = self._to_network.convert(samples, self._input)
            estimate = self._advance(np.concatenate([self._waiting, heard]))
            output, self._output = self._from_network.convert(estimate, self._output)
            self._returned, self._dtype = self._returned + len(output), dtype
            return _as_type(output, dtype)

    def flush(self) -> Shaped[np.ndarray, " _samples"]:
        """Return the rest of the output, and begin anew: the next block is the start of another recording."""
        with self._lock:
            heard, self._input = self._to_network.convert(np.zeros(0, np.float32), self._input, last=True)
            rest = np.concatenate([self._waiting, heard])
            count = len(rest) + self._engine.hop - self._skip
            padding = -len(rest) % self._engine.hop + self._engine.hop
            estimate = self._advance(np.pad(rest, (0, padding)))[:count]
            output, _ = self._from_network.convert(estimate, self._output, last=True)
            output = _as_type(output[: self._received - self._returned], self._dtype)
            self._restart()
            return output

    @property
    def state(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Where the stream is, as arrays by name, which `numpy.savez` can write.

        Setting it continues from there. The voice, the strength and `absent_db` are no part of it. Raises `ConfigError`
        for a state that does not fit.
        """
        with self._lock:
            numbers = [self._skip, self._received, self._returned, self.silenced_blocks, self._dtype == np.int16]
            state = {
                "rate": np.array(self.sample_rate),
                "numbers": np.array(numbers, np.int64),
                "share": np.array(self._share),
                "powers": self._powers,
                "gain": np.array(self._gain),
                "waiting": self._waiting,
                "mixture": self._mixture,
                "input": self._input.recent,
                "input_place": np.array([self._input.first, self._input.made]),
                "output": self._output.recent,
                "output_place": np.array([self._output.first, self._output.made]),
            }
            state |= {NETWORK + name: np.asarray(value) for name, value in self._network.items()}
            return {name: value.copy() for name, value in state.items()}

    @state.setter
    def state(self, state: Arrays) -> None:
        start = self._engine.start()
        network = {name: state[NETWORK + name] for name in start if NETWORK + name in state}
        if "rate" not in state or {k: v.shape for k, v in network.items()} != {k: v.shape for k, v in start.items()}:
            raise ConfigError("state: comes from a stream of another network; restore it with the weights it had")
        if int(state["rate"]) != self.sample_rate:
            raise ConfigError(f"state: comes from a stream of {int(state['rate'])} Hz, not {self.sample_rate} Hz")
        with self._lock:
            self._network = {name: value.copy() for name, value in network.items()}
            self._skip, self._received, self._returned, self.silenced_blocks, is_int16 = map(int, state["numbers"])
            self._dtype = np.dtype(np.int16 if is_int16 else np.float32)
            self._share = float(state["share"])
            self._gain, self._powers = 1.0, np.zeros(2)
            if "gain" in state:  # states of the first version have none
                self._gain, self._powers = float(state["gain"]), state["powers"].copy()
            self._waiting, self._mixture = state["waiting"].copy(), state["mixture"].copy()
            self._input = RateState(state["input"].copy(), *map(int, state["input_place"]))
            self._output = RateState(state["output"].copy(), *map(int, state["output_place"]))

    def _restart(self) -> None:
        self._input, self._output = self._to_network.start(), self._from_network.start()
        self._network = self._engine.start()
        self._waiting = np.zeros(0, np.float32)
        self._mixture = np.zeros(self._engine.hop, np.float32)
        self._share = 0.0 if self._prepared is None else self._strength
        self._powers, self._gain = np.zeros(2), 1.0
        self._skip = self._engine.hop
        self._received = self._returned = 0
        self._dtype = np.dtype(np.float32)

    def _set_voice(self, voice: Any, prepared: Prepared | None) -> None:
        if prepared is not None:
            if self._prepared is None and not self._skip:  # the network begins with the window of the last hop
                _, self._network = self._engine.step(self._mixture, prepared, self._network)
            self._prepared = prepared
            self._powers = np.zeros(2)  # the new voice may speak at once
        self.voice = voice

    def _advance(self, samples: Mono) -> Mono:
        """Return what the whole hops of `samples` bring out, and keep the rest of them waiting."""
        hop = self._engine.hop
        whole = len(samples) // hop * hop
        self._waiting = samples[whole:].copy()
        if not whole:
            return np.zeros(0, np.float32)
        heard = samples[:whole]
        output = np.concatenate([self._mixture, heard[:-hop]])
        if self._prepared is None:
            self._network = {**self._network, "input": output[None, -hop:].copy()}
        else:
            estimate, self._network = self._engine.step(heard, self._prepared, self._network)
            output = self._blend(output, self._turn_down(output, estimate))
        self._mixture = heard[-hop:].copy()
        skipped, self._skip = self._skip, max(0, self._skip - len(output))
        return output[skipped:]

    def _turn_down(self, mixture: Mono, estimate: Mono) -> Mono:
        """Turn the estimate down by up to `absent_db` where it has been much quieter than the mixture for a while."""
        hop = self._engine.hop
        fade = math.exp(-hop / (WINDOW_SECONDS * self._engine.sample_rate))
        gains = [self._gain]
        for powers in np.square([mixture, estimate], dtype=np.float64).reshape(2, -1, hop).mean(2).T:
            self._powers = fade * self._powers + powers
            heard, own = self._powers + POWER_FLOOR
            absence = (HEARD_DB - 10 * math.log10(own / heard)) / (HEARD_DB - ABSENT_DB)
            gains.append(10 ** (-min(self._absent_db, MOST_DB) * min(1.0, max(0.0, absence)) / 20))
        self._gain = gains[-1]
        if min(gains) == 1.0:
            return estimate
        places = np.arange(1, len(estimate) + 1) / hop
        return (estimate * np.interp(places, np.arange(len(gains)), gains)).astype(np.float32)

    def _blend(self, mixture: Mono, estimate: Mono) -> Mono:
        target = 0.0 if self.voice is None else self._strength
        shares = np.full(len(mixture), target, np.float32)
        if self._share != target:
            shares[: self._engine.hop] = np.linspace(self._share, target, self._engine.hop + 1)[1:]
        self._share = target
        if self.voice is None:  # faded out: the network starts anew with the next voice
            self._prepared = None
            self._network = {**self._engine.start(), "input": mixture[None, -self._engine.hop :].copy()}
        return np.asarray(shares * estimate + (1 - shares) * mixture)

    def _read(self, block: Shaped[np.ndarray, "..."]) -> tuple[Mono, np.dtype[Any]]:
        """Return a block as mono floats, silenced if it is not finite, and the type of the output."""
        array = np.asarray(block)
        if array.ndim not in (1, 2) or not (array.dtype == np.int16 or np.issubdtype(array.dtype, np.floating)):
            raise AudioError(
                f"stream: a block is {array.dtype} of shape {array.shape}; give int16 or floats, (samples,) or "
                "(channels, samples)"
            )
        if array.ndim == 2:
            array = array.mean(axis=0) if len(array) > 1 else array[0]
        dtype = np.dtype(np.int16 if np.asarray(block).dtype == np.int16 else np.float32)
        samples = (array / 32768 if dtype == np.int16 else array).astype(np.float32)
        if not np.isfinite(samples).all():
            self.silenced_blocks += 1
            if self.silenced_blocks == 1:
                warnings.warn("stream: a block with NaN or infinite samples became silence", RuntimeWarning, 3)
            samples = np.zeros_like(samples)
        return samples, dtype


def _as_type(samples: Mono, dtype: np.dtype[Any]) -> Shaped[np.ndarray, " _samples"]:
    if dtype == np.int16:
        return np.asarray(np.clip(np.rint(samples * 32768), -32768, 32767), np.int16)
    return samples
