"""Opens a set of trials: from a config section to a list of trials whose files have been checked.

Folders of trials have one of two layouts, at any sample rate:

- flat: `NAME-mixed.wav`, `NAME-ref.wav` and `NAME-target.wav` side by side, as `onevoice mix` writes them;
- folders: `mix/`, `refs/` and `targets/`, whose files share their names, with or without those endings.

The target speaker is taken from `manifest.jsonl` if there is one, otherwise from the part of the name before its
first underscore. A trial with a silent target is one in which the target is absent.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from onevoice.audio import EXTENSIONS, probe_audio
from onevoice.config import to_dict
from onevoice.errors import AudioError, CorpusError
from onevoice.mixing.folder import SUFFIXES
from onevoice.trials.config import FolderTrials, LibriMixTrials, TrialsConfig, TrialSet, Wsj0Trials
from onevoice.trials.librimix_trials import list_librimix
from onevoice.trials.trial import Candidate, Trial, TrialList
from onevoice.trials.wsj0 import list_wsj0

FOLDERS = {"mixture": "mix", "enrollment": "refs", "target": "targets"}
HEADER_THREADS = 8
"""Threads that read headers; on network drives most of the time is waiting."""


def open_trials(config: TrialsConfig) -> TrialList:
    """Return the trials that a config section names, after reading the header of every file.

    Trials with something missing or wrong are skipped and named in `left_out`, up to the fraction `max_missing`, which
    is checked once for the lists and once for the files. Raises `CorpusError` above that fraction or if no trial is
    left, `ConfigError` for contradicting settings, and `MissingDependencyError` if the data set needs a package that
    is not installed.
    """
    if isinstance(config, FolderTrials):
        return TrialList(find_trials(config.folder, config.limit), [], None)
    candidates, unlisted, notes = list_wsj0(config) if isinstance(config, Wsj0Trials) else list_librimix(config)
    name = place_of(config)
    require_few_missing(name, unlisted, len(candidates) + len(unlisted), config.max_missing)
    trials, broken = check_files(candidates[: config.limit])
    require_few_missing(name, broken, len(trials) + len(broken), config.max_missing)
    if not trials:
        raise CorpusError(f"{name}: holds no trials; check the settings of the data set")
    return TrialList(trials, unlisted + broken, config.sample_rate, notes)


def find_trials(folder: str | Path, limit: int | None = None) -> list[Trial]:
    """List the first `limit` trials of a folder, by name; `CorpusError` if there are none or files are missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder of trials")
    in_folders = all((folder / name).is_dir() for name in FOLDERS.values())
    files = {
        kind: _files_by_name(folder / FOLDERS[kind] if in_folders else folder, suffix, needs_suffix=not in_folders)
        for kind, suffix in SUFFIXES.items()
    }
    names = sorted(files["mixture"])
    if not names:
        raise CorpusError(
            f"{folder}: holds no trials; expected NAME-mixed.wav, NAME-ref.wav and NAME-target.wav, "
            "or folders mix, refs and targets"
        )
    for kind in ("enrollment", "target"):
        missing = [name for name in names if name not in files[kind]]
        if missing:
            raise CorpusError(
                f"{folder}: the {kind} is missing for {len(missing)} of {len(names)} trials, first {missing[0]!r}; "
                "add the files, or remove these trials"
            )
    speakers = _manifest_speakers(folder / "manifest.jsonl")
    return [
        Trial(name, speakers.get(name, name.split("_")[0]), **{kind: files[kind][name] for kind in files})
        for name in names[:limit]
    ]


def place_of(config: TrialsConfig) -> str:
    """Return the folder or file that stands for a set of trials in messages."""
    if isinstance(config, FolderTrials):
        return config.folder
    if isinstance(config, Wsj0Trials):
        return config.lists
    if isinstance(config, LibriMixTrials):
        return config.root
    return config.metadata


def to_record(config: TrialsConfig) -> dict[str, Any]:
    """Return a set of trials as JSON values for a record, without the keys of `TrialSet` that are null."""
    unset = {field.name for field in fields(TrialSet) if getattr(config, field.name) is None}
    return {key: value for key, value in to_dict(config).items() if key not in unset}


def check_files(candidates: Sequence[Candidate]) -> tuple[list[Trial], list[str]]:
    """Return the trials whose files are usable, and one line for each other trial that says what is wrong.

    Only headers are read. A file must be decodable, hold samples and have its sample rate; a mixture and a target
    that are both files must have the same length.
    """
    files = list(dict.fromkeys(file for candidate in candidates for file, _ in candidate.files))
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        headers = dict(zip(files, pool.map(_header, files), strict=True))
    trials, problems = [], []
    for candidate in candidates:
        problem = _problem(candidate, headers)
        if problem is None:
            trials.append(candidate.trial)
        else:
            problems.append(f"{candidate.trial.name}: {problem}")
    return trials, problems


def require_few_missing(name: str | Path, problems: Sequence[str], total: int, max_missing: float) -> None:
    """Raise `CorpusError` if `problems` are more than the fraction `max_missing` of the `total` trials."""
    if len(problems) > max_missing * total:
        raise CorpusError(
            f"{name}: {len(problems)} of {total} trials are missing or wrong, more than max_missing = {max_missing:g} "
            f"allows; the first: {problems[0]}"
        )


def _header(file: Path) -> tuple[int, int] | str:
    """Return samples and rate in Hz from a file's header, or what is wrong with the file."""
    try:
        return probe_audio(file, str(file))
    except AudioError as error:
        return str(error)


def _problem(candidate: Candidate, headers: dict[Path, tuple[int, int] | str]) -> str | None:
    for file, sample_rate in candidate.files:
        header = headers[file]
        if isinstance(header, str):
            return header
        if header[1] != sample_rate:
            return f"{file}: is at {header[1]} Hz, not {sample_rate} Hz"
    mixture, target = (
        headers[audio] if isinstance(audio, Path) else None
        for audio in (candidate.trial.mixture, candidate.trial.target)
    )
    if mixture is not None and target is not None and mixture[0] != target[0]:
        return f"{candidate.trial.target}: has {target[0]} samples, its mixture {mixture[0]}"
    return None


def _files_by_name(folder: Path, suffix: str, *, needs_suffix: bool) -> dict[str, Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    return {path.stem.removesuffix(suffix): path for path in paths if path.stem.endswith(suffix) or not needs_suffix}


def _manifest_speakers(manifest: Path) -> dict[str, str]:
    """Return the target speakers by the names of the trials; empty if there is no manifest."""
    if not manifest.exists():
        return {}
    speakers: dict[str, str] = {}
    try:
        for line in manifest.read_bytes().splitlines():
            row = json.loads(line)
            speakers[row["name"]] = row["target_speaker"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{manifest}: line {len(speakers) + 1} is not a row of `onevoice mix`; let that command finish, or remove "
            "the file"
        ) from error
    return speakers
