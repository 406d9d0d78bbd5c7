"""Audio files: what comes back is what went in, at the requested sample rate, or it is an error."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onevoice.audio import (
    FORMATS,
    read_audio,
    require_finite,
    require_not_silent,
    require_writable_format,
    resample,
    to_mono,
    to_pcm16,
    write_audio,
)
from onevoice.errors import AudioError, StorageError


def sine(frequency: float, sample_rate: int, seconds: float = 1.0, amplitude: float = 0.5) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return (amplitude * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def si_sdr_db(estimate: np.ndarray, target: np.ndarray) -> float:
    estimate, target = estimate - estimate.mean(), target - target.mean()
    projection = (estimate @ target) / (target @ target) * target
    residual = estimate - projection
    return float(10 * np.log10((projection @ projection) / (residual @ residual)))


def test_float_wav_is_exact(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).standard_normal(999).astype(np.float32) * 3  # some beyond full scale
    write_audio(tmp_path / "a.wav", samples, 11_025, subtype="FLOAT")
    back, rate = read_audio(tmp_path / "a.wav")
    assert (rate, back.dtype) == (11_025, np.float32)
    np.testing.assert_array_equal(back, samples)


@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(-1.5, 1.5, width=32)))
def test_pcm16_rounds_to_the_nearest_value(samples: np.ndarray) -> None:
    codes = to_pcm16(samples)
    inside = np.clip(samples, -1, 32767 / 32768)
    assert np.abs(codes / 32768 - inside.astype(np.float64)).max() <= 0.5 / 32768
    np.testing.assert_array_equal(to_pcm16(codes.astype(np.float32) / np.float32(32768)), codes)


def test_written_pcm16_is_rounded(tmp_path: Path) -> None:
    samples = np.array([0.6, -0.6, 1.4, -1.4, 32767.0, -32768.0, 40000.0, -40000.0], np.float32) / 32768
    for ending in (".wav", ".flac"):
        write_audio(tmp_path / f"a{ending}", samples, 8000)
        codes = soundfile.read(tmp_path / f"a{ending}", dtype="int16")[0]
        np.testing.assert_array_equal(codes, [1, -1, 1, -1, 32767, -32768, 32767, -32768])


@pytest.mark.parametrize("ending", list(FORMATS))
def test_every_format_survives_a_round_trip(tmp_path: Path, ending: str) -> None:
    """The rate and length agree, and so does the waveform: to 16 bits, or above 15 dB in lossy formats."""
    samples = sine(440, 16_000) + sine(1000, 16_000, amplitude=0.2)
    write_audio(tmp_path / f"a{ending.upper()}", samples, 16_000)
    back, rate = read_audio(tmp_path / f"a{ending.upper()}")
    assert rate == 16_000
    if FORMATS[ending] in ("OGG", "MP3"):
        assert abs(len(back) - len(samples)) <= 1
        assert si_sdr_db(back[: len(samples)], samples[: len(back)]) > 15
    else:
        np.testing.assert_allclose(back, samples, atol=0.51 / 32768)


def test_opus_is_opus(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.opus", sine(440, 48_000), 48_000)
    write_audio(tmp_path / "a.ogg", sine(440, 48_000), 48_000)
    assert soundfile.info(tmp_path / "a.opus").subtype == "OPUS"
    assert soundfile.info(tmp_path / "a.ogg").subtype == "VORBIS"


def test_channels_are_averaged(tmp_path: Path) -> None:
    channels = np.stack([sine(440, 8000), -sine(440, 8000) / 2, np.zeros(8000, np.float32)])
    soundfile.write(tmp_path / "a.wav", channels.T, 8000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav")[0], sine(440, 8000) / 6, atol=1e-7)
    np.testing.assert_allclose(to_mono(channels), sine(440, 8000) / 6, atol=1e-7)


@pytest.mark.parametrize("from_rate", [8000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("frequency", [50.0, 997.0, 3000.0])
def test_a_resampled_sine_is_that_sine(tmp_path: Path, from_rate: int, frequency: float) -> None:
    """Same frequency, amplitude and phase at 16 kHz, to −60 dB away from the edges."""
    write_audio(tmp_path / "a.wav", sine(frequency, from_rate), from_rate, subtype="FLOAT")
    samples, rate = read_audio(tmp_path / "a.wav", 16_000)
    assert rate == 16_000
    assert abs(len(samples) - 16_000) <= 1
    np.testing.assert_allclose(samples[1000:15_000], sine(frequency, 16_000)[1000:15_000], atol=0.0005)


def test_frequencies_above_half_the_new_rate_are_removed() -> None:
    assert np.abs(resample(sine(6000, 48_000), 48_000, 8000)[500:-500]).max() < 0.0005


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, sine(440, 8000), 8000)
    before = path.read_bytes()
    with pytest.raises(AudioError, match="NaN or infinite"):
        write_audio(path, np.array([0.0, np.nan], np.float32), 8000)
    with pytest.raises(AudioError, match=r"a\.wav: cannot be written at 0 Hz"):
        write_audio(path, sine(440, 8000), 0)
    with pytest.raises(AudioError, match=r"a\.opus: cannot be encoded at 44100 Hz \(Opus only supports"):
        write_audio(tmp_path / "a.opus", sine(440, 44_100), 44_100)
    with pytest.raises(StorageError):
        write_audio(path / "b.wav", sine(440, 8000), 8000)
    assert [each.name for each in tmp_path.iterdir()] == ["a.wav"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.raw", "a.xi", ".wav"])
def test_unknown_extensions_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AudioError, match=r"unknown extension .*; use \.wav"):
        require_writable_format(tmp_path / name)
    with pytest.raises(AudioError, match="unknown extension"):
        write_audio(tmp_path / name, sine(440, 8000), 8000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".wav", ".aiff", ".flac", ".ogg", ".opus", ".mp3", ".caf"])
@pytest.mark.parametrize("kept", [0.4, 0.97])
def test_a_truncated_file_is_an_error(tmp_path: Path, ending: str, kept: float) -> None:
    path = tmp_path / f"a{ending}"
    write_audio(path, sine(440, 16_000, 2.0), 16_000)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(AudioError, match=rf"a\{ending}: (truncated .*; copy it again|cannot be decoded)"):
        read_audio(path)


def test_a_wav_written_to_a_pipe_is_complete(tmp_path: Path) -> None:
    """Its writer did not know the length and wrote 2³² − 1, as ffmpeg does."""
    write_audio(tmp_path / "a.wav", sine(440, 8000), 8000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    assert data[36:40] == b"data"
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "a.wav").write_bytes(data)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav")[0], sine(440, 8000), atol=0.51 / 32768)


@pytest.mark.parametrize("rate", [1, 999, 2_000_000])
def test_a_damaged_header_does_not_fill_the_memory(tmp_path: Path, rate: int) -> None:
    write_audio(tmp_path / "a.wav", sine(440, 8000), 8000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = struct.pack("<I", rate)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(AudioError, match=rf"a\.wav: has a sample rate of {rate} Hz"):
        read_audio(tmp_path / "a.wav", 16_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "empty"), (b"Hello, this is text.\n" * 9, "cannot be decoded")],
)
@pytest.mark.parametrize("ending", [".wav", ".raw"])
def test_what_is_not_audio(tmp_path: Path, content: bytes | None, message: str, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AudioError, match=message):
        read_audio(path)
    with pytest.raises(AudioError, match="is a folder"):
        read_audio(tmp_path)


def test_nan_in_a_file(tmp_path: Path) -> None:
    samples = sine(440, 8000)
    samples[5000] = np.inf
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav: holds NaN or infinite samples"):
        read_audio(tmp_path / "a.wav")


def test_checks_for_finite_and_silent_samples() -> None:
    require_finite(np.zeros(3, np.float32), "x")
    require_not_silent(np.array([0.0, 1e-30], np.float32), "x")
    for bad, message in ((np.zeros(0, np.float32), "no samples"), (np.array([np.nan], np.float32), "NaN")):
        with pytest.raises(AudioError, match=f"x: holds {message}"):
            require_finite(bad, "x")
    with pytest.raises(AudioError, match=r"x: is silent \(all samples are 0.25\)"):
        require_not_silent(np.full(9, 0.25, np.float32), "x")
