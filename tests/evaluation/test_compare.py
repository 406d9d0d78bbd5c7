"""Paired differences of results, against a plain implementation and values by hand."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import command

from onevoice.errors import ConfigError
from onevoice.evaluation.compare import compare, difference_of, title_of, unit_of
from onevoice.evaluation.results import Result, TrialRow, hash_trials, write_result

GAINS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def row(number: int, gain: float, **more: object) -> TrialRow:
    values = {"si_sdr": gain + 1, "si_sdr_improvement": gain, "pesq": None if number == 0 else 1.5}
    return TrialRow(f"t{number}", 1.0, values, {}, audio_hash=f"hash{number}", **more)  # type: ignore[arg-type]


def result(name: str, gains: list[float], first: int = 0) -> Result:
    return Result(Path(f"/x/{name}.json"), {}, [row(number, gain) for number, gain in enumerate(gains, first)])


def test_differences_are_paired_by_name() -> None:
    other = result("b", [2.0, 2.0, 4.0, 7.0, 4.0, 9.0])
    shuffled = dataclasses.replace(other, rows=other.rows[::-1])
    (found,) = compare([result("a", GAINS), shuffled])
    assert (found.reference, found.other, found.trials) == ("a", "b", 6)
    gain = found.differences["si_sdr_improvement"]
    assert (gain.reference, gain.other, gain.count) == (3.5, pytest.approx(28 / 6), 6)
    assert gain.difference == pytest.approx(7 / 6)
    assert (gain.median, gain.higher, gain.lower) == (1.0, 4, 1)
    assert gain.interval_95[0] < 7 / 6 < gain.interval_95[1]
    assert found.ranking == [("t3", 3.0), ("t5", 3.0), ("t0", 1.0), ("t2", 1.0), ("t1", 0.0), ("t4", -1.0)]
    assert found.differences["pesq"].count == 5
    assert (found.differences["pesq"].difference, found.differences["pesq"].p) == (0.0, 1.0)


def test_p_is_the_share_of_sign_patterns_that_are_as_extreme() -> None:
    """The exact distribution of the signed-rank statistic, by going through all signs (Wilcoxon, 1945)."""
    difference = np.array([0.3, -1.1, 2.2, 3.4, 5.0, 4.1, 7.3, -0.2])
    ranks = np.argsort(np.argsort(np.abs(difference))) + 1
    centre = ranks.sum() / 2
    statistics = [abs(ranks @ np.array(signs) - centre) for signs in itertools.product((0, 1), repeat=len(ranks))]
    expected = np.mean(np.array(statistics) >= abs(ranks @ (difference > 0) - centre))
    assert difference_of(np.zeros(8), difference).p == pytest.approx(expected)
    assert difference_of(np.zeros(10), np.append(difference, [0.0, 0.0])).p == pytest.approx(expected)


def test_more_than_two_and_only_what_all_have() -> None:
    results = [result("a", GAINS), result("b", GAINS, first=1), result("c", GAINS, first=2)]
    with pytest.raises(ConfigError, match=r"4 trials are in all results.* add --common"):
        compare(results)
    two = compare(results, common=True)
    assert [each.other for each in two] == ["b", "c"]
    assert [each.trials for each in two] == [4, 4]
    assert [each.differences["si_sdr"].difference for each in two] == [-1.0, -2.0]
    assert "a has 6, b has 6, c has 6" in two[0].notes[0]
    with pytest.raises(ConfigError, match="no trial in common"):
        compare([result("a", GAINS), result("b", GAINS, first=10)], common=True)


def test_other_audio_under_the_same_name_is_refused() -> None:
    first = result("a", GAINS)
    second = dataclasses.replace(first, rows=[dataclasses.replace(first.rows[0], audio_hash="x"), *first.rows[1:]])
    assert hash_trials(first.rows) != hash_trials(second.rows)
    with pytest.raises(ConfigError, match="in 1 of them the audio differs"):
        compare([first, second])
    assert "the audio differs" in compare([first, second], common=True)[0].text()


def test_lower_is_better_for_word_errors() -> None:
    results = [
        Result(Path(f"/{name}.json"), {}, [row(number, 1.0, more={"wer": wer}) for number, wer in enumerate(rates)])
        for name, rates in {"a": [0.5, 0.5], "b": [0.25, 0.75]}.items()
    ]
    (found,) = compare(results, by="wer")
    assert found.ranking == [("t0", -0.25), ("t1", 0.25)]
    with pytest.raises(ConfigError, match="--by loudness: is no column of all results; choose one of si_sdr,"):
        compare(results, by="loudness")


def test_results_of_the_same_file_name_are_told_apart() -> None:
    results = [dataclasses.replace(result("r", GAINS), path=Path(f"/runs/{name}/r.json")) for name in "ab"]
    assert (compare(results)[0].reference, compare(results)[0].other) == ("a/r", "b/r")


def test_titles() -> None:
    assert [title_of(name) for name in ("si_sdr_improvement", "pesq_improvement", "stoi", "attenuation_db", "wer")] == [
        *("SI-SDRi", "PESQi", "STOI", "attenuation", "wer"),
    ]
    assert [unit_of(name) for name in ("sdr_improvement", "pesq_improvement", "interferer_improvement_db")] == [
        *(" dB", "", " dB"),
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"trials": 6, "failure_rate": None, "metrics": {}}
    for name, gains in {"a": GAINS, "b": [gain + 1 + gain / 10 for gain in GAINS]}.items():
        write_result(tmp_path / f"{name}.json", summary, result(name, gains).rows)
    done = command(capsys, "compare", tmp_path / "a.json", tmp_path / "b.csv")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[0] == "b against a, 6 trials"
    line = next(line for line in done.out.splitlines() if line.startswith("SI-SDRi"))
    assert "3.500 -> 4.850 dB  +1.350 dB  (95 % interval +1.2" in line
    assert "p = 0.031, 6 higher, 0 lower, n = 6)" in line
    assert "best by SI-SDRi: t5 +1.60, t4 +1.50, t3 +1.40" in done.out
    assert "worst by SI-SDRi: t0 +1.10" in done.out
    done = command(capsys, "compare", tmp_path / "a.json", tmp_path / "b.json", "--json", "--by", "si_sdr")
    (values,) = json.loads(done.out)
    assert (values["by"], values["trials"], values["ranking"][0][0]) == ("si_sdr", 6, "t5")
    assert values["differences"]["si_sdr"]["p"] == pytest.approx(1 / 32)
    for arguments in ([tmp_path / "a.json"], [tmp_path / "a.json", tmp_path / "c.json"]):
        done = command(capsys, "compare", *arguments)
        assert (done.status, done.err.count("\n")) == (2, 1)
