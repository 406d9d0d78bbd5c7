"""The files of an extraction, by a fixed list of names; those that nobody may want are made when asked for."""

from pathlib import Path
from typing import Literal, get_args

from onevoice.extraction.presence import write_timeline
from onevoice.server.jobs import Job
from onevoice.server.problems import not_found
from onevoice.server.sounds import tracks_of, write_copy

FileName = Literal[
    "voice.wav", "residual.wav", "mixture.flac", "voice.flac", "residual.flac",
    "voice.mp3", "residual.mp3", "voice.csv", "voice.rttm", "voice.txt", "report.html",
]  # fmt: skip
TYPES = {
    ".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".csv": "text/csv", ".rttm": "text/plain",
    ".txt": "text/plain", ".html": "text/html",
}  # fmt: skip
TIMELINE = (".csv", ".rttm", ".txt")


def names_of(job: Job) -> list[str]:
    """Return the names of the files that a job that is done can give."""
    missing = set() if job.order.has_report else {".html"}
    if job.presence is None:
        missing |= set(TIMELINE)
    return [name for name in get_args(FileName) if Path(name).suffix not in missing]


def make_file(job: Job, name: FileName) -> Path:
    """Return a file of a job that is done, and make it if it is not there yet.

    Raises `AudioError` for a format that cannot hold the sound, `StorageError`, and `ProblemError`.
    """
    if job.status != "done" or name not in names_of(job):
        raise not_found(f"{name} of extraction {job.id}")
    path = job.folder / name
    with job.lock:
        if path.exists():
            return path
        if path.suffix in TIMELINE and job.presence is not None:
            write_timeline(job.presence, path, Path(job.order.mixture.name).stem, "voice")
            return path
        if job.is_deleted:
            raise not_found(f"extraction {job.id}")
        facts, peak = job.order.facts, max(each.peak for each in job.looks.values())
        write_copy(tracks_of(job.folder)[path.stem], path, facts.samples, facts.sample_rate, job.channels, peak)
    return path
