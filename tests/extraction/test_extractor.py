"""Extraction: rates, channels, levels and types of its input and output."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tiny import full_disk
from voices import Voice

import onevoice
from onevoice.audio import read_audio, resample, write_audio
from onevoice.errors import AudioError, StorageError
from onevoice.extraction.checkpoint import Card, save_checkpoint
from onevoice.extraction.extractor import Extractor, match_level
from onevoice.extraction.recording import extract_file
from onevoice.models import SpExPlus, SpExPlusConfig
from onevoice.models.base import Embedding, Lengths, Network, NetworkConfig, Wave

CONFIG = SpExPlusConfig(
    sample_rate=8000, filters=16, channels=12, hidden=20, blocks=3, stacks=2, speaker_dim=10, num_classes=5
)


class Straight(Network):
    """A network whose estimate is the mixture with inverted polarity and three times the amplitude."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.tensor(-3.0))

    def classify(self, embedding: Embedding) -> torch.Tensor:
        return embedding

    def _embed(self, ref: Wave, ref_length: Lengths | None) -> torch.Tensor:
        return ref[:, :5]

    def _extract(self, audio: Wave, embedding: Embedding, audio_length: Lengths | None) -> tuple[torch.Tensor, ...]:
        return (self.gain * audio,)


@pytest.fixture
def straight() -> Extractor:
    return Extractor(Straight(CONFIG), Card(CONFIG))


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    torch.manual_seed(0)
    return Extractor(SpExPlus(CONFIG), Card(CONFIG))


def speech(number: int = 0, seconds: float = 1.0, rate: int = 8000) -> np.ndarray:
    return Voice.number(number).say(0, seconds, rate)


@pytest.mark.parametrize("rate", [8000, 16000, 11025, 44100, 48000])
def test_the_estimate_has_rate_level_polarity_and_length_of_the_mixture(straight: Extractor, rate: int) -> None:
    time = np.arange(round(0.7 * rate) + 1) / rate
    mixture = (0.3 * np.sin(2 * np.pi * 440 * time) * np.sin(np.pi * time / time[-1])).astype(np.float32)
    estimate = straight.extract(mixture, rate, speech(1), 8000)
    assert estimate.shape == mixture.shape
    np.testing.assert_allclose(estimate, mixture, atol=2e-3)


def test_channels_are_averaged(straight: Extractor) -> None:
    left, right = speech(0), speech(1)
    estimate = straight.extract(np.stack([left, right]), 8000, np.stack([left, left]), 8000)
    mean = (left + right) / 2
    np.testing.assert_allclose(estimate, mean - mean.mean(), atol=1e-3)


def test_an_offset_of_the_mixture_is_not_part_of_the_voice(straight: Extractor) -> None:
    estimate = straight.extract(speech(0) + np.float32(0.3), 8000, speech(1))
    np.testing.assert_allclose(estimate, speech(0) - speech(0).mean(), atol=1e-4)


def test_a_list_of_mixtures_gives_a_list(extractor: Extractor) -> None:
    mixtures, voice = [speech(0) + speech(1), speech(2, 0.5)], extractor.enroll(speech(0, 2.0), 8000)
    together = extractor.extract(mixtures, 8000, voice)
    for ours, mixture in zip(together, mixtures, strict=True):
        np.testing.assert_array_equal(ours, extractor.extract(mixture, 8000, voice))


@pytest.mark.parametrize(
    ("mixture", "rate", "message"),
    [
        ([0.1, 0.2], 8000, "mixture: is a float; give a NumPy array or a tensor"),
        (speech().tolist, 8000, "mixture: is a builtin_function_or_method; give a NumPy array"),
        (speech(), 0, "mixture: has a sample rate of 0 Hz; give one from 1000 to 768000 Hz"),
        (speech(), -8000, "mixture: has a sample rate of -8000 Hz"),
    ],
)
def test_what_is_not_a_mixture(extractor: Extractor, mixture: Any, rate: int, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        extractor.extract(mixture, rate, speech(0, 2.0), 8000)
    with pytest.raises(AudioError, match="enrollment: has a sample rate of 0 Hz"):
        extractor.extract(speech(), 8000, speech(0, 2.0), 0)


def test_arrays_and_tensors_give_the_same_in_their_own_type(extractor: Extractor) -> None:
    mixture, enrollment = speech(0) + speech(1), speech(0, 2.0)
    array = extractor.extract(mixture, 8000, enrollment, 8000)
    double = extractor.extract(mixture.astype(np.float64), 8000, enrollment.astype(np.float64), 8000)
    tensor = extractor.extract(torch.from_numpy(mixture).double(), 8000, torch.from_numpy(enrollment).double(), 8000)
    assert (array.dtype, double.dtype, tensor.dtype) == (np.float32, np.float64, torch.float64)
    np.testing.assert_array_equal(array, double.astype(np.float32))
    np.testing.assert_array_equal(array, tensor.numpy().astype(np.float32))


def test_the_enrollment_rate_is_the_mixtures_by_default(extractor: Extractor) -> None:
    mixture, enrollment = speech(0, 1.0, 16000) + speech(1, 1.0, 16000), speech(0, 2.0, 16000)
    np.testing.assert_array_equal(
        extractor.extract(mixture, 16000, enrollment), extractor.extract(mixture, 16000, enrollment, 16000)
    )


def test_the_enrollment_is_converted_from_its_own_rate(extractor: Extractor) -> None:
    mixture, enrollment = speech(0) + speech(1), speech(0, 2.0, 16000)
    expected = extractor.extract(mixture, 8000, resample(enrollment, 16000, 8000), 8000)
    np.testing.assert_array_equal(extractor.extract(mixture, 8000, enrollment, 16000), expected)


def test_enrollment_level_and_offset_do_not_matter(extractor: Extractor) -> None:
    mixture, enrollment = speech(0) + speech(1), speech(0, 2.0)
    quiet = extractor.extract(mixture, 8000, 0.001 * enrollment + np.float32(0.2), 8000)
    loud = extractor.extract(mixture, 8000, enrollment, 8000)
    np.testing.assert_allclose(quiet, loud, atol=1e-3 * np.abs(loud).max())


def test_estimate_and_residual_are_orthogonal(extractor: Extractor) -> None:
    mixture = speech(0) + speech(1)
    estimate = extractor.extract(mixture, 8000, speech(0, 2.0), 8000).astype(np.float64)
    assert estimate @ estimate > 0
    assert abs(estimate @ (mixture - estimate)) < 1e-5 * (estimate @ estimate)


def test_a_network_that_has_a_level_keeps_what_it_turns_down() -> None:
    model = Straight(NetworkConfig(sample_rate=8000))
    mixture = speech(0)
    for gain, own, expected in ((0.01, 0.02, 1.0), (0.8, 1.0, 1.0), (-0.01, 0.02, 1.0)):
        with torch.no_grad():
            model.gain.fill_(gain)
        for has_level, factor in ((True, own), (False, expected)):
            extractor = Extractor(model, Card(replace(CONFIG, has_level=has_level)))
            voice = extractor.extract(mixture, 8000, speech(0, 2.0), 8000)
            np.testing.assert_allclose(voice, factor * (mixture - mixture.mean()), atol=1e-3)


def test_match_level_leaves_the_least_residual() -> None:
    rng = np.random.default_rng(0)
    mixture, estimate = rng.standard_normal((2, 500)).astype(np.float32)
    (gain,), *_ = np.linalg.lstsq(estimate[:, None].astype(float), mixture.astype(float), rcond=None)
    np.testing.assert_allclose(match_level(estimate, mixture), gain * estimate, rtol=1e-5)


def test_a_silent_estimate_stays_silent() -> None:
    np.testing.assert_array_equal(match_level(np.zeros(9, np.float32), np.ones(9, np.float32)), np.zeros(9))


@pytest.mark.parametrize("residual", [None, "rest.wav"])
def test_files_add_up_to_the_mixture(extractor: Extractor, tmp_path: Path, residual: str | None) -> None:
    rate = 22050
    mixture = 0.9 * (speech(0, 1.0, rate) + speech(1, 1.0, rate))
    write_audio(tmp_path / "mixture.flac", mixture, rate)
    write_audio(tmp_path / "enrollment.ogg", speech(0, 2.0, 16000), 16000)
    rest = None if residual is None else tmp_path / residual
    extract_file(extractor, tmp_path / "mixture.flac", tmp_path / "enrollment.ogg", tmp_path / "out.wav", rest)
    out, out_rate = read_audio(tmp_path / "out.wav")
    assert out_rate == rate
    if rest is not None:
        written, _ = read_audio(tmp_path / "mixture.flac")
        np.testing.assert_allclose(out + read_audio(rest)[0], written, atol=1e-7)
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == sorted(
        ["out.wav", *([residual] if residual else [])]
    )


@pytest.mark.parametrize(("name", "subtype"), [("out.wav", "FLOAT"), ("OUT.WAV", "FLOAT"), ("out.flac", "PCM_16")])
def test_the_sample_type_of_a_file_follows_its_format(
    straight: Extractor, tmp_path: Path, name: str, subtype: str
) -> None:
    write_audio(tmp_path / "mixture.wav", speech(0), 8000)
    extract_file(straight, tmp_path / "mixture.wav", tmp_path / "mixture.wav", tmp_path / name)
    assert soundfile.info(tmp_path / name).subtype == subtype


def test_a_loud_estimate_is_not_clipped(straight: Extractor, tmp_path: Path) -> None:
    loud = speech(0) / np.abs(speech(0)).max() * 1.8
    write_audio(tmp_path / "loud.wav", loud.astype(np.float32), 8000, subtype="FLOAT")
    write_audio(tmp_path / "voice.wav", speech(0), 8000)
    extract_file(straight, tmp_path / "loud.wav", tmp_path / "voice.wav", tmp_path / "out.wav")
    assert np.abs(read_audio(tmp_path / "out.wav")[0]).max() == pytest.approx(1.8, rel=0.01)


@pytest.mark.parametrize(
    ("mixture", "enrollment", "message"),
    [
        (speech(), np.full(8000, 0.3, np.float32), "enrollment: is silent"),
        (speech(), speech(0, 0.2), r"enrollment: lasts 0\.20 s; an enrollment needs at least 0\.5 s"),
        (np.full(8000, np.nan, np.float32), speech(), "mixture: holds NaN"),
        (np.zeros(0, np.float32), speech(), "mixture: holds no samples"),
        ((speech() * 32767).astype(np.int16), speech(), "integer samples"),
        (speech().reshape(-1, 2), speech(), "transpose"),
        (speech().reshape(2, 2, -1), speech(), r"\(channels, samples\)"),
    ],
)
def test_unusable_sound(extractor: Extractor, mixture: np.ndarray, enrollment: np.ndarray, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        extractor.extract(mixture, 8000, enrollment, 8000)


def test_the_shortest_enrollment(extractor: Extractor) -> None:
    extractor.extract(speech(), 8000, speech(0, 0.5), 8000)
    with pytest.raises(AudioError, match=r"enrollment: lasts 0\.49 s"):
        extractor.extract(speech(), 8000, speech(0, 0.49), 8000)


def test_the_first_estimate_is_used_in_evaluation_mode() -> None:
    model = SpExPlus(CONFIG).train()
    extractor = Extractor(model, Card(CONFIG))
    assert not model.training
    batch = {"audio": torch.from_numpy(speech())[None], "ref": torch.from_numpy(speech(1))[None]}
    with torch.inference_mode():
        first, *others = model(batch)["predicted_audio"]
    assert torch.equal(extractor.estimate(batch), first)
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_extraction_leaves_no_file(extractor: Extractor, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.flac"
    write_audio(mixture, speech(0) / 2 + speech(1) / 2, 8000)
    for size, failing in ((10, "w"), (20_000, "out.wav")):
        with full_disk(size), pytest.raises(StorageError, match=failing):
            extract_file(extractor, mixture, mixture, tmp_path / "out.wav", tmp_path / "rest.w64")
        assert [path.name for path in tmp_path.iterdir()] == ["mixture.flac"]


def test_the_public_interface(tmp_path: Path) -> None:
    model = SpExPlus(CONFIG)
    save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), Card(CONFIG))
    extractor = onevoice.load(tmp_path / "model.safetensors")
    voice = extractor.extract(speech(0) + speech(1), 8000, speech(0), 8000)
    expected = Extractor(model, Card(CONFIG)).extract(speech(0) + speech(1), 8000, speech(0), 8000)
    np.testing.assert_array_equal(voice, expected)
