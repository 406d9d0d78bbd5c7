"""The pieces of a page, read back from its HTML: values, audio, pictures, and that nothing comes from elsewhere."""

import io
import math
import re

import numpy as np
import pytest
import soundfile
from pages import Page, decode

from onevoice.report.charts import MAX_POINTS, histogram, line_chart, scatter
from onevoice.report.page import Section, page, settings_table, table, text
from onevoice.report.players import Track, players
from onevoice.report.sounds import (
    COLORS,
    RANGE_DB,
    ROWS,
    envelope_of,
    power_db,
    power_db_of,
    spectrogram_rgb,
    waveform_path,
)


def read(*pieces: str) -> Page:
    return Page(page("Title", "subtitle", [Section("Section", pieces)]))


def test_lines_share_one_axis_and_gaps_are_null() -> None:
    chart = line_chart("Loss", {"train": ([1, 2, 3], [4.0, math.nan, 2.0]), "validation": ([2], [1 / 3])}, unit="dB")
    spec = read(chart).charts["Loss"]
    assert spec["names"] == ["train", "validation"]
    assert spec["data"] == [[1, 2, 3], [4, None, 2], [None, 0.333333, None]]
    assert (spec["x_label"], spec["y_label"]) == ("step", "dB")
    assert "train from 4 to 2, lowest 2, highest 4" in chart


def test_a_long_line_is_thinned_without_losing_its_mean_or_its_end() -> None:
    y = np.random.default_rng(0).normal(size=10 * MAX_POINTS)
    x, thinned = read(line_chart("L", {"a": (list(range(len(y))), y.tolist())})).charts["L"]["data"]
    assert len(x) == MAX_POINTS
    assert x[-1] == len(y) - 1
    assert np.mean(thinned) == pytest.approx(y.mean(), abs=1e-6)


def test_histograms_have_common_bins_and_count_every_value() -> None:
    spec = read(histogram("H", {"a": [0.0, 1.0, 1.1, None], "b": [10.0]}, unit="dB", bins=10)).charts["H"]
    edges, a, b = spec["data"]
    assert edges == list(range(10))
    assert (a, b) == ([1, 2] + 8 * [0], 9 * [0] + [1])
    assert spec["span"] == [0, 10]


def test_points_are_sorted_by_x_and_belong_to_one_series_each() -> None:
    series = {"a": ([3.0, 1.0, 2.0], [30.0, 10.0, None]), "b": ([1.0], [11.0])}
    assert read(scatter("S", series, x_label="x", y_label="y")).charts["S"]["data"] == [
        [1, 1, 3], [10, None, 30], [None, 11, None],
    ]  # fmt: skip


@pytest.mark.parametrize("chart", [line_chart, histogram])
def test_charts_without_values(chart: object) -> None:
    assert "no values" in (line_chart("E", {"a": ([], [])}) if chart is line_chart else histogram("E", {"a": []}))


def test_tables_and_settings() -> None:
    shown = read(
        table("T", ("name", "value"), [("a", 1.23456), ("b", None), ("c", 7)]),
        settings_table("S", {"model": {"name": "x", "sizes": [1, 2]}, "seed": None, "empty": {}}),
    )
    assert shown.tables["T"] == [["name", "value"], ["a", "1.235"], ["b", ""], ["c", "7"]]
    assert shown.tables["S"] == [["model.name", "x"], ["model.sizes", "[1, 2]"], ["seed", "null"], ["empty", "{}"]]


def test_text_from_outside_is_never_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    wave = np.zeros(800, np.float32)
    pieces = [
        text(evil), table(evil, (evil,), [(evil,)]), settings_table(evil, {evil: evil}),
        line_chart(evil, {evil: ([1], [1.0])}), players(evil, [Track(evil, wave, 8000)], note=evil),
    ]  # fmt: skip
    html = page(evil, evil, [Section(evil, pieces, evil)])
    assert evil not in html
    assert "<img src=x" not in html
    assert Page(html).charts[evil]["names"] == [evil]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    wave = np.zeros(800, np.float32)
    html = page("T", "s", [Section("A", [players("p", [Track("a", wave, 8000)])]), Section("Left out", [])])
    shown = Page(html)
    assert shown.addresses
    assert all(address.startswith(("data:", "#")) for address in shown.addresses)
    assert "Left out" not in html
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", html)
    assert "default-src 'none'" in html
    assert "The MIT License (MIT)" in html  # of the chart library inside


def test_players_hold_the_samples_exactly() -> None:
    rng = np.random.default_rng(1)
    mixture, other = (rng.integers(-9000, 9000, 4000) / 32768).astype("f4"), np.zeros(1000, np.float32)
    shown = read(players("P", [Track("mixture", mixture, 16000), Track("enrollment", other, 8000, is_aligned=False)]))
    group = shown.players["P"]
    assert [(each["seconds"], each["aligned"]) for each in group.values()] == [("0.250", "yes"), ("0.125", "no")]
    samples, rate = soundfile.read(io.BytesIO(decode(group["mixture"]["audio"])), dtype="float32")
    assert rate == 16000
    np.testing.assert_array_equal(samples, mixture)
    assert group["enrollment"]["alt"] == "Spectrogram of enrollment: 0 to 4 kHz over 0.1 s"


def test_a_loud_group_keeps_its_relative_levels_and_broken_samples_are_zero() -> None:
    loud, quiet = np.array([4.0, -2.0, np.nan, np.inf] * 100, "f4"), np.full(400, 1.0, "f4")
    group = read(players("P", [Track("a", loud, 8000), Track("b", quiet, 8000)])).players["P"]
    a, b = (soundfile.read(io.BytesIO(decode(each["audio"])), dtype="float32")[0] for each in group.values())
    np.testing.assert_allclose(a[:4], [1, -0.5, 0, 0], atol=1e-4)
    np.testing.assert_allclose(b, 0.25, atol=1e-4)


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44100])
def test_a_tone_is_one_line_at_its_frequency(sample_rate: int) -> None:
    time = np.arange(sample_rate) / sample_rate
    levels = power_db(np.sin(2 * np.pi * 0.3 * sample_rate / 2 * time).astype("f4"), sample_rate)
    assert levels.shape[0] == ROWS
    middle = levels[:, 10:-10]
    assert set(middle.argmax(0)) <= {round(0.7 * ROWS) - 1, round(0.7 * ROWS)}
    assert (np.median(middle, 0) < middle.max(0) - 60).all()


def test_no_sound_is_lost_between_the_columns() -> None:
    samples = np.zeros(60 * 16000, np.float32)  # a minute, far more frames than columns
    samples[500_000:500_040] = 1
    loud = power_db(samples, 16000).max(0) > -60
    assert 1 <= loud.sum() <= 2
    assert abs(loud.argmax() / len(loud) - 500_000 / len(samples)) < 0.005


@pytest.mark.parametrize("length", [1, 3, 255, 256, 257])
def test_the_shortest_audio_has_pictures(length: int) -> None:
    samples = np.full(length, 0.5, np.float32)
    assert power_db(samples, 8000).shape[1] >= 1
    assert waveform_path(samples, 0.5).startswith("M")


@pytest.mark.parametrize("samples", [1, 63, 64, 8000, 123_457])
def test_a_recording_in_blocks_looks_as_it_does_whole(samples: int) -> None:
    sound = np.random.default_rng(0).standard_normal(samples).astype("f4")
    blocks = np.array_split(sound, 7)
    np.testing.assert_array_equal(power_db_of(blocks, samples, 16_000), power_db(sound, 16_000))
    low, high = envelope_of(blocks, samples, 300)
    starts = np.arange(len(low)) * samples // len(low)
    np.testing.assert_array_equal(low, np.minimum.reduceat(sound, starts))
    np.testing.assert_array_equal(high, np.maximum.reduceat(sound, starts))


def test_a_waveform_reaches_the_edges_at_its_peaks() -> None:
    heights = [float(y) for y in re.findall(r" (-?[\d.]+)", waveform_path(np.array([0, 1, 0, -1], "f4"), 1.0))]
    assert (min(heights), max(heights)) == (0, 100)


def test_pictures_get_lighter_with_level_and_are_valid_png() -> None:
    from PIL import Image

    levels = np.linspace(-RANGE_DB, 0, 50, dtype="f4")[None].repeat(3, 0)
    light = spectrogram_rgb(levels, 0.0).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light[0]) >= 0).all()
    assert len(np.unique(light)) == COLORS
    rng = np.random.default_rng(0)
    noise = rng.normal(size=8000).astype("f4")
    group = read(players("P", [Track("noise", noise, 8000)])).players["P"]
    image = Image.open(io.BytesIO(decode(group["noise"]["image"]))).convert("RGB")
    levels = power_db(noise, 8000)
    np.testing.assert_array_equal(np.asarray(image), spectrogram_rgb(levels, float(levels.max())))
