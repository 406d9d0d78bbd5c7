"""The page of a training run: curves, checkpoints, validation trials to listen to, settings, environment.

It reads only files of the run folder, so it works while the run is going on, and for runs of earlier versions.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from onevoice.audio import read_audio
from onevoice.errors import CheckpointError, ConfigError
from onevoice.extraction.checkpoint import read_card
from onevoice.extraction.extractor import match_level
from onevoice.files import Row
from onevoice.report.charts import Points, line_chart
from onevoice.report.page import Section, page, settings_table, table
from onevoice.report.players import HOW_TO_LISTEN, Track, players
from onevoice.training.tracking import CONSTANT_KINDS, TrialSounds, read_rows, read_samples

CURVES: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("Loss", "", {"train": "train/loss", "validation": "validation/loss"}),
    (
        "SI-SDR",
        "dB",
        {
            "train": "train/si_sdr_db",
            "validation": "validation/si_sdr_db",
            "validation, 2nd estimate": "validation/si_sdr_2_db",
            "validation, 3rd estimate": "validation/si_sdr_3_db",
        },
    ),
    ("SI-SDR improvement", "dB", {"validation": "validation/si_sdri_db"}),
    ("Speaker cross-entropy", "nats", {"train": "train/cross_entropy"}),
    ("PESQ", "MOS-LQO", {"validation": "validation/pesq"}),
    ("Suppression of absent targets", "dB", {"validation": "validation/absent_suppression_db"}),
    ("Learning rate", "", {"train": "train/learning_rate"}),
    ("Gradient norm", "", {"train": "train/gradient_norm"}),
    ("Speed", "steps/s", {"train": "train/steps_per_second"}),
    ("Skipped steps", "steps", {"train": "train/skipped_steps"}),
)
"""Each chart: title, unit, and the names in `metrics.jsonl` by what the chart calls them."""
MAX_TRIALS = 8
"""Validation trials on the page."""


def run_report(folder: Path) -> str:
    """Return the page of the run in `folder`. Raises `ConfigError` if the folder holds no run."""
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder}: holds no training run (no metrics.jsonl); name a run folder")
    rows = read_rows(folder / "metrics.jsonl")
    settings = _read_json(folder / "config.json")
    name = settings.get("name", folder.name)
    trials = [sounds for sounds in read_samples(folder) if sounds.estimates]
    shown = trials[:MAX_TRIALS]
    left_out = f" {len(trials) - len(shown)} more are in the folder samples." if len(trials) > len(shown) else ""
    return page(
        f"Training run {name}",
        _subtitle(rows),
        [
            Section("Curves", _curves(rows), "Training values are means since the last log line.", is_grid=True),
            Section("Checkpoints", _checkpoints(folder, rows)),
            Section(
                "Validation trials",
                [_trial(sounds) for sounds in shown],
                f"{HOW_TO_LISTEN} Estimates have the level that an extraction gives them.{left_out}",
            ),
            Section("Settings", [settings_table("config.json", settings)] if settings else []),
            Section("Environment", _environment(folder)),
        ],
    )


def _subtitle(rows: Sequence[Row]) -> str:
    if not rows:
        return "nothing recorded yet"
    scores = [(row["validation/si_sdri_db"], row["step"]) for row in rows if row.get("validation/si_sdri_db")]
    best = f" · best validation SI-SDRi {max(scores)[0]:.2f} dB at step {max(scores)[1]}" if scores else ""
    return f"{max(row['step'] for row in rows)} steps{best} · last record {_date(rows[-1].get('wall_time'))}"


def _curves(rows: Sequence[Row]) -> list[Markup]:
    """Return the charts that have values."""
    charts = []
    for title, unit, names in CURVES:
        series = {label: _points(rows, name) for label, name in names.items()}
        known = {label: points for label, points in series.items() if any(y is not None for y in points[1])}
        if title == "Skipped steps" and not any(any(points[1]) for points in known.values()):
            continue
        if known:
            charts.append(line_chart(title, known, unit=unit))
    return charts


def _points(rows: Sequence[Row], name: str) -> Points:
    found = [row for row in rows if name in row]
    return [row["step"] for row in found], [row[name] for row in found]


def _checkpoints(folder: Path, rows: Sequence[Row]) -> list[Markup]:
    """Return a table of the weights in the folder, in the order of their steps."""
    scores = {row["step"]: row["validation/si_sdri_db"] for row in rows if "validation/si_sdri_db" in row}
    lines: list[tuple[Any, ...]] = []
    for path in sorted(folder.glob("*.safetensors")):
        size, date = f"{path.stat().st_size / 1e6:.2f} MB", _date(path.stat().st_mtime)
        try:
            facts = read_card(path).facts
        except CheckpointError as error:
            lines.append((path.name, None, None, None, size, date, str(error).removeprefix(f"{path}: ")))
            continue
        step = facts.get("step")
        what = {"best.safetensors": "the one to use", "last.safetensors": "the one to resume from"}.get(path.name, "")
        lines.append((path.name, facts.get("epoch"), step, scores.get(step), size, date, what))
    lines.sort(key=lambda line: (line[2] or 0, line[0]))
    columns = ("file", "epoch", "step", "SI-SDRi (dB)", "size", "written (UTC)", "")
    return [table("Checkpoints", columns, lines)] if lines else []


def _trial(sounds: TrialSounds) -> Markup:
    """Return the players of one trial: what went in, and the estimate of each kept validation, the latest first."""
    constant = {kind: read_audio(sounds.constant[kind]) for kind in CONSTANT_KINDS if kind in sounds.constant}
    tracks = [Track(kind, *audio, kind != "enrollment") for kind, audio in constant.items()]
    for step, path in sorted(sounds.estimates.items(), reverse=True):
        estimate, rate = read_audio(path)
        if "mixture" in constant:
            estimate = match_level(estimate, constant["mixture"][0])
        tracks.append(Track(f"estimate, step {step}", estimate, rate))
    return players(sounds.name, tracks)


def _environment(folder: Path) -> list[Markup]:
    """Return the environment that the run recorded; for runs of earlier versions, what their card says."""
    values = _read_json(folder / "environment.json")
    if not values and (folder / "last.safetensors").exists():
        facts = read_card(folder / "last.safetensors").facts
        values = {key: facts[key] for key in ("onevoice", "torch", "commit") if key in facts}
    return [table("Environment", ("", ""), list(values.items()))] if values else []


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if the file is missing."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error}); restore it from a copy") from error
    return values if isinstance(values, dict) else {}


def _date(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
