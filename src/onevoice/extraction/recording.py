"""One file in, the voice in it out: any format, any length, in constant memory.

1. The mixture is decoded in blocks, its channels are picked, and each is converted to the network's rate into a spool.
2. The network runs over the spool in windows. The estimate of a long recording goes to a file beside the output, so
   that the same command resumes it if it was stopped.
3. Where the voice is heard follows from the levels of estimate and mixture (`presence`).
4. Estimate and residual are converted back and written in blocks under temporary names, and get their names together.

On an accelerator, several short recordings take each step together.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from onevoice.addresses import as_address, exists
from onevoice.audio import BLOCK, Block, Mono, to_mono
from onevoice.errors import AudioError, ConfigError, OnevoiceError
from onevoice.extraction.arrays import channels_cancel
from onevoice.extraction.batches import GROUP
from onevoice.extraction.enrollment import Spec, enroll_files
from onevoice.extraction.extractor import Extractor, at_rate
from onevoice.extraction.presence import Presence, join, write_timeline
from onevoice.extraction.report import extraction_report
from onevoice.extraction.request import Channel, Request
from onevoice.extraction.voice import Voice
from onevoice.extraction.windows import Spool, fill_spools, make_plan
from onevoice.files import atomic_write, storage_errors
from onevoice.streams import Source, is_here, keeps_peaks, open_source, write_together

FULL_SCALE = 32767 / 32768
"""The largest peak in a file with integer samples."""

T = TypeVar("T")


@dataclass(frozen=True)
class Extraction:
    """What became of one recording."""

    mixture: str
    output: str
    seconds: float
    """Length of the recording."""
    elapsed_seconds: float
    """Time it took."""
    notes: tuple[str, ...] = ()
    """What the user should know about the result."""
    presence: Presence | None = None
    """Where the voice is heard; None if the weights cannot tell."""

    def text(self) -> str:
        """Return one line about the result."""
        speed = self.seconds / max(self.elapsed_seconds, 1e-9)
        line = f"{self.output}: {self.seconds:.1f} s of sound in {self.elapsed_seconds:.1f} s ({speed:.1f}x real time)"
        presence = [] if self.presence is None else [self.presence.text()]
        return "; ".join([line, *presence, *self.notes])


@dataclass(frozen=True)
class Track:
    """One channel of a recording on its way through the network."""

    mixture: Spool
    estimate: Spool
    gain: float = 0.0
    """The gain for the estimate."""
    presence: Presence | None = None
    """Where the voice is heard in it."""


@dataclass(frozen=True)
class Heard:
    """A mixture that was decoded, on its way to its output."""

    request: Request
    source: Source
    voice: Voice
    channel: Channel
    """The channel that is used: one of those that cancel each other, in place of their mean."""
    samples: int
    """Per channel of the file."""
    tracks: list[Track]
    paths: list[Path | None]
    """Where the estimate of each track is kept while it grows; None for what is quickly done again."""
    notes: list[str]
    begin: float
    """When work on it began, by `time.perf_counter`."""


def extract_file(
    extractor: Extractor,
    mixture: str | Path,
    voice: Voice | Spec | Sequence[Spec],
    output: str | Path,
    residual: str | Path | None = None,
    *,
    channel: Channel = "mean",
    force: bool = False,
    absent_db: float = 0.0,
    timeline: str | Path | None = None,
    page: str | Path | None = None,
    shown_name: str | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> Extraction:
    """Extract a voice from the file `mixture` and write it to `output`, at the rate and length of the mixture.

    The arguments are the fields of `Request`. WAV is written as 32-bit float: nothing clips, and output + residual is
    the mixture up to float32 rounding. In other formats, one gain turns both down if a peak would exceed full scale.
    `report` gets the share that is done, 0 to 1.

    Raises `AudioError`, `ConfigError`, `StorageError` and `MissingDependencyError`.
    """
    request = Request(mixture, voice, output, residual, channel, force, absent_db, timeline, page, shown_name)
    return _extract(extractor, request, report)


def extract_files(
    extractor: Extractor, requests: Sequence[Request], report: Callable[[float], None] = lambda share: None
) -> list[Extraction | OnevoiceError]:
    """Do several requests; return the result of each, or its error.

    On an accelerator, the network takes `GROUP` of them at once, as far as they fit a window, those of similar length
    together. Their elapsed time is that of the group, divided by their number. `report` gets the share that is done of
    each of the others.
    """
    if not extractor.takes_batches:
        return [_or_error(_extract, extractor, request, report) for request in requests]
    groups = [requests[first : first + GROUP] for first in range(0, len(requests), GROUP)]
    return [result for group in groups for result in _extract_group(extractor, group, report)]


def _extract_group(
    extractor: Extractor, requests: Sequence[Request], report: Callable[[float], None]
) -> list[Extraction | OnevoiceError]:
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        heard = [_or_error(_hear_or_extract, extractor, request, stack, report) for request in requests]
        short = [each for each in heard if isinstance(each, Heard)]
        extractor.estimate_together(
            [(track.mixture, track.estimate, each.voice) for each in short for track in each.tracks]
        )
        done = [_or_error(_finish_late, extractor, each) if isinstance(each, Heard) else each for each in heard]
    elapsed = (time.perf_counter() - begin) / max(1, len(short))
    return [
        replace(result, elapsed_seconds=elapsed)
        if isinstance(result, Extraction) and isinstance(each, Heard)
        else result
        for each, result in zip(heard, done, strict=True)
    ]


def _hear_or_extract(
    extractor: Extractor, request: Request, stack: contextlib.ExitStack, report: Callable[[float], None]
) -> Heard | Extraction:
    """Decode a mixture that fits a window, and leave it open; extract from a longer one at once."""
    with contextlib.ExitStack() as own:
        heard = _hear(extractor, request, own)
        if make_plan(extractor.card.config, heard.tracks[0].mixture.samples).count == 1:
            stack.enter_context(own.pop_all())
            return heard
        return _finish(extractor, heard, report)


def _finish_late(extractor: Extractor, heard: Heard) -> Extraction:
    """Look at the names once more, since others may have written in between; then write."""
    heard.request.check_names()
    return _finish(extractor, heard, lambda share: None)


def _extract(extractor: Extractor, request: Request, report: Callable[[float], None]) -> Extraction:
    with contextlib.ExitStack() as stack:
        return _finish(extractor, _hear(extractor, request, stack), report)


def _or_error(function: Callable[..., T], *arguments: Any) -> T | OnevoiceError:
    try:
        return function(*arguments)
    except OnevoiceError as error:
        return error


def _hear(extractor: Extractor, request: Request, stack: contextlib.ExitStack) -> Heard:
    """Look at the files of a request, and decode its mixture. The stack closes what is open."""
    begin = time.perf_counter()
    request.check_names()
    outputs = [each for each in (request.output, request.residual) if each is not None]
    for address in [] if request.force else map(as_address, outputs):
        if address is not None and exists(address):
            raise ConfigError(f"{address}: exists; choose another name, or overwrite it with --force")
    if request.absent_db or request.timeline is not None:
        extractor.require_level()
    source = stack.enter_context(open_source(request.mixture))
    request.require_channel(source)
    voice = request.voice if isinstance(request.voice, Voice) else enroll_files(extractor, request.voice)
    voice.require_model(extractor.model_hash)
    folder = _make_folder(Path(request.output)) if is_here(request.output) else None
    spools, samples, channel, notes = _decode(source, request.channel, extractor.sample_rate, folder, stack)
    paths = _estimate_paths(extractor, source, voice, request.output, channel, spools)
    estimates = [stack.enter_context(Spool(folder, path)) for path in paths]
    tracks = [Track(*pair) for pair in zip(spools, estimates, strict=True)]
    notes += [*voice.warnings, *_swapped(voice, samples / source.sample_rate)]
    return Heard(request, source, voice, channel, samples, tracks, paths, notes, begin)


def _finish(extractor: Extractor, heard: Heard, report: Callable[[float], None]) -> Extraction:
    """Run the network over the tracks of a request, and write what it asks for."""
    request, source, tracks = heard.request, heard.source, []
    for track, gain in zip(heard.tracks, _separate(extractor, heard, report), strict=True):
        has_level = extractor.card.config.has_level
        presence = extractor.presence(track.mixture, track.estimate) if has_level else None
        tracks.append(replace(track, gain=gain, presence=presence))
    where = [track.presence for track in tracks if track.presence is not None]
    presence = join(where) if where else None
    notes = heard.notes + _write(extractor.sample_rate, heard, tracks)
    if request.timeline is not None and presence is not None:
        speaker = Path((*heard.voice.sources, "voice")[0]).stem
        write_timeline(presence, Path(request.timeline), Path(source.name).stem, speaker)
    if request.page is not None:
        shown = request.shown_name
        files = {"mixture": source.name, "output": str(request.output)} if shown is None else {"mixture": shown}
        about = {**files, "channel": heard.channel, "absent_db": request.absent_db}
        first = tracks[0]
        content = extraction_report(
            extractor, files["mixture"], first.mixture, first.estimate, first.gain, presence, heard.voice, about
        )
        atomic_write(Path(request.page), content.encode())
    for path in filter(None, heard.paths):
        path.unlink(missing_ok=True)
    seconds, elapsed = heard.samples / source.sample_rate, time.perf_counter() - heard.begin
    return Extraction(source.name, str(request.output), seconds, elapsed, tuple(notes), presence)


def _swapped(voice: Voice, seconds: float) -> list[str]:
    """Return a hint if the enrollment looks like the mixture."""
    if voice.check_up is None or voice.check_up.people < 2 or voice.check_up.seconds < seconds:
        return []
    return ["the enrollment is not shorter than the mixture and has several voices: were they swapped?"]


def _make_folder(output: Path) -> Path:
    with storage_errors(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    return output.absolute().parent


def pick(block: Block, channel: Channel) -> Float[np.ndarray, "_block _picked"]:
    """Return the chosen channel, their mean, or all channels of a block, as columns."""
    if channel == "each":
        return block
    return to_mono(block.T)[:, None] if channel == "mean" else block[:, channel - 1 : channel]


def _decode(
    source: Source, channel: Channel, rate: int, folder: Path | None, stack: contextlib.ExitStack
) -> tuple[list[Spool], int, Channel, list[str]]:
    """Decode the mixture into one spool per track at the network's rate.

    Returns the spools, the samples per channel of the file, the channel that was used, and what the user should know.
    """
    powers, mean_power = np.zeros(source.channels), 0.0

    def picked() -> Iterator[Block]:
        nonlocal mean_power, powers
        for block in source.blocks():
            chosen = pick(block, channel)
            if channel == "mean" and source.channels > 1:
                powers += [float(each @ each) for each in np.ascontiguousarray(block.T, np.float64)]
                mean_power += float(np.square(chosen, dtype=np.float64).sum())
            yield chosen

    spools = [stack.enter_context(Spool(folder)) for _ in range(source.channels if channel == "each" else 1)]
    samples, is_silent = fill_spools(spools, picked(), source.sample_rate, rate)
    if not samples:
        raise AudioError(f"{source.name}: holds no samples")
    if channel == "mean" and channels_cancel(powers, mean_power):
        loudest = int(powers.argmax()) + 1
        spools, samples, _, notes = _decode(source, loudest, rate, folder, stack)
        return spools, samples, loudest, [*notes, f"its channels cancel each other, so channel {loudest} was used"]
    return spools, samples, channel, ["the recording is silent, so the output is too"] if is_silent.all() else []


def _estimate_paths(
    extractor: Extractor, source: Source, voice: Voice, output: str | Path, channel: Channel, spools: list[Spool]
) -> list[Path | None]:
    """Return where the estimate of each track is kept while it grows; None for what is quickly done again.

    The name depends on everything that the estimate depends on, so that only the same command finds it.
    """
    plan = make_plan(extractor.card.config, spools[0].samples)
    if plan.count == 1 or not is_here(output) or not is_here(source.name) or source.name == "standard input":
        return [None] * len(spools)
    status = source.path.stat()
    identity = [
        str(source.path.resolve()), status.st_size, status.st_mtime_ns, channel, extractor.model_hash,
        hashlib.sha256(voice.embedding.numpy().tobytes()).hexdigest(), repr(plan),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = Path(output)
    return [path.with_name(f".{path.name}.{key}.{index}.spool") for index in range(len(spools))]


def _separate(extractor: Extractor, heard: Heard, report: Callable[[float], None]) -> list[float]:
    """Run the network over each track; return the gains of the estimates."""
    gains = []
    for index, track in enumerate(heard.tracks):

        def progress(samples: int, index: int = index, total: int = track.mixture.samples) -> None:
            report((index + samples / total) / len(heard.tracks))

        gains.append(extractor.separate(track.mixture, track.estimate, heard.voice, progress))
    report(1.0)
    return gains


class _TooLoudError(Exception):
    """A peak exceeds full scale in a format with integer samples."""

    def __init__(self, peak: float) -> None:
        super().__init__(peak)
        self.peak = peak


def _write(rate: int, heard: Heard, tracks: Sequence[Track]) -> list[str]:
    """Write the output and the residual, turned down if a format needs it; return what the user should know."""
    request, source = heard.request, heard.source

    def attempt(volume: float) -> None:
        columns = [
            at_rate(
                track.estimate, track.gain, rate, source.sample_rate, heard.samples, track.presence, request.absent_db
            )
            for track in tracks
        ]
        estimates = regroup(columns)
        output, residual = request.output, request.residual
        paths = [output] if residual is None else [residual, output]
        limited, peak = [not keeps_peaks(path) for path in paths], 0.0
        with write_together(paths, source.sample_rate, len(tracks), heard.samples) as writers:
            for sounds in _with_residual(source, heard.channel, estimates) if residual is not None else zip(estimates):
                for write, is_limited, sound in zip(writers, limited, sounds, strict=True):
                    scaled = sound if volume == 1.0 else (volume * sound).astype(np.float32)
                    if is_limited:
                        peak = max(peak, float(np.abs(scaled).max()))
                    write(scaled)
            if peak > 1.0:
                raise _TooLoudError(peak)

    try:
        attempt(1.0)
    except _TooLoudError as error:
        attempt(FULL_SCALE / error.peak)
        return [f"turned down by {20 * np.log10(error.peak / FULL_SCALE):.1f} dB to fit the format"]
    return []


def _with_residual(source: Source, channel: Channel, estimates: Iterator[Block]) -> Iterator[tuple[Block, Block]]:
    """Decode the mixture once more; yield blocks of the residual, and of the estimate."""
    mixtures = (pick(block, channel) for block in source.blocks())
    try:
        for mixture, estimate in zip(mixtures, estimates, strict=True):
            yield mixture - estimate, estimate
    except ValueError as error:
        raise AudioError(f"{source.name}: changed while it was read; run the command again") from error


def regroup(columns: Sequence[Iterator[Mono]]) -> Iterator[Block]:
    """Join channels that come in pieces of any length, equally long in total, to blocks of `BLOCK` samples."""
    waiting = [np.zeros(0, np.float32) for _ in columns]
    while True:
        for index, column in enumerate(columns):
            pieces = [waiting[index]]
            while sum(map(len, pieces)) < BLOCK and (piece := next(column, None)) is not None:
                pieces.append(piece)
            waiting[index] = np.concatenate(pieces)
        block = np.stack([each[:BLOCK] for each in waiting], axis=1)
        if not len(block):
            return
        yield block
        waiting = [each[BLOCK:] for each in waiting]
