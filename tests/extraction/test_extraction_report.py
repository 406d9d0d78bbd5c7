"""The page of an extraction in a real browser, and its size for a long recording."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import in_every_look, needs_browser, open_page
from tiny import command

from onevoice.audio import read_audio, write_audio
from onevoice.evaluation.demo import SAMPLES
from onevoice.extraction import report
from onevoice.extraction.extractor import load
from onevoice.extraction.recording import extract_file


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about a talk in which the target speaks first, and the other second."""
    folder = tmp_path_factory.mktemp("page")
    mixture, target = (read_audio(SAMPLES / f"{name}.flac", 16_000)[0] for name in ("mixture", "target"))
    write_audio(folder / "talk.wav", np.concatenate([target, mixture - target]), 16_000)
    names = (folder / "talk.wav", SAMPLES / "enrollment.flac", folder / "o.wav")
    extract_file(load(device="cpu"), *names, page=folder / "page.html")
    return folder / "page.html"


@needs_browser
@in_every_look
def test_it_opens_without_a_word_in_the_console_and_fits_the_window(
    sample: Path, tmp_path: Path, size: str, dark: bool
) -> None:
    opened = open_page(
        sample, tmp_path, """
        return {
            overflow: document.documentElement.scrollWidth - innerWidth,
            sections: all("h2").map((each) => each.textContent),
            tracks: all(".track span").map((each) => each.textContent),
            spans: all(".spans rect").map((each) => each.getBoundingClientRect().width),
            loaded: all("img").map((each) => each.complete && each.naturalWidth > 0),
            checkUp: all("#section-3 p")[0].textContent,
            title: document.title, header: all("header p")[0].textContent,
        };
        """, size=size, dark=dark,
    )  # fmt: skip
    assert opened.console == []
    assert opened.found["overflow"] <= 0
    assert opened.found["sections"] == ["Listen", "Presence", "Voice", "Settings"]
    assert opened.found["tracks"] == ["mixture", "voice", "residual"]
    assert opened.found["loaded"] == [True] * 3
    assert opened.found["spans"]
    assert min(opened.found["spans"]) > 0
    assert opened.found["checkUp"].startswith("Check-up: ")
    assert "talk.wav" in opened.found["title"]
    assert "% of the recording" in opened.found["header"]


@needs_browser
def test_a_switch_keeps_the_position(sample: Path, tmp_path: Path) -> None:
    opened = open_page(
        sample, tmp_path, """
        const [slider] = all(".position"), radios = all("input[type=radio]"), seen = [];
        slider.value = 3; slider.dispatchEvent(new Event("input"));
        for (const radio of radios) { radio.click(); seen.push(+slider.value); }
        all(".play")[0].click();
        for (let n = 0; n < 1000 && all("audio")[2].currentTime <= 3; n++) await wait(0.05);
        return [...seen, all("audio")[2].currentTime > 3];
        """, seconds=60,
    )  # fmt: skip
    assert opened.console == []
    assert opened.found == [3, 3, 3, True]


def test_a_long_recording_has_a_small_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The players hold the beginning, as MP3; the presence covers everything."""
    monkeypatch.setattr(report, "MAX_PLAYED_SECONDS", 6.0)
    monkeypatch.setattr(report, "LOSSLESS_SECONDS", 5.0)
    mixture = np.tile(read_audio(SAMPLES / "mixture.flac", 16_000)[0], 2)
    write_audio(tmp_path / "long.wav", mixture, 16_000)
    names = (tmp_path / "long.wav", SAMPLES / "enrollment.flac", tmp_path / "o.wav")
    extract_file(load(device="cpu"), *names, page=tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "hold the first 0:06.0 of 0:16.0" in text
    assert text.count("data:audio/mpeg") == 3
    assert "audio/flac" not in text
    assert len(text) < 600_000


def test_a_recording_with_a_silent_channel_has_a_page(tmp_path: Path) -> None:
    mixture = read_audio(SAMPLES / "mixture.flac", 16_000)[0]
    soundfile.write(tmp_path / "two.wav", np.stack([np.zeros_like(mixture), mixture], axis=1), 16_000)
    names = (tmp_path / "two.wav", SAMPLES / "enrollment.flac", tmp_path / "o.wav")
    done = extract_file(load(device="cpu"), *names, channel="each", page=tmp_path / "p.html")
    assert done.presence is not None
    assert done.presence.is_present  # it is in channel 2
    assert "They play channel 1." in (tmp_path / "p.html").read_text()


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [SAMPLES / "mixture.flac", SAMPLES / "enrollment.flac", tmp_path / "o.flac"]
    outcome = command(capsys, "extract", *names, "--report", tmp_path / "p.html")
    assert outcome.status == 0
    assert "Extraction from" in (tmp_path / "p.html").read_text()
