"""The files of an evaluation keep every number, and say in one line when they are something else."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.evaluation import results
from onevoice.evaluation.results import TrialRow, read_result, rows_path_of, write_result

PRESENT = TrialRow(
    "a_b_0",
    1.25,
    {"si_sdr": 10.1, "si_sdr_improvement": 1 / 3, "pesq": None},
    {"pesq": "PESQ refused: over 45 utterances; score shorter pieces", "si_sdr": "odd"},
    None,
    "corpus, part",
    "a",
    "b",
    "FM",
    -2.5,
    3.0,
    {"si_sdr": 9.5, "pesq": 1.5},
    -4.0,
    False,
    -1.5,
    True,
    "c0ffee",
    {"similarity": 0.75},
    0.125,
)
ABSENT = TrialRow("absent", 2.0, {}, {}, 30.5, more={"similarity": None})
SUMMARY = {"trials": 2, "failure_rate": 0.5, "metrics": {}}


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_rows_come_back_as_they_were(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"r{ending}"
    rows_file = write_result(path, SUMMARY, [PRESENT, ABSENT])
    assert rows_file.suffix == (".csv" if ending == ".json" else ending)
    for name in (path, tmp_path / "r.json", rows_file):
        result = read_result(name)
        assert result.rows == [PRESENT, ABSENT]
        assert (result.name, result.path) == ("r", tmp_path / "r.json")
    assert result.summary == {**SUMMARY, "rows_file": rows_file.name, "rows_hash": results.hash_rows(result.rows)}
    assert result.row("absent") == ABSENT
    assert result.row("nobody") is None


def test_the_columns(tmp_path: Path) -> None:
    rows = write_result(tmp_path / "r.json", SUMMARY, [PRESENT, ABSENT])
    with rows.open() as file:
        first, second = csv.DictReader(file)
    assert list(first) == [
        *("trial", "seconds", "si_sdr", "si_sdr_improvement", "pesq", "attenuation_db", "refused"),
        *("corpus", "target_speaker", "interferer_speaker", "gender_pair", "absent", "input_snr_db"),
        *("enrollment_seconds", "mixture_si_sdr", "mixture_pesq", "pesq_improvement", "interferer_improvement_db"),
        *("confused", "presence_db", "heard", "audio_hash", "similarity", "network_seconds"),
    ]
    assert first["refused"] == "pesq: PESQ refused: over 45 utterances; score shorter pieces; si_sdr: odd"
    assert (first["absent"], first["confused"], second["absent"], second["confused"]) == ("false", "false", "true", "")
    assert (first["pesq_improvement"], first["similarity"], second["attenuation_db"]) == ("", "0.75", "30.5")


def test_numbers_and_improvements() -> None:
    row = dataclasses.replace(PRESENT, values={"si_sdr": 10.0, "si_sdr_improvement": 0.5, "pesq": 2.0})
    assert row.improvements == {"pesq_improvement": 0.5}
    assert list(row.numbers) == [
        *("si_sdr", "si_sdr_improvement", "pesq", "pesq_improvement", "interferer_improvement_db", "similarity"),
    ]
    assert PRESENT.improvements == {"pesq_improvement": None}


def test_the_hash_of_the_rows_leaves_the_speed_out_and_nothing_else() -> None:
    first = results.hash_rows([PRESENT, ABSENT])
    assert results.hash_rows([dataclasses.replace(PRESENT, network_seconds=9.0), ABSENT]) == first
    changes = ({"confused": True}, {"more": {"similarity": 0.76}}, {"audio_hash": "d0"}, {"input_snr_db": -2.25})
    for change in changes:
        assert results.hash_rows([dataclasses.replace(PRESENT, **change), ABSENT]) != first
    trials = results.hash_trials([PRESENT, ABSENT])
    assert results.hash_trials([dataclasses.replace(PRESENT, confused=True), ABSENT]) == trials
    assert results.hash_trials([dataclasses.replace(PRESENT, audio_hash="d0"), ABSENT]) != trials
    assert results.hash_trials([ABSENT, PRESENT]) != trials


def test_results_of_earlier_versions_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "r.csv").write_text(
        "trial,seconds,si_sdr,pesq,attenuation_db,refused\na,1.000,3.5,,,pesq: too short\nb,2.000,,,60.0,\n"
    )
    assert read_result(tmp_path / "r.json").rows == [
        TrialRow("a", 1.0, {"si_sdr": 3.5, "pesq": None}, {"pesq": "too short"}),
        TrialRow("b", 2.0, {}, {}, 60.0),
    ]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"metrics": {"pesq": 1}}', '{"trials": 1, "failure_rate": 1}'])
def test_something_else_than_a_result(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match=r"r\.json: not a result of onevoice eval --output"):
        read_result(tmp_path / "r.json")


@pytest.mark.parametrize("content", [None, "nothing\n1\n", "trial,seconds,si_sdr\na,1,loud\n"])
def test_rows_that_are_missing_or_damaged(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "r.json").write_text(json.dumps(SUMMARY))
    if content is not None:
        (tmp_path / "r.csv").write_text(content)
    with pytest.raises(ConfigError, match=r"r\.csv: holds no rows of an evaluation"):
        read_result(tmp_path / "r.json")


def test_the_name_of_the_output() -> None:
    assert rows_path_of(Path("a/r.json")) == Path("a/r.csv")
    assert rows_path_of(Path("a/r.parquet")) == Path("a/r.parquet")
    with pytest.raises(ConfigError, match=r"must end in \.json"):
        rows_path_of(Path("r.txt"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"onevoice\[parquet\]\""):
        write_result(tmp_path / "r.parquet", SUMMARY, [PRESENT])
    assert list(tmp_path.iterdir()) == []
