"""Saved voices: one file each, named by a random number, kept until somebody deletes it.

The network of live streams has embeddings of its own. So a voice that is saved while that network is there gets a
second file, below `live`, which comes and goes with the first one.
"""

import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from onevoice.errors import CheckpointError, StorageError
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

    def __init__(self, folder: Path, model_hash: str, live_hash: str | None = None) -> None:
        self._folder, self._model_hash, self._live_hash = folder, model_hash, live_hash

    def save(self, voice: Voice, name: str, names: Mapping[Path, str], live: Voice | None = None) -> SavedVoice:
        """Keep a voice under a name for people; `live` is the same one for live streams. Raises `StorageError`.

        The names of its recordings are not kept.
        """
        number = uuid.uuid4().hex
        check_up = voice.check_up
        if check_up is not None:
            check_up = replace(check_up, warnings=tuple(without_paths(each, names) for each in check_up.warnings))
        try:
            for each, path in ((voice, self._path(number)), (live, self._live_path(number))):
                if each is not None:
                    _make_private(path.parent)
                    save_voice(replace(each, sources=(name,), check_up=check_up), path)
                    path.chmod(0o600)
        except StorageError:
            self._path(number).unlink(missing_ok=True)
            raise
        return self.describe(number)

    def load(self, number: str) -> Voice:
        """Return a voice. Raises `ProblemError` if it is not there, or other weights made it."""
        path = self._path(number)
        if not path.is_file():
            raise not_found(f"voice {number}")
        voice = _read(path)
        if voice is None or voice.model_hash != self._model_hash:
            raise _does_not_fit("it was saved with another network")
        return voice

    def load_live(self, number: str) -> Voice:
        """Return a voice for live streams. Raises `ProblemError` if it is not there, or other weights made it."""
        if not self._path(number).is_file():
            raise not_found(f"voice {number}")
        voice = self._find_live(number)
        if voice is None:
            raise _does_not_fit("it was saved without the network for live sound")
        return voice

    def _find_live(self, number: str) -> Voice | None:
        voices = (_read(path) for path in (self._path(number), self._live_path(number)))
        return next((each for each in voices if each is not None and each.model_hash == self._live_hash), None)

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
            fits_live=self._find_live(number) is not None,
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
        self._live_path(number).unlink(missing_ok=True)

    def _live_path(self, number: str) -> Path:
        return self._folder / "live" / f"{number}{EXTENSION}"

    def _path(self, number: str) -> Path:
        return self._folder / f"{number}{EXTENSION}"


def _make_private(folder: Path) -> None:
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True, mode=0o700)


def _read(path: Path) -> Voice | None:
    """Return the voice in a file; None if there is no readable one."""
    try:
        return load_voice(path)
    except CheckpointError:
        return None


def _does_not_fit(reason: str) -> ProblemError:
    detail = f"this voice cannot be used here: {reason}; save it once more from a recording"
    return ProblemError("voice", "The voice cannot be used", 409, detail)
