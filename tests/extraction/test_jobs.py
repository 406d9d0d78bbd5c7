"""Many recordings by one command: patterns, job lists, processes, and the lines that are printed."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny import Outcome, command, save_tiny
from toy_runs import forked_workers
from voices import Voice

from onevoice.audio import read_audio, write_audio
from onevoice.errors import AudioError, ConfigError
from onevoice.extraction.extractor import load
from onevoice.extraction.jobs import Job, expand, jobs_for, read_jobs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two mixtures in a folder, an enrollment and weights; the current folder."""
    for number in (1, 2):
        sound = (Voice.number(0).say(number, 1.0) + Voice.number(number).say(0, 1.0)) / 2
        write_audio(tmp_path / "in" / f"m{number}.wav", sound, 8000)
    write_audio(tmp_path / "voice.wav", Voice.number(0).say(9, 2.0), 8000)
    save_tiny(tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def extract(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    return command(capsys, "extract", *arguments, "--pretrained", "tiny.safetensors", "--precision", "float32")


def expected(name: str) -> np.ndarray:
    extractor = load("tiny.safetensors", device="cpu")
    return np.asarray(extractor.extract(*read_audio(f"in/{name}.wav"), read_audio("voice.wav")[0]))


def test_patterns_and_names(place: Path) -> None:
    Path("in/[x].wav").write_bytes(b"")
    assert expand(["in/m*.wav", "in/m1.wav"]) == ["in/m1.wav", "in/m2.wav"]
    assert expand(["in/[x].wav"]) == ["in/[x].wav"]  # a file of that name
    assert expand(["**/m2.wav"]) == ["in/m2.wav"]
    assert expand(["gone.wav", "-"]) == ["gone.wav", "-"]
    with pytest.raises(AudioError, match=r"out/\*\.wav: matches no file"):
        expand(["out/*.wav"])


def test_where_outputs_go(place: Path) -> None:
    assert jobs_for(["in/m1.wav"], "v", "o.flac", "r.wav") == [Job("in/m1.wav", "v", "o.flac", "r.wav")]
    assert jobs_for(["in/m1.wav"], "v", "out") == [Job("in/m1.wav", "v", "out/m1.wav")]
    assert jobs_for(["in/m*.wav"], "v", "out", "rest")[1] == Job("in/m2.wav", "v", "out/m2.wav", "rest/m2.wav")
    with pytest.raises(ConfigError, match=r"b/m1\.mp3: would get the same output as in/m1\.wav"):
        jobs_for(["in/m1.wav", "b/m1.mp3"], "v", "out")
    with pytest.raises(ConfigError, match="standard input and output are for one mixture"):
        jobs_for(["in/m1.wav", "-"], "v", "out")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_of_recordings(place: Path, capsys: pytest.CaptureFixture[str], jobs: int) -> None:
    with forked_workers():
        done = extract(capsys, "in/*.wav", "--voice", "voice.wav", "-o", "out", "--residual", "rest", "-j", jobs)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["out/m1.wav", "out/m2.wav"]
    assert lines[2].startswith("2 of 2 recordings, 2.0 s of sound in ")
    for name in ("m1", "m2"):
        np.testing.assert_array_equal(read_audio(f"out/{name}.wav")[0], expected(name))
        total = read_audio(f"out/{name}.wav")[0] + read_audio(f"rest/{name}.wav")[0]
        np.testing.assert_allclose(total, read_audio(f"in/{name}.wav")[0], atol=1e-6)


def test_a_job_list(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Relative names start at the folder of the list."""
    (place / "in" / "list.jsonl").write_text(
        json.dumps({"mixture": "m1.wav", "voice": "../voice.wav", "output": "../a.wav"})
        + "\n\n"
        + json.dumps({"mixture": str(place / "in/m2.wav"), "voice": "../voice.wav", "output": "../b.flac"})
        + "\n"
    )
    done = extract(capsys, "--list", "in/list.jsonl")
    assert done.status == 0, done.err
    np.testing.assert_array_equal(read_audio("a.wav")[0], expected("m1"))
    assert Path("b.flac").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2"),
        ('{"mixture": "a", "voice": "b"}', "line 2: output"),
        ('{"mixture": "a", "voice": "b", "output": "c", "outptu": 1}', "outptu: unknown key; did you mean 'output'"),
    ],
)
def test_a_broken_job_list(place: Path, line: str, message: str) -> None:
    good = '{"mixture": "a", "voice": "b", "output": "c"}\n'
    Path("list.jsonl").write_text(good + line + "\n")
    with pytest.raises(ConfigError, match=r"list\.jsonl") as raised:
        read_jobs(Path("list.jsonl"))
    assert message in str(raised.value)
    for text, complaint in (("", "holds no jobs"), (None, "cannot be read")):
        Path("list.jsonl").unlink()
        if text is not None:
            Path("list.jsonl").write_text(text)
            with pytest.raises(ConfigError, match=complaint):
                read_jobs(Path("list.jsonl"))
            Path("list.jsonl").write_text(text)


def test_all_files_are_looked_at_before_the_weights_load(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in/m3.wav").write_bytes(b"")
    done = command(capsys, "extract", "in/*.wav", "--voice", "voice.wav", "-o", "out", "--pretrained", "gone.pth")
    assert done.err == "onevoice: error: in/m3.wav: the file is empty (0 bytes)\n"
    done = command(capsys, "extract", "in/m1.wav", "voice.wav", "in/m2.wav", "--pretrained", "gone.pth")
    assert "in/m2.wav: exists" in done.err
    assert not Path("out").exists()


def test_an_output_is_no_input_of_another_job(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = extract(capsys, "in/*.wav", "--voice", "voice.wav", "-o", "in", "--force")
    assert done.status == 2
    assert "is the input in/m1.wav" in done.err


def test_a_recording_that_fails_does_not_stop_the_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(place / "in" / "m0.wav", np.full(8000, np.nan, np.float32), 8000, subtype="FLOAT")
    done = extract(capsys, "in/*.wav", "--voice", "voice.wav", "-o", "out")
    assert done.status == 2
    first, last = done.err.splitlines()
    assert first.startswith("onevoice: failed: in/m0.wav: holds NaN")
    assert last == "onevoice: error: 1 of 3 recordings failed"
    assert "2 of 3 recordings" in done.out
    assert sorted(path.name for path in Path("out").iterdir()) == ["m1.wav", "m2.wav"]


def test_a_silent_recording_gives_silence_and_a_note(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio(place / "in" / "m0.wav", np.zeros(8000, np.float32), 8000)
    done = extract(capsys, "in/*.wav", "--voice", "voice.wav", "-o", "out")
    assert done.status == 0, done.err
    assert "the recording is silent, so the output is too" in done.out
    assert not read_audio("out/m0.wav")[0].any()
    assert read_audio("out/m1.wav")[0].any()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["in/m1.wav", "--voice", "voice.wav"], "--out: is missing"),
        (["--voice", "voice.wav", "-o", "out"], "MIXTURE: is missing"),
        (["in/m1.wav", "-o", "a.wav"], "--out: needs --voice"),
        (["--list", "l.jsonl", "a.wav"], "--list: names mixtures, voices and outputs itself"),
        (["in/m1.wav", "voice.wav", "a.wav", "-j", "0"], "jobs: must be 1 or more, not 0"),
        (["in/m1.wav", "voice.wav", "a.wav", "--channel", "left"], "'left' is not a channel"),
        (["in/m1.wav", "voice.wav", "a.wav", "--enrollment", "b.wav"], "is given by name and by place; give it once"),
        (["https://example.org/a.wav", "voice.wav", "a.wav"], "https://example.org/a.wav: is an address, not a file"),
        (["-", "-", "a.wav"], "standard input cannot be both"),
        (["in/m1.wav", "voice.wav", "-", "--residual", "-"], "standard output cannot be both"),
    ],
)
def test_command_lines_that_do_not_fit(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    done = extract(capsys, *arguments)
    assert (done.status, done.out) == (2, "")
    assert complaint in done.err
    assert done.err.count("\n") == 1


def test_an_unknown_precision(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = command(
        capsys, "extract", "in/m1.wav", "voice.wav", "a.wav", "--pretrained", "tiny.safetensors", "--precision", "int8"
    )
    assert "precision: 'int8' is none; choose one of auto, float32, bfloat16" in done.err
