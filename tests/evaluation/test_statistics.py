"""Groups of trials have the statistics of their rows."""

import numpy as np
import pytest

from onevoice.evaluation.results import TrialRow
from onevoice.evaluation.statistics import (
    ENROLLMENT_EDGES_SECONDS,
    SNR_EDGES_DB,
    bin_of,
    bootstrap_interval,
    confusion_rate,
    summarize_groups,
    summarize_presence,
    summarize_rows,
)


def row(gain: float | None, snr: float = 0.0, pair: str | None = None, confused: bool | None = None) -> TrialRow:
    return TrialRow(
        "a", 1.0, {"si_sdr_improvement": gain, "pesq": None if gain is None else 2.0}, {}, None, "set",
        gender_pair=pair, input_snr_db=snr, enrollment_seconds=4.0, mixture={"pesq": 1.5}, confused=confused,
    )  # fmt: skip


def test_the_numbers_of_a_group_are_those_of_its_rows() -> None:
    rows = [row(0.5, -5.0, "FM", True), row(3.0, -5.0, "FM", False), row(9.0, 5.0, "MM"), row(None, 5.0)]
    groups = summarize_groups(rows)
    assert list(groups) == ["gender_pair", "input_snr_db", "enrollment_seconds", "corpus"]
    assert list(groups["gender_pair"]) == ["FM", "MM"]
    assert groups["gender_pair"]["FM"] == summarize_rows(rows[:2])
    mixed = groups["gender_pair"]["FM"]
    assert (mixed["trials"], mixed["failure_rate"], mixed["confusion_rate"]) == (2, 0.5, 0.5)
    assert mixed["metrics"]["si_sdr_improvement"]["mean"] == 1.75
    assert mixed["metrics"]["pesq_improvement"]["mean"] == 0.5
    assert list(groups["input_snr_db"]) == ["-7.5 to -2.5", "2.5 to 7.5"]
    assert groups["input_snr_db"]["2.5 to 7.5"]["metrics"]["si_sdr_improvement"]["missing"] == 1
    assert {name: group["trials"] for name, group in groups["enrollment_seconds"].items()} == {"3 to 5": 4}
    assert groups["corpus"]["set"] == summarize_rows(rows)


def test_groups_are_in_the_order_of_their_values() -> None:
    rows = [row(1.0, snr) for snr in (20.0, 0.0, -20.0, 5.0, -5.0)]
    names = ["below -7.5", "-7.5 to -2.5", "-2.5 to 2.5", "2.5 to 7.5", "7.5 or more"]
    assert list(summarize_groups(rows)["input_snr_db"]) == names


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (-7.6, "below -7.5"), (-7.5, "-7.5 to -2.5"), (7.4, "2.5 to 7.5"), (7.5, "7.5 or more")],
)
def test_a_bin_includes_its_lower_edge(value: float | None, expected: str | None) -> None:
    assert bin_of(value, SNR_EDGES_DB) == expected
    assert bin_of(3.0, ENROLLMENT_EDGES_SECONDS) == "3 to 5"


def test_confusions_leave_unknown_trials_out() -> None:
    assert confusion_rate([row(1.0), row(1.0, confused=True), row(1.0, confused=False)]) == 0.5
    assert confusion_rate([row(1.0)]) is None


def scored(score: float | None, heard: bool | None, attenuation: float | None = None) -> TrialRow:
    return TrialRow("a", 1.0, {}, {}, attenuation, presence_db=score, heard=heard)


def test_presence_errors_by_counting() -> None:
    """One of four present trials scores below two of four absent ones; the threshold in use is another."""
    present = [scored(score, score > 4.5) for score in (2.0, 5.0, 6.0, 7.0)]
    absent = [scored(score, score > 4.5, 20.0) for score in (0.0, 1.0, 3.0, 5.5)]
    found = summarize_presence([*present, *absent, scored(None, None)])
    assert found == {
        "false_silence_rate": 0.25,
        "false_output_rate": 0.25,
        "equal_error_rate": 0.25,
        "equal_error_threshold_db": 5.0,
    }
    assert summarize_presence([scored(None, None), scored(None, None, 20.0)]) is None
    alone = summarize_presence(present)
    assert alone is not None
    assert (alone["false_silence_rate"], alone["false_output_rate"], alone["equal_error_rate"]) == (0.25, None, None)


@pytest.mark.parametrize("count", [3, 700])
def test_the_bootstrap_draws_one_set_after_another(count: int) -> None:
    """As many sets at once as fit give the intervals of single draws."""
    values = np.random.default_rng(0).normal(size=count)
    rng = np.random.Generator(np.random.PCG64(5))
    means = [values[rng.integers(count, size=count)].mean() for _ in range(2000)]
    assert bootstrap_interval(values, seed=5) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=1e-14)
