"""From file to file: inputs survive, killed runs resume, memory stays, channels and formats have decided rules."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny import process, save_tiny
from toy_runs import forked_process
from voices import Voice

from onevoice.audio import read_audio, resample, write_audio
from onevoice.errors import AudioError, CheckpointError, ConfigError
from onevoice.extraction import windows
from onevoice.extraction.extractor import Extractor, load
from onevoice.extraction.recording import extract_file
from onevoice.extraction.request import Request, parse_channel
from onevoice.extraction.voice import Voice as SavedVoice


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    return load(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors"), device="cpu")


def speech(number: int, seconds: float = 1.0, rate: int = 8000) -> np.ndarray:
    return Voice.number(number).say(0, seconds, rate)


def mix(seconds: float = 1.0, rate: int = 8000) -> np.ndarray:
    return np.asarray((speech(0, seconds, rate) + speech(1, seconds, rate)) / 2)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_audio(tmp_path / "mixture.wav", mix(), 8000, subtype="FLOAT")
    write_audio(tmp_path / "voice.wav", speech(0, 2.0), 8000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("output", "residual"),
    [("mixture.wav", None), ("voice.wav", None), ("o.wav", "mixture.wav"), ("o.wav", "voice.wav"), ("o.wav", "o.wav")],
)
def test_inputs_survive(extractor: Extractor, place: Path, output: str, residual: str | None) -> None:
    before = contents(place)
    with pytest.raises(ConfigError, match=r"is the input|is the name of two"):
        extract_file(extractor, "mixture.wav", "voice.wav", output, residual, force=True)
    assert contents(place) == before


def test_an_existing_output_needs_force(extractor: Extractor, place: Path) -> None:
    extract_file(extractor, "mixture.wav", "voice.wav", "o.wav")
    before = contents(place)
    with pytest.raises(ConfigError, match=r"o\.wav: exists"):
        extract_file(extractor, "mixture.wav", "voice.wav", "o.wav")
    extract_file(extractor, "mixture.wav", "voice.wav", "o.wav", force=True)
    assert contents(place) == before


def test_files_give_what_arrays_give(extractor: Extractor, place: Path) -> None:
    done = extract_file(extractor, "mixture.wav", "voice.wav", "o.wav")
    expected = extractor.extract(mix(), 8000, read_audio("voice.wav")[0])
    np.testing.assert_array_equal(read_audio("o.wav")[0], expected)
    assert done.text().startswith("o.wav: 1.0 s of sound in ")


def test_a_voice_serves_many_recordings_and_its_own_weights_only(extractor: Extractor, place: Path) -> None:
    voice = extractor.enroll(read_audio("voice.wav")[0], 8000)
    extract_file(extractor, "mixture.wav", voice, "o.wav")
    np.testing.assert_array_equal(read_audio("o.wav")[0], extractor.extract(mix(), 8000, voice))
    other = SavedVoice(voice.embedding, "0" * 64)
    assert other != voice
    with pytest.raises(CheckpointError, match=r"the voice was made by other weights \(000000000000…\)"):
        extractor.extract(mix(), 8000, other)


def test_several_enrollments_make_one_voice(extractor: Extractor) -> None:
    one, two = speech(0, 1.0), Voice.number(0).say(1, 2.0)
    joined = extractor.enroll([one, 0.01 * two], 8000)
    assert joined == extractor.enroll([one, two], 8000) or np.allclose(
        joined.embedding, extractor.enroll([one, two], 8000).embedding, atol=1e-4
    )
    assert joined != extractor.enroll(one, 8000)
    with pytest.raises(AudioError, match="no recordings"):
        extractor.enroll([], 8000)


@pytest.mark.parametrize("ending", [".wav", ".flac", ".ogg"])
def test_two_runs_give_the_same(extractor: Extractor, place: Path, ending: str) -> None:
    for name in "ab":
        extract_file(extractor, "mixture.wav", "voice.wav", f"{name}{ending}")
    if ending == ".ogg":  # its serial number is random
        np.testing.assert_array_equal(read_audio("a.ogg")[0], read_audio("b.ogg")[0])
    else:
        assert Path(f"a{ending}").read_bytes() == Path(f"b{ending}").read_bytes()


def test_threads_may_share_an_extractor(extractor: Extractor) -> None:
    voice, mixtures = extractor.enroll(speech(0, 2.0), 8000), [mix(0.5 + 0.1 * number) for number in range(8)]
    alone = [extractor.extract(mixture, 8000, voice) for mixture in mixtures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda mixture: extractor.extract(mixture, 8000, voice), mixtures))
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_chunks_in_and_chunks_out(extractor: Extractor) -> None:
    voice, mixture = extractor.enroll(speech(0, 2.0), 8000), mix(1.0, 11_025)
    chunks = (mixture[first : first + 700] for first in range(0, len(mixture), 700))
    found = np.concatenate(list(extractor.extract_chunks(chunks, 11_025, voice)))
    np.testing.assert_array_equal(found, extractor.extract(mixture, 11_025, voice))
    with pytest.raises(AudioError, match="mixture: holds no samples"):
        list(extractor.extract_chunks([], 8000, voice))


# Channels -------------------------------------------------------------------------------------------------------


def write_channels(path: str, *channels: np.ndarray) -> None:
    soundfile.write(path, np.stack(channels, axis=1), 8000, subtype="FLOAT")


def test_which_channel_is_used(extractor: Extractor, place: Path) -> None:
    left, right = speech(0), speech(1)
    write_channels("two.wav", left, right)
    voice = extractor.enroll(speech(0, 2.0), 8000)
    for channel, expected in ((1, left), (2, right), ("mean", (left + right) / 2)):
        extract_file(extractor, "two.wav", voice, "o.wav", "rest.wav", channel=channel, force=True)
        np.testing.assert_array_equal(read_audio("o.wav")[0], extractor.extract(expected, 8000, voice))
        np.testing.assert_allclose(read_audio("o.wav")[0] + read_audio("rest.wav")[0], expected, atol=1e-6)
    extract_file(extractor, "two.wav", voice, "o.wav", "rest.wav", channel="each", force=True)
    each, rest = soundfile.read("o.wav", dtype="float32")[0], soundfile.read("rest.wav", dtype="float32")[0]
    for index, sound in enumerate((left, right)):
        np.testing.assert_array_equal(each[:, index], extractor.extract(sound, 8000, voice))
    np.testing.assert_allclose(each + rest, np.stack([left, right], axis=1), atol=1e-6)


def test_a_silent_channel_stays_silent(extractor: Extractor, place: Path) -> None:
    write_channels("two.wav", np.zeros(8000, np.float32), mix())
    extract_file(extractor, "two.wav", "voice.wav", "o.wav", channel="each")
    each = soundfile.read("o.wav")[0]
    assert not each[:, 0].any()
    assert each[:, 1].any()


@pytest.mark.parametrize("rate", [8000, 44_100])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_silence_in_is_silence_out(extractor: Extractor, place: Path, offset: float, rate: int) -> None:
    silence = np.full(rate * 3 // 2, offset, np.float32)
    soundfile.write("silent.wav", np.stack([silence, silence], axis=1), rate, subtype="FLOAT")
    for channel in ("mean", "each", 2):
        done = extract_file(extractor, "silent.wav", "voice.wav", "o.wav", "rest.wav", channel=channel, force=True)  # type: ignore[arg-type]
        assert "the recording is silent, so the output is too" in done.notes
        assert not soundfile.read("o.wav")[0].any()
        np.testing.assert_array_equal(soundfile.read("rest.wav", dtype="float32")[0].max(), np.float32(offset))
    voice = extractor.enroll(speech(0, 2.0), 8000)
    chunks = extractor.extract_chunks(np.array_split(silence, 7), rate, voice)
    for estimate in (extractor.extract(silence, rate, voice), np.concatenate(list(chunks))):
        np.testing.assert_array_equal(estimate, np.zeros_like(silence))


@pytest.mark.parametrize("quieter", [1.0, 0.9])
def test_channels_that_cancel_are_not_averaged(extractor: Extractor, place: Path, quieter: float) -> None:
    write_channels("two.wav", -np.float32(quieter) * mix(), mix())
    done = extract_file(extractor, "two.wav", "voice.wav", "o.wav", "rest.wav")
    used = 2 if quieter < 1 else 1
    assert f"its channels cancel each other, so channel {used} was used" in done.text()
    expected = mix() if used == 2 else -mix()
    np.testing.assert_allclose(read_audio("o.wav")[0] + read_audio("rest.wav")[0], expected, atol=1e-6)
    array = extractor.extract(soundfile.read("two.wav", dtype="float32")[0].T, 8000, read_audio("voice.wav")[0])
    np.testing.assert_array_equal(read_audio("o.wav")[0], array)


def test_independent_channels_are_averaged(extractor: Extractor, place: Path) -> None:
    write_channels("many.wav", mix(), *[np.zeros(8000, np.float32)] * 7)
    assert "channel" not in extract_file(extractor, "many.wav", "voice.wav", "o.wav").text()


@pytest.mark.parametrize("name", ["0", "3"])
def test_a_channel_that_is_not_there(extractor: Extractor, place: Path, name: str) -> None:
    write_channels("two.wav", speech(0), speech(1))
    with pytest.raises(AudioError, match=rf"two\.wav: has no channel {name}, only 1 to 2"):
        Request("two.wav", "voice.wav", "o.wav", channel=parse_channel(name)).check()
    with pytest.raises(ConfigError, match="'left' is not a channel; give 1, 2, …, mean or each"):
        parse_channel("left")


# Levels, rates and lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".flac", ".wav"])
def test_a_loud_estimate_is_turned_down_for_integers(extractor: Extractor, place: Path, ending: str) -> None:
    loud = (3.0 * mix() / np.abs(mix()).max()).astype(np.float32)
    write_audio("loud.wav", loud, 8000, subtype="FLOAT")
    done = extract_file(extractor, "loud.wav", "voice.wav", f"o{ending}", f"rest{ending}")
    total = read_audio(f"o{ending}")[0] + read_audio(f"rest{ending}")[0]
    gain = float(total @ loud / (loud @ loud))
    np.testing.assert_allclose(total, gain * loud, atol=1e-4)  # one gain for both: they still add up
    if ending == ".wav":
        assert gain == pytest.approx(1)
        assert "turned down" not in done.text()
    else:
        assert gain < 0.7
        assert f"turned down by {-20 * np.log10(gain):.1f} dB to fit the format" in done.text()


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("samples", [1, 7001])
def test_the_output_has_rate_and_length_of_the_input(
    extractor: Extractor, place: Path, rate: int, samples: int
) -> None:
    sound = resample(mix(2.0), 8000, rate)[:samples] if samples > 1 else np.ones(1, np.float32)
    write_audio("in.wav", sound, rate, subtype="FLOAT")
    done = extract_file(extractor, "in.wav", "voice.wav", "o.wav")
    assert ("silent" in done.text()) == (samples == 1)  # one sample is an offset
    assert (soundfile.info("o.wav").frames, soundfile.info("o.wav").samplerate) == (samples, rate)


# Long recordings ------------------------------------------------------------------------------------------------

STOPPED = """
import os, signal, sys
from onevoice.extraction.extractor import load
from onevoice.extraction.recording import extract_file

def report(share):
    if share >= 0.5:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))

extract_file(load("tiny.safetensors", device="cpu"), "long.wav", "voice.wav", "o.wav", "rest.wav", report=report)
"""


def extract_long(extractor: Extractor) -> list[float]:
    """Extract from the long mixture; return the shares that were reported."""
    shares: list[float] = []
    extract_file(extractor, "long.wav", "voice.wav", "o.wav", "rest.wav", report=shares.append)
    return shares


@pytest.fixture
def long(place: Path) -> Path:
    save_tiny(place / "tiny.safetensors")
    write_audio("long.wav", np.tile(mix(20.0), 12), 8000)
    return place


@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
def test_a_stopped_run_resumes(extractor: Extractor, long: Path, number: str) -> None:
    names = set(contents(long))
    stopped = forked_process(["-c", STOPPED, number])
    assert stopped.status != 0
    left = set(contents(long)) - names
    assert len(left) == 1
    assert next(iter(left)).startswith(".o.wav.")  # what was done, and nothing under the final names
    shares = extract_long(extractor)
    assert 0.4 < shares[0] < 1
    assert len(shares) <= 5
    assert set(contents(long)) - names == {"o.wav", "rest.wav"}
    in_pieces = contents(long)
    for name in ("o.wav", "rest.wav"):
        (long / name).unlink()
    shares = extract_long(extractor)
    assert (shares[0], len(shares)) == (0, 7)
    assert contents(long) == in_pieces


def test_another_voice_does_not_resume(extractor: Extractor, long: Path) -> None:
    assert forked_process(["-c", STOPPED, "SIGKILL"]).status == -signal.SIGKILL
    write_audio("voice.wav", speech(1, 2.0), 8000)
    assert extract_long(extractor)[0] == 0


MEMORY = """
import resource, sys
from onevoice.extraction.extractor import load
from onevoice.extraction.recording import extract_file
from onevoice.extraction import windows

windows.SPOOL_MEMORY = 2**20
extract_file(load("tiny.safetensors", device="cpu"), sys.argv[1], "voice.wav", sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_length(long: Path) -> None:
    """10 min more of stereo at 16 kHz are 77 MB, and half of it for each stage."""
    peaks, block = [], np.stack([mix(20.0, 16_000)] * 2, axis=1)
    for name, copies in (("short", 15), ("longer", 45)):
        with soundfile.SoundFile(f"{name}.wav", "w", 16_000, 2) as file:
            for _ in range(copies):
                file.write(block)
        done = process(["-c", MEMORY, f"{name}.wav", f"{name}-o.wav", f"{name}-rest.wav"])
        assert done.status == 0, done.err
        peaks.append(float(done.out))
    assert peaks[1] < peaks[0] + 30  # MiB


def test_the_command_says_130_after_ctrl_c(long: Path) -> None:
    code = "import os, signal, sys\nfrom onevoice.extraction import recording\n"
    code += "recording._write = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
    code += (
        "from onevoice.cli import main\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nmain(sys.argv[1:])"
    )
    arguments = ["extract", "mixture.wav", "voice.wav", "o.wav", "--pretrained", "tiny.safetensors"]
    done = forked_process(["-c", code, *arguments])
    assert (done.status, done.out, done.err) == (130, "", "interrupted\n")
    assert not list(long.glob(".o.wav*"))


def test_a_file_that_changes_while_it_is_read(
    extractor: Extractor, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    separate = Extractor.separate

    def shrink(*arguments: object) -> float:
        write_audio("mixture.wav", mix()[:5000], 8000)
        return separate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Extractor, "separate", shrink)
    with pytest.raises(AudioError, match=r"mixture\.wav: (truncated|changed while it was read)"):
        extract_file(extractor, "mixture.wav", "voice.wav", "o.wav", "rest.wav")
    assert set(contents(place)) == {"mixture.wav", "voice.wav"}


@pytest.mark.parametrize("gain", [3.0, 30.0])
def test_a_clipped_mixture(extractor: Extractor, place: Path, gain: float) -> None:
    clipped = np.clip(gain * mix(), -1, 1).astype(np.float32)
    write_audio("clipped.wav", clipped, 8000)
    extract_file(extractor, "clipped.wav", "voice.wav", "o.wav", "rest.wav")
    estimate, rest, given = (read_audio(f"{name}.wav")[0] for name in ("o", "rest", "clipped"))
    assert np.isfinite(estimate).all()
    assert estimate.any()
    np.testing.assert_allclose(estimate + rest, given, atol=1e-6)


def test_an_offset_of_the_mixture_stays_in_the_residual(extractor: Extractor, place: Path) -> None:
    """An offset, as of a bad sound card, changes the estimate only by its gain, and comes back with the residual."""
    write_audio("offset.wav", mix() + np.float32(0.25), 8000, subtype="FLOAT")
    extract_file(extractor, "mixture.wav", "voice.wav", "o.wav")
    extract_file(extractor, "offset.wav", "voice.wav", "p.wav", "rest.wav")
    plain, ours = read_audio("o.wav")[0].astype(np.float64), read_audio("p.wav")[0].astype(np.float64)
    gain = (plain @ ours) / (plain @ plain)
    np.testing.assert_allclose(ours, gain * plain, atol=1e-5)
    np.testing.assert_allclose(ours + read_audio("rest.wav")[0], mix() + 0.25, atol=1e-6)


def test_windows_are_the_same_from_a_file(extractor: Extractor, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WHOLE_SECONDS", 5.0)
    write_audio("long.wav", mix(6.0), 8000, subtype="FLOAT")
    extract_file(extractor, "long.wav", "voice.wav", "o.wav")
    expected = extractor.extract(mix(6.0), 8000, read_audio("voice.wav")[0])
    np.testing.assert_array_equal(read_audio("o.wav")[0], expected)
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_standard_input_and_output(place: Path) -> None:
    save_tiny(place / "tiny.safetensors")
    command = [sys.executable, "-m", "onevoice", "extract", "-", "voice.wav", "-", "--pretrained", "tiny.safetensors"]
    with Path("mixture.wav").open("rb") as given:
        done = subprocess.run([*command, "--precision", "float32"], stdin=given, capture_output=True, check=True)
    assert done.stderr.startswith(b"-: 1.0 s of sound in ")
    Path("o.wav").write_bytes(done.stdout)
    expected = load("tiny.safetensors", device="cpu").extract(mix(), 8000, read_audio("voice.wav")[0])
    np.testing.assert_array_equal(read_audio("o.wav")[0], expected)
