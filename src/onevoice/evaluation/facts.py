"""What is known about trials besides their audio: data set, speakers and genders.

For a folder of trials, `manifest.jsonl` tells, as `onevoice mix` writes it: one row per trial with `name`, and
optionally `target_speaker`, `interferer_speaker`, `corpus`, and `gender_pair` (FF, FM, MF or MM, the target first).
Without it, names that begin with two numbers are TARGET_INTERFERER, as in the original system. The names of LibriMix
and WSJ0-2mix hold the speakers. Genders come from a table of the speakers, and for LibriMix from LibriSpeech.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onevoice.corpus.layouts import read_genders
from onevoice.errors import CorpusError
from onevoice.evaluation.scoring import TrialFacts
from onevoice.files import whole_rows
from onevoice.mixing.folder import MANIFEST
from onevoice.trials.config import FolderTrials, LibriMixMetadataTrials, LibriMixTrials, TrialsConfig, Wsj0Trials
from onevoice.trials.enrollment import speaker_of
from onevoice.trials.trial import Trial

GENDER_PAIRS = ("FF", "FM", "MF", "MM")


def trial_facts(config: TrialsConfig, trials: Sequence[Trial], genders: Path | None = None) -> list[TrialFacts]:
    """Return what is known about each trial. `genders` is a table with the columns `speaker` and `gender`.

    Raises `CorpusError` for an unusable table or a `gender_pair` that is none.
    """
    known = _librispeech_genders(config) | ({} if genders is None else read_genders(genders))
    manifest = _manifest(config)
    corpus = corpus_of(config)
    facts = []
    for trial in trials:
        row = manifest.get(trial.name, {})
        target, interferer = _speakers(config, trial, row)
        pair = "".join(known.get(speaker or "", "")[:1].upper() for speaker in (target, interferer))
        pair = str(row.get("gender_pair") or (pair if len(pair) == 2 else "")).upper()
        if pair and pair not in GENDER_PAIRS:
            raise CorpusError(f"{MANIFEST}: the gender_pair of {trial.name!r} is {pair}; write one of FF, FM, MF, MM")
        facts.append(TrialFacts(str(row.get("corpus") or corpus), target, interferer, pair or None))
    return facts


def corpus_of(config: TrialsConfig) -> str:
    """Return a short name of a data set, without the place where it is on this machine."""
    if isinstance(config, FolderTrials):
        return Path(config.folder).resolve().name
    if isinstance(config, Wsj0Trials):
        return f"{config.kind}/{Path(config.lists).name}"
    if isinstance(config, LibriMixTrials):
        return f"{Path(config.root).name}/{config.part}"
    return Path(config.metadata).stem


def _speakers(config: TrialsConfig, trial: Trial, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return target speaker and interferer, as far as they are known; a mixture of three has no one interferer."""
    if isinstance(config, FolderTrials):
        named = re.match(r"(\d+)_(\d+)(?!\d)", trial.name)
        target, interferer = named.groups() if named else (None, None)
        return row.get("target_speaker", target), row.get("interferer_speaker", interferer)
    if isinstance(config, Wsj0Trials):
        *mixture, _ = trial.name.split("_")
        others = {utterance[: len(trial.speaker)] for utterance in mixture[::2]} if len(mixture) == 4 else set()
    else:
        *utterances, _ = trial.name.split("_")
        others = {speaker_of(utterance) for utterance in utterances}
    others -= {trial.speaker}
    return trial.speaker, others.pop() if len(others) == 1 else None


def _manifest(config: TrialsConfig) -> dict[str, dict[str, Any]]:
    if not isinstance(config, FolderTrials):
        return {}
    return {str(row.get("name")): row for row in whole_rows(Path(config.folder) / MANIFEST)}


def _librispeech_genders(config: TrialsConfig) -> dict[str, str]:
    """Return the genders in SPEAKERS.TXT of LibriSpeech, whose lines are `speaker | gender | …`."""
    if not isinstance(config, LibriMixTrials | LibriMixMetadataTrials) or config.librispeech_dir is None:
        return {}
    table = Path(config.librispeech_dir) / "SPEAKERS.TXT"
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.is_file() else []
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if not line.startswith(";")]
    return {speaker: gender for speaker, gender, *_ in (row for row in cells if len(row) > 1)}
