"""Where a voice is heard: levels from a formula, stretches, muting, timelines, and what the default weights say."""

import csv
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny import command, save_tiny

from onevoice.audio import Mono, read_audio, write_audio
from onevoice.errors import ConfigError
from onevoice.evaluation.demo import SAMPLES
from onevoice.extraction.extractor import Extractor, load
from onevoice.extraction.presence import FLOOR_DB, FRAME_SECONDS, Presence, join, measure_presence, write_timeline
from onevoice.extraction.recording import extract_file
from onevoice.extraction.request import parse_absent
from onevoice.extraction.windows import Spool

RATE = 1000


def noise(seconds: float, seed: int = 0) -> Mono:
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32)


def measure(mixture: Mono, estimate: Mono) -> Presence:
    with Spool() as one, Spool() as other:
        one.append(mixture)
        other.append(estimate)
        return measure_presence(one, other, RATE)


def gated(sound: Mono, *stretches: tuple[float, float], rest_db: float = -30.0) -> Mono:
    """The sound at its level in the stretches (seconds), and at `rest_db` elsewhere."""
    factors = np.full(len(sound), 10 ** (rest_db / 20))
    for begin, end in stretches:
        factors[round(begin * RATE) : round(end * RATE)] = 1.0
    return (factors * sound).astype(np.float32)


def test_levels_are_those_of_the_estimate_against_the_mixture() -> None:
    """Also in a recording that is read in several pieces; an offset of the mixture does not count."""
    mixture = noise(120)
    quieter = (10 ** (-7 / 20) * mixture).astype(np.float32)
    levels = measure(mixture + 5, quieter).levels_db
    assert len(levels) == 120 / FRAME_SECONDS
    np.testing.assert_allclose(levels, -7, atol=0.5)
    np.testing.assert_allclose(measure(mixture, quieter).levels_db, -7, atol=0.05)


def test_stretches_are_found() -> None:
    mixture = noise(20)
    presence = measure(mixture, gated(mixture, (2, 5), (5.1, 7), (12, 12.05), (15, 20)))
    np.testing.assert_allclose(presence.stretches, [(2, 7), (15, 20)], atol=0.15)
    assert presence.is_present
    assert presence.share == pytest.approx(0.5, abs=0.02)
    assert presence.text() == f"heard in {100 * presence.share:.0f} % of the recording"


def test_a_level_between_the_limits_counts_beside_a_higher_one_only() -> None:
    levels = np.repeat([-30.0, -7.0, -1.0, -7.0, -30.0, -7.0, -30.0], 20)
    np.testing.assert_allclose(Presence(levels, 7.0).stretches, [(1.0, 4.0)])


def test_short_pauses_are_closed_and_short_stretches_dropped() -> None:
    """A pause of 5 frames is closed, one of 7 is not; 3 frames are dropped, 4 are not; the ends are no pauses."""
    runs = [(3, -30.0), (40, 0.0), (5, -30.0), (20, 0.0), (7, -30.0), (4, 0.0), (20, -30.0), (3, 0.0), (20, -30.0)]
    levels = np.concatenate([np.full(length, level) for length, level in [*runs, (10, 0.0), (2, -30.0)]])
    expected = [(3, 68), (75, 79), (122, 132)]
    presence = Presence(levels, len(levels) * FRAME_SECONDS)
    np.testing.assert_allclose(presence.stretches, np.array(expected) * FRAME_SECONDS)


def test_a_voice_must_be_heard_long_enough() -> None:
    """0.5 s in a short recording, one percent of a long one."""
    mixture = noise(10)
    for length, is_present in ((0.3, False), (1.0, True)):
        presence = measure(mixture, gated(mixture, (4, 4 + length)))
        assert presence.is_present == is_present
    levels = np.full(100_000, -30.0)
    levels[:900] = 0.0
    assert not Presence(levels, 5000.0).is_present
    levels[:1100] = 0.0
    assert Presence(levels, 5000.0).is_present


def test_an_absent_voice_is_heard_nowhere() -> None:
    mixture = noise(10)
    presence = measure(mixture, gated(mixture, (4, 4.3)))
    assert presence.stretches == []
    assert presence.share == 0
    assert presence.text() == "this voice does not seem to be in it"
    assert (presence.gains(0, 10 * RATE, RATE, math.inf) == 0).all()


def test_silence_holds_no_voice() -> None:
    """Neither digital silence, nor the noise floor of a network in it."""
    mixture = noise(10)
    mixture[3000:6000] = 0
    presence = measure(mixture, mixture + 1e-4 * noise(10, 1))
    assert np.isfinite(presence.levels_db).all()
    assert (presence.levels_db[62:118] == FLOOR_DB).all()
    np.testing.assert_allclose(presence.stretches, [(0, 3), (6, 10)], atol=0.15)
    silent = measure(np.zeros(500, np.float32), np.zeros(500, np.float32))
    assert not silent.is_present
    assert measure(np.ones(1, np.float32), np.ones(1, np.float32)).text()


def test_gains_keep_the_stretches_and_fade() -> None:
    mixture = noise(10)
    presence = measure(mixture, gated(mixture, (4, 6)))
    gains = presence.gains(0, 10 * RATE, RATE, 20.0)
    (begin, end), margin, frame = presence.stretches[0], 0.2, round(FRAME_SECONDS * RATE)
    assert (gains[round((begin - margin) * RATE) + frame : round((end + margin) * RATE) - frame] == 1).all()
    far = np.r_[gains[: round((begin - margin) * RATE) - frame], gains[round((end + margin) * RATE) + frame :]]
    np.testing.assert_allclose(far, 0.1)
    edges = [round((begin - margin) * RATE), round((end + margin) * RATE)]
    np.testing.assert_allclose(gains[edges], (1 + 0.1) / 2, atol=1 / frame)  # the middle of each fade
    assert np.abs(np.diff(gains)).max() < 1.05 / frame
    parts = [presence.gains(first, first + 700, RATE, 20.0) for first in range(0, 9800, 700)]
    np.testing.assert_array_equal(np.concatenate(parts), gains[:9800])


def test_channels_are_joined() -> None:
    mixture = noise(10)
    one, other = (measure(mixture, gated(mixture, stretch)) for stretch in ((1, 3), (7, 9)))
    np.testing.assert_allclose(join([one, other]).stretches, [(1, 3), (7, 9)], atol=0.15)


def test_timelines_hold_the_stretches(tmp_path: Path) -> None:
    presence = measure(noise(20), gated(noise(20), (2, 7), (15, 20)))
    for extension in (".csv", ".rttm", ".TXT"):
        write_timeline(presence, tmp_path / f"t{extension}", "my, meeting", "alice")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [line.split("\t") for line in (tmp_path / "t.TXT").read_text().splitlines()]
    rttm = [line.split(" ") for line in (tmp_path / "t.rttm").read_text().splitlines()]
    np.testing.assert_allclose([(float(row["begin_seconds"]), float(row["end_seconds"])) for row in rows],
                               presence.stretches, atol=1e-3)  # fmt: skip
    assert {row["recording"] for row in rows} == {"my_meeting"}
    assert all(abs(float(row["level_db"])) < 2 for row in rows)
    np.testing.assert_allclose([(float(a), float(b)) for a, b, _ in labels], presence.stretches, atol=1e-3)
    assert [line[:3] + line[5:] for line in rttm] == 2 * [
        ["SPEAKER", "my_meeting", "1", "<NA>", "<NA>", "alice", "<NA>", "<NA>"]
    ]
    np.testing.assert_allclose([(float(line[3]), float(line[3]) + float(line[4])) for line in rttm],
                               presence.stretches, atol=2e-3)  # fmt: skip


@pytest.mark.parametrize(("text", "level"), [("keep", 0.0), ("mute", math.inf), ("12.5", 12.5)])
def test_how_far_to_turn_down(text: str, level: float) -> None:
    assert parse_absent(text) == level


@pytest.mark.parametrize("text", ["quiet", "-3", "nan", ""])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"absent: .* is none of keep, mute and a number of dB"):
        parse_absent(text)


# With the default weights


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load(device="cpu")


def sample(name: str) -> Mono:
    return read_audio(SAMPLES / f"{name}.flac", 16_000)[0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixture, an enrollment, and `other.wav`, which holds the other voice only."""
    for name in ("mixture", "enrollment"):
        write_audio(tmp_path / f"{name}.wav", sample(name), 16_000)
    write_audio(tmp_path / "other.wav", sample("mixture") - sample("target"), 16_000, subtype="FLOAT")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_voice_is_in_the_mixture_and_not_where_the_other_speaks_alone(extractor: Extractor) -> None:
    voice = extractor.enroll(sample("enrollment"), 16_000)
    mixture, target = sample("mixture"), sample("target")
    estimate, presence = extractor.extract_with_presence(mixture, 16_000, voice)
    assert presence.is_present
    np.testing.assert_array_equal(estimate, extractor.extract(mixture, 16_000, voice))
    estimate, presence = extractor.extract_with_presence(mixture - target, 16_000, voice, absent_db=math.inf)
    assert not presence.is_present
    assert not estimate.any()
    assert len(estimate) == len(mixture)


def test_an_absent_voice_is_said_and_muted_with_status_0(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--absent", "mute", "--timeline", "t.csv", "--residual", "r.wav"]
    outcome = command(capsys, "extract", "other.wav", "enrollment.wav", "o.wav", *options)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.rstrip().endswith("; this voice does not seem to be in it")
    assert not read_audio("o.wav")[0].any()
    np.testing.assert_array_equal(read_audio("r.wav")[0], read_audio("other.wav")[0])
    assert len(Path("t.csv").read_text().splitlines()) == 1


def test_files_are_muted_as_arrays_are(extractor: Extractor, place: Path) -> None:
    talk = np.concatenate([sample("target"), sample("mixture") - sample("target")]).astype(np.float32)
    write_audio("talk.wav", talk, 16_000, subtype="FLOAT")
    done = extract_file(extractor, "talk.wav", "enrollment.wav", "o.wav", absent_db=30.0)
    voice = extractor.enroll(sample("enrollment"), 16_000)
    expected, presence = extractor.extract_with_presence(talk, 16_000, voice, absent_db=30.0)
    np.testing.assert_array_equal(read_audio("o.wav")[0], expected)
    assert done.presence is not None
    assert done.presence.stretches == presence.stretches
    assert 0.3 < presence.share < 0.7
    assert "heard in" in done.text()
    kept = extractor.extract(talk, 16_000, voice)
    muted = presence.gains(0, len(talk), 16_000, math.inf) == 0
    assert 0.2 < muted.mean() < 0.6
    np.testing.assert_allclose(expected[muted], kept[muted] * 10 ** (-30 / 20), atol=1e-7)
    heard = presence.gains(0, len(talk), 16_000, math.inf) == 1
    np.testing.assert_array_equal(expected[heard], kept[heard])


def test_threads_and_repeats_give_the_same(extractor: Extractor) -> None:
    mixture = sample("mixture")[:32_000]
    voice = extractor.enroll(sample("enrollment"), 16_000)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(extractor.extract_with_presence, mixture, 16_000, voice) for _ in range(3)]
        results = [job.result() for job in jobs]
    for estimate, presence in results:
        np.testing.assert_array_equal(estimate, results[0][0])
        np.testing.assert_array_equal(presence.levels_db, results[0][1].levels_db)


def test_the_card_may_name_the_threshold(extractor: Extractor) -> None:
    from dataclasses import replace

    facts = {**extractor.card.facts, "presence_threshold_db": 3.5}
    strict = Extractor(extractor.model, replace(extractor.card, facts=facts))
    voice = strict.enroll(sample("enrollment"), 16_000)
    presence = strict.extract_with_presence(sample("mixture"), 16_000, voice)[1]
    assert presence.threshold_db == 3.5
    assert not presence.is_present


# Bad input


def test_weights_without_a_level_cannot_tell(tmp_path: Path, place: Path) -> None:
    plain = load(save_tiny(tmp_path / "tiny.safetensors"), device="cpu")
    assert extract_file(plain, "mixture.wav", "enrollment.wav", "o.wav").presence is None
    with pytest.raises(ConfigError, match="do not tell where the voice is absent"):
        plain.extract_with_presence(noise(16), 8000, plain.enroll(noise(16), 8000))
    for options in ({"absent_db": math.inf}, {"timeline": "t.csv"}):
        with pytest.raises(ConfigError, match="do not tell where the voice is absent"):
            extract_file(plain, "mixture.wav", "enrollment.wav", "p.wav", **options)  # type: ignore[arg-type]
    assert not Path("p.wav").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timeline", "t.wav"], "--timeline: t.wav must end in .csv, .rttm, .txt"),
        (["--report", "r.pdf"], "--report: r.pdf must end in .html, .htm"),
        (["--timeline", "there.csv"], "there.csv: exists"),
        (["--absent", "loud"], "absent: 'loud' is none of keep, mute and a number"),
    ],
)
def test_mistakes_are_found_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    Path("there.csv").write_text("mine")
    outcome = command(capsys, "extract", "mixture.wav", "enrollment.wav", "o.wav", *options)
    assert outcome.status == 2
    assert message in outcome.err
    assert Path("there.csv").read_text() == "mine"
    assert not Path("o.wav").exists()


def test_a_timeline_is_for_one_mixture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["mixture.wav", "other.wav", "--voice", "enrollment.wav", "--out", "voices", "--timeline", "t.csv"]
    outcome = command(capsys, "extract", *names)
    assert outcome.status == 2
    assert "are for one mixture" in outcome.err


def test_nobody_is_in_a_silent_mixture(extractor: Extractor) -> None:
    voice = extractor.enroll(sample("enrollment"), 16_000)
    estimate, presence = extractor.extract_with_presence(np.zeros(16_000, np.float32), 16_000, voice, absent_db=20.0)
    np.testing.assert_array_equal(estimate, np.zeros(16_000, np.float32))
    assert (presence.is_present, presence.share, presence.stretches) == (False, 0.0, [])
