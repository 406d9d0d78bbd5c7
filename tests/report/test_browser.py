"""The pieces of a page in a real browser: nothing in the console, charts drawn, players that keep their position."""

from pathlib import Path

import numpy as np
import pytest
from browser import in_every_look, needs_browser, open_page

from onevoice.report.charts import histogram, line_chart, scatter
from onevoice.report.page import Section, page, settings_table, table, text
from onevoice.report.players import Track, players

pytestmark = needs_browser


def tone(frequency: float, seconds: float, sample_rate: int = 8000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * sample_rate)) / sample_rate)).astype("f4")


def group(title: str) -> str:
    return players(
        title,
        [
            Track("mixture", tone(300, 2), 8000),
            Track("enrollment", tone(500, 1), 8000, is_aligned=False),
            Track("estimate", tone(700, 2), 8000),
        ],
    )


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one of everything, and a second group of players."""
    charts = [
        line_chart("Loss", {"train": ([1, 2, 3], [3.0, None, 1.0]), "validation": ([2, 4], [2.5, 2.0])}),
        line_chart("Nothing", {"train": ([], [])}),
        histogram("SI-SDRi", {"ours": [1.0, 2.0, 2.5], "theirs": [0.0, 4.0]}, unit="dB"),
        scatter("By SNR", {"ours": ([0.0, 0.0, 5.0], [1.0, 2.0, 3.0])}, x_label="SNR", y_label="SI-SDRi"),
    ]
    content = page(
        "A page", "with everything",
        [
            Section("Charts", charts, is_grid=True),
            Section("Players", [group("one"), group("two")]),
            Section("Rest", [table("T", ("a", "b"), [("x", 1.0)]), settings_table("S", {"a": {"b": 1}}), text("t")]),
        ],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(content, encoding="utf-8")
    return path


@in_every_look
def test_it_opens_without_a_word_in_the_console_and_fits_the_window(
    sample: Path, tmp_path: Path, size: str, dark: bool
) -> None:
    opened = open_page(
        sample, tmp_path, """
        const ink = getComputedStyle(document.body).color;
        const painted = all("canvas").map((canvas) => canvas.getContext("2d")
            .getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0));
        return {painted, ink, empty: all(".plot")[1].textContent,
                overflow: document.documentElement.scrollWidth - innerWidth};
        """, size=size, dark=dark,
    )  # fmt: skip
    assert opened.console == []
    assert opened.found["painted"] == [True, True, True]
    assert opened.found["empty"] == "no values"
    assert opened.found["overflow"] <= 0
    assert opened.found["ink"] == ("rgb(232, 234, 238)" if dark else "rgb(22, 24, 29)")


def test_aligned_tracks_share_their_position_and_others_keep_their_own(sample: Path, tmp_path: Path) -> None:
    opened = open_page(
        sample, tmp_path, """
        const [slider] = all(".position"), radios = all(".players")[0].querySelectorAll("input[type=radio]");
        const seen = [];
        const seek = (seconds) => { slider.value = seconds; slider.dispatchEvent(new Event("input")); };
        const see = () => seen.push([+slider.value, +slider.max, all(".clock")[0].textContent]);
        seek(1.5); see();
        radios[2].click(); see();
        radios[1].click(); see();
        seek(0.5); radios[0].click(); see();
        radios[1].click(); see();
        return seen;
        """,
    )  # fmt: skip
    assert opened.console == []
    assert opened.found == [
        [1.5, 2, "0:01.5 / 0:02.0"],
        [1.5, 2, "0:01.5 / 0:02.0"],
        [0, 1, "0:00.0 / 0:01.0"],
        [1.5, 2, "0:01.5 / 0:02.0"],
        [0.5, 1, "0:00.5 / 0:01.0"],
    ]


def test_one_sound_plays_at_a_time_and_a_switch_goes_on(sample: Path, tmp_path: Path) -> None:
    opened = open_page(
        sample, tmp_path, """
        const [first, second] = all(".play"), audio = all("audio"), radios = all("input[type=radio]");
        const until = async (done) => { for (let n = 0; n < 2000 && !done(); n++) await wait(0.05); return done(); };
        const playing = () => audio.map((each) => !each.paused);
        first.click();
        const started = await until(() => audio[0].currentTime > 0);
        const one = playing();
        radios[2].click();
        const switched = await until(() => audio[2].currentTime > 0);
        const two = playing();
        second.click();
        await until(() => audio[3].currentTime > 0);
        const found = [started, one, switched, two, playing(), [first, second].map((each) => each.ariaLabel)];
        audio.forEach((each) => each.pause());
        return found;
        """, seconds=300,
    )  # fmt: skip
    assert opened.console == []
    first, third, fourth = ([number == on for number in range(6)] for on in (0, 2, 3))
    assert opened.found == [True, first, True, third, fourth, ["Play", "Pause"]]


def test_everything_that_reacts_to_the_mouse_is_reached_by_keyboard(sample: Path, tmp_path: Path) -> None:
    """Native controls with names, in order; folded tables and wide tables take the focus too."""
    opened = open_page(
        sample, tmp_path, """
        const controls = all("a, button, input, summary, [tabindex='0']").filter((each) => each.checkVisibility());
        return controls.map((each) => {
            each.focus();
            const name = each.ariaLabel || each.labels?.[0]?.textContent.trim() || each.textContent.trim();
            return [each.tagName, name, document.activeElement === each];
        });
        """,
    )  # fmt: skip
    transport = [["BUTTON", "Play", True], ["INPUT", "Position in seconds", True]]
    radios = [["INPUT", name, True] for name in ("mixture", "enrollment", "estimate")]
    links = [["A", name, True] for name in ("Charts", "Players", "Rest")]
    assert opened.found == [
        *links,
        *transport,
        *radios,
        *transport,
        *radios,
        ["DIV", "T", True],
        ["SUMMARY", "S", True],
    ]


def test_an_error_in_the_console_is_seen(sample: Path, tmp_path: Path) -> None:
    assert len(open_page(sample, tmp_path, "console.error('broken');").console) == 1
