"""Uploaded recordings, until they are deleted or expire."""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from onevoice.server.folders import remove
from onevoice.server.problems import not_found
from onevoice.server.schemas import Overview, Recording
from onevoice.server.sounds import blocks_of, look, overview, write_copy
from onevoice.server.uploads import Facts, Upload


@dataclass
class Stored:
    """A recording in a folder of its own."""

    id: str
    folder: Path
    upload: Upload
    facts: Facts
    expires: float
    """Seconds since 1970."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a copy is made."""

    def describe(self) -> Recording:
        """Return its JSON."""
        return Recording(
            id=self.id, name=self.upload.name, seconds=self.facts.seconds, sample_rate=self.facts.sample_rate,
            channels=self.facts.channels, expires=to_time(self.expires),
        )  # fmt: skip

    def overview(self) -> Overview:
        """Return what it looks like."""
        path = self.folder / "overview.json"
        with self.lock:
            if not path.exists():
                samples, rate = self.facts.samples, self.facts.sample_rate
                looked = look(blocks_of(self.upload.path), samples, rate)
                path.write_text(overview({"mixture": looked}, samples, rate).model_dump_json(), encoding="utf-8")
            return Overview.model_validate_json(path.read_text(encoding="utf-8"))

    def copy(self) -> Path:
        """Return a copy that browsers play."""
        path = self.folder / "copy.flac"
        facts = self.facts
        with self.lock:
            if not path.exists():
                read = blocks_of(self.upload.path)
                peak = max(float(abs(block).max()) for block in read())
                write_copy(read, path, facts.samples, facts.sample_rate, facts.channels, peak)
        return path


class Recordings:
    """All uploads by their number."""

    def __init__(self, folder: Path, ttl_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._ttl, self._clock = folder, ttl_seconds, clock
        self._stored: dict[str, Stored] = {}
        folder.mkdir(exist_ok=True)

    def new_folder(self) -> Path:
        """Make a folder for an upload."""
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def add(self, folder: Path, upload: Upload, facts: Facts) -> Stored:
        """Keep the upload in a folder of `new_folder`."""
        stored = Stored(folder.name, folder, upload, facts, self._clock() + self._ttl)
        self._stored[stored.id] = stored
        return stored

    def get(self, number: str) -> Stored:
        """Return a recording, which now expires later. Raises `ProblemError`."""
        stored = self._stored.get(number)
        if stored is None:
            raise not_found(f"recording {number}")
        stored.expires = self._clock() + self._ttl
        return stored

    def delete(self, number: str) -> None:
        """Remove a recording and what was made of it. Raises `ProblemError`."""
        stored = self._stored.pop(number, None)
        if stored is None:
            raise not_found(f"recording {number}")
        remove(stored.folder)

    def sweep(self) -> None:
        """Remove what has expired."""
        for stored in list(self._stored.values()):
            if stored.expires <= self._clock():
                self._stored.pop(stored.id, None)
                remove(stored.folder)


def to_time(seconds: float) -> datetime:
    """Return a point in time."""
    return datetime.fromtimestamp(seconds, UTC)
