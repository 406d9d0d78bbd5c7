"""The page of results: its numbers are those of the results, and its sounds are those that were judged."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import needs_browser, open_page
from pages import Page, decode
from tiny import command, save_tiny

from onevoice.audio import read_audio, write_audio
from onevoice.cli import main
from onevoice.evaluation.compare import compare
from onevoice.evaluation.metrics import si_sdr
from onevoice.evaluation.report import choose_trials, results_report
from onevoice.evaluation.results import Result, TrialRow, read_result
from onevoice.trials.reading import find_trials

METRICS = ("--metrics", "si_sdr", "si_sdr_improvement")


@pytest.fixture(scope="module")
def results(trials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with saved estimates, a baseline, and estimates of somebody else; on toy trials, one of them absent."""
    folder = tmp_path_factory.mktemp("results")
    data = folder / "trials"
    data.mkdir()
    for number, trial in enumerate(find_trials(trials)[:12]):
        paths = [Path(str(path)) for path in (trial.mixture, trial.enrollment, trial.target)]
        (mixture, rate), (enrollment, _), (target, _) = map(read_audio, paths)
        mixture = (0.3 if number % 2 else 0.5) * (mixture - target) + 0.5 * target
        target = np.zeros_like(target) if number == 11 else 0.5 * target
        for path, samples in zip(paths, (mixture, enrollment, target), strict=True):
            write_audio(data / path.name, samples.astype("f4"), rate, subtype="FLOAT")
    (folder / "theirs").mkdir()
    for trial in find_trials(data):
        samples, rate = read_audio(Path(str(trial.mixture)))
        write_audio(folder / "theirs" / f"{trial.name}.wav", samples[::-1].copy(), rate)
    return folder


@pytest.fixture(scope="module")
def evaluated(results: Path) -> Path:
    weights = save_tiny(results / "tiny.safetensors")
    common = ["-j", "1", *METRICS]
    main(["eval", "-r", str(weights), "-t", str(results / "trials"), "-o", str(results / "net.json"), *common])
    main(["eval", "--baseline", "irm", "-t", str(results / "trials"), "-o", str(results / "irm.json"), *common])
    main(["score", str(results / "theirs"), str(results / "trials"), "-o", str(results / "theirs.json"), *common])
    return results


def heard(tracks: dict[str, dict[str, str]], name: str) -> np.ndarray:
    return np.asarray(soundfile.read(io.BytesIO(decode(tracks[name]["audio"])), dtype="float32")[0])


def test_one_result(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = command(capsys, "report", evaluated / "net.json", "-o", evaluated / "net.html", "--played", "2")
    assert (done.status, done.err) == (0, "")
    shown = Page((evaluated / "net.html").read_text(encoding="utf-8"))
    result = read_result(evaluated / "net.json")
    assert shown.titles[0] == "Evaluation net"
    gain = result.summary["metrics"]["si_sdr_improvement"]
    line = next(line for line in shown.tables["Metrics"] if line[:2] == ["SI-SDRi (dB)", "net"])
    assert line[2:] == [
        *(f"{gain['mean']:.4g}", "{:.3f} to {:.3f}".format(*gain["interval_95"])),
        *(f"{gain['median']:.4g}", f"{gain['percentile_5']:.4g}", "11"),
    ]
    before = result.summary["mixture"]["si_sdr"]["mean"]
    assert next(line for line in shown.tables["Metrics"] if line[1] == "mixture")[2] == f"{before:.4g}"
    rates = dict(zip(*shown.tables["Rates"], strict=True))
    assert rates["failures"] == f"{100 * result.summary['failure_rate']:.1f} %"
    assert rates["absent targets"] == "1"
    assert "Differences" not in shown.titles
    snrs = result.summary["groups"]["input_snr_db"]
    assert [line[0] for line in shown.tables["By input SNR (dB)"][1:]] == list(snrs)
    assert [int(line[2]) for line in shown.tables["By input SNR (dB)"][1:]] == [
        each["trials"] for each in snrs.values()
    ]
    assert sum(shown.charts["SI-SDRi"]["data"][1]) == 11
    x, y = shown.charts["SI-SDRi by SI-SDR of the mixture"]["data"]
    rows = sorted((row.input_snr_db, row.values["si_sdr_improvement"]) for row in result.rows if not row.absent)
    np.testing.assert_allclose(np.transpose([x, y]), rows, rtol=1e-4)
    assert ["provenance.sample_rate", "8000"] in shown.tables["net.json"]
    assert ["trials_hash", result.summary["trials_hash"]] in shown.tables["net.json"]
    assert not [address for address in shown.addresses if not address.startswith(("#", "data:"))]


def test_the_worst_best_and_random_trials_can_be_heard(evaluated: Path) -> None:
    shown = Page(results_report([evaluated / "irm.json"], "cpu", 2))
    result = read_result(evaluated / "irm.json")
    gains = {row.name: row.values["si_sdr_improvement"] for row in result.rows if not row.absent}
    ranked = sorted(gains, key=lambda name: gains[name])
    assert list(shown.players)[:4] == [ranked[0], ranked[1], ranked[-1], ranked[-2]]
    assert len(set(shown.players)) == 6
    trial = next(trial for trial in find_trials(evaluated / "trials") if trial.name == ranked[0])
    tracks = shown.players[trial.name]
    assert list(tracks) == ["mixture", "target", "estimate", "enrollment"]
    assert [tracks[name]["aligned"] for name in tracks] == ["yes", "yes", "yes", "no"]
    for kind, path in {"mixture": trial.mixture, "target": trial.target, "enrollment": trial.enrollment}.items():
        np.testing.assert_allclose(heard(tracks, kind), read_audio(Path(str(path)))[0], atol=1e-4)
    row = result.row(trial.name)
    assert row is not None
    assert "when it was judged" not in shown.text
    assert si_sdr(heard(tracks, "estimate"), heard(tracks, "target")) == pytest.approx(row.values["si_sdr"], abs=0.05)


@pytest.fixture(scope="module")
def three(evaluated: Path) -> Path:
    """The page of three results, with one worst, best and random trial."""
    paths = [str(evaluated / f"{name}.json") for name in ("net", "irm", "theirs")]
    main(["report", *paths, "-o", str(evaluated / "three.html"), "--played", "1"])
    return evaluated / "three.html"


def test_several_results_side_by_side(evaluated: Path, three: Path) -> None:
    shown = Page(three.read_text(encoding="utf-8"))
    paths = [evaluated / f"{name}.json" for name in ("net", "irm", "theirs")]
    first, second = compare([read_result(path) for path in paths])
    line = next(line for line in shown.tables["Paired differences"] if line[:2] == ["irm", "SI-SDRi"])
    difference = first.differences["si_sdr_improvement"]
    assert line[2:5] == [f"{value:.4g}" for value in (difference.reference, difference.other, difference.difference)]
    assert second.other == "theirs"
    assert list(shown.charts["SI-SDRi"]["names"]) == ["net", "irm", "theirs"]
    x, y = shown.charts["SI-SDRi of irm against net"]["data"]
    assert np.mean(y) - np.mean(x) == pytest.approx(difference.difference, rel=1e-3)
    assert len(shown.players) == 3
    for name, tracks in shown.players.items():
        assert list(tracks)[2:5] == ["estimate of net", "estimate of irm", "estimate of theirs"]
        mixture, theirs = heard(tracks, "mixture"), heard(tracks, "estimate of theirs")
        assert abs(np.corrcoef(theirs, mixture[::-1])[0, 1]) > 0.999, name


def test_sounds_that_are_gone_are_named_and_the_numbers_stay(evaluated: Path, tmp_path: Path) -> None:
    for name in ("net.csv", "net.json"):
        (tmp_path / name).write_bytes((evaluated / name).read_bytes())
    summary = json.loads((tmp_path / "net.json").read_text())
    summary["checkpoint"] = str(tmp_path / "gone.safetensors")
    (tmp_path / "net.json").write_text(json.dumps(summary))
    shown = Page(results_report([tmp_path / "net.json"]))
    assert "net cannot be heard" in shown.text
    assert "gone.safetensors" in shown.text
    assert shown.players == {}
    summary["data"]["folder"] = str(tmp_path / "moved")
    (tmp_path / "net.json").write_text(json.dumps(summary))
    assert "moved: no such folder of trials" in Page(results_report([tmp_path / "net.json"])).text


def test_an_estimate_that_changed_is_named(evaluated: Path, tmp_path: Path) -> None:
    summary = json.loads((evaluated / "theirs.json").read_text())
    estimates = tmp_path / "changed"
    estimates.mkdir()
    for path in (evaluated / "trials").glob("*-target.wav"):
        (estimates / path.name.replace("-target", "")).write_bytes(path.read_bytes())
    (tmp_path / "theirs.json").write_text(json.dumps({**summary, "estimates": str(estimates)}))
    (tmp_path / "theirs.csv").write_bytes((evaluated / "theirs.csv").read_bytes())
    shown = Page(results_report([tmp_path / "theirs.json"], "cpu", 1))
    assert shown.text.count("dB when it was judged") == 3


def test_trials_are_chosen_by_gain_and_the_random_ones_are_always_the_same() -> None:
    rows = [TrialRow(f"t{number:02}", 1.0, {"si_sdr_improvement": float(number)}, {}) for number in range(50)]
    result = Result(Path("r.json"), {}, [*rows[::-1], TrialRow("absent", 1.0, {}, {}, 30.0)])
    chosen = choose_trials(result, 10)
    assert chosen["Worst"] == [f"t{number:02}" for number in range(10)]
    assert chosen["Best"] == [f"t{number:02}" for number in range(49, 39, -1)]
    assert len(set(chosen["Random"]) - set(chosen["Worst"]) - set(chosen["Best"])) == 10
    assert choose_trials(Result(Path("q.json"), {}, rows), 10) == chosen
    few = choose_trials(Result(Path("q.json"), {}, rows[:12]), 10)
    assert [len(names) for names in few.values()] == [10, 2, 0]
    assert choose_trials(result, 0) == {"Worst": [], "Best": [], "Random": []}


@needs_browser
@pytest.mark.parametrize(("size", "dark"), [("1280,900", False), ("390,800", True)], ids=["wide", "phone"])
def test_it_opens_without_a_word_in_the_console(three: Path, tmp_path: Path, size: str, dark: bool) -> None:
    opened = open_page(
        three, tmp_path, """
        const painted = all("canvas").map((canvas) => canvas.getContext("2d")
            .getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0));
        return {painted, players: all(".players").length, tracks: all(".track").length,
                overflow: document.documentElement.scrollWidth - innerWidth};
        """, size=size, dark=dark,
    )  # fmt: skip
    assert opened.console == []
    assert len(opened.found["painted"]) >= 5
    assert all(opened.found["painted"])
    assert (opened.found["players"], opened.found["tracks"]) == (3, 18)
    assert opened.found["overflow"] <= 0


def test_mistakes_are_one_line(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text('{"trials": 1, "failure_rate": 0, "metrics": {"pesq": 1}}')
    (tmp_path / "broken.csv").write_bytes((evaluated / "net.csv").read_bytes())
    for arguments, message in (
        ((evaluated, evaluated / "net.json"), "only results are shown side by side"),
        ((evaluated / "net.json", "--evaluation", evaluated / "irm.json"), "--evaluation belongs to weights"),
        ((tmp_path / "nothing.json",), "not a result of onevoice eval"),
        ((tmp_path / "broken.json",), "not a result of onevoice eval"),
    ):
        done = command(capsys, "report", *arguments, "-o", tmp_path / "page.html")
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert message in done.err
