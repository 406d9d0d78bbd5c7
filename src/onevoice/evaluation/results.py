"""The files of an evaluation: one row per trial, and a summary beside them.

    RESULT.json      the summary: every statistic, and what the numbers depend on
    RESULT.csv       one row per trial, or RESULT.parquet with the same columns

The rows have these columns, in this order. Empty means that there is no value, or that it is not known.

    trial                        name of the trial
    seconds                      length of the mixture
    si_sdr, …                    the chosen metrics of the estimate, by their names in `metrics.METRICS`
    attenuation_db               how much quieter the estimate is than the mixture; only if the target is absent
    refused                      `metric: reason` for each metric without a value, joined by "; "
    corpus                       data set that the trial comes from
    target_speaker               speaker of target and enrollment
    interferer_speaker           the other speaker
    gender_pair                  gender of the target, then of the interferer: FF, FM, MF or MM
    absent                       whether the target is silent
    input_snr_db                 SI-SDR of the mixture against the target
    enrollment_seconds           length of the enrollment
    mixture_si_sdr, …            the chosen metrics of the mixture itself
    pesq_improvement, …          estimate minus mixture, for each metric (`si_sdr_improvement` is a metric itself)
    interferer_improvement_db    SI-SDR improvement toward all that is not the target
    confused                     whether the estimate gains more toward the interferer than toward the target
    presence_db                  score of the voice's presence, of networks that have one
    heard                        whether the score reaches the threshold of the network
    audio_hash                   hash of the audio that was judged: mixture, target and enrollment
    …                            any other numbers, such as a speaker similarity, by a name of their own
    network_seconds              computing time of the network; the only column that differs from run to run

The summary is one JSON object with these keys:

    trials, target_present, target_absent, failure_rate, failure_threshold_db, confusion_rate,
    attenuation_db, presence, refusals, left_out, notes, metrics, mixture, groups, word_error_rates, speed, trials_hash,
    data, provenance, rows_file, rows_hash, saved_estimates (the folder), and one of checkpoint (with facts), baseline
    and estimates: what was judged

`metrics` and `mixture` map a column to `{count, missing, mean, median, percentile_5, interval_95}`. `groups` maps
`gender_pair`, `input_snr_db`, `enrollment_seconds` and `corpus` to groups, each with `trials`, `failure_rate`,
`confusion_rate` and `metrics`. `speed` is null, or has `network_seconds`, `sound_seconds` and `real_time_factor`.
`provenance` has `estimator` (`card`, `weights_hash` and `device` of a network), `sample_rate`, `recipe` (how the trials
were made), `batch_size` and `software` (versions, commit, seeds). `trials_hash` covers the names and the audio of the
trials, so it is equal if the same was judged. `rows_hash` covers every column but `network_seconds`, so equal numbers
have equal hashes.
"""

import csv
import hashlib
import importlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from onevoice.errors import ConfigError, MissingDependencyError
from onevoice.evaluation.metrics import METRICS, MetricName
from onevoice.files import atomic_write

IMPROVEMENT = "_improvement"
MIXTURE = "mixture_"

Cells = dict[str, Any]
"""One line of a table by column: texts, numbers, truth values, and None where there is none."""
NUMBERS = ("input_snr_db", "enrollment_seconds", "interferer_improvement_db", "presence_db", "network_seconds")
TRUTHS = ("absent", "confused", "heard")
TEXTS = ("corpus", "target_speaker", "interferer_speaker", "gender_pair", "audio_hash")
KNOWN = {"trial", "seconds", "attenuation_db", "refused", *TRUTHS, *NUMBERS, *TEXTS, *METRICS}
"""Columns that are neither a metric of the mixture, nor an improvement, nor a number of someone else."""


@dataclass(frozen=True)
class TrialRow:
    """One trial: what it is, and how good its estimate is. The module's docstring explains the fields."""

    name: str
    seconds: float
    values: dict[MetricName, float | None]
    """The metrics of the estimate; None for a metric that has no value for this trial. Empty if the target is absent.
    """
    refusals: dict[MetricName, str]
    """Why a metric has no value."""
    attenuation_db: float | None = None
    corpus: str | None = None
    target_speaker: str | None = None
    interferer_speaker: str | None = None
    gender_pair: str | None = None
    input_snr_db: float | None = None
    enrollment_seconds: float | None = None
    mixture: dict[MetricName, float | None] = field(default_factory=dict)
    """The metrics of the mixture."""
    interferer_improvement_db: float | None = None
    confused: bool | None = None
    presence_db: float | None = None
    heard: bool | None = None
    audio_hash: str | None = None
    more: dict[str, float | None] = field(default_factory=dict)
    """Other numbers, by the name of their column."""
    network_seconds: float | None = None

    @property
    def absent(self) -> bool:
        """Whether the target is silent."""
        return self.attenuation_db is not None

    @property
    def improvements(self) -> dict[str, float | None]:
        """Estimate minus mixture, by the name of the column, for each metric that has no such metric of its own."""
        return {
            f"{name}{IMPROVEMENT}": None if value is None or before is None else value - before
            for name, before in self.mixture.items()
            if f"{name}{IMPROVEMENT}" not in METRICS
            for value in (self.values.get(name),)
        }

    @property
    def numbers(self) -> dict[str, float | None]:
        """Everything that was measured of the estimate, by column: metrics, improvements and other numbers."""
        toward_interferer = {"interferer_improvement_db": self.interferer_improvement_db}
        return dict([*self.values.items(), *self.improvements.items(), *toward_interferer.items(), *self.more.items()])


@dataclass(frozen=True)
class Result:
    """An evaluation as it is on disk."""

    path: Path
    """The file of the summary."""
    summary: dict[str, Any]
    """The JSON object; the module's docstring lists the keys."""
    rows: list[TrialRow]

    @property
    def name(self) -> str:
        """A short name: that of the file."""
        return self.path.stem

    def row(self, trial: str) -> TrialRow | None:
        """Return the row of a trial; None if it has none."""
        return next((row for row in self.rows if row.name == trial), None)


def read_result(path: str | Path) -> Result:
    """Read a result from the file of its summary (.json) or of its rows; results of earlier versions have fewer keys.

    Raises `ConfigError` if it is something else or its rows are missing, and `MissingDependencyError` for Parquet
    without pyarrow.
    """
    path = Path(path)
    summary_path = path.with_suffix(".json")
    try:
        summary = json.loads(summary_path.read_bytes())
        summary["trials"], summary["failure_rate"], dict(summary["metrics"])
        rows = summary_path.with_name(summary.get("rows_file", summary_path.with_suffix(".csv").name))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{summary_path}: not a result of onevoice eval --output ({error}); name its .json file"
        ) from error
    return Result(summary_path, summary, read_rows(rows))


def write_result(path: Path, summary: Mapping[str, Any], rows: Sequence[TrialRow]) -> Path:
    """Write the rows, then the summary, to the files that belong to `path`; return the file of the rows.

    The ending of `path` chooses the format of the rows: .parquet, or else CSV. Raises `StorageError`.
    """
    rows_path = rows_path_of(path)
    write_rows(rows_path, rows)
    values = {**summary, "rows_file": rows_path.name, "rows_hash": hash_rows(rows)}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path.with_suffix(".json"), text.encode())
    return rows_path


def rows_path_of(path: Path) -> Path:
    """Return the file of the rows for a file that `--output` names, .json or .parquet. Raises `ConfigError`."""
    if path.suffix.lower() == ".parquet":
        return path
    if path.suffix.lower() != ".json":
        raise ConfigError(
            f"{path}: must end in .json; the rows go into a .csv file beside it (or end it in .parquet, for such rows)"
        )
    return path.with_suffix(".csv")


def require_format(path: Path) -> None:
    """Raise `MissingDependencyError` before any work if the rows cannot be written in the format of `path`."""
    if path.suffix.lower() == ".parquet":
        _parquet()


def write_rows(path: Path, rows: Sequence[TrialRow]) -> None:
    """Write one row per trial to a .csv or .parquet file. Raises `StorageError` and `MissingDependencyError`."""
    if path.suffix.lower() == ".parquet":
        atomic_write(path, lambda place: _write_parquet(place, rows))
    else:
        atomic_write(path, to_csv(rows).encode())


def read_rows(path: Path) -> list[TrialRow]:
    """Read the rows of a .csv or .parquet file. Raises `ConfigError` if there are none or a cell is damaged."""
    try:
        if path.suffix.lower() == ".parquet":
            return [_from_cells(cells) for cells in _parquet().read_table(path).to_pylist()]
        with path.open(encoding="utf-8", newline="") as file:
            return [_from_cells(cells) for cells in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: holds no rows of an evaluation ({error}); evaluate again") from error


def to_csv(rows: Sequence[TrialRow], columns: Sequence[str] | None = None) -> str:
    """Return the rows as CSV, with all columns by default."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = columns_of(rows) if columns is None else columns
    writer.writerow(columns)
    for row in rows:
        cells = {**_to_cells(row), "seconds": f"{row.seconds:.3f}"}
        writer.writerow([_csv_cell(cells.get(column)) for column in columns])
    return text.getvalue()


def columns_of(rows: Sequence[TrialRow]) -> list[str]:
    """Return the columns of a table of these rows, in the order of the module's docstring."""
    names: list[str] = list(dict.fromkeys(name for row in rows for name in row.values))
    before = dict.fromkeys(name for row in rows for name in row.mixture)
    return [
        *("trial", "seconds", *names, "attenuation_db", "refused"),
        *("corpus", "target_speaker", "interferer_speaker", "gender_pair", "absent"),
        *("input_snr_db", "enrollment_seconds", *(f"{MIXTURE}{name}" for name in before)),
        *(f"{name}{IMPROVEMENT}" for name in before if f"{name}{IMPROVEMENT}" not in METRICS),
        *("interferer_improvement_db", "confused", "presence_db", "heard", "audio_hash"),
        *dict.fromkeys(name for row in rows for name in row.more),
        "network_seconds",
    ]


def hash_rows(rows: Sequence[TrialRow]) -> str:
    """Return the hash of all that was measured: of the CSV without its last column, the speed of the machine."""
    return hashlib.sha256(to_csv(rows, columns_of(rows)[:-1]).encode()).hexdigest()


def hash_trials(rows: Sequence[TrialRow]) -> str:
    """Return the hash of the names and the audio of the trials: equal if the same was judged."""
    lines = "".join(f"{row.name} {row.audio_hash}\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def _to_cells(row: TrialRow) -> Cells:
    return {
        "trial": row.name,
        "seconds": row.seconds,
        **{str(name): value for name, value in row.values.items()},
        "attenuation_db": row.attenuation_db,
        "refused": "; ".join(f"{name}: {why}" for name, why in row.refusals.items()),
        **{name: getattr(row, name) for name in (*TEXTS, *NUMBERS, *TRUTHS)},
        **{f"{MIXTURE}{name}": value for name, value in row.mixture.items()},
        **row.improvements,
        **row.more,
    }


def _from_cells(cells: Mapping[str, Any]) -> TrialRow:
    """Return the row of one line of a table; the cells are text in CSV. Raises `KeyError` and `ValueError`."""
    absent = _number(cells.get("attenuation_db")) is not None
    before = [name for name in METRICS if f"{MIXTURE}{name}" in cells]
    facts: Cells = {**{name: cells.get(name) or None for name in TEXTS}, **{n: _number(cells.get(n)) for n in NUMBERS}}
    derived = {f"{name}{IMPROVEMENT}" for name in METRICS} | {f"{MIXTURE}{name}" for name in METRICS}
    return TrialRow(
        name=cells["trial"],
        seconds=float(cells["seconds"]),
        values={} if absent else {name: _number(cells[name]) for name in METRICS if name in cells},
        refusals=_refusals(cells.get("refused") or ""),
        attenuation_db=_number(cells.get("attenuation_db")),
        mixture={} if absent else {name: _number(cells[f"{MIXTURE}{name}"]) for name in before},
        confused=_truth(cells.get("confused")),
        heard=_truth(cells.get("heard")),
        more={name: _number(value) for name, value in cells.items() if name not in KNOWN | derived},
        **facts,
    )


def _refusals(text: str) -> dict[MetricName, str]:
    """Take `metric: reason; metric: reason` apart; a reason may hold "; " itself."""
    names = "|".join(METRICS)
    pieces = re.split(rf"(?:^|; )({names}): ", text)[1:]
    known = {str(name): name for name in METRICS}
    return {known[name]: why for name, why in zip(pieces[::2], pieces[1::2], strict=True)}


def _number(cell: Any) -> float | None:
    return None if cell is None or cell == "" else float(cell)


def _truth(cell: Any) -> bool | None:
    return {"true": True, "false": False}.get(str(cell).lower())


def _csv_cell(cell: Any) -> Any:
    return str(cell).lower() if isinstance(cell, bool) else cell


def _write_parquet(path: Path, rows: Sequence[TrialRow]) -> None:
    parquet, arrow = _parquet(), importlib.import_module("pyarrow")
    kinds = {"trial": arrow.string(), "refused": arrow.string()}
    kinds |= dict.fromkeys(TEXTS, arrow.string()) | dict.fromkeys(TRUTHS, arrow.bool_())
    cells = [_to_cells(row) for row in rows]
    columns = {
        name: arrow.array([each.get(name) for each in cells], kinds.get(name, arrow.float64()))
        for name in columns_of(rows)
    }
    parquet.write_table(arrow.table(columns), path)


def _parquet() -> ModuleType:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(
            'rows in Parquet need pyarrow: pip install "onevoice[parquet]", or name a .csv file'
        ) from error
