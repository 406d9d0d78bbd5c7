"""An evaluation resumes after a kill, judges baselines and other toolkits alike, and says what it judged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import command, save_tiny
from toy_runs import forked_process
from voices import make_trials

from onevoice.audio import read_audio, write_audio
from onevoice.cli import main
from onevoice.errors import AudioError
from onevoice.evaluation.journal import Journal
from onevoice.evaluation.results import read_result
from onevoice.evaluation.run import Estimator, EvaluationConfig, judge
from onevoice.models import SpExPlusConfig
from onevoice.trials.reading import find_trials

QUICK = ("--metrics", "si_sdr", "si_sdr_improvement", "-j", "1")
KILLED = """
import os, signal, sys
from onevoice.cli import main
from onevoice.evaluation.journal import Journal
append = Journal.append
def append_or_die(self, row):
    append(self, row)
    if row.name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.append = append_or_die
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network, seven trials, and the result of an undisturbed evaluation with its estimates."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_tiny(folder / "tiny.safetensors")
    make_trials(folder / "trials", 7, seconds=0.5)
    main([*arguments(folder), "-o", str(folder / "whole.json"), "--save-estimates", str(folder / "estimates")])
    return folder


def arguments(home: Path) -> list[str]:
    return ["eval", "-r", str(home / "tiny.safetensors"), "-t", str(home / "trials"), "-b", "3", *QUICK]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def without_times(path: Path) -> tuple[dict[str, object], list[list[str]]]:
    """The summary without what depends on times, and the rows without their last column."""
    summary = json.loads(path.with_suffix(".json").read_text())
    assert summary.pop("speed")["network_seconds"] > 0
    assert summary.pop("rows_file") == path.with_suffix(".csv").name
    rows = [line.split(",") for line in path.with_suffix(".csv").read_text().splitlines()]
    assert {row.pop() != "" for row in rows} == {True}
    return summary, rows


def test_a_killed_evaluation_resumes_to_the_same_bytes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed within the second batch of three, and with half a line of the journal on the disk."""
    same = [*arguments(home), "-o", tmp_path / "r.json", "--save-estimates", home / "estimates"]
    fifth = find_trials(home / "trials")[4].name
    killed = forked_process(["-c", KILLED, fifth, *same])
    assert killed.status == -9, killed.err
    journal = tmp_path / "r.journal.jsonl"
    assert len(journal.read_bytes().splitlines()) == 6
    assert not (tmp_path / "r.json").exists()
    torn = journal.read_bytes() + b'{"name": "half a r'
    journal.write_bytes(torn)

    done = command(capsys, *same[:-6], "si_sdr", *same[-4:])  # another choice of metrics
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "belongs to an unfinished evaluation of something else (metrics differ); remove it to start over" in done.err
    assert journal.read_bytes() == torn

    done = command(capsys, *same)
    assert done.status == 0, done.err
    assert not journal.exists()
    whole, resumed = without_times(home / "whole.json"), without_times(tmp_path / "r.json")
    assert resumed == whole
    kept = [json.loads(line)["network_seconds"] for line in torn.splitlines()[1:-1]]
    assert [row.network_seconds for row in read_result(tmp_path / "r.json").rows[:5]] == kept


def test_a_journal_of_other_weights_or_trials_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [*arguments(home), "-o", tmp_path / "r.json"]
    with monkeypatch.context() as patch:
        patch.setattr("onevoice.evaluation.run.tqdm.update", interrupt)
        assert command(capsys, *same).status == 130
    assert len((tmp_path / "r.journal.jsonl").read_text().splitlines()) == 2
    whole = read_result(home / "whole.json")
    Journal(tmp_path / "r.json", {}).append(whole.rows[1])
    other = save_tiny(tmp_path / "other.safetensors", SpExPlusConfig(sample_rate=8000, filters=8, channels=8, hidden=8))
    done = command(capsys, *["-r" if a == "-r" else other if str(a).endswith("tiny.safetensors") else a for a in same])
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "unfinished evaluation of something else (estimator" in done.err
    lines = (tmp_path / "r.journal.jsonl").read_text().splitlines()
    swapped = [lines[0], lines[2], lines[1]]
    (tmp_path / "r.journal.jsonl").write_text("\n".join(swapped) + "\n")
    done = command(capsys, *same)
    assert "its trials are not those of this evaluation; remove it to start over" in done.err


def test_what_a_result_says_of_itself(home: Path) -> None:
    result = read_result(home / "whole.json")
    software = result.summary["provenance"]["software"]
    assert {"onevoice", "torch", "python", "packages", "seeds"} <= software.keys()
    assert software["packages"]["pesq"]
    assert software["packages"]["numpy"] == np.__version__
    estimator = result.summary["provenance"]["estimator"]
    assert estimator["card"]["speakers"] == 4
    assert len(estimator["weights_hash"]) == 64
    assert result.summary["provenance"]["sample_rate"] == 8000
    assert result.summary["groups"].keys() == {"gender_pair", "input_snr_db", "enrollment_seconds", "corpus"}
    assert result.summary["groups"]["corpus"]["trials"]["trials"] == 7
    assert [row.name for row in result.rows] == [trial.name for trial in find_trials(home / "trials")]
    assert len({row.audio_hash for row in result.rows}) == 7


def test_estimates_on_disk_score_the_same(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = command(capsys, "score", home / "estimates", home / "trials", *QUICK, "-o", tmp_path / "r.parquet")
    assert (done.status, done.err) == (0, "")
    ours, scored = read_result(home / "whole.json"), read_result(tmp_path / "r.parquet")
    for key in ("rows_hash", "trials_hash", "metrics", "groups", "failure_rate", "confusion_rate"):
        assert scored.summary[key] == ours.summary[key]
    assert scored.summary["speed"] is None
    assert scored.summary["estimates"] == str(home / "estimates")
    assert read_audio(home / "estimates" / f"{ours.rows[0].name}.wav")[0].dtype == np.float32


def change_estimates(folder: Path, home: Path, what: str) -> None:
    """Copy the estimates to `folder` with one fault in that of the third trial."""
    for path in sorted((home / "estimates").iterdir()):
        samples, rate = read_audio(path)
        if path.stem.endswith("_000002"):
            if what == "missing":
                continue
            if what == "short":
                samples = samples[:-100]
            if what == "a bit short":
                samples = samples[:-50]
            if what == "other rate":
                rate = 16000
            if what == "twice":
                write_audio(folder / f"{path.stem}-estimate.flac", samples, rate)
            if what == "NaN":
                write_audio(folder / path.name, samples, rate, subtype="FLOAT")
                data = bytearray((folder / path.name).read_bytes())
                data[-400:-396] = np.float32(np.nan).tobytes()
                (folder / path.name).write_bytes(data)
                continue
        write_audio(folder / path.name, samples, rate, subtype="FLOAT")
    if what == "extra":
        write_audio(folder / "nobody.wav", samples, rate)


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("missing", "1 of 7 trials have no estimate, the first is 'spk"),
        ("short", "lasts 0.487 s, but its mixture 0.500 s"),
        ("other rate", "is at 16000 Hz, but is judged at 8000 Hz"),
        ("twice", "are of one trial; remove one of them"),
        ("NaN", "holds NaN or infinite samples"),
    ],
)
def test_a_faulty_estimate_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, complaint: str
) -> None:
    change_estimates(tmp_path, home, what)
    done = command(capsys, "score", tmp_path, home / "trials", *QUICK)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert complaint in done.err
    assert "_000002" in done.err


@pytest.mark.parametrize(
    ("what", "note"),
    [
        ("extra", "1 files belong to no trial, the first is nobody.wav"),
        ("a bit short", "1 of 7 estimates differ from their mixtures in length by up to 0.01 s"),
    ],
)
def test_an_odd_folder_of_estimates_is_a_note(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, note: str
) -> None:
    change_estimates(tmp_path, home, what)
    done = command(capsys, "score", tmp_path, home / "trials", *QUICK)
    assert done.status == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("note ")]
    assert note in line


def test_baselines_bound_a_network(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = {}
    for name in ("mixture", "irm", "psm"):
        done = command(
            capsys, "eval", "--baseline", name, "-t", home / "trials", *QUICK, "-o", tmp_path / f"{name}.json"
        )
        assert done.status == 0, done.err
        result = read_result(tmp_path / f"{name}.json")
        assert result.summary["baseline"] == name
        assert result.summary["trials_hash"] == read_result(home / "whole.json").summary["trials_hash"]
        means[name] = result.summary["metrics"]["si_sdr_improvement"]["mean"]
        if name == "mixture":
            assert {row.confused for row in result.rows} == {False}
            assert {row.interferer_improvement_db for row in result.rows} == {0.0}
    assert means["mixture"] == 0.0
    assert means["psm"] > means["irm"] > 5.0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--baseline", "irm", "-r", "a"], "--checkpoint: cannot be scored together with --baseline"),
        (["-r", "a", "--sample-rate", "8000"], "--sample-rate: belongs to --baseline"),
    ],
)
def test_options_that_exclude_each_other(
    capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    done = command(capsys, "eval", "-t", "trials", *options)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert complaint in done.err


def test_confusion_is_a_gain_toward_the_interferer(tmp_path: Path) -> None:
    """The interferer itself as the estimate, the target itself, and the mixture turned down."""
    make_trials(tmp_path, 3)
    number = iter(range(3))

    def estimate(batch: object) -> list[np.ndarray]:
        mixture, target = (batch[key].numpy()[0] for key in ("audio", "target"))  # type: ignore[index]
        return [(mixture - target, target, np.float32(0.5) * mixture)[next(number)]]

    report = judge(Estimator(estimate, 8000), EvaluationConfig(str(tmp_path), metrics=("si_sdr",), jobs=1))
    assert [row.confused for row in report.trials] == [True, False, False]
    toward = [row.interferer_improvement_db or 0.0 for row in report.trials]
    assert toward[0] > 20
    assert toward[1] < -20
    assert toward[2] == pytest.approx(0, abs=1e-9)
    assert report.confusion_rate == pytest.approx(1 / 3)


def test_nan_of_a_network_names_the_trial(tmp_path: Path) -> None:
    make_trials(tmp_path, 2)

    def estimate(batch: object) -> list[np.ndarray]:
        return [torch.full_like(batch["audio"][0], torch.nan).numpy()]  # type: ignore[index]

    config = EvaluationConfig(str(tmp_path), metrics=("si_sdr",), jobs=1)
    with pytest.raises(AudioError, match=r"^trial spk\w+_000000: estimate: holds NaN"):
        judge(Estimator(estimate, 8000), config, progress=False)
