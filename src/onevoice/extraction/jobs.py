"""Many recordings: which files, one voice or several, and the work spread over processes or a cluster."""

import contextlib
import functools
import glob
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as section

from onevoice.addresses import as_address, exists, local_copy, local_name
from onevoice.cluster import Cluster, Workers
from onevoice.config import STRICT, from_dict, refuse_nul
from onevoice.errors import AudioError, ConfigError, OnevoiceError
from onevoice.extraction.batches import GROUP
from onevoice.extraction.enrollment import as_places, enroll_files
from onevoice.extraction.extractor import Extractor, load
from onevoice.extraction.recording import Extraction, extract_files
from onevoice.extraction.request import Channel, Request, parse_absent, parse_channel
from onevoice.extraction.voice import Voice
from onevoice.models.base import pick_device
from onevoice.processes import ordered_map
from onevoice.streams import PIPE, check_outputs

PIECES_PER_WORKER = 4
"""At least so many, or a worker may be idle while another has much left."""
MANY_WORKERS = 8
"""What a cluster is taken to have, if nobody says."""
PATTERN_SIGNS = "*?["
"""Signs that make a name a glob pattern, unless a file has that name."""


@section(frozen=True, config=STRICT)
class Job:
    """One extraction: a line of a job list."""

    mixture: Annotated[str, Field(min_length=1)]
    """The recording of several people."""
    voice: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]
    """The enrollment, or several of one person: FILE, FILE@1:20-1:31, FILE#2, or FILE.voice."""
    output: Annotated[str, Field(min_length=1)]
    """The file to write."""
    residual: str | None = None
    """The file for what is left; null: none."""
    timeline: str | None = None
    """The file for the stretches in which the voice is heard: .csv, .rttm, or .txt for Audacity; null: none."""
    report: str | None = None
    """The HTML page about the extraction; null: none."""


@dataclass(frozen=True)
class Settings:
    """What holds for all jobs."""

    channel: Channel = "mean"
    force: bool = False
    absent_db: float = 0.0
    """How far the output is turned down where the voice is not heard."""


@dataclass(frozen=True)
class Failure:
    """A job that could not be done."""

    job: Job
    message: str


def expand(names: Iterable[str]) -> list[str]:
    """Return the files that names and glob patterns stand for, each once; patterns in order. Raises `AudioError`."""
    found: list[str] = []
    for name in names:
        if name == PIPE or Path(name).exists() or not any(sign in name for sign in PATTERN_SIGNS):
            found.append(name)
            continue
        paths = glob.glob(name, recursive=True)  # noqa: PTH207, Path.glob takes no absolute patterns
        matches = sorted(path for path in paths if Path(path).is_file())
        if not matches:
            raise AudioError(f"{name}: matches no file; check the pattern")
        found += matches
    return list(dict.fromkeys(found))


def jobs_for(mixtures: Sequence[str], voice: str | tuple[str, ...], out: str, residual: str | None = None) -> list[Job]:
    """Return the jobs for one voice in several mixtures.

    One mixture goes to the file `out`, if that has an extension. Otherwise `out` is a folder and gets NAME.wav for each
    mixture NAME.*; `residual` is then a folder too. Raises `ConfigError` for two mixtures of one name.
    """
    mixtures = expand(mixtures)
    if len(mixtures) == 1 and not Path(out).is_dir() and (out == PIPE or Path(out).suffix):
        return [Job(mixtures[0], voice, out, residual)]
    if PIPE in (*mixtures, out):
        raise ConfigError("-: standard input and output are for one mixture; name the output file with --out FILE")
    places: dict[str, str] = {}
    for mixture in mixtures:
        name = f"{Path(mixture).stem}.wav"
        if name in places:
            raise ConfigError(f"{mixture}: would get the same output as {places[name]}; use a job list (--list)")
        places[name] = mixture
    return [
        Job(mixture, voice, str(Path(out) / name), None if residual is None else str(Path(residual) / name))
        for name, mixture in places.items()
    ]


def read_jobs(name: str | Path) -> list[Job]:
    """Read a job list in JSON Lines, one `Job` per line; relative names start at its folder. Raises `ConfigError`."""
    jobs = []
    try:
        with local_copy(name) as path:
            lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}: line {number} is not JSON ({error}); write one object per line") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: line {number} is not an object; write {{}} with mixture, voice and output")
        refuse_nul(values, f"{name}: line {number}")
        jobs.append(_below(from_dict(Job, values, name=f"{name}: line {number}"), name))
    if not jobs:
        raise ConfigError(f"{name}: holds no jobs; write one object per line")
    return jobs


def _below(job: Job, list_name: str | Path) -> Job:
    """Return the job with its names relative to the folder of the list, here or at an address."""
    address = as_address(list_name)

    def place(name: str) -> str:
        name = local_name(name)
        if as_address(name) or Path(name).is_absolute():
            return name
        if address is None:
            return str(Path(list_name).parent / name)
        scheme, path = address.split("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(path), name))}"

    return Job(
        place(job.mixture),
        place(job.voice) if isinstance(job.voice, str) else tuple(map(place, job.voice)),
        place(job.output),
        *(None if name is None else place(name) for name in (job.residual, job.timeline, job.report)),
    )


def check_jobs(jobs: Sequence[Job], settings: Settings) -> None:
    """Look at all inputs and outputs before any work. Raises what `extract_file` raises."""
    inputs = [name for job in jobs for name in (job.mixture, *(place.path for place in as_places(job.voice)))]
    outputs = [name for job in jobs for name in (job.output, job.residual)]
    check_outputs(outputs, inputs, settings.force, [name for job in jobs for name in (job.timeline, job.report)])
    for job in jobs:
        _request(job, job.voice, settings).check()
    if not settings.force:
        addresses = [address for name in outputs if name is not None and (address := as_address(name))]
        with ThreadPoolExecutor(32) as pool:
            for address, is_there in zip(addresses, pool.map(exists, addresses), strict=True):
                if is_there:
                    raise ConfigError(f"{address}: exists; choose another name, or overwrite it with --force")


def run_jobs(
    jobs: Sequence[Job],
    load: Callable[[], Extractor],
    settings: Settings,
    workers: Workers = 1,
    report: Callable[[float], None] | None = None,
    together: int = 1,
) -> Iterator[tuple[Job, Extraction | Failure]]:
    """Do the jobs and yield each with what became of it. A job that fails does not stop the others.

    Each of the `workers` processes loads the network once, so `load` must be picklable. It takes `together` jobs at
    once, in their order: more than one is for accelerators. `report` gets the share that is done of the current job;
    with several processes or jobs at once, nothing is reported in between. On a cluster, call `check_jobs` first: a job
    whose worker was lost is done again, and replaces what that worker may have written. Jobs that took down their
    workers together are done again at the end, one by one.
    """
    if isinstance(workers, Cluster):
        settings = replace(settings, force=True)
    make_work = functools.partial(_start, load, settings, report if workers == 1 else None)
    groups = [tuple(jobs[first : first + together]) for first in range(0, len(jobs), together)]
    suspects: list[Job] = []

    def set_aside(group: tuple[Job, ...], why: str) -> list[Extraction | Failure]:
        if len(group) > 1:
            suspects.extend(group)
            return []
        return [Failure(group[0], f"{group[0].mixture}: {why}")]

    with contextlib.closing(ordered_map(make_work, groups, workers, set_aside)) as results:
        for group, done in zip(groups, results, strict=True):
            yield from zip(group, done, strict=bool(done))
    if suspects:
        yield from run_jobs(suspects, load, settings, workers)


def jobs_together(device: str, workers: Workers, count: int) -> int:
    """Return how many of `count` jobs a worker is to take at once on a device of this name.

    More than one only on an accelerator, and few enough that each worker gets several pieces.
    """
    if isinstance(workers, Cluster):
        is_fast, size = workers.gpus > 0, workers.workers or MANY_WORKERS
    else:
        is_fast, size = pick_device(device).type != "cpu", workers
    return max(1, min(GROUP, count // (PIECES_PER_WORKER * size))) if is_fast else 1


def _request(job: Job, voice: Voice | str | tuple[str, ...], settings: Settings) -> Request:
    return Request(
        job.mixture, voice, job.output, job.residual, settings.channel, settings.force, settings.absent_db,
        job.timeline, job.report,
    )  # fmt: skip


def _start(
    load: Callable[[], Extractor], settings: Settings, report: Callable[[float], None] | None
) -> Callable[[Sequence[Job]], list[Extraction | Failure]]:
    extractor, say = load(), report or (lambda share: None)
    voices: dict[str | tuple[str, ...], Voice] = {}

    def prepare(job: Job) -> Request | OnevoiceError:
        try:
            if job.voice not in voices:
                voices[job.voice] = enroll_files(extractor, job.voice)
        except OnevoiceError as error:
            return error
        return _request(job, voices[job.voice], settings)

    def work(jobs: Sequence[Job]) -> list[Extraction | Failure]:
        prepared = [prepare(job) for job in jobs]
        results = iter(extract_files(extractor, [each for each in prepared if isinstance(each, Request)], say))
        done = [next(results) if isinstance(each, Request) else each for each in prepared]
        return [
            Failure(job, str(each)) if isinstance(each, OnevoiceError) else each
            for job, each in zip(jobs, done, strict=True)
        ]

    return work


@dataclass(frozen=True)
class ExtractBatch:
    """Extracts voices for batches of rows, as a plain callable that can be pickled: for Ray Data and the like.

        rows.map_batches(ExtractBatch, fn_constructor_kwargs={"checkpoint": "NAME"}, concurrency=4)

    A batch maps the columns of a job list (mixture, voice, output, …) to sequences of names. The result has these
    columns, the `seconds` of each recording, and its `error`, which is empty if there was none. The network is loaded
    at the first batch, and each voice is computed once. On an accelerator, recordings of similar length in a batch go
    through the network together. Outputs that exist are replaced only with `force`.
    """

    checkpoint: str | None = None
    """Weights as for `extractor.load`."""
    channel: str = "mean"
    absent: str = "keep"
    """What to do where the voice is not heard, as --absent: keep, mute, or a number of dB."""
    force: bool = False
    device: str = "auto"
    precision: str = "auto"

    @functools.cached_property
    def _work(self) -> Callable[[Sequence[Job]], list[Extraction | Failure]]:
        settings = Settings(parse_channel(self.channel), self.force, parse_absent(self.absent))
        return _start(functools.partial(load, self.checkpoint, None, self.device, self.precision), settings, None)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the network."""
        return {name: value for name, value in vars(self).items() if name != "_work"}

    def __call__(self, batch: Mapping[str, Sequence[Any] | np.ndarray]) -> dict[str, Any]:
        """Do the job of each row. Raises `ConfigError` for rows that are no jobs."""
        columns = {name: [_plain(value) for value in values] for name, values in batch.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        results = self._work([from_dict(Job, row, name=f"row {number}") for number, row in enumerate(rows)])
        return {
            **batch,
            "seconds": np.array([0.0 if isinstance(result, Failure) else result.seconds for result in results]),
            "error": np.array([result.message if isinstance(result, Failure) else "" for result in results]),
        }


def _plain(value: Any) -> Any:
    """Return a value of a column as plain Python: Ray's columns are NumPy arrays, also inside."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
