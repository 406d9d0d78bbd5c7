"""Results of the same trials side by side: paired differences to the first one.

The difference of a trial is the other result minus the reference. Its mean has a bootstrap 95 % interval over trials,
and Wilcoxon's signed-rank test gives the two-sided p of no difference (Wilcoxon, 1945; by scipy). Pairing removes what
makes a trial easy or hard, so small differences show that two separate means would hide.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.evaluation.listening import ABOUT_TRIALS, LOWER_IS_BETTER
from onevoice.evaluation.metrics import IN_DB, TITLES
from onevoice.evaluation.results import IMPROVEMENT, Result, TrialRow, hash_trials
from onevoice.evaluation.statistics import bootstrap_interval

SHOWN = 5
"""Best and worst trials in the printed text."""
MIN_P = 0.001
"""Smaller p values are not printed exactly."""
MAIN_COLUMN = "si_sdr_improvement"


@dataclass(frozen=True)
class Difference:
    """One column of two results, over the trials that have a value in both; each value is a mean over them."""

    count: int
    reference: float
    other: float
    difference: float
    """Mean of other − reference."""
    median: float
    """Median of other − reference."""
    interval_95: tuple[float, float]
    """Bootstrap 95 % interval of the mean difference."""
    p: float
    """Two-sided p of Wilcoxon's signed-rank test; 1 if no trial differs."""
    higher: int
    """Trials in which the other result has the higher value."""
    lower: int
    """Trials in which it has the lower value; the rest are equal."""


@dataclass(frozen=True)
class Comparison:
    """Two results on the same trials."""

    reference: str
    other: str
    trials: int
    differences: dict[str, Difference]
    by: str
    """The column that `ranking` is about."""
    ranking: list[tuple[str, float]]
    """Trials and their difference, the best for the other result first."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """Return the lines that `onevoice compare` prints."""
        lines = [f"{self.other} against {self.reference}, {self.trials} trials"]
        width = max(len(title_of(column)) for column in self.differences)
        for column, each in self.differences.items():
            low, high = each.interval_95
            unit, sign = unit_of(column), "" if each.p < MIN_P else "= "
            lines.append(
                f"{title_of(column):<{width}}  {each.reference:.3f} -> {each.other:.3f}{unit}  "
                f"{each.difference:+.3f}{unit}  (95 % interval {low:+.3f} to {high:+.3f}, p {sign}{format_p(each.p)}, "
                f"{each.higher} higher, {each.lower} lower, n = {each.count})"
            )
        title, shown = title_of(self.by), min(SHOWN, len(self.ranking) // 2)
        for name, chosen in (("best", self.ranking[:shown]), ("worst", self.ranking[::-1][:shown])):
            if chosen:
                trials = ", ".join(f"{trial} {value:+.2f}" for trial, value in chosen)
                lines.append(f"{name} by {title}: {trials}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def compare(results: Sequence[Result], by: str | None = None, *, common: bool = False) -> list[Comparison]:
    """Compare each further result with the first, over the trials that all of them have.

    `by` is the column that ranks trials, SI-SDRi by default. Raises `ConfigError` if the results judge other trials
    or other audio and `common` does not allow it, or if they share no trial or column.
    """
    names = short_names(results)
    rows = [{row.name: row for row in result.rows} for result in results]
    shared = [name for name in rows[0] if all(name in each for each in rows)]
    notes = _check_trials(results, names, rows, shared, common)
    columns = [
        column
        for column in dict.fromkeys(column for row in rows[0].values() for column in numbers_of(row))
        if all(any(numbers_of(row).get(column) is not None for row in each.values()) for each in rows)
    ]
    if not columns:
        raise ConfigError(f"{', '.join(names)}: have no metric in common; evaluate them with the same --metrics")
    by = by or (MAIN_COLUMN if MAIN_COLUMN in columns else columns[0])
    if by not in columns:
        raise ConfigError(f"--by {by}: is no column of all results; choose one of {', '.join(columns)}")
    return [
        _compare_two(
            names[0], names[number], [(rows[0][name], rows[number][name]) for name in shared], columns, by, notes
        )
        for number in range(1, len(results))
    ]


def _check_trials(
    results: Sequence[Result],
    names: Sequence[str],
    rows: Sequence[Mapping[str, TrialRow]],
    shared: Sequence[str],
    common: bool,
) -> tuple[str, ...]:
    """Return what is to be said about the trials. Raises `ConfigError`."""
    if not shared:
        raise ConfigError(f"{', '.join(names)}: have no trial in common; compare results of the same trials")
    if len({hash_trials(sorted(result.rows, key=lambda row: row.name)) for result in results}) == 1:
        return ()
    counts = ", ".join(f"{name} has {len(each)}" for name, each in zip(names, rows, strict=True))
    differ = sum(len({each[name].audio_hash for each in rows}) > 1 for name in shared)
    note = f"{len(shared)} trials are in all results ({counts})"
    if differ:
        note += f", and in {differ} of them the audio differs (other files, cuts, or sample rate)"
    if not common:
        raise ConfigError(
            f"{note}; evaluate them on the same trials, or add --common to compare what they share by name"
        )
    return (note,)


def _compare_two(
    reference: str,
    other: str,
    pairs: Sequence[tuple[TrialRow, TrialRow]],
    columns: Sequence[str],
    by: str,
    notes: tuple[str, ...],
) -> Comparison:
    differences, ranking = {}, []
    for column in columns:
        known = [
            (before.name, a, b)
            for before, after in pairs
            for a, b in [(numbers_of(before).get(column), numbers_of(after).get(column))]
            if a is not None and b is not None
        ]
        if known:
            values = np.array([(a, b) for _, a, b in known])
            differences[column] = difference_of(values[:, 0], values[:, 1])
        if column == by:
            sign = -1 if column in LOWER_IS_BETTER else 1
            ranking = sorted(((name, b - a) for name, a, b in known), key=lambda each: -sign * each[1])
    return Comparison(reference, other, len(pairs), differences, by, ranking, notes)


def difference_of(reference: Float[np.ndarray, " trials"], other: Float[np.ndarray, " trials"]) -> Difference:
    """Return the paired difference of two columns. Raises `MissingDependencyError` without scipy."""
    difference = other - reference
    return Difference(
        len(difference),
        float(reference.mean()),
        float(other.mean()),
        float(difference.mean()),
        float(np.median(difference)),
        bootstrap_interval(difference),
        wilcoxon_p(difference),
        int((difference > 0).sum()),
        int((difference < 0).sum()),
    )


def wilcoxon_p(difference: Float[np.ndarray, " trials"]) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test; trials without a difference are left out."""
    if not difference.any():
        return 1.0
    try:
        stats = importlib.import_module("scipy.stats")
    except ImportError as error:
        raise MissingDependencyError('comparing needs scipy: pip install "onevoice[eval]"') from error
    return float(stats.wilcoxon(difference[difference != 0]).pvalue)


def numbers_of(row: TrialRow) -> dict[str, float | None]:
    """Return what was measured of the estimate by column, without what describes the trial itself."""
    numbers = {**row.numbers, "attenuation_db": row.attenuation_db}
    return {column: value for column, value in numbers.items() if column not in ABOUT_TRIALS}


def title_of(column: str) -> str:
    """Return what texts and pages call a column."""
    titles = {str(name): title for name, title in TITLES.items()}
    base = column.removesuffix(IMPROVEMENT)
    return titles.get(column) or (
        f"{titles[base]}i" if base in titles else column.removesuffix("_db").replace("_", " ")
    )


def unit_of(column: str) -> str:
    """Return " dB" for columns in dB, and "" for the others."""
    return " dB" if column in IN_DB or column.removesuffix(IMPROVEMENT) in IN_DB or column.endswith("_db") else ""


def format_p(p: float) -> str:
    """Return a p value as text."""
    return f"< {MIN_P}" if p < MIN_P else f"{p:.3f}"


def short_names(results: Sequence[Result]) -> list[str]:
    """Return a name for each result: of its file, with so many folders before it that all names differ."""
    parts = [result.path.with_suffix("").resolve().parts for result in results]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(result.path) for result in results]
