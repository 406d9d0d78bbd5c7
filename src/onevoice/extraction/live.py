"""Runs a stream while its blocks arrive: from a microphone to a loudspeaker, or from file to file along the same path.

A device asks for its next block at fixed times and cannot wait. So its callback only hands over a block and takes one
(`Pump`), and a thread of its own pushes the blocks through the stream. If the thread falls behind, the oldest block
that waits is dropped; if its output is not there in time, silence is played. Both are counted.
"""

import contextlib
import importlib
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onevoice.audio import Mono, to_mono
from onevoice.errors import AudioError, ConfigError, MissingDependencyError
from onevoice.extraction.checkpoint import WEIGHTS, read_card, read_registry
from onevoice.extraction.stream import Stream
from onevoice.streams import check_outputs, open_source, write_together

BLOCK_SECONDS = 0.01
MAX_WAITING = 50
"""Blocks that wait for the thread at most, 0.5 s."""
HEAD_START = 2
"""Blocks that are ready before the first one is played, for computing times that vary."""
FLOOR_DB = -90.0
METER = 20
"""Characters of a level meter."""
METER_SECONDS = 0.2
"""Time between two readings."""


class Pump:
    """Pushes blocks through a stream in a thread, between a side that brings blocks and one that takes them."""

    def __init__(self, stream: Stream, max_waiting: int = MAX_WAITING) -> None:
        self.stream = stream
        self.dropped_blocks = 0
        """Blocks that were dropped because the stream is slower than real time."""
        self.underruns = 0
        """Times that the output ran dry."""
        self.levels_db = [FLOOR_DB, FLOOR_DB]
        """Peaks of the last blocks in and out, in dB relative to full scale."""
        self.error: Exception | None = None
        """What ended the thread."""
        self._waiting: queue.Queue[Mono | None] = queue.Queue(max_waiting)
        self._ready: Mono = np.zeros(0, np.float32)
        self._lock, self._is_playing = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)
        self._thread.start()

    def give(self, block: Mono) -> None:
        """Hand over a block without waiting."""
        while True:
            try:
                return self._waiting.put_nowait(block)
            except queue.Full:
                try:
                    self._waiting.get_nowait()
                    self.dropped_blocks += 1
                except queue.Empty:
                    continue

    def take(self, samples: int) -> Mono:
        """Return the next samples of the output without waiting: silence if they are not there yet."""
        with self._lock:
            enough = samples if self._is_playing else HEAD_START * samples
            if len(self._ready) < enough:
                self.underruns += self._is_playing
                self._is_playing = False
                return np.zeros(samples, np.float32)
            self._is_playing = True
            output, self._ready = self._ready[:samples], self._ready[samples:]
            return output

    def give_and_wait(self, block: Mono) -> Mono:
        """Hand over a block, wait if too many are waiting, and return what is ready, of any length."""
        while self._thread.is_alive():
            try:
                self._waiting.put(block, timeout=0.1)
                break
            except queue.Full:
                continue
        with self._lock:
            output, self._ready = self._ready, self._ready[:0]
            return output

    def finish(self) -> Mono:
        """Wait for all blocks, and return the rest of the output. Raises what ended the thread early."""
        while self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self._ready

    def _run(self) -> None:
        try:
            while (block := self._waiting.get()) is not None:
                self._add(self.stream.push(block), block)
            self._add(self.stream.flush(), np.zeros(0, np.float32))
        except Exception as error:  # is raised again by finish
            self.error = error

    def _add(self, output: Mono, block: Mono) -> None:
        with self._lock:
            self._ready = np.concatenate([self._ready, output])
            self.levels_db = [peak_db(block), peak_db(output)]


def peak_db(samples: Mono) -> float:
    """Return the peak in dB relative to full scale."""
    peak = float(np.abs(samples).max(initial=0.0))
    return max(FLOOR_DB, 20 * float(np.log10(peak))) if peak > 0 else FLOOR_DB


def status_line(pump: Pump) -> str:
    """Return level meters and counts in one line."""
    meters = []
    for name, level in zip(("in", "out"), pump.levels_db, strict=True):
        bars = round(METER * min(1.0, max(0.0, 1 + level / 60)))
        meters.append(f"{name} [{'#' * bars}{'-' * (METER - bars)}] {level:4.0f} dB")
    state = "extracting" if pump.stream.voice is not None else "listening for a voice"
    return "  ".join([*meters, state, counts(pump)])


def counts(pump: Pump) -> str:
    """Return what went wrong so far, in words."""
    return (
        f"underruns {pump.underruns}, dropped blocks {pump.dropped_blocks}, "
        f"silenced blocks {pump.stream.silenced_blocks}"
    )


def latency_line(stream: Stream, device_seconds: float = 0.0) -> str:
    """Return the latency in words; `device_seconds` is what blocks and devices add."""
    total = 1000 * (stream.latency_seconds + device_seconds)
    own = 1000 * stream.latency_seconds
    return f"latency {total:.0f} ms: {own:.0f} ms network and rates, {total - own:.0f} ms blocks and devices"


def run_file(source: str | Path, output: str | Path, open_stream: Callable[[int], Stream], force: bool = False) -> Pump:
    """Send a file through the path of the microphone, as fast as it goes, and write the output as long as the input.

    `open_stream` gets the rate of the file. Raises `AudioError` and `StorageError`.
    """
    check_outputs([output], [source], force)
    with open_source(source) as recording:
        pump = Pump(open_stream(recording.sample_rate))
        size = round(BLOCK_SECONDS * recording.sample_rate)

        with write_together([output], recording.sample_rate, 1, recording.samples or 0) as (write,):
            for block in recording.blocks():
                mono = to_mono(block.T)
                for first in range(0, len(mono), size):
                    write(pump.give_and_wait(mono[first : first + size])[:, None])
            write(pump.finish()[:, None])
    return pump


def run_devices(
    open_stream: Callable[[int], Stream],
    microphone: int | str | None,
    loudspeaker: int | str | None,
    seconds: float | None,
    say: Callable[[str], None],
) -> Pump:
    """Send the microphone to the loudspeaker for some seconds, or until the user interrupts.

    Devices are named by number or a part of their name; None is the default one. `say` gets a line with the latency,
    and then the meters, five times a second. Raises `AudioError` for devices that do not work.
    """
    sounddevice = _load_sounddevice()
    try:
        rate = round(sounddevice.query_devices(microphone, "input")["default_samplerate"])
        pump = Pump(open_stream(rate))

        def exchange(heard: Any, played: Any, samples: int, *_: Any) -> None:
            pump.give(heard[:, 0].copy())
            played[:] = pump.take(samples)[:, None]

        with sounddevice.Stream(
            samplerate=rate, blocksize=round(BLOCK_SECONDS * rate), device=(microphone, loudspeaker), channels=1,
            dtype="float32", callback=exchange,
        ) as device:  # fmt: skip
            say(latency_line(pump.stream, HEAD_START * BLOCK_SECONDS + sum(device.latency)))
            end = None if seconds is None else time.monotonic() + seconds
            with contextlib.suppress(KeyboardInterrupt):
                while pump.error is None and (end is None or time.monotonic() < end):
                    time.sleep(METER_SECONDS)
                    say(status_line(pump))
    except (sounddevice.PortAudioError, ValueError) as error:
        raise AudioError(f"live: {error}; onevoice live --devices lists what there is") from error
    pump.finish()
    return pump


def list_devices() -> str:
    """Return the sound devices of this machine, one per line."""
    return str(_load_sounddevice().query_devices())


def find_causal_weights() -> str:
    """Return the name of the newest published weights that can run in a stream. Raises `ConfigError`."""
    for name in reversed(read_registry().weights):
        if getattr(read_card(WEIGHTS / f"{name}.safetensors").config, "causal", False):
            return name
    raise ConfigError(
        "no causal weights are published yet; train a network with configs/causal_pool.json, and name its checkpoint "
        "with --pretrained"
    )


def _load_sounddevice() -> Any:
    try:
        return importlib.import_module("sounddevice")
    except ImportError as error:
        raise MissingDependencyError('live: needs sounddevice: pip install "onevoice[live]"') from error
    except OSError as error:
        raise MissingDependencyError(f"live: {error}; install PortAudio (apt install libportaudio2)") from error
