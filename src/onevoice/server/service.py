"""What the routes work with: one extractor, the queue, the recordings and the saved voices."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from onevoice.errors import OnevoiceError
from onevoice.extraction.enrollment import Place, enroll_files, find_in_file, format_time
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
NO_LIVE = (
    "this server has no network for live sound; start it with onevoice serve --live MODEL, where MODEL is a checkpoint "
    "of a causal network"
)


@dataclass
class Service:
    """The state of a server. Short work has two lanes of threads: one for the network, a wider one for files.

    Live streams have a lane of their own, in which none waits for another.
    """

    settings: Settings
    extractor: Extractor
    folder: Path
    metrics: Metrics
    jobs: Jobs
    recordings: Recordings
    voices: Voices
    live: Extractor | None
    """The causal network of live streams; None: there is none."""
    blocks: CapacityLimiter
    open_streams: int = 0
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

    async def on_blocks(self, work: Callable[[], Value]) -> Value:
        """Run the work of a live stream."""
        return await to_thread.run_sync(work, limiter=self.blocks)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[Extractor]:
        """Count a live stream as open; yield its network. Raises `ProblemError` if it cannot be opened."""
        if self.live is None:
            raise ProblemError("no-live", "No live network", 501, NO_LIVE)
        self.jobs.require_running()
        if self.open_streams >= self.settings.max_streams:
            detail = f"all {self.settings.max_streams} live streams of this server are in use; try again later"
            raise ProblemError("busy", "The server is busy", 503, detail)
        self.open_streams += 1
        try:
            yield self.live
        finally:
            self.open_streams -= 1

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

    async def places_of(self, uploads: Sequence[Upload]) -> tuple[Place, ...]:
        """Return where enrollments are, once all are decoded within the limits. Raises `AudioError`."""
        for upload in uploads:
            await self.on_files(lambda upload=upload: measure(upload, self.settings.limits))  # type: ignore[misc]
        return tuple(Place(upload.name, str(upload.path)) for upload in uploads)

    async def enroll(self, places: Sequence[Place], extractor: Extractor | None = None) -> Voice:
        """Return the voice of recordings of one person, by default for extractions. Raises `AudioError`."""
        return await self.on_network(lambda: enroll_files(extractor or self.extractor, places))

    async def enroll_twin(self, places: Sequence[Place]) -> Voice | None:
        """Return the same voice for live streams, if these have another network. Raises `AudioError`."""
        if self.live is None or self.live is self.extractor or not places:
            return None
        return await self.enroll(places, self.live)

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
        if fields.absent_db() > 0 and not self.extractor.card.config.has_level:
            raise invalid("absent", "the network of this server cannot tell where a voice is absent; use keep")
        if mixtures:
            mixture = mixtures[0]
            facts = await self.on_files(lambda: measure(mixture, self.settings.limits))
        else:
            mixture, facts = self._link(folder, str(fields.recording))
        places = await self.places_of(enrollments)
        names = {**form.names, mixture.path: mixture.name}
        voice = self._voice(fields, mixture, facts, places)
        channel = fields.parsed_channel()
        if isinstance(channel, int) and not 1 <= channel <= facts.channels:
            raise invalid("channel", f"{mixture.name} has no channel {channel}, only 1 to {facts.channels}")
        return Order(mixture, facts, voice, names, channel, fields.absent_db(), fields.report)

    def _voice(
        self, fields: ExtractionFields, mixture: Upload, facts: Facts, enrollments: tuple[Place, ...]
    ) -> Voice | tuple[Place, ...]:
        if fields.voice is not None:
            return self.voices.load(fields.voice)
        if enrollments:
            return enrollments
        path = str(mixture.path)
        if fields.person is not None:
            return (Place(f"person {fields.person} of {mixture.name}", path, number=fields.person),)
        begin, end = fields.begin, fields.end
        if begin is None or end is None or not begin < end:
            raise invalid("end", "give both begin and end, and the end after the begin")
        if begin >= facts.seconds:
            raise invalid("begin", f"{mixture.name} ends after {facts.seconds:.1f} s")
        end = min(end, facts.seconds)
        return (Place(f"{mixture.name} from {format_time(begin)} to {format_time(end)}", path, (begin, end)),)

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
def open_service(extractor: Extractor, settings: Settings, live: Extractor | None = None) -> Iterator[Service]:
    """Yield a service with a private folder; at the end, wait for running jobs and remove everything but voices.

    `live` is the causal network of live streams.
    """
    metrics = Metrics()
    with private_folder() as folder:
        queue = Jobs(folder / "extractions", extractor, settings, metrics)
        metrics.watch(queue.count)
        recordings = Recordings(folder / "recordings", settings.ttl_seconds)
        voices = Voices(settings.voices, extractor.model_hash, None if live is None else live.model_hash)
        blocks = CapacityLimiter(settings.max_streams)
        service = Service(settings, extractor, folder, metrics, queue, recordings, voices, live, blocks)
        metrics.watch_streams(lambda: service.open_streams)
        try:
            yield service
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
