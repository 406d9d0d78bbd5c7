"""A stream against the whole, for any blocks, rates and threads; its state, its fades, and blocks that do not fit."""

import resource
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SMALL_CONFIGS
from torch import nn

from onevoice.audio import Mono
from onevoice.errors import AudioError, CheckpointError, ConfigError
from onevoice.extraction import engine
from onevoice.extraction import stream as stream_module
from onevoice.extraction.checkpoint import Card
from onevoice.extraction.discovery import FoundVoice
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.stream import Stream
from onevoice.extraction.voice import Voice
from onevoice.models import BandSplitConfig, build

base = SMALL_CONFIGS["bandsplit"]
assert isinstance(base, BandSplitConfig)
CAUSAL = replace(base, causal=True, normalize_level=False, level_seconds=0.1)
RATE, HOP = CAUSAL.sample_rate, CAUSAL.hop


def causal_extractor() -> Extractor:
    torch.manual_seed(0)
    model = build(CAUSAL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Extractor(model, Card(CAUSAL))


EXTRACTOR = causal_extractor()
VOICE, OTHER = (Voice(torch.randn(1, 4 * 7 * 8, generator=torch.Generator().manual_seed(seed)), EXTRACTOR.model_hash)
                for seed in (1, 2))  # fmt: skip


def noise(samples: int, seed: int = 0) -> Mono:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def push_all(stream: Stream, sound: np.ndarray, sizes: list[int]) -> np.ndarray:
    parts, first = [], 0
    while first < len(sound):
        size = sizes[len(parts) % len(sizes)]
        parts.append(stream.push(sound[first : first + size]))
        first += size
    return np.concatenate([*parts, stream.flush()])


@torch.inference_mode()
def whole(sound: Mono) -> Mono:
    return EXTRACTOR.model.extract(torch.from_numpy(sound)[None], VOICE.embedding)[0][0].numpy()


SOUND = noise(3001)
WHOLE = whole(SOUND)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=6).filter(any))
def test_blocks_add_up_to_the_whole(sizes: list[int]) -> None:
    output = push_all(EXTRACTOR.stream(VOICE, RATE), SOUND, sizes)
    assert output.dtype == np.float32
    assert len(output) == len(SOUND)
    assert np.abs(output - WHOLE).max() < 1e-5 * np.abs(WHOLE).max()


@pytest.mark.parametrize("samples", [0, 1, HOP - 1, HOP, HOP + 1])
def test_short_streams_and_a_block_of_ten_seconds(samples: int) -> None:
    stream = EXTRACTOR.stream(VOICE, RATE)
    for sound in (noise(samples), noise(10 * RATE)):  # the second one after a flush, as a new recording
        output = push_all(stream, sound, [10**6])
        assert len(output) == len(sound)
        assert np.allclose(output, whole(sound) if len(sound) else sound, atol=1e-5)


@pytest.mark.parametrize("rate", [44_100, 48_000, 16_000])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_other_rates_are_aligned_and_as_late_as_stated(rate: int, strength: float) -> None:
    stream = EXTRACTOR.stream(VOICE, rate, strength)
    time = np.arange(rate // 2 + 3) / rate
    sound = (0.1 * np.sin(2 * np.pi * 700 * time) * np.hanning(len(time))).astype(np.float32)
    heard, made, parts = 0, 0, []
    for first in range(0, len(sound), rate // 100):
        block = sound[first : first + rate // 100]
        parts.append(stream.push(block, rate))
        heard, made = heard + len(block), made + len(parts[-1])
        assert made >= heard - stream.latency_seconds * rate - 2
    output = np.concatenate([*parts, stream.flush()])
    assert len(output) == len(sound)
    if strength == 0:
        assert np.abs(output - sound).max() < 1e-4


def test_int16_comes_back_as_int16() -> None:
    sound = (SOUND * 32767).astype(np.int16)
    output = push_all(EXTRACTOR.stream(VOICE, RATE), sound, [441])
    assert output.dtype == np.int16
    wanted = np.clip(np.rint(whole((sound / 32768).astype(np.float32)) * 32768), -32768, 32767)
    assert np.abs(output - wanted).max() <= 1


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_a_state_can_be_saved_and_continued(rate: int, tmp_path: Path) -> None:
    stream = EXTRACTOR.stream(VOICE, rate)
    stream.push(noise(1777))
    np.savez(tmp_path / "state.npz", **stream.state)
    rest, other = noise(2222, seed=1), EXTRACTOR.stream(VOICE, rate)
    other.state = np.load(tmp_path / "state.npz")
    first, kept = push_all(stream, rest, [100]), other.state
    np.testing.assert_array_equal(first, push_all(other, rest, [100]))
    other.state = kept
    np.testing.assert_array_equal(first, push_all(other, rest, [100]))
    other.state = {name: value for name, value in kept.items() if name not in ("powers", "gain")}  # an earlier one
    np.testing.assert_array_equal(first, push_all(other, rest, [100]))
    with pytest.raises(ConfigError, match="a stream of"):
        EXTRACTOR.stream(VOICE, 16_000).state = kept
    with pytest.raises(ConfigError, match="another network"):
        other.state = {name: value for name, value in kept.items() if name != "network.overlap"}


def test_strength_blends_and_no_voice_passes_through() -> None:
    for strength in (0.0, 0.25):
        output = push_all(EXTRACTOR.stream(VOICE, RATE, strength), SOUND, [100])
        assert np.allclose(output, strength * WHOLE + (1 - strength) * SOUND, atol=1e-6)
    np.testing.assert_array_equal(push_all(EXTRACTOR.stream(None, RATE), SOUND, [333]), SOUND)


class Dial:
    """An engine whose estimate is the mixture at full level, 30 dB down from second 2 to 8, and at full level again."""

    sample_rate, hop = 8000, 80

    def start(self) -> dict[str, np.ndarray]:
        return {"input": np.zeros((1, self.hop), np.float32), "place": np.array([-self.hop])}

    def prepare(self, voice: Any) -> tuple[Any, ...]:
        return (voice,)

    def step(self, samples: Mono, voice: Any, state: Any) -> tuple[Mono, dict[str, np.ndarray]]:
        heard = np.concatenate([state["input"][0], samples])
        seconds = (state["place"] + np.arange(len(samples))) / self.sample_rate
        levels = np.where((seconds >= 2) & (seconds < 8), 10**-1.5, 1.0).astype(np.float32)
        place = state["place"] + len(samples)
        return heard[: len(samples)] * levels, {"input": heard[None, -self.hop :], "place": place}


@pytest.mark.parametrize(("absent_db", "least_db"), [(0.0, -30.0), (20.0, -50.0), (np.inf, -110.0)])
def test_where_the_voice_is_not_heard_the_output_is_turned_down(absent_db: float, least_db: float) -> None:
    """Not at once, but the voice comes back at once, and never louder than the network has it."""
    mixture = noise(10 * 8000)
    output = push_all(Stream(Dial(), VOICE, 8000, absent_db=absent_db), mixture, [333, 100])
    powers = [np.square(sound.astype(np.float64)).reshape(-1, 800).mean(1) for sound in (output, mixture)]
    levels = 10 * np.log10(powers[0] / powers[1])  # in tenths of a second
    np.testing.assert_allclose(levels[:20], 0, atol=1e-4)
    np.testing.assert_allclose(levels[20:32], -30, atol=1e-3)
    np.testing.assert_allclose(levels[60:80], least_db, atol=0.01)
    assert (np.diff(levels[20:80]) < 1e-3).all()
    assert (np.diff(levels[80:90]) > -1e-3).all()
    np.testing.assert_allclose(levels[84:], 0, atol=1e-4)


def test_how_far_it_is_turned_down_depends_on_no_blocks_and_survives_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition, hop by hop over the whole."""
    monkeypatch.setattr(stream_module, "HEARD_DB", 15.0)  # the network of the tests is loud
    monkeypatch.setattr(stream_module, "ABSENT_DB", 0.0)
    quiet = noise(40 * HOP) * np.linspace(0, 1, 40 * HOP, dtype=np.float32) ** 4
    estimate, fade = whole(quiet), np.exp(-HOP / RATE)
    hops = np.square([quiet, estimate], dtype=np.float64).reshape(2, -1, HOP).mean(2)
    gains, powers = [1.0], np.zeros(2)
    for pair in hops.T:
        powers = fade * powers + pair
        level = 10 * np.log10((powers[1] + 1e-10) / (powers[0] + 1e-10))
        gains.append(10 ** (-12 * np.clip((15 - level) / 15, 0, 1) / 20))
    assert len(set(gains)) > 20
    wanted = estimate * np.interp(np.arange(1, 40 * HOP + 1) / HOP, np.arange(len(gains)), gains)
    stream = EXTRACTOR.stream(VOICE, RATE, absent_db=12.0)
    for sizes in ([100], [7, 900]):
        np.testing.assert_allclose(push_all(stream, quiet, sizes), wanted, atol=1e-5)
    first = stream.push(quiet[:777])
    other = EXTRACTOR.stream(VOICE, RATE, absent_db=12.0)
    other.state = stream.state
    joined = np.concatenate([first, other.push(quiet[777:]), other.flush()])
    np.testing.assert_allclose(joined, wanted, atol=1e-5)


def test_voices_can_change_at_any_time() -> None:
    """From none to one: a fade over one hop, then the estimate of a network whose first window is the last one."""
    stream = EXTRACTOR.stream(None, RATE)
    before = 10 * HOP
    parts = [stream.push(SOUND[:before])]
    stream.set_voice(VOICE)
    parts.append(stream.push(SOUND[before:2000]))
    stream.set_voice(OTHER)
    parts.append(stream.push(SOUND[2000:2500]))
    stream.set_voice(None)
    parts += [stream.push(SOUND[2500:]), stream.flush()]
    output = np.concatenate(parts)
    np.testing.assert_array_equal(output[: before - HOP], SOUND[: before - HOP])
    engine = EXTRACTOR.engine
    state = {**engine.start(), "input": SOUND[None, before - 2 * HOP : before - HOP]}
    late, _ = engine.step(SOUND[before - HOP : 15 * HOP], engine.prepare(VOICE), state)
    assert np.allclose(output[before : 14 * HOP], late[2 * HOP :], atol=1e-5)
    assert not np.allclose(output[2100:2400], WHOLE[2100:2400], atol=1e-3)
    np.testing.assert_array_equal(output[2500 + HOP :], SOUND[2500 + HOP :])
    # Set before the first block, a voice is there from the start.
    stream.set_voice(VOICE)
    assert np.allclose(push_all(stream, SOUND, [100]), WHOLE, atol=1e-5)


def test_a_block_with_nan_becomes_silence_and_is_counted() -> None:
    stream, damaged, silent = EXTRACTOR.stream(VOICE, RATE), SOUND.copy(), SOUND.copy()
    damaged[1050], silent[1000:1100] = np.nan, 0
    with pytest.warns(RuntimeWarning, match="became silence"):
        output = push_all(stream, damaged, [100])
    assert np.allclose(output, whole(silent), atol=1e-5)
    assert stream.silenced_blocks == 1


def test_what_is_refused() -> None:
    stream = EXTRACTOR.stream(VOICE, RATE)
    with pytest.raises(AudioError, match="the rate changed from 8000 to 16000 Hz"):
        stream.push(SOUND, 16_000)
    with pytest.raises(AudioError, match="a block is int32 of shape"):
        stream.push(np.zeros(10, np.int32))
    with pytest.raises(AudioError, match="sample rate of 10 Hz"):
        EXTRACTOR.stream(VOICE, 10)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        EXTRACTOR.stream(VOICE, RATE, 1.5)
    for absent_db in (-1.0, np.nan):
        with pytest.raises(ConfigError, match="absent_db: must be 0 dB or more"):
            EXTRACTOR.stream(VOICE, RATE, absent_db=absent_db)
    with pytest.raises(CheckpointError):
        EXTRACTOR.stream(Voice(VOICE.embedding, "other"), RATE)
    with pytest.raises(ConfigError, match="a stream needs a causal network"):
        Extractor(build(base), Card(base)).stream(VOICE, RATE)


def test_streams_of_one_extractor_in_threads() -> None:
    sounds = [noise(4000, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda sound: push_all(EXTRACTOR.stream(VOICE, RATE), sound, [97]), sounds))
    for output, sound in zip(outputs, sounds, strict=True):
        assert np.allclose(output, whole(sound), atol=1e-5)


class Gain(nn.Module):
    """Stands for the network where its cost does not matter."""

    sample_rate, hop = RATE, HOP

    def start(self) -> dict[str, np.ndarray]:
        return {"input": np.zeros((1, HOP), np.float32)}

    def prepare(self, voice: float) -> tuple[float]:
        return (voice,)

    def step(
        self, samples: Mono, voice: tuple[float], state: dict[str, np.ndarray]
    ) -> tuple[Mono, dict[str, np.ndarray]]:
        joined = np.concatenate([state["input"][0], samples])
        return voice[0] * joined[: len(samples)], {"input": joined[None, -HOP:].copy()}


def test_an_hour_in_flat_memory() -> None:
    stream, block, made, early = Stream(Gain(), 0.5, RATE), noise(RATE), 0, 0
    for second in range(3600):
        made += len(stream.push(block))
        if second == 100:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert made + len(stream.flush()) == 3600 * RATE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early < 20_000  # kilobytes


@pytest.mark.parametrize("background", [False, True])
def test_live_enrolls_the_first_voice(background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two people: the search names who speaks when; the one who reaches three seconds is enrolled."""
    monkeypatch.setattr(engine, "find_speech", lambda sound, rate: [(0.0, len(sound) / rate)])
    monkeypatch.setattr(
        engine,
        "find_voices",
        lambda sound, rate, speech: [
            FoundVoice(1, ((0.0, 2.0),), (0.0, 2.0)),
            FoundVoice(2, ((2.0, len(sound) / rate),), (2.0, len(sound) / rate)),
        ],
    )
    sound = noise(7 * RATE)
    stream = EXTRACTOR.live(RATE, background)
    for first in range(0, len(sound), RATE // 4):
        output = stream.push(sound[first : first + RATE // 4])
        if stream._listen is not None and stream._listen._search is not None:  # type: ignore[attr-defined]
            stream._listen._search.result()  # type: ignore[attr-defined]
        if first < 4 * RATE:
            assert stream.voice is None
            assert np.isin(output, sound).all()
    assert stream.voice == EXTRACTOR.enroll(sound[2 * RATE : 5 * RATE], RATE)


def test_no_warning_without_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        push_all(EXTRACTOR.stream(VOICE, RATE), SOUND, [100])
