"""Voices: how they are named, checked, saved, joined, and found in a recording."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import command, save_tiny
from voices import Voice as Toy

from onevoice.audio import write_audio
from onevoice.errors import AudioError, CheckpointError, ConfigError
from onevoice.extraction import discovery, enrollment, vad
from onevoice.extraction import extractor as extractor_module
from onevoice.extraction.discovery import FoundVoice, cluster, find_voices
from onevoice.extraction.enrollment import Place, enroll_files, format_time, parse_place, read_place
from onevoice.extraction.extractor import Extractor, load
from onevoice.extraction.voice import Voice, clipped_share, examine, load_voice, save_voice, trim

RATE = 8000


@pytest.fixture
def extractor(tmp_path: Path) -> Extractor:
    return load(save_tiny(tmp_path / "tiny.safetensors"), device="cpu")


@pytest.fixture
def by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """The level finds speech, as without silero-vad: toy voices are no speech to its network."""
    monkeypatch.setattr(vad, "package_file", lambda package, name: None)


def say(speaker: int, seconds: float = 4.0, index: int = 0) -> np.ndarray:
    return Toy.number(speaker).say(index, seconds, RATE)


# Names


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a.wav", Place("a.wav", "a.wav")),
        ("m.mp3@1:20-1:31", Place("m.mp3@1:20-1:31", "m.mp3", (80.0, 91.0))),
        ("m.mp3@80-91.5", Place("m.mp3@80-91.5", "m.mp3", (80.0, 91.5))),
        ("m@x.mp3@1:00:00-1:02:03.5", Place("m@x.mp3@1:00:00-1:02:03.5", "m@x.mp3", (3600.0, 3723.5))),
        ("m.wav#2", Place("m.wav#2", "m.wav", number=2)),
    ],
)
def test_names_of_voices(text: str, place: Place) -> None:
    assert parse_place(text) == place


def test_a_file_of_that_name_is_meant_first(tmp_path: Path) -> None:
    for name in ("take#2", "a@1-2"):
        (tmp_path / name).write_bytes(b"")
        assert parse_place(tmp_path / name).path == str(tmp_path / name)


@pytest.mark.parametrize("text", ["m.wav@2-1", "m.wav@1:70-2:00", "m.wav@1:2:3:4-9", "m.wav@.-1", "m.wav#0"])
def test_places_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match=r"m\.wav"):
        parse_place(text)


@pytest.mark.parametrize("seconds", [0.0, 80.5, 59.96, 3723.4])
def test_times_are_read_as_they_are_printed(seconds: float) -> None:
    place = parse_place(f"m.wav@{format_time(seconds)}-2:00:00")
    assert place.stretch is not None
    assert place.stretch[0] == pytest.approx(seconds, abs=0.051)


@pytest.mark.parametrize("stretch", [(0.0, 1.0), (9.0, 10.5), (19.0, 20.0)])
def test_a_stretch_is_exactly_that_part(tmp_path: Path, stretch: tuple[float, float]) -> None:
    """Also beyond the first block of the file."""
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 20 * RATE).astype(np.float32)
    write_audio(tmp_path / "m.wav", sound, RATE, subtype="FLOAT")
    read = read_place(Place("x", str(tmp_path / "m.wav"), stretch))
    np.testing.assert_array_equal(read.samples, sound[int(stretch[0] * RATE) : int(stretch[1] * RATE)])


def test_a_stretch_after_the_end(tmp_path: Path) -> None:
    write_audio(tmp_path / "m.wav", say(0), RATE)
    for text in ("@5-6", "@3-9"):
        with pytest.raises(AudioError, match=r"ends after 4\.0 s"):
            read_place(parse_place(f"{tmp_path / 'm.wav'}{text}"))


# Check-up


def test_numbers_of_the_check_up() -> None:
    rng = np.random.default_rng(0)
    speech = np.concatenate([np.ones(4 * RATE, bool), np.zeros(2 * RATE, bool)])
    tone = 0.2 * np.sqrt(2) * np.sin(2 * np.pi * 440 * np.arange(6 * RATE) / RATE)
    sound = (tone * speech + 0.02 * rng.standard_normal(6 * RATE)).astype(np.float32)
    found = examine([sound], [speech], RATE, 0.0)
    assert (found.seconds, found.speech_seconds, found.warnings) == (6.0, 4.0, ())
    assert found.level_db == pytest.approx(10 * np.log10(0.2**2 + 0.02**2), abs=0.05)
    assert found.snr_db == pytest.approx(20.0, abs=0.1)
    assert examine([sound[: 4 * RATE]], [speech[: 4 * RATE]], RATE, 0.0).snr_db is None


def test_warnings_of_the_check_up() -> None:
    sound = np.random.default_rng(0).standard_normal(4 * RATE).astype(np.float32)
    none, short = np.zeros(4 * RATE, bool), np.arange(4 * RATE) < 2 * RATE
    assert "no speech was found" in examine([sound], [none], RATE, 0.0).warnings[0]
    (little, noisy) = examine([sound], [short], RATE, 0.0).warnings
    assert "only 2.0 s of speech" in little
    assert "noisy" in noisy
    assert "3.0 % of the enrollment is clipped" in examine([sound], [short], RATE, 0.03).warnings[1]


def test_clipped_samples_lie_on_a_flat_top() -> None:
    sound = say(0)
    assert clipped_share(sound) < 1e-3
    clipped = np.clip(30 * sound, -1, 1)
    assert clipped_share(clipped) == pytest.approx(float((np.abs(clipped) == 1).mean()), abs=0.05)
    assert clipped_share(clipped) > 0.1


def test_steady_noise_is_no_speech(by_level: None, extractor: Extractor) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(4 * RATE)).astype(np.float32)
    assert vad.find_speech(noise, RATE) == []
    assert "no speech was found" in extractor.enroll(noise, RATE).warnings[0]


def test_the_level_finds_speech_between_pauses(by_level: None) -> None:
    pause = np.zeros(RATE, np.float32)
    sound = np.concatenate([pause, say(0, 2.0), pause, say(0, 1.5, 1), pause])
    sound += 1e-3 * np.random.default_rng(0).standard_normal(len(sound)).astype(np.float32)
    truth = [(1.0, 3.0), (4.0, 5.5)]
    for changed in (sound, 0.001 * sound + np.float32(0.2)):
        found = vad.find_speech(changed, RATE)
        np.testing.assert_allclose(found, truth, atol=0.25)


def test_pauses_do_not_reach_the_network(by_level: None, extractor: Extractor) -> None:
    pause = np.zeros(2 * RATE, np.float32)
    sound = np.concatenate([pause, say(0, 3.0), pause])
    voice = extractor.enroll(sound, RATE)
    assert voice.check_up is not None
    assert voice.check_up.speech_seconds == pytest.approx(3.0, abs=0.3)
    mask = vad.speech_mask(sound, RATE)
    assert torch.equal(voice.embedding, extractor.embed([sound[mask]]).embedding)
    np.testing.assert_array_equal(trim(sound, mask, 9.0 * RATE), sound)


# Files


def test_a_saved_voice_is_the_voice(by_level: None, extractor: Extractor, tmp_path: Path) -> None:
    voice = extractor.enroll(say(0), RATE, ["alice.wav"])
    save_voice(voice, tmp_path / "alice.voice")
    back = load_voice(tmp_path / "alice.voice", extractor.model_hash)
    assert back == voice
    assert (back.sources, back.check_up) == (("alice.wav",), voice.check_up)


def test_a_voice_of_other_weights(tmp_path: Path) -> None:
    save_voice(Voice(torch.zeros(1, 4), "a" * 64), tmp_path / "a.voice")
    with pytest.raises(CheckpointError, match=r"a\.voice: the voice was made by other weights \(aaaaaaaaaaaa…\)"):
        load_voice(tmp_path / "a.voice", "b" * 64)


def test_files_that_are_no_voice(extractor: Extractor, tmp_path: Path) -> None:
    (tmp_path / "broken.voice").write_bytes(b"nothing")
    (tmp_path / "weights.voice").write_bytes((tmp_path / "tiny.safetensors").read_bytes())
    for name, message in (("gone", "no such voice"), ("broken", "not a readable"), ("weights", "is not a voice")):
        with pytest.raises(CheckpointError, match=message):
            enroll_files(extractor, tmp_path / f"{name}.voice")


def test_recordings_of_another_person_are_left_out(
    extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of a recording stands for its person here: the first sample says who it is."""
    monkeypatch.setattr(enrollment, "_speech", lambda sound: sound.samples)
    monkeypatch.setattr(enrollment, "embed_stretches", lambda sounds: np.eye(2)[[int(sounds[0][0] > 0)]])
    monkeypatch.setattr(enrollment, "find_voices", lambda sound, rate, speech: [])
    paths = []
    for number, sign in enumerate((1, 1, -1, 1)):
        sound = say(0, 2.0, number)
        sound[0] = 0.5 * sign
        paths.append(tmp_path / f"{number}.wav")
        write_audio(paths[-1], sound, RATE, subtype="FLOAT")
    voice = enroll_files(extractor, paths)
    assert voice.sources == tuple(str(paths[number]) for number in (0, 1, 3))
    assert any("2.wav was left out" in warning for warning in voice.warnings)
    assert any("sound like two people" in warning for warning in enroll_files(extractor, paths[1:3]).warnings)
    assert any(
        "sound like several" in each for each in enroll_files(extractor, [paths[1], *paths[2:], paths[2]]).warnings
    )


def test_speech_is_found_once_in_each_recording(
    by_level: None, extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, find = [], vad.find_speech
    for module in (enrollment, discovery, extractor_module):
        monkeypatch.setattr(module, "find_speech", lambda sound, rate: found.append(len(sound)) or find(sound, rate))
    for number in (0, 1):
        write_audio(tmp_path / f"{number}.wav", say(0, 4.0 + number, number), RATE)
    voice = enroll_files(extractor, [tmp_path / "0.wav", tmp_path / "1.wav"])
    assert found == [4 * RATE, 5 * RATE]
    found.clear()
    assert voice == extractor.enroll([read_place(parse_place(tmp_path / f"{n}.wav")).samples for n in (0, 1)], RATE)
    assert found == [4 * RATE, 5 * RATE]


def test_the_commands(
    by_level: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny.safetensors")
    write_audio(tmp_path / "alice.wav", say(0), RATE)
    write_audio(tmp_path / "mix.wav", (say(0, 2.0, 3) + say(1, 2.0)) / 2, RATE)
    weights = ("--pretrained", "tiny.safetensors")
    done = command(capsys, "enroll", "alice.wav", "-o", "alice.voice", *weights)
    assert done.status == 0, done.err
    assert done.out.startswith("alice.voice: voice of alice.wav; ")
    assert " s of speech in 4.0 s, level -" in done.out
    assert "exists" in command(capsys, "enroll", "alice.wav", "-o", "alice.voice", *weights).err
    assert command(capsys, "extract", "mix.wav", "--voice", "alice.voice", "-o", "saved.wav", *weights).status == 0
    assert command(capsys, "extract", "mix.wav", "alice.wav", "named.wav", *weights).status == 0
    assert Path("saved.wav").read_bytes() == Path("named.wav").read_bytes()
    two = ("--voice", "alice.wav@0-2", "--voice", "alice.wav@2-4")
    assert command(capsys, "extract", "mix.wav", *two, "-o", "joined.wav", *weights).status == 0
    clash = command(capsys, "extract", "mix.wav", "--voice", "alice.voice", "--voice", "alice.wav", "-o", "x.wav")
    assert "is a saved voice, which cannot be joined" in clash.err
    done = command(capsys, "extract", "mix.wav", "--voice", "mix.wav#7", "-o", "x.wav", *weights)
    assert done.err == "onevoice: error: mix.wav#7: was not found, only one person\n"


def test_swapped_arguments_get_a_hint(
    extractor: Extractor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    people = [FoundVoice(number, ((0.0, 3.0),), (0.0, 3.0)) for number in (1, 2)]
    monkeypatch.setattr(enrollment, "find_voices", lambda sound, rate, speech: people)
    write_audio(tmp_path / "long.wav", (say(0, 6.0) + say(1, 6.0)) / 2, RATE)
    write_audio(tmp_path / "short.wav", say(0, 3.0), RATE)
    weights = ("--pretrained", tmp_path / "tiny.safetensors")
    done = command(capsys, "extract", tmp_path / "short.wav", tmp_path / "long.wav", tmp_path / "out.wav", *weights)
    assert "were they swapped?" in done.out
    assert "long.wav seems to have 2 voices" in done.out


# Who speaks when


def test_clusters_are_those_of_scipy() -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    rng = np.random.default_rng(0)
    points = np.repeat(rng.standard_normal((4, 16)), 12, axis=0) + 0.8 * rng.standard_normal((48, 16))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    for threshold in (0.2, 0.5, 0.8):
        ours = cluster(points, threshold)
        theirs = hierarchy.fcluster(hierarchy.linkage(points, "average", "cosine"), 1 - threshold, "distance")
        assert np.array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_two_people_in_turns(by_level: None, monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    """Tones stand for people; the embedding is the share of energy below and above 1 kHz."""

    def embed(stretches: list[np.ndarray]) -> np.ndarray:
        spectra = np.abs(np.fft.rfft(np.stack(stretches), axis=1)) ** 2
        border = int(1000 * len(stretches[0]) / discovery.RATE)
        parts = np.stack([spectra[:, :border].sum(1), spectra[:, border:].sum(1)], 1)
        return np.asarray(parts / np.linalg.norm(parts, axis=1, keepdims=True), np.float32)

    monkeypatch.setattr(discovery, "embed_stretches", embed)
    turns = [(0.5, 6.5, 2000), (7.5, 15.0, 400), (16.0, 21.0, 2000)]
    time = np.arange(22 * rate) / rate
    sound = 1e-3 * np.random.default_rng(0).standard_normal(len(time))
    for begin, end, pitch in turns:
        sound += 0.3 * np.sin(2 * np.pi * pitch * time) * ((time >= begin) & (time < end))
    first, second = find_voices(sound.astype(np.float32), rate)
    assert (first.number, second.number) == (1, 2)
    np.testing.assert_allclose(first.turns, [turns[0][:2], turns[2][:2]], atol=0.15)
    np.testing.assert_allclose(second.turns, [turns[1][:2]], atol=0.15)
    assert first.seconds == pytest.approx(11.0, abs=0.5)
    for voice in (first, second):
        assert any(begin <= voice.solo[0] < voice.solo[1] <= end for begin, end in voice.turns)
        piece = voice.enrollment(sound.astype(np.float32), rate)
        assert len(piece) <= discovery.ENROLLMENT_SECONDS * rate
        assert embed([piece])[0].argmax() == (1 if voice is first else 0)


def test_nobody_speaks() -> None:
    assert find_voices(np.zeros(3 * RATE, np.float32), RATE) == []
