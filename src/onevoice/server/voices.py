"""Saved voices: one file each, named by a random number, kept until somebody deletes it."""

import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from onevoice.errors import CheckpointError
from onevoice.extraction.voice import EXTENSION, Voice, load_voice, save_voice
from onevoice.files import storage_errors
from onevoice.server.problems import ProblemError, not_found, without_paths
from onevoice.server.schemas import CheckUp, SavedVoice


def describe_check_up(voice: Voice, names: Mapping[Path, str]) -> CheckUp | None:
    """Return the JSON of what is known about the recordings of a voice."""
    if voice.check_up is None:
        return None
    values = asdict(voice.check_up)
    values["warnings"] = [without_paths(warning, names) for warning in voice.warnings]
    return CheckUp(text=voice.check_up.text(), **values)


class Voices:
    """The saved voices in a folder that only this user can read."""

    def __init__(self, folder: Path, model_hash: str) -> None:
        self._folder, self._model_hash = folder, model_hash

    def save(self, voice: Voice, name: str, names: Mapping[Path, str]) -> SavedVoice:
        """Keep a voice under a name for people. Raises `StorageError`.

        The names of its recordings are not kept.
        """
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        number = uuid.uuid4().hex
        check_up = voice.check_up
        if check_up is not None:
            check_up = replace(check_up, warnings=tuple(without_paths(each, names) for each in check_up.warnings))
        save_voice(replace(voice, sources=(name,), check_up=check_up), self._path(number))
        self._path(number).chmod(0o600)
        return self.describe(number)

    def load(self, number: str) -> Voice:
        """Return a voice. Raises `ProblemError`, and `CheckpointError` for one that other weights made."""
        path = self._path(number)
        if not path.is_file():
            raise not_found(f"voice {number}")
        try:
            voice = load_voice(path)
        except CheckpointError as error:
            raise CheckpointError(without_paths(str(error), {path: f"voice {number}"})) from error
        voice.require_model(self._model_hash)
        return voice

    def describe(self, number: str) -> SavedVoice:
        """Return the JSON of a voice. Raises `ProblemError`."""
        path = self._path(number)
        try:
            voice = load_voice(path)
            created = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except (CheckpointError, OSError) as error:
            raise not_found(f"voice {number}") from error
        return SavedVoice(
            id=number, name=", ".join(voice.sources) or number, created=created,
            check_up=describe_check_up(voice, {}), fits=voice.model_hash == self._model_hash,
        )  # fmt: skip

    def list(self) -> list[SavedVoice]:
        """Return all voices by name. Files that are no voices are left out."""
        found = []
        for path in self._folder.glob(f"*{EXTENSION}"):
            try:
                found.append(self.describe(path.stem))
            except (ProblemError, ValidationError):
                continue
        return sorted(found, key=lambda each: (each.name.casefold(), each.id))

    def delete(self, number: str) -> None:
        """Remove a voice. Raises `ProblemError`."""
        try:
            self._path(number).unlink()
        except FileNotFoundError as error:
            raise not_found(f"voice {number}") from error

    def _path(self, number: str) -> Path:
        return self._folder / f"{number}{EXTENSION}"
