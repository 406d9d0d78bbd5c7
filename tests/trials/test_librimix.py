"""LibriMix on the fly: equal bit for bit to files that an independent script writes, and errors for bad input."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from plain_librimix import RATE, TYPES, Toy, make_toy, plain_tree

from onevoice.audio import pcm16_round_trip
from onevoice.errors import AudioError, CorpusError, MissingDependencyError
from onevoice.trials.librimix import (
    FADE_SAMPLES,
    LibriMixFile,
    MetadataRow,
    Scaled,
    extend_noise,
    read_metadata,
    require_resampler,
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("rate", [8000, 16000])
def test_every_file_equals_the_official_one_bit_for_bit(
    toy: Toy, tmp_path: Path, rate: int, mode: str, sources: int
) -> None:
    folder = plain_tree(toy, sources, rate, mode, tmp_path) / f"wav{rate // 1000}k" / mode / "test"
    rows = read_metadata(toy.metadata[sources], toy.librispeech, toy.wham)
    assert len(rows) == 8
    clipped = 0
    for row in rows:
        for name in (*(f"s{k + 1}" for k in range(sources)), "noise", *TYPES):
            samples, rendered_rate = LibriMixFile(row, rate, mode, name).render()
            written, file_rate = soundfile.read(folder / name / f"{row.mixture_id}.wav", dtype="int16")
            assert rendered_rate == file_rate == rate
            assert samples.dtype == np.float32
            np.testing.assert_array_equal(samples * 32768, written, err_msg=f"{name} of {row.mixture_id}")
            clipped += int(np.sum(written == 32767))
    assert clipped > 0, "the toy gains must be high enough for 16-bit clipping"


def test_16_bits_are_rounded_down_and_clipped() -> None:
    """libsndfile rounds 2^31 x of a float32 x to an integer and keeps its upper 16 bits."""
    rng = np.random.default_rng(1)
    samples = np.concatenate([rng.uniform(-1.2, 1.2, 20_000), np.arange(-9, 9) / 32768, [1, -1]]).astype(np.float32)
    expected = np.clip(np.rint(samples.astype(np.float64) * 2**31).astype(np.int64) >> 16, -32768, 32767)
    np.testing.assert_array_equal(pcm16_round_trip(samples) * 32768, expected)
    np.testing.assert_array_equal(pcm16_round_trip(pcm16_round_trip(samples)), pcm16_round_trip(samples))


def test_extended_noise_fades_into_itself() -> None:
    """The halves of the window add up to 1: constant noise stays constant, and samples off the seams are unchanged."""
    noise = np.random.default_rng(2).standard_normal(30_000).astype(np.float32)
    extended = extend_noise(noise, 100_000)
    assert len(extended) == 100_000
    seam = len(noise) - FADE_SAMPLES
    np.testing.assert_array_equal(extended[:seam], noise[:seam])
    np.testing.assert_array_equal(extended[seam + FADE_SAMPLES : 2 * seam], noise[FADE_SAMPLES:seam])
    angle = np.pi * np.arange(FADE_SAMPLES) / (FADE_SAMPLES - 1)
    expected = noise[seam:] * (1 + np.cos(angle)) / 2 + noise[:FADE_SAMPLES] * (1 - np.cos(angle)) / 2
    np.testing.assert_allclose(extended[seam : seam + FADE_SAMPLES], expected, atol=1e-12)
    constant = np.full(9000, 0.25, np.float32)
    np.testing.assert_allclose(extend_noise(constant, 40_000), 0.25, atol=1e-12)
    assert extend_noise(noise, 30_000).dtype == np.float32
    with pytest.raises(CorpusError, match="too short to extend"):
        extend_noise(noise[:FADE_SAMPLES], FADE_SAMPLES + 1)


def test_mixture_is_the_sum_of_its_sources(toy: Toy) -> None:
    """The sum holds up to the last bit of each file if nothing clips."""
    row = read_metadata(toy.metadata[3], toy.librispeech, toy.wham)[0]
    quiet = dataclasses.replace(row, sources=tuple(dataclasses.replace(s, gain=0.2 * s.gain) for s in row.sources))
    sounds = {name: LibriMixFile(quiet, 16000, "max", name).render()[0] for name in ("s1", "s2", "s3", *TYPES, "noise")}
    total = sounds["s1"] + sounds["s2"] + sounds["s3"]
    np.testing.assert_allclose(sounds["mix_clean"], total, atol=4 / 32768)
    np.testing.assert_allclose(sounds["mix_both"], total + sounds["noise"], atol=5 / 32768)
    np.testing.assert_allclose(sounds["mix_single"], sounds["s1"] + sounds["noise"], atol=3 / 32768)


def test_gains_keep_every_digit(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(
        "source_2_gain,mixture_ID,source_1_path,source_1_gain,source_2_path\n1.4352834120507272,a_b,a,2,b\n"
    )
    (row,) = read_metadata(path, Path("/speech"))
    assert row == MetadataRow("a_b", (Scaled(Path("/speech/a"), 2.0), Scaled(Path("/speech/b"), 1.4352834120507272)))


HEAD = "mixture_ID,source_1_path,source_1_gain,source_2_path,source_2_gain,noise_path,noise_gain\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "columns are missing: mixture_ID"),
        ("mixture_ID,source_1_path,source_1_gain\nx,y,1\n", "columns are missing: .*source_2_path"),
        (HEAD.replace(",noise_gain", ""), "columns are missing: noise_gain"),
        (HEAD + "x,a,1,b,loud,n,1\n", r"m\.csv:2: source_2 has the path 'b' and the gain 'loud'"),
        (HEAD + "x,a,nan,b,1,n,1\n", "source_1 has the path 'a' and the gain 'nan'"),
        (HEAD + "x,a,1,b,1\n", "noise has the path '' and the gain ''"),
        (HEAD + "x,a,1,b,1,n,1\nx,a,1,b,1,n,1\n", r"m\.csv:3: mixture 'x' appears twice"),
        (HEAD + "../x,a,1,b,1,n,1\n", "cannot be a mixture_ID"),
        ("", "columns are missing: mixture_ID"),
    ],
)
def test_errors_name_the_line_of_broken_metadata(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(CorpusError, match=message):
        read_metadata(path, tmp_path, tmp_path)
    with pytest.raises(CorpusError, match="cannot be read"):
        read_metadata(tmp_path / "none.csv", tmp_path)


def test_unusable_files_are_named(toy: Toy, tmp_path: Path) -> None:
    row = read_metadata(toy.metadata[2], toy.librispeech)[0]

    def render(name: str = "mix_clean", **changes: object) -> None:
        LibriMixFile(dataclasses.replace(row, **changes), 16000, "min", name).render()

    with pytest.raises(AudioError, match=r"none\.flac: no such file"):
        render(sources=(row.sources[0], Scaled(tmp_path / "none.flac", 1.0)))
    soundfile.write(tmp_path / "slow.wav", np.zeros(8000), 8000)
    with pytest.raises(CorpusError, match=r"slow\.wav: is at 8000 Hz; LibriMix needs files at 16000 Hz"):
        render(sources=(row.sources[0], Scaled(tmp_path / "slow.wav", 1.0)))
    with pytest.raises(CorpusError, match="name the folder of the WHAM noise"):
        render("mix_both")
    soundfile.write(tmp_path / "click.wav", np.zeros(FADE_SAMPLES), RATE)
    with pytest.raises(CorpusError, match=r"click\.wav: noise of 8001 samples is too short"):
        render("mix_both", noise=Scaled(tmp_path / "click.wav", 1.0))


def test_8_khz_without_scipy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    require_resampler(16000)
    with pytest.raises(MissingDependencyError, match=r"onevoice\[protocols\]"):
        require_resampler(8000)
