"""The page of a checkpoint: its card, what it makes of the sample recordings, and a result of `onevoice eval`."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from onevoice.audio import read_audio
from onevoice.errors import ConfigError
from onevoice.evaluation.demo import SAMPLES
from onevoice.evaluation.metrics import IN_DB, TITLES, si_sdr, si_sdr_improvement
from onevoice.extraction.extractor import Extractor
from onevoice.report.charts import histogram, scatter
from onevoice.report.page import Section, page, settings_table, table, text
from onevoice.report.players import HOW_TO_LISTEN, Track, players

TITLE_OF = {name: f"{title} (dB)" if name in IN_DB else title for name, title in TITLES.items()}


def weights_report(extractor: Extractor, name: str, evaluation: Path | None = None) -> str:
    """Return the page of a checkpoint; `evaluation` is a JSON file that `onevoice eval --output` wrote.

    Raises `ConfigError` if that file is something else.
    """
    card = json.loads(extractor.card.to_json())
    facts = card.pop("facts")
    count = sum(value.numel() for value in extractor.model.state_dict().values())
    card["speakers"] = len(card["speakers"])
    return page(
        f"Weights {name}",
        f"{card['model']} · {count / 1e6:.2f} M weights · {extractor.sample_rate} Hz",
        [
            *([] if evaluation is None else evaluation_sections(evaluation)),
            Section("Sample recordings", _demo(extractor), "Generated voices that come with the package."),
            Section(
                "Card",
                [
                    settings_table("Model", card, is_open=True),
                    *([settings_table("How it was made", facts)] if facts else []),
                ],
            ),
        ],
    )


def evaluation_sections(path: Path) -> list[Section]:
    """Return the sections of an evaluation: a table of its metrics, and charts of its trials.

    Raises `ConfigError` if `path` is no result of `onevoice eval`.
    """
    try:
        result = json.loads(path.read_bytes())
        rows = [
            (TITLE_OF.get(name, name), *(each[key] for key in ("mean", "median", "percentile_5")),
             "" if each["interval_95"] is None else "{:.3f} to {:.3f}".format(*each["interval_95"]), each["count"])
            for name, each in result["metrics"].items()
        ]  # fmt: skip
        trials, failures = result["trials"], result["failure_rate"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a result of onevoice eval --output ({error}); name its .json file") from error
    summary = f"{trials} trials of {_place(result.get('data'))}"
    if failures is not None:
        summary += f"; {100 * failures:.1f} % of those with a target gain less than 1 dB"
    columns = ("metric", "mean", "median", "5th percentile", "95 % interval of the mean", "trials")
    return [
        Section("Evaluation", [table("Metrics", columns, rows), text(summary + ".")]),
        Section("Trials", _trial_charts(path.with_suffix(".csv")), is_grid=True),
    ]


def _trial_charts(path: Path) -> list[Markup]:
    """Return the charts of the rows beside a result; none if the file is missing or has no SI-SDRi."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("si_sdr") and row.get("si_sdr_improvement")]
    if not rows:
        return []
    gains = [float(row["si_sdr_improvement"]) for row in rows]
    before = [float(row["si_sdr"]) - gain for row, gain in zip(rows, gains, strict=True)]
    return [
        histogram("SI-SDRi", {"trials": gains}, unit="dB"),
        scatter("SI-SDRi by SI-SDR of the mixture", {"trials": (before, gains)}, x_label="SI-SDR of the mixture (dB)",
                y_label="SI-SDRi (dB)"),
    ]  # fmt: skip


def _demo(extractor: Extractor) -> Sequence[Markup]:
    (mixture, rate), (enrollment, enrollment_rate), (target, _) = (
        read_audio(SAMPLES / f"{name}.flac") for name in ("mixture", "enrollment", "target")
    )
    estimate = extractor.extract(mixture, rate, enrollment, enrollment_rate)
    scores = (
        f"SI-SDR {si_sdr(estimate, target):.2f} dB, {si_sdr_improvement(estimate, mixture, target):+.2f} dB SI-SDRi"
    )
    return [
        players(
            "Demo",
            [
                Track("mixture", mixture, rate),
                Track("enrollment", enrollment, enrollment_rate, is_aligned=False),
                Track("target", target, rate),
                Track("estimate", estimate, rate),
                Track("residual", mixture - estimate, rate),
            ],
            note=f"{scores}. {HOW_TO_LISTEN}",
        )
    ]


def _place(data: Any) -> str:
    values = data if isinstance(data, dict) else {}
    return str(next((values[key] for key in ("folder", "root", "metadata", "lists") if key in values), "a data set"))
