"""What the routes work with: one extractor, the queue, the recordings and the saved voices."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from onevoice.errors import OnevoiceError
from onevoice.extraction.enrollment import enroll_files, find_in_file
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.voice import Voice
from onevoice.server.folders import private_folder, remove
from onevoice.server.forms import ExtractionFields
from onevoice.server.jobs import Jobs, Order
from onevoice.server.metrics import Metrics
from onevoice.server.problems import ProblemError, explain, invalid
from onevoice.server.recordings import Recordings, Stored
from onevoice.server.schemas import Person
from onevoice.server.settings import Settings
from onevoice.server.uploads import Facts, Form, Upload, measure, receive_form
from onevoice.server.voices import Voices

Value = TypeVar("Value")


@dataclass
class Service:
    """The state of a server. Short work has two lanes of threads: one for the network, a wider one for files."""

    settings: Settings
    extractor: Extractor
    folder: Path
    metrics: Metrics
    jobs: Jobs
    recordings: Recordings
    voices: Voices
    network: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    files: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))

    async def on_network(self, work: Callable[[], Value]) -> Value:
        """Run short work that needs the network. Raises `ProblemError` if too many wait for it."""
        if self.network.statistics().tasks_waiting >= self.settings.max_queued:
            raise ProblemError("busy", "The server is busy", 503, "too many requests are waiting", retry_after=10)
        return await to_thread.run_sync(work, limiter=self.network)

    async def on_files(self, work: Callable[[], Value]) -> Value:
        """Run work that reads and writes files."""
        return await to_thread.run_sync(work, limiter=self.files)

    @contextlib.asynccontextmanager
    async def receive(self, request: Request, folder: Path, fields: Collection[str]) -> AsyncIterator[Form]:
        """Yield the form of a request, with its files in `folder`, which is removed if anything fails.

        Errors about files name them as the client does.
        """
        form = Form()
        try:
            form = await receive_form(request, folder, self.settings.limits, fields)
            yield form
        except BaseException as error:
            remove(folder)
            if isinstance(error, OnevoiceError):
                raise ProblemError.of(explain(error, form.names)) from error
            raise

    async def keep_recording(self, request: Request) -> Stored:
        """Store the recording of a form. Raises `ProblemError`."""
        folder = self.recordings.new_folder()
        async with self.receive(request, folder, ["recording"]) as form:
            (upload,) = exactly(form, "recording", 1, 1)
            facts = await self.on_files(lambda: measure(upload, self.settings.limits))
            return self.recordings.add(folder, upload, facts)

    async def find_people(self, stored: Stored) -> list[Person]:
        """Return the people in a recording. Raises `AudioError`."""
        found = await self.on_network(lambda: find_in_file(stored.upload.path))
        return [
            Person(number=each.number, seconds=each.seconds, turns=list(each.turns), solo=each.solo) for each in found
        ]

    async def enroll(self, uploads: list[Upload]) -> Voice:
        """Return the voice of recordings of one person. Raises `AudioError`."""
        for upload in uploads:
            await self.on_files(lambda upload=upload: measure(upload, self.settings.limits))  # type: ignore[misc]
        specs = [str(upload.path) for upload in uploads]
        return await self.on_network(lambda: enroll_files(self.extractor, specs[0] if len(specs) == 1 else specs))

    async def prepare(self, folder: Path, form: Form, fields: ExtractionFields) -> Order:
        """Return what a form asks to extract; an uploaded recording is linked into `folder`. Raises `ProblemError`."""
        mixtures, enrollments = form.named("mixture"), form.named("enrollment")
        given = {
            "enrollment": bool(enrollments), "voice": fields.voice is not None, "person": fields.person is not None,
            "begin": fields.begin is not None or fields.end is not None,
        }  # fmt: skip
        if len(mixtures) + (fields.recording is not None) != 1:
            raise invalid("mixture", "give one file, or the id of an upload as `recording`")
        if sum(given.values()) != 1:
            raise invalid("voice", "give exactly one of enrollment, voice, person, and begin with end")
        if fields.absent_db() > 0:
            self.extractor.require_level()
        if mixtures:
            mixture = mixtures[0]
            facts = await self.on_files(lambda: measure(mixture, self.settings.limits))
        else:
            mixture, facts = self._link(folder, str(fields.recording))
        for upload in enrollments:
            await self.on_files(lambda upload=upload: measure(upload, self.settings.limits))  # type: ignore[misc]
        names = {**form.names, mixture.path: mixture.name}
        voice = self._voice(fields, mixture, facts, enrollments)
        channel = fields.parsed_channel()
        if isinstance(channel, int) and not 1 <= channel <= facts.channels:
            raise invalid("channel", f"{mixture.name} has no channel {channel}, only 1 to {facts.channels}")
        return Order(mixture, facts, voice, names, channel, fields.absent_db(), fields.report)

    def _voice(
        self, fields: ExtractionFields, mixture: Upload, facts: Facts, enrollments: list[Upload]
    ) -> Voice | tuple[str, ...]:
        if fields.voice is not None:
            return self.voices.load(fields.voice)
        if enrollments:
            return tuple(str(upload.path) for upload in enrollments)
        if fields.person is not None:
            return (f"{mixture.path}#{fields.person}",)
        begin, end = fields.begin, fields.end
        if begin is None or end is None or not begin < end:
            raise invalid("end", "give both begin and end, and the end after the begin")
        if begin >= facts.seconds:
            raise invalid("begin", f"{mixture.name} ends after {facts.seconds:.1f} s")
        return (f"{mixture.path}@{begin:.3f}-{min(end, facts.seconds):.3f}",)

    def _link(self, folder: Path, number: str) -> tuple[Upload, Facts]:
        """Give a job its own name for an upload, so that neither is lost with the other."""
        stored = self.recordings.get(number)
        path = folder / "mixture"
        os.link(stored.upload.path, path)
        return Upload("mixture", stored.upload.name, path), stored.facts

    def sweep(self) -> None:
        """Remove what has expired."""
        self.jobs.sweep()
        self.recordings.sweep()


@contextlib.contextmanager
def open_service(extractor: Extractor, settings: Settings) -> Iterator[Service]:
    """Yield a service with a private folder; at the end, wait for running jobs and remove everything but voices."""
    metrics = Metrics()
    with private_folder() as folder:
        queue = Jobs(folder / "extractions", extractor, settings, metrics)
        metrics.watch(queue.count)
        recordings = Recordings(folder / "recordings", settings.ttl_seconds)
        voices = Voices(settings.voices, extractor.model_hash)
        try:
            yield Service(settings, extractor, folder, metrics, queue, recordings, voices)
        finally:
            queue.close()


def exactly(form: Form, name: str, least: int, most: int) -> list[Upload]:
    """Return the files of a field. Raises `ProblemError` for more or fewer."""
    uploads = form.named(name)
    if not least <= len(uploads) <= most:
        raise invalid(
            name, "give one file" if most == 1 else ("give no file" if most == 0 else f"give {least} to {most} files")
        )
    return uploads
