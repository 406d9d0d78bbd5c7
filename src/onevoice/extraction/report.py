"""The page of one extraction: what was heard, players, where the voice is, how it was made."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onevoice.extraction.enrollment import format_time
from onevoice.extraction.extractor import Extractor, at_rate
from onevoice.extraction.presence import FRAME_SECONDS, Presence
from onevoice.extraction.voice import Voice
from onevoice.extraction.windows import Spool
from onevoice.report.charts import line_chart, spans
from onevoice.report.page import Section, page, settings_table, table, text
from onevoice.report.players import HOW_TO_LISTEN, Track, players

MAX_PLAYED_SECONDS = 300.0
"""The page plays the beginning of a longer recording."""
LOSSLESS_SECONDS = 30.0
"""Longer sounds are MP3 in place of FLAC: about 0.4 MB per minute and player."""
MAX_ROWS = 100


def extraction_report(
    extractor: Extractor,
    name: str,
    mixture: Spool,
    estimate: Spool,
    gain: float,
    presence: Presence | None,
    voice: Voice,
    settings: Mapping[str, Any],
) -> str:
    """Return the page. `mixture` and `estimate` are at the rate of the network, and `gain` is that of the output.

    `settings` are shown as they are; `absent_db` of them shapes the sound as it shapes the output.
    """
    rate = extractor.sample_rate
    seconds = mixture.samples / rate
    played = min(mixture.samples, round(MAX_PLAYED_SECONDS * rate))
    before = mixture.read(0, played)
    absent_db = float(settings.get("absent_db", 0.0))
    after = np.concatenate(list(at_rate(estimate, gain, rate, rate, played, presence, absent_db)))
    tracks = [Track("mixture", before, rate), Track("voice", after, rate), Track("residual", before - after, rate)]
    note = HOW_TO_LISTEN
    if played < mixture.samples:
        note += f" The players hold the first {format_time(played / rate)} of {format_time(seconds)}."
    if settings.get("channel") == "each":
        note += " They play channel 1."
    suffix = ".flac" if played <= LOSSLESS_SECONDS * rate else ".mp3"
    facts = json.loads(extractor.card.to_json())
    facts["speakers"] = len(facts["speakers"])
    verdict = "" if presence is None else f" · {presence.text()}"
    return page(
        f"Extraction from {Path(name).name}",
        f"{format_time(seconds)}{verdict}",
        [
            Section("Listen", [players("Sounds", tracks, note=note, suffix=suffix)]),
            Section("Presence", [] if presence is None else _presence_pieces(presence)),
            Section("Voice", _voice_pieces(voice)),
            Section(
                "Settings",
                [
                    settings_table("This extraction", settings, is_open=True),
                    settings_table("Card of the weights", facts),
                ],
            ),
        ],
    )


def _presence_pieces(presence: Presence) -> list[Any]:
    times = (np.arange(len(presence.levels_db)) + 0.5) * FRAME_SECONDS
    stretches = presence.stretches
    rows = [(format_time(begin), format_time(end), f"{end - begin:.2f}") for begin, end in stretches[:MAX_ROWS]]
    verdict = (
        f"Score {presence.score_db:.1f} dB; the voice counts as being in the recording from "
        f"{presence.threshold_db:.1f} dB on."
    )
    pieces = [
        text(f"{presence.text().capitalize()}. {verdict}"),
        spans("Where the voice is heard", stretches, presence.seconds),
        line_chart(
            "Level of the voice against the mixture",
            {"level": (times.tolist(), presence.levels_db.tolist())},
            x_label="s",
            unit="dB",
        ),
    ]
    if rows:
        pieces.append(table("Stretches", ("from", "to", "seconds"), rows))
    if len(stretches) > MAX_ROWS:
        pieces.append(text(f"The first {MAX_ROWS} of {len(stretches)} stretches; a timeline has all of them."))
    return pieces


def _voice_pieces(voice: Voice) -> list[Any]:
    about = {"recordings": ", ".join(voice.sources) or "an array", "weights": f"{voice.model_hash[:12]}…"}
    pieces = [settings_table("Enrollment", about, is_open=True)]
    if voice.check_up is not None:
        check_up = asdict(voice.check_up)
        warnings = check_up.pop("warnings")
        pieces.insert(0, text(f"Check-up: {voice.check_up.text()}."))
        pieces[1:1] = [text(f"Warning: {warning}.") for warning in warnings]
        numbers = {name: f"{value:.4g}" for name, value in check_up.items() if value is not None}
        pieces.append(settings_table("Check-up", numbers))
    return pieces
