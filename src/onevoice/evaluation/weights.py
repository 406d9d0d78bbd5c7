"""The page of a checkpoint: its card, what it makes of the sample recordings, and a result of `onevoice eval`."""

import json
from pathlib import Path

from markupsafe import Markup

from onevoice.audio import read_audio
from onevoice.evaluation.demo import SAMPLES
from onevoice.evaluation.metrics import si_sdr, si_sdr_improvement
from onevoice.evaluation.report import result_sections
from onevoice.evaluation.results import read_result
from onevoice.extraction.extractor import Extractor
from onevoice.report.page import Section, page, settings_table
from onevoice.report.players import HOW_TO_LISTEN, Track, players


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
            *([] if evaluation is None else result_sections([read_result(evaluation)])),
            Section("Sample recordings", [_demo(extractor)], "Generated voices that come with the package."),
            Section(
                "Card",
                [
                    settings_table("Model", card, is_open=True),
                    *([settings_table("How it was made", facts)] if facts else []),
                ],
            ),
        ],
    )


def _demo(extractor: Extractor) -> Markup:
    (mixture, rate), (enrollment, enrollment_rate), (target, _) = (
        read_audio(SAMPLES / f"{name}.flac") for name in ("mixture", "enrollment", "target")
    )
    estimate = extractor.extract(mixture, rate, enrollment, enrollment_rate)
    scores = (
        f"SI-SDR {si_sdr(estimate, target):.2f} dB, {si_sdr_improvement(estimate, mixture, target):+.2f} dB SI-SDRi"
    )
    return players(
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
