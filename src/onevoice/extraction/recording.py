"""One file in, the voice in it out: any format, any length, in constant memory.

1. The mixture is decoded in blocks, its channels are picked, and each is converted to the network's rate into a spool.
2. The network runs over the spool in windows. The estimate of a long recording goes to a file beside the output, so
   that the same command resumes it if it was stopped.
3. Where the voice is heard follows from the levels of estimate and mixture (`presence`).
4. Estimate and residual are converted back and written in blocks under temporary names, and get their names together.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from onevoice.addresses import as_address, exists
from onevoice.audio import BLOCK, Block, Mono, to_mono
from onevoice.errors import AudioError, ConfigError
from onevoice.extraction.enrollment import Spec, as_places, check_voice, enroll_files
from onevoice.extraction.extractor import Extractor, at_rate, channels_cancel
from onevoice.extraction.presence import TIMELINES, Presence, join, write_timeline
from onevoice.extraction.report import extraction_report
from onevoice.extraction.voice import Voice
from onevoice.extraction.windows import Spool, fill_spools, make_plan
from onevoice.files import atomic_write, storage_errors
from onevoice.streams import PIPE, Source, check_outputs, is_here, keeps_peaks, open_source, write_together

Channel = int | Literal["mean", "each"]
"""A channel counted from 1, their average, or each one by itself."""
FULL_SCALE = 32767 / 32768
"""The largest peak in a file with integer samples."""


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

    `voice` comes from `Extractor.enroll`, or names recordings (`enrollment`). `residual` gets mixture − estimate.
    `-` is standard input or output. WAV is written as 32-bit float: nothing clips, and output + residual is the mixture
    up to float32 rounding. In other formats, one gain turns both down if a peak would exceed full scale. `report` gets
    the share that is done, 0 to 1. Files that exist are replaced only with `force`.

    The output is turned down by `absent_db` where the voice is not heard; infinity mutes. `timeline` receives the
    stretches in which it is heard (.csv, .rttm, or .txt for Audacity), and `page` an HTML page about the extraction,
    which calls the mixture `shown_name`, and then names no other file either.

    Raises `AudioError`, `ConfigError`, `StorageError` and `MissingDependencyError`.
    """
    begin = time.perf_counter()
    _check_names(mixture, voice, output, residual, timeline, page, force)
    for address in [] if force else [as_address(each) for each in (output, residual) if each is not None]:
        if address is not None and exists(address):
            raise ConfigError(f"{address}: exists; choose another name, or overwrite it with --force")
    if absent_db or timeline is not None:
        extractor.require_level()
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(mixture))
        _require_channel(source, channel)
        if not isinstance(voice, Voice):
            voice = enroll_files(extractor, voice)
        folder = _make_folder(Path(output)) if is_here(output) else None
        spools, samples, channel, notes = _hear(source, channel, extractor.sample_rate, folder, stack)
        paths = _estimate_paths(extractor, source, voice, output, channel, spools)
        estimates = [stack.enter_context(Spool(folder, path)) for path in paths]
        tracks = [Track(*pair) for pair in zip(spools, estimates, strict=True)]
        tracks = _separate(extractor, tracks, voice, report)
        notes += [*voice.warnings, *_swapped(voice, samples / source.sample_rate)]
        heard = [track.presence for track in tracks if track.presence is not None]
        presence = join(heard) if heard else None
        notes += _write(extractor.sample_rate, source, channel, samples, tracks, absent_db, output, residual)
        if timeline is not None and presence is not None:
            write_timeline(presence, Path(timeline), Path(source.name).stem, Path((*voice.sources, "voice")[0]).stem)
        if page is not None:
            files = {"mixture": source.name, "output": str(output)} if shown_name is None else {"mixture": shown_name}
            about = {**files, "channel": channel, "absent_db": absent_db}
            first = tracks[0]
            content = extraction_report(
                extractor, files["mixture"], first.mixture, first.estimate, first.gain, presence, voice, about
            )
            atomic_write(Path(page), content.encode())
        for path in filter(None, paths):
            path.unlink(missing_ok=True)
    seconds = samples / source.sample_rate
    return Extraction(source.name, str(output), seconds, time.perf_counter() - begin, tuple(notes), presence)


def check_files(
    mixture: str | Path,
    voice: Voice | Spec | Sequence[Spec],
    output: str | Path,
    residual: str | Path | None = None,
    timeline: str | Path | None = None,
    page: str | Path | None = None,
    *,
    channel: Channel = "mean",
    force: bool = False,
) -> None:
    """Look at inputs and outputs before long work, as far as they are here. Raises what `extract_file` does."""
    if not isinstance(voice, Voice):
        check_voice(voice)
    _check_names(mixture, voice, output, residual, timeline, page, force)
    if is_here(mixture):
        with open_source(mixture) as source:
            _require_channel(source, channel)


def _check_names(
    mixture: str | Path,
    voice: Voice | Spec | Sequence[Spec],
    output: str | Path,
    residual: str | Path | None,
    timeline: str | Path | None,
    page: str | Path | None,
    force: bool,
) -> None:
    """Check, without opening a file, that the names go together and that the outputs can be written."""
    enrollments = [] if isinstance(voice, Voice) else [place.path for place in as_places(voice)]
    if (str(mixture) == PIPE and PIPE in enrollments) or enrollments.count(PIPE) > 1:
        raise ConfigError("-: standard input cannot be both the mixture and the voice; name a file for one")
    if str(output) == PIPE and residual is not None and str(residual) == PIPE:
        raise ConfigError("-: standard output cannot be both the output and the residual; name a file for one")
    _require_extension(timeline, "timeline", TIMELINES)
    _require_extension(page, "report", (".html", ".htm"))
    check_outputs([output, residual], [mixture, *enrollments], force, [timeline, page])


def _require_extension(path: str | Path | None, option: str, extensions: Collection[str]) -> None:
    if path is not None and Path(path).suffix.lower() not in extensions:
        raise ConfigError(f"--{option}: {path} must end in {', '.join(extensions)}")


def parse_absent(text: str) -> float:
    """Return how far `--absent` turns the output down, in dB: keep, mute, or a number. Raises `ConfigError`."""
    named = {"keep": 0.0, "mute": math.inf}
    try:
        level = named[text] if text in named else float(text)
    except ValueError:
        level = math.nan
    if not level >= 0:
        raise ConfigError(f"absent: {text!r} is none of keep, mute and a number of dB; give 30 to turn down by 30 dB")
    return level


def parse_channel(text: str) -> Channel:
    """Return the channel that an option names. Raises `ConfigError`."""
    if text == "mean":
        return "mean"
    if text == "each":
        return "each"
    if not text.isdecimal():
        raise ConfigError(f"channel: {text!r} is not a channel; give 1, 2, …, mean or each")
    return int(text)


def _swapped(voice: Voice, seconds: float) -> list[str]:
    """Return a hint if the enrollment looks like the mixture."""
    if voice.check_up is None or voice.check_up.people < 2 or voice.check_up.seconds < seconds:
        return []
    return ["the enrollment is not shorter than the mixture and has several voices: were they swapped?"]


def _require_channel(source: Source, channel: Channel) -> None:
    if isinstance(channel, int) and not 1 <= channel <= source.channels:
        raise AudioError(f"{source.name}: has no channel {channel}, only 1 to {source.channels}")


def _make_folder(output: Path) -> Path:
    with storage_errors(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    return output.absolute().parent


def pick(block: Block, channel: Channel) -> Float[np.ndarray, "_block _picked"]:
    """Return the chosen channel, their mean, or all channels of a block, as columns."""
    if channel == "each":
        return block
    return to_mono(block.T)[:, None] if channel == "mean" else block[:, channel - 1 : channel]


def _hear(
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
        spools, samples, _, notes = _hear(source, loudest, rate, folder, stack)
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


def _separate(extractor: Extractor, tracks: list[Track], voice: Voice, report: Callable[[float], None]) -> list[Track]:
    """Run the network over each track; return the tracks with their gains."""
    done = []
    for index, track in enumerate(tracks):

        def progress(samples: int, index: int = index, total: int = track.mixture.samples) -> None:
            report((index + samples / total) / len(tracks))

        gain = extractor.separate(track.mixture, track.estimate, voice, progress)
        has_level = extractor.card.config.has_level
        presence = extractor.presence(track.mixture, track.estimate) if has_level else None
        done.append(replace(track, gain=gain, presence=presence))
    report(1.0)
    return done


class _TooLoudError(Exception):
    """A peak exceeds full scale in a format with integer samples."""

    def __init__(self, peak: float) -> None:
        super().__init__(peak)
        self.peak = peak


def _write(
    rate: int,
    source: Source,
    channel: Channel,
    samples: int,
    tracks: list[Track],
    absent_db: float,
    output: str | Path,
    residual: str | Path | None,
) -> list[str]:
    """Write the output and the residual, turned down if a format needs it; return what the user should know."""

    def attempt(volume: float) -> None:
        columns = [
            at_rate(track.estimate, track.gain, rate, source.sample_rate, samples, track.presence, absent_db)
            for track in tracks
        ]
        estimates = regroup(columns)
        paths = [output] if residual is None else [residual, output]
        limited, peak = [not keeps_peaks(path) for path in paths], 0.0
        with write_together(paths, source.sample_rate, len(tracks), samples) as writers:
            for sounds in _with_residual(source, channel, estimates) if residual is not None else zip(estimates):
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
