"""Publish weights under a new name: python3 scripts/publish.py --help.

The published file leaves out what extraction does not need (the classifier and the names of the training speakers). Its
matrices are rounded to float16 (the loader computes in float32), and absolute paths in its facts are cut to their last
part. The script writes it into the package, makes it the default in the registry unless told otherwise, and writes a
model card with marks where a person must fill in text.
"""

import csv
import hashlib
import json
import re
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cyclopts import App, CycloptsError

from onevoice.config import to_dict
from onevoice.errors import CheckpointError, ConfigError, OnevoiceError
from onevoice.evaluation import demo
from onevoice.extraction import checkpoint as checkpoints
from onevoice.extraction.checkpoint import Card, Published, State, load_checkpoint, load_model, save_checkpoint
from onevoice.extraction.extractor import Extractor
from onevoice.files import atomic_write, to_json
from onevoice.models import Network

CARDS = Path(__file__).parents[1] / "docs" / "models"
MAX_BYTES = 30_000_000
GAP = "> To be written:"
"""Marks what a person must write; a test rejects published cards that still contain it."""

TITLES = {
    "si_sdr_improvement": "SI-SDRi (dB)",
    "si_sdr": "SI-SDR (dB)",
    "sdr": "SDR (dB)",
    "pesq": "PESQ",
    "stoi": "STOI",
    "estoi": "ESTOI",
}
app = App(help="Publish a checkpoint with the package.")


@app.default
def publish(
    checkpoint: Path, name: str, *, report: Path, attribution: Path | None = None, default: bool = True
) -> None:
    """Write weights/NAME.safetensors, enter it in the registry, and write docs/models/NAME.md.

    Args:
        checkpoint: The weights, as training writes them. A config.json beside it goes into the card.
        name: A new name of lowercase letters, digits, dots and hyphens.
        report: The file that `onevoice eval -r CHECKPOINT -o REPORT` wrote.
        attribution: The training data: a CSV table (corpus, license, speaker, seconds, optionally source), or Markdown
            text to insert unchanged.
        default: Whether these become the default weights.
    """
    registry = checkpoints.read_registry()
    file, document = checkpoints.WEIGHTS / f"{name}.safetensors", CARDS / f"{name}.md"
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name):
        raise ConfigError(f"{name}: a name has lowercase letters and digits, with dots or hyphens between them")
    for path in (file, document):
        if name in registry.weights or path.exists():
            raise ConfigError(f"{path}: exists; a published name never changes, so choose a new one")
    state, card = load_checkpoint(checkpoint)
    result = read_report(report, card)
    sources = describe_data(attribution, card)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / file.name
        save_checkpoint(draft, *slim(state, card, checkpoint))
        model, slim_card = load_model(draft)
        data = draft.read_bytes()
        before, after = (measure_demo(*load_model(path)) for path in (checkpoint, draft))
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{checkpoint}: has {len(data):,} bytes after rounding; {MAX_BYTES:,} are allowed")
    published = Published(
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sample_rate=card.config.sample_rate,
        si_sdr_improvement_db=round(result["metrics"]["si_sdr_improvement"]["mean"], 3),
    )
    rounding = (
        f"SI-SDRi on the sample recording of `onevoice demo`: {before:.4f} dB in float32, {after:.4f} dB published."
    )
    experiment = experiment_beside(checkpoint) or {"model": to_dict(slim_card.config), **slim_card.facts}
    text = model_card(name, published, slim_card, result, sources, rounding, experiment)
    atomic_write(document, text.encode())
    atomic_write(file, data)
    chosen = name if default else registry.default
    entry = replace(registry, default=chosen, weights={**registry.weights, name: published})
    atomic_write(checkpoints.WEIGHTS / checkpoints.REGISTRY, to_json(to_dict(entry)))
    print(published.line(name), rounding, sep="\n")
    print(f"written: {file}, {document} ({text.count(GAP)} gaps to fill), {checkpoints.WEIGHTS / checkpoints.REGISTRY}")


def slim(state: State, card: Card, path: Path) -> tuple[State, Card]:
    """Return the weights with an empty classifier and matrices in float16, and their card.

    Vectors (biases, norms and their statistics) are small and stay unchanged. Raises `CheckpointError` if a weight is
    beyond the range of float16.
    """
    kept = {name: value[:0] if name.startswith("classifier.") else value for name, value in state.items()}
    rounded = {name: value.half() if value.ndim > 1 else value for name, value in kept.items()}
    for name, value in rounded.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name} has values that are not finite, or too large for float16")
    return rounded, Card(replace(card.config, num_classes=0), (), portable(dict(card.facts)))


def measure_demo(model: Network, card: Card) -> float:
    """Return the SI-SDRi in dB on the sample recording of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        return demo.run(Extractor(model, card), Path(folder)).si_sdr_improvement_db


def portable(value: Any) -> Any:
    """Return JSON values with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {key: portable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [portable(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def read_report(path: Path, card: Card) -> dict[str, Any]:
    """Return the report. Raises `ConfigError` if it belongs to another checkpoint or has no SI-SDRi."""
    result = read_json(path)
    if portable(result.get("facts")) != portable(dict(card.facts)):
        raise ConfigError(f"{path}: belongs to another checkpoint; evaluate this one with -o {path}")
    if result.get("metrics", {}).get("si_sdr_improvement", {}).get("mean") is None:
        raise ConfigError(f"{path}: has no mean of si_sdr_improvement; evaluate with the default metrics")
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file. Raises `ConfigError`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a JSON object ({error})") from error


def experiment_beside(checkpoint: Path) -> dict[str, Any] | None:
    """Return the config that training writes beside its checkpoints, without absolute paths; None if it is missing."""
    path = checkpoint.parent / "config.json"
    return dict(portable(read_json(path))) if path.is_file() else None


def describe_data(attribution: Path | None, card: Card) -> str:
    """Return the section of the card on corpora and licenses."""
    if attribution is None:
        return f"{GAP} for each corpus the license, attribution, speakers, hours and source."
    text = attribution.read_text(encoding="utf-8")
    return attribution_table(text, card, attribution) if attribution.suffix == ".csv" else text.strip()


def attribution_table(text: str, card: Card, path: Path) -> str:
    """Sum a table of utterances by corpus and license, counting only the speakers that the network was trained on."""
    header, *lines = text.splitlines() or [""]
    rows = list(csv.DictReader([header.replace("licence", "license"), *lines]))  # either spelling of the column
    missing = {"corpus", "license", "speaker", "seconds"} - set(rows[0] if rows else ())
    if missing:
        raise ConfigError(f"{path}: has no columns {', '.join(sorted(missing))}; add them")
    trained = {speaker.split("@")[0] for speaker in card.speakers}  # speaker@0.9 is a speed-perturbed copy
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        if row["speaker"] in trained:
            groups.setdefault((row["corpus"], row["license"], row.get("source", "")), []).append(row)
    if not groups:
        raise ConfigError(f"{path}: names none of the speakers that the checkpoint was trained on; check its speakers")
    lines = ["| corpus | license | speakers | utterances | hours | source |", "|---|---|---|---|---|---|"]
    for (corpus, license, source), members in sorted(groups.items()):
        speakers = len({row["speaker"] for row in members})
        hours = sum(float(row["seconds"]) for row in members) / 3600
        lines.append(f"| {corpus} | {license} | {speakers} | {len(members)} | {hours:.2f} | {source} |")
    return "\n".join(lines)


def results_table(result: dict[str, Any]) -> str:
    """Return the figures of a report: a table, the failure rate, and the attenuation."""
    lines = ["| figure | mean | 95 % interval of the mean | median | 5th percentile | n |", "|---|---|---|---|---|---|"]
    for name, title in TITLES.items():
        s = result["metrics"].get(name)
        if s is not None and s["mean"] is not None:
            low, high = s["interval_95"]
            figures = f"{s['mean']:.3f} | {low:.3f} to {high:.3f} | {s['median']:.3f} | {s['percentile_5']:.3f}"
            lines.append(f"| {title} | {figures} | {s['count']} |")
    failures = f"Failures (SI-SDRi below {result['failure_threshold_db']:g} dB): {100 * result['failure_rate']:.1f} %."
    absent = result["attenuation_db"]
    if absent is None:
        return "\n".join([*lines, "", failures])
    attenuation = f"mean {absent['mean']:.2f} dB, median {absent['median']:.2f} dB"
    return "\n".join([*lines, "", failures, f"Target absent ({absent['count']} trials): attenuation {attenuation}."])


def model_card(
    name: str,
    published: Published,
    card: Card,
    result: dict[str, Any],
    sources: str,
    rounding: str,
    experiment: dict[str, Any],
) -> str:
    """Return the model card, with a `GAP` wherever a person must write something."""
    facts = [f"{key} {value}" for key, value in card.facts.items() if isinstance(value, str | int | float)]
    counts = f"{result['target_present']} with the target, {result['target_absent']} without"
    return f"""# {name}

```sh
onevoice extract mixture.wav enrollment.wav voice.wav --pretrained {name}
```

| | |
|---|---|
| file | `src/onevoice/extraction/weights/{name}.safetensors`, {published.bytes / 1e6:.2f} MB, matrices in float16 |
| SHA-256 | `{published.sha256}` |
| network | `{card.config.name}`, {published.parameters:,} parameters without classifier, {published.sample_rate} Hz |
| license | MIT, as the code; the recordings named below are not part of it and keep their own licenses |

## Results

Trials: `{json.dumps(portable(result["data"]))}`, {counts}.

{results_table(result)}

{rounding}

{GAP} whether these figures come from the float32 or the published weights, and the difference between the two.

## Data and attribution

{sources}

## Training

{textwrap.fill("; ".join(facts), 119)}.

```json
{json.dumps(experiment, indent=1, ensure_ascii=False)}
```

{GAP} the commands from the data to the checkpoint, how long they took, and the hardware.

## Limits

{GAP} languages, ages, recordings and mixtures that it was not trained for, and what it does if the target is absent.
"""


if __name__ == "__main__":
    try:
        app(exit_on_error=False, print_error=False)
    except (OnevoiceError, CycloptsError) as error:
        sys.exit(f"publish: error: {' '.join(str(error).split())}")
    except OSError as error:
        sys.exit(f"publish: error: {error.filename}: {error.strerror}")
