"""What a number depends on besides the trials: the estimator, the packages, the seeds, and the recipe of the trials."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onevoice.evaluation.statistics import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED
from onevoice.extraction.checkpoint import provenance
from onevoice.extraction.extractor import Extractor
from onevoice.mixing.folder import SETTINGS
from onevoice.trials import FolderTrials, TrialsConfig, to_record

PACKAGES = (
    "pesq",
    "pystoi",
    "fast-bss-eval",
    "numpy",
    "scipy",
    "soxr",
    "soundfile",
    "speechmos",
    "onnxruntime",
    "jiwer",
)
"""The packages that compute metrics or change the audio."""
CUT_SEED = 0
"""The seed of the parts that `segment_seconds` and `enrollment_seconds` cut out."""


def describe_software() -> dict[str, Any]:
    """Return versions and seeds: of onevoice with its git commit (in a checkout), Python, torch and other packages."""
    return {
        **provenance(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "seeds": {"bootstrap": f"{BOOTSTRAP_SEED:#x}", "bootstrap_resamples": BOOTSTRAP_RESAMPLES, "cuts": CUT_SEED},
    }


def describe_model(extractor: Extractor) -> dict[str, Any]:
    """Return the card of a network, with the number of its speakers instead of their names, and its weights' hash."""
    card = json.loads(extractor.card.to_json())
    card["speakers"] = len(card["speakers"])
    return {"card": card, "weights_hash": extractor.model_hash, "device": str(extractor.device)}


def describe_recipe(config: TrialsConfig) -> dict[str, Any]:
    """Return how the trials were made: the settings in their folder by `onevoice mix`, or the section that names them.

    Settings of a folder without a record are unknown.
    """
    if not isinstance(config, FolderTrials):
        return to_record(config)
    try:
        settings = json.loads((Path(config.folder) / SETTINGS).read_text(encoding="utf-8"))
        return {key: value for key, value in settings.items() if key != "summary"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
