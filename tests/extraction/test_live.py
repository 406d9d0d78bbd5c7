"""The microphone's path: on files, with a device that is played by the test, and with a stream that is too slow."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from extraction.test_stream import EXTRACTOR, RATE, VOICE, noise, whole
from tiny import command, save_tiny

from onevoice.audio import read_audio, write_audio
from onevoice.errors import AudioError, MissingDependencyError
from onevoice.extraction import checkpoint, live
from onevoice.extraction.checkpoint import save_checkpoint
from onevoice.extraction.stream import Stream
from onevoice.extraction.voice import save_voice


def causal_checkpoint(folder: Path) -> tuple[Path, Path]:
    weights, voice = folder / "causal.safetensors", folder / "alice.voice"
    save_checkpoint(weights, EXTRACTOR.model.state_dict(), EXTRACTOR.card)
    save_voice(VOICE, voice)
    return weights, voice


def test_a_file_takes_the_same_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, voice = causal_checkpoint(tmp_path)
    sound = noise(5003)
    write_audio(tmp_path / "in.wav", sound, RATE)
    sound, _ = read_audio(tmp_path / "in.wav")
    words = ["live", "--input", tmp_path / "in.wav", "--output", tmp_path / "out.wav", "--pretrained", weights]
    outcome = command(capsys, *words, "--voice", voice)
    assert outcome.status == 0, outcome.err
    assert "latency 32 ms: 32 ms network and rates, 0 ms blocks and devices" in outcome.err
    assert "underruns 0, dropped blocks 0, silenced blocks 0" in outcome.err
    output, rate = read_audio(tmp_path / "out.wav")
    assert rate == RATE
    assert len(output) == len(sound)
    assert np.allclose(output, whole(sound), atol=1e-5)
    outcome = command(capsys, *words, "--force")
    assert "everything passed through" in outcome.err
    assert np.allclose(read_audio(tmp_path / "out.wav")[0], sound, atol=1e-6)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, _ = causal_checkpoint(tmp_path)
    assert "belong together" in command(capsys, "live", "--input", "a.wav").err
    outcome = command(capsys, "live", "--pretrained", save_tiny(tmp_path / "whole.safetensors"))
    assert outcome.status == 2
    assert "a stream needs a causal network" in outcome.err
    outcome = command(capsys, "live", "--pretrained", weights, "--input", "none.wav", "--output", tmp_path / "o.wav")
    assert outcome.status == 2
    assert "none.wav" in outcome.err


def test_without_published_causal_weights_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "read_registry", lambda: checkpoint.Registry())
    outcome = command(capsys, "live")
    assert outcome.status == 2
    assert "no causal weights are published yet" in outcome.err
    causal_checkpoint(tmp_path)
    published = SimpleNamespace(weights={"causal": None})
    monkeypatch.setattr(live, "read_registry", lambda: published)
    monkeypatch.setattr(live, "WEIGHTS", tmp_path)
    assert live.find_causal_weights() == "causal"


class Device:
    """Stands for sounddevice: a microphone with noise, and a loudspeaker that keeps what is played."""

    PortAudioError = OSError

    def __init__(self) -> None:
        self.heard: list[np.ndarray] = []
        self.played: list[np.ndarray] = []

    def query_devices(self, name: Any = None, kind: str | None = None) -> Any:
        if name == "broken":
            raise OSError("no such device")
        return {"default_samplerate": float(RATE)} if kind else "0 Toy microphone"

    def Stream(self, blocksize: int, callback: Any, **_: Any) -> "Device":
        self.blocksize, self.callback = blocksize, callback
        return self

    def __enter__(self) -> "Device":
        self.latency, self.is_open = (0.005, 0.01), True
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self.thread.join()

    def run(self) -> None:
        while self.is_open:
            heard, played = noise(self.blocksize, len(self.heard))[:, None], np.empty((self.blocksize, 1), np.float32)
            self.callback(heard, played, self.blocksize, None, None)
            self.heard.append(heard[:, 0])
            self.played.append(played[:, 0])
            time.sleep(0.002)


def test_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device, lines = Device(), []
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    pump = live.run_devices(lambda rate: EXTRACTOR.stream(None, rate), None, None, 0.5, lines.append)
    assert lines[0] == "latency 67 ms: 32 ms network and rates, 35 ms blocks and devices"
    assert lines[1].startswith("in [###")
    assert "listening for a voice" in lines[1]
    if not (pump.underruns or pump.dropped_blocks):  # as it is on a machine that is not busy
        played, heard = np.concatenate(device.played), np.concatenate(device.heard)
        begin = int(np.flatnonzero(played)[0])
        np.testing.assert_array_equal(played[begin:], heard[: len(played) - begin])
    assert command(capsys, "live", "--devices").out == "0 Toy microphone\n"
    with pytest.raises(AudioError, match="live: no such device; onevoice live --devices"):
        live.run_devices(lambda rate: EXTRACTOR.stream(None, rate), "broken", None, 0.1, lines.append)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingDependencyError, match=r"onevoice\[live\]"):
        live.list_devices()


class Slow:
    """An engine of hops of 10 samples that waits for permission before each step, and gives back what it hears."""

    sample_rate, hop = 1000, 10

    def __init__(self) -> None:
        self.go, self.error = threading.Semaphore(0), False

    def start(self) -> dict[str, np.ndarray]:
        return {"input": np.zeros((1, 10), np.float32)}

    def prepare(self, voice: Any) -> tuple[Any, ...]:
        return (voice,)

    def step(self, samples: np.ndarray, voice: Any, state: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        self.go.acquire()
        if self.error:
            raise AudioError("engine: broke")
        joined = np.concatenate([state["input"][0], samples])
        return joined[: len(samples)], {"input": joined[None, -10:]}


def test_a_slow_stream_drops_the_oldest_blocks_and_counts() -> None:
    engine = Slow()
    pump = live.Pump(Stream(engine, "voice", 1000), max_waiting=3)
    for number in range(1, 8):
        pump.give(np.full(10, number, np.float32))
        if number == 1:
            while not pump._waiting.empty():  # the thread takes the first one and waits
                time.sleep(0.001)
    assert pump.dropped_blocks == 3
    assert not pump.take(10).any()
    assert pump.underruns == 0  # nothing has been played yet
    engine.go.release(9)
    rest = pump.finish()
    assert rest[::10].tolist() == [1, 5, 6, 7]
    assert pump.take(10)[0] == 1
    for _ in range(3):
        pump.take(10)
    assert not pump.take(10).any()
    assert pump.underruns == 1
    assert live.counts(pump) == "underruns 1, dropped blocks 3, silenced blocks 0"


def test_an_error_in_the_thread_reaches_the_caller() -> None:
    engine = Slow()
    engine.error = True
    engine.go.release()
    pump = live.Pump(Stream(engine, "voice", 1000))
    pump.give(noise(10))
    with pytest.raises(AudioError, match="engine: broke"):
        pump.finish()
