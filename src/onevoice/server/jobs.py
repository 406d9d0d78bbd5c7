"""Extractions: a queue, a few threads that share the network, and the results until they expire.

queued → running → done
                 → failed
"""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import onevoice.server.schemas as schemas
from onevoice.extraction.enrollment import Place, enroll_files
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.presence import Presence
from onevoice.extraction.recording import Extraction, extract_file
from onevoice.extraction.request import Channel
from onevoice.extraction.voice import Voice
from onevoice.server.folders import remove
from onevoice.server.metrics import Metrics
from onevoice.server.problems import Problem, ProblemError, explain, not_found, without_paths
from onevoice.server.recordings import to_time
from onevoice.server.settings import Settings
from onevoice.server.sounds import TRACKS, Look, look, overview, tracks_of, write_copy
from onevoice.server.uploads import Facts, Upload
from onevoice.server.voices import describe_check_up

NETWORK_SHARE = 0.8
"""Of the progress; the rest is making copies and pictures."""


@dataclass(frozen=True)
class Order:
    """What to extract."""

    mixture: Upload
    facts: Facts
    """Of the mixture."""
    voice: Voice | tuple[Place, ...]
    """A saved voice, or where the enrollments are."""
    names: dict[Path, str]
    """What the client calls the files."""
    channel: Channel = "mean"
    absent_db: float = 0.0
    has_report: bool = False


@dataclass
class Job:
    """One extraction, in a folder of its own."""

    id: str
    folder: Path
    order: Order
    created: float
    status: schemas.Status = "queued"
    progress: float = 0.0
    begun: float = 0.0
    progressed: float = 0.0
    """When the progress changed."""
    expires: float | None = None
    result: schemas.Result | None = None
    problem: Problem | None = None
    voice: Voice | None = None
    presence: Presence | None = None
    looks: dict[str, Look] = field(default_factory=dict)
    is_deleted: bool = False
    future: "Future[None] | None" = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a file is made."""

    @property
    def channels(self) -> int:
        """Of the result."""
        return self.order.facts.channels if self.order.channel == "each" else 1


class _DeletedError(Exception):
    """The client deleted the job."""


class Jobs:
    """All extractions by their number. Threads may share it."""

    def __init__(
        self, folder: Path, extractor: Extractor, settings: Settings, metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._folder, self._extractor, self._settings = folder, extractor, settings
        self._metrics, self._clock = metrics, clock
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(settings.workers, "onevoice-network")
        self._speed: float | None = None
        self.is_stopping = False
        folder.mkdir(exist_ok=True)

    def new_folder(self) -> Path:
        """Make a folder for a job."""
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def require_room(self) -> None:
        """Raise `ProblemError` if no job can be added now."""
        self.require_running()
        if len(self._having("queued")) >= self._settings.max_queued:
            detail = f"{self._settings.max_queued} extractions are waiting; try again later"
            raise ProblemError("busy", "The queue is full", 503, detail, retry_after=30)

    def require_running(self) -> None:
        """Raise `ProblemError` if the server is about to end."""
        if self.is_stopping:
            raise stopping()

    def submit(self, folder: Path, order: Order) -> Job:
        """Queue an extraction in a folder of `new_folder`. Raises `ProblemError`."""
        with self._lock:
            self.require_room()
            job = Job(folder.name, folder, order, self._clock())
            self._jobs[job.id] = job
            job.future = self._pool.submit(self._run, job)
        return job

    def get(self, number: str) -> Job:
        """Return a job. Raises `ProblemError`."""
        job = self._jobs.get(number)
        if job is None:
            raise not_found(f"extraction {number}")
        return job

    def delete(self, number: str) -> None:
        """Forget a job, stop it if it runs, and remove its files. Raises `ProblemError`."""
        with self._lock:
            job = self._jobs.pop(number, None)
            if job is None:
                raise not_found(f"extraction {number}")
            job.is_deleted = True
            if job.future is not None:
                job.future.cancel()
        remove(job.folder)

    def sweep(self) -> None:
        """Delete the jobs that have expired."""
        for job in list(self._jobs.values()):
            if job.expires is not None and job.expires <= self._clock():
                self._jobs.pop(job.id, None)
                remove(job.folder)

    def stop(self) -> list[Job]:
        """Let running jobs end, fail those that wait, and take no more. Return those that run."""
        self.is_stopping = True
        with self._lock:
            for job in self._having("queued"):
                if job.future is not None and job.future.cancel():
                    self._end(job, stopping().problem)
        return self._having("running")

    def close(self) -> None:
        """Wait for running jobs."""
        self.stop()
        self._pool.shutdown(wait=True)

    def count(self) -> tuple[int, int]:
        """Return how many jobs run, and how many wait."""
        return len(self._having("running")), len(self._having("queued"))

    def describe(self, job: Job) -> schemas.Extraction:
        """Return the JSON of a job."""
        waiting = [each.id for each in self._having("queued")]
        return schemas.Extraction(
            id=job.id, status=job.status, mixture=job.order.mixture.name,
            position=waiting.index(job.id) + 1 if job.id in waiting else None,
            progress=job.progress, remaining_seconds=self._remaining(job), created=to_time(job.created),
            expires=None if job.expires is None else to_time(job.expires), result=job.result, problem=job.problem,
        )  # fmt: skip

    def _having(self, status: schemas.Status) -> list[Job]:
        return [job for job in list(self._jobs.values()) if job.status == status]

    def _remaining(self, job: Job) -> float | None:
        """Return the seconds that a running job still needs: from its own progress, else from the speed of others."""
        if job.status != "running":
            return None
        now = self._clock()
        if job.progress > 0:
            expected = (job.progressed - job.begun) * (1 - job.progress) / job.progress
            return round(max(0.0, expected - (now - job.progressed)), 1)
        if self._speed is None:
            return None
        return round(max(0.0, job.order.facts.seconds / self._speed - (now - job.begun)), 1)

    def _run(self, job: Job) -> None:
        job.begun, job.status = self._clock(), "running"
        try:
            extraction = self._extract(job)
            self._report(job, NETWORK_SHARE)
            _finish(job, extraction, lambda share: self._report(job, NETWORK_SHARE + (1 - NETWORK_SHARE) * share))
        except _DeletedError:
            pass
        except Exception as error:
            if not job.is_deleted:
                problem = explain(error, job.order.names)
                if problem.status == 500:
                    self._metrics.log_failure("an extraction", error)
                self._end(job, problem)
        else:
            self._speed = job.order.facts.seconds / max(self._clock() - job.begun, 1e-3)
            self._end(job, None)
        finally:
            if job.is_deleted:
                remove(job.folder)
                self._metrics.count_job("deleted", 0.0, 0.0)

    def _extract(self, job: Job) -> Extraction:
        order = job.order
        voice = order.voice
        job.voice = voice if isinstance(voice, Voice) else enroll_files(self._extractor, voice)
        extraction = extract_file(
            self._extractor, order.mixture.path, job.voice, job.folder / "voice.wav", job.folder / "residual.wav",
            channel=order.channel, absent_db=order.absent_db, force=True,
            report=lambda share: self._report(job, NETWORK_SHARE * share),
            page=job.folder / "report.html" if order.has_report else None, shown_name=order.mixture.name,
        )  # fmt: skip
        job.presence = extraction.presence
        return extraction

    def _report(self, job: Job, share: float) -> None:
        """Keep the progress of a job; stop it if it was deleted."""
        if job.is_deleted:
            raise _DeletedError
        job.progress, job.progressed = share, self._clock()

    def _end(self, job: Job, problem: Problem | None) -> None:
        job.problem = problem
        job.progress = job.progress if problem else 1.0
        now = self._clock()
        job.expires = now + self._settings.ttl_seconds
        job.status = "failed" if problem else "done"
        self._metrics.count_job(job.status, job.order.facts.seconds, max(0.0, now - job.begun) if job.begun else 0.0)


def stopping() -> ProblemError:
    """Return the problem of a server that is about to end."""
    return ProblemError("stopping", "The server is stopping", 503, "the server is stopping; try again", retry_after=60)


def _finish(job: Job, extraction: Extraction, report: Callable[[float], None]) -> None:
    """Make what the page plays and draws, and describe the result; `report` gets the share that is done."""
    facts, channels = job.order.facts, job.channels
    tracks = tracks_of(job.folder)
    for done, (name, read) in enumerate(tracks.items()):
        report(done / len(tracks) / 2)
        job.looks[name] = look(read, facts.samples, facts.sample_rate)
    peak = max(each.peak for each in job.looks.values())
    for done, (name, read) in enumerate(tracks.items()):
        report(0.5 + done / len(tracks) / 2)
        write_copy(read, job.folder / f"{name}.flac", facts.samples, facts.sample_rate, channels, peak)
    pictures = overview(job.looks, facts.samples, facts.sample_rate, job.presence)
    (job.folder / "overview.json").write_text(pictures.model_dump_json(), encoding="utf-8")
    presence, voice = job.presence, job.voice
    notes = [without_paths(note, job.order.names) for note in extraction.notes]
    job.result = schemas.Result(
        seconds=facts.seconds, sample_rate=facts.sample_rate, channels=channels, notes=notes,
        elapsed_seconds=round(extraction.elapsed_seconds, 3),
        levels_db={name: round(job.looks[name].rms_db, 1) for name in TRACKS},
        presence=None if presence is None else schemas.Presence(
            is_present=presence.is_present, score_db=presence.score_db, threshold_db=presence.threshold_db,
            share=presence.share, stretches=presence.stretches, text=presence.text(),
        ),
        check_up=None if voice is None else describe_check_up(voice, job.order.names),
        files={},
    )  # fmt: skip
