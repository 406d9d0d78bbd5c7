"""Audio of any format in blocks: what is read, what is refused, and what is never overwritten."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from onevoice import streams
from onevoice.audio import BLOCK, FORMATS, read_audio, write_audio
from onevoice.errors import AudioError, ConfigError, MissingDependencyError, StorageError
from onevoice.streams import FFMPEG_FORMATS, check_outputs, find_ffmpeg, open_source, write_together

needs_ffmpeg = pytest.mark.skipif(find_ffmpeg() is None, reason="needs the ffmpeg program: pip install imageio-ffmpeg")


def noise(samples: int, channels: int = 1, peak: float = 0.5) -> np.ndarray:
    """Low-pass noise, which lossy formats keep well, `(samples, channels)`."""
    white = np.random.default_rng(0).standard_normal((samples + 40, channels))
    smooth = np.apply_along_axis(np.convolve, 0, white, np.hanning(41), "valid")
    return (peak * smooth / np.abs(smooth).max()).astype(np.float32)


def lag(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Return by how many samples `ours` is late, from the maximum of the cross-correlation."""
    size = 2 * max(len(ours), len(theirs))
    product = np.fft.irfft(np.fft.rfft(ours, size) * np.conj(np.fft.rfft(theirs, size)), size)
    place = int(np.argmax(product))
    return place if place < size // 2 else place - size


def read_all(path: Path) -> tuple[np.ndarray, int]:
    with open_source(path) as source:
        return np.concatenate(list(source.blocks())), source.sample_rate


def write(path: Path, sound: np.ndarray, rate: int) -> None:
    with write_together([path], rate, sound.shape[1], len(sound)) as (append,):
        for first in range(0, len(sound), 1000):
            append(sound[first : first + 1000])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("ending", [*FORMATS, *(each for each in FFMPEG_FORMATS if each != ".ac3")])
def test_what_is_written_in_blocks_is_read_in_blocks(tmp_path: Path, ending: str, channels: int) -> None:
    if ending in FFMPEG_FORMATS and find_ffmpeg() is None:
        pytest.skip("needs ffmpeg")
    sound, path = noise(2 * BLOCK + 7, channels), tmp_path / f"a{ending}"
    write(path, sound, 48_000)
    back, rate = read_all(path)
    assert (rate, back.shape[1]) == (48_000, channels)
    assert abs(len(back) - len(sound)) <= (
        4096 if ending in FFMPEG_FORMATS else 0
    )  # AAC and Opus fill their last frame
    length = min(len(back), len(sound))
    if ending not in (".aac", ".wma"):  # raw AAC and WMA do not record the delay of their encoder
        assert lag(back[:, 0], sound[:, 0]) == 0
        error = back[:length] - sound[:length]
        assert np.square(error).mean() < 0.02 * np.square(sound).mean()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_blocks_are_what_libsndfile_reads_at_once(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.flac", noise(3 * BLOCK + 1)[:, 0], 44_100)
    np.testing.assert_array_equal(read_all(tmp_path / "a.flac")[0][:, 0], read_audio(tmp_path / "a.flac")[0])


def test_minutes_of_ogg_do_not_crash_the_encoder(tmp_path: Path) -> None:
    """libsndfile's Vorbis encoder overflows the stack on one long write."""
    write_audio(tmp_path / "a.ogg", np.tile(noise(44_100)[:, 0], 90), 44_100)
    assert soundfile.info(tmp_path / "a.ogg").frames == 90 * 44_100


@pytest.mark.parametrize("ending", [".wav", ".flac", ".mp3", ".aiff"])
def test_equal_sound_gives_equal_files(tmp_path: Path, ending: str) -> None:
    """The PEAK chunk of a WAV file with float samples has a time, which would differ from second to second."""
    for name in "ab":
        write(tmp_path / f"{name}{ending}", noise(9000), 8000)
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    if ending == ".wav":
        data = (tmp_path / "a.wav").read_bytes()
        place = data.index(b"PEAK")
        assert data[place + 12 : place + 16] == bytes(4)


@needs_ffmpeg
@pytest.mark.parametrize("ending", [".m4a", ".mkv", ".webm"])
def test_ffmpeg_gives_equal_files_too(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}{ending}", noise(9000), 48_000)
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


@needs_ffmpeg
def test_text_is_not_sound_for_ffmpeg(tmp_path: Path) -> None:
    (tmp_path / "a.m4a").write_text("This is not sound.\n" * 99)
    with pytest.raises(AudioError, match=r"a\.m4a: cannot be decoded \(Invalid data found when processing input\)"):
        read_all(tmp_path / "a.m4a")


@needs_ffmpeg
def test_a_truncated_file_of_ffmpeg(tmp_path: Path) -> None:
    write(tmp_path / "a.m4a", noise(48_000), 48_000)
    data = (tmp_path / "a.m4a").read_bytes()
    (tmp_path / "a.m4a").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=r"a\.m4a: cannot be decoded"):
        read_all(tmp_path / "a.m4a")


def test_without_ffmpeg_a_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "find_ffmpeg", lambda: None)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A " + bytes(99))
    with pytest.raises(AudioError, match=r"a\.m4a: cannot be decoded without the ffmpeg program.*pip install"):
        read_all(tmp_path / "a.m4a")
    with pytest.raises(MissingDependencyError, match=r"b\.m4a: needs the ffmpeg program.*pip install"):
        check_outputs([tmp_path / "b.m4a"], [])


def test_ffmpeg_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_ffmpeg() == str(tmp_path / "ffmpeg")


@pytest.mark.parametrize("name", ["https://example.org/a.wav", "http://example.org/a.wav"])
def test_a_web_address_is_not_a_file(name: str) -> None:
    with pytest.raises(AudioError, match=rf"{name}: is an address, not a file; download it"):
        check_outputs([name], [])
    with pytest.raises(AudioError, match=rf"{name}: is an address, not a file"), open_source(name):
        pass


@pytest.mark.parametrize("channels", [1, 32])
@pytest.mark.parametrize("rate", [8000, 192_000])
@pytest.mark.parametrize("samples", [1, 1000])
def test_unusual_files(tmp_path: Path, channels: int, rate: int, samples: int) -> None:
    sound = noise(samples, channels)
    write(tmp_path / "a.wav", sound, rate)
    back, found = read_all(tmp_path / "a.wav")
    assert found == rate
    np.testing.assert_array_equal(back, sound)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", noise(4 * BLOCK), 8000)
    with open_source(tmp_path / "a.wav") as source:
        blocks = source.blocks()
        next(blocks)
        os.truncate(tmp_path / "a.wav", 4 * BLOCK + 1000)
        with pytest.raises(AudioError, match=rf"truncated \(\d+ of {4 * BLOCK} samples"):
            list(blocks)


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    sound, path = noise(2 * BLOCK), tmp_path / "a.wav"
    write(path, sound, 8000)
    with open_source(path) as source:
        blocks = source.blocks()
        first = next(blocks)
        longer = noise(4 * BLOCK)
        write(tmp_path / "b.wav", longer, 8000)
        path.write_bytes((tmp_path / "b.wav").read_bytes()[: 4 * 3 * BLOCK])  # in place, as a recorder does
        rest = list(blocks)
    assert len(first) + sum(map(len, rest)) == len(sound)


def set_length(path: Path, size: int) -> None:
    """Set the bytes of audio in the header of a WAV file."""
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10**6, r"truncated \(\d+ of 1000000 bytes of audio\)"),
        (2000, r"its header leaves out the last \d+ bytes; repair it"),
        (0, r"its header leaves out the last \d+ bytes; repair it"),
    ],
)
def test_a_header_that_lies_about_the_length(tmp_path: Path, subtype: str, size: int, message: str) -> None:
    white = np.random.default_rng(0).uniform(-0.5, 0.5, 100_000)
    soundfile.write(tmp_path / "a.wav", white, 8000, subtype=subtype)
    set_length(tmp_path / "a.wav", size)
    with pytest.raises(AudioError, match=rf"a\.wav: {message}"):
        read_all(tmp_path / "a.wav")
    with pytest.raises(AudioError, match=rf"a\.wav: {message}"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("size", [0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_a_header_that_does_not_know_the_length(tmp_path: Path, size: int) -> None:
    """Programs that write into a pipe cannot go back to the header."""
    sound = noise(1000)
    write(tmp_path / "a.wav", sound, 8000)
    set_length(tmp_path / "a.wav", size)
    np.testing.assert_array_equal(read_all(tmp_path / "a.wav")[0], sound)


@pytest.mark.parametrize("tag", [b"LIST\x04\0\0\0INFO", b"TAG" + bytes(125), bytes(100_000)])
def test_tags_and_padding_after_the_audio_are_skipped(tmp_path: Path, tag: bytes) -> None:
    sound = noise(1000)
    write(tmp_path / "a.wav", sound, 8000)
    with (tmp_path / "a.wav").open("ab") as file:
        file.write(tag)
    np.testing.assert_array_equal(read_all(tmp_path / "a.wav")[0], sound)


# Outputs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.wav, and other names for it; the current one."""
    write_audio(tmp_path / "a.wav", noise(800)[:, 0], 8000)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.wav").symlink_to("a.wav")
    (tmp_path / "folder").symlink_to("sub")
    os.link(tmp_path / "a.wav", tmp_path / "hard.wav")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["a.wav", "./a.wav", "sub/../a.wav", "{}/a.wav", "link.wav", "hard.wav"])
def test_no_output_is_an_input(place: Path, name: str, force: bool) -> None:
    before = (place / "a.wav").read_bytes()
    with pytest.raises(ConfigError, match=r"is the input a\.wav; write to another file"):
        check_outputs([name.format(place)], ["a.wav"], force)
    assert (place / "a.wav").read_bytes() == before


@pytest.mark.parametrize("other", ["b.wav", "./b.wav", "sub/../b.wav", "B.WAV", "{}/b.wav"])
def test_two_outputs_have_two_names(place: Path, other: str) -> None:
    with pytest.raises(ConfigError, match="is the name of two outputs; give them two names"):
        check_outputs(["b.wav", other.format(place)], ["a.wav"])
    with pytest.raises(ConfigError, match="is the name of two outputs"):
        check_outputs(["sub/b.wav", "folder/b.wav"], ["a.wav"])


def test_what_exists_is_replaced_only_by_force(place: Path) -> None:
    shutil.copy("a.wav", "b.wav")
    with pytest.raises(ConfigError, match=r"b\.wav: exists; choose another name, or overwrite it with --force"):
        check_outputs(["b.wav"], ["a.wav"])
    check_outputs(["b.wav", None, "-"], ["a.wav"], force=True)
    (place / "c.wav").mkdir()
    with pytest.raises(ConfigError, match=r"c\.wav: exists and is not a file"):
        check_outputs(["c.wav"], ["a.wav"], force=True)


def test_a_missing_folder_is_made(place: Path) -> None:
    check_outputs(["new/folder/b.wav"], ["a.wav"])
    assert not (place / "new").exists()
    write(place / "new/folder/b.wav", noise(10), 8000)
    assert (place / "new/folder/b.wav").is_file()


def test_files_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_two(fail: bool) -> None:
        with write_together([tmp_path / "a.wav", tmp_path / "b.wav"], 8000, 1, 10) as two:
            for append in two:
                append(noise(10))
            if fail:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_two(fail=True)
    assert not list(tmp_path.iterdir())
    replace = Path.replace

    def refuse(part: Path, path: Path) -> Path:
        if path.name == "b.wav":
            raise OSError(28, "No space left on device")
        return replace(part, path)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match=r"b\.wav: cannot be written"):
        write_two(fail=False)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.wav.999999999.part.wav").write_bytes(b"left")
    (tmp_path / f".a.wav.{os.getppid()}.part.wav").write_bytes(b"at work")
    write(tmp_path / "a.wav", noise(10), 8000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".a.wav.{os.getppid()}.part.wav", "a.wav"]
