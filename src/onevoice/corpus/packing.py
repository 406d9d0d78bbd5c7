"""Packing: a corpus decoded once into the form that `onevoice.corpus.pack` reads.

The work is done in `NAME.part` beside the wanted folder, utterance by utterance in the order of the corpus: the
samples are appended to one file, then a row with their checksum to another. So it can be killed at any moment. Started
again, it keeps the rows whose samples are there and have the checksum, cuts off the rest and goes on; the finished
folder holds the same bytes, for any number of processes. Only then does it get its name.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from onevoice.audio import HIGHEST_RATE, LOWEST_RATE, require_sound, resample, to_pcm16
from onevoice.corpus.listing import MAX_BROKEN, Corpus, require_share
from onevoice.corpus.pack import FORMAT, HEADER, INDEX, ROWS, SAMPLES, PackedCorpus, is_pack, sha256_of
from onevoice.corpus.recordings import Fault, Utterance
from onevoice.errors import AudioError, ConfigError, CorpusError
from onevoice.files import Row, append_whole, atomic_write, storage_errors, to_json, to_json_lines, whole_rows
from onevoice.processes import ordered_map


@dataclass(frozen=True)
class Job:
    """An utterance to be packed, at a speed; anything but 1 makes another speaker."""

    utterance: Utterance
    speed: float = 1.0

    @property
    def id(self) -> str:
        """The id of the utterance in the pack."""
        speaker = self.utterance.speaker
        return f"{speaker}{suffix(self.speed)}{self.utterance.id.removeprefix(speaker)}"


@dataclass(frozen=True)
class Encoded:
    """What an utterance became: the bytes of its samples and the rate it had in Hz, or the fault it has."""

    data: bytes = b""
    source_rate: int = 0
    fault: str = ""


def pack_corpus(
    corpus: Corpus,
    out: str | Path,
    *,
    sample_rate: int = 16_000,
    workers: int = 1,
    speeds: Sequence[float] = (),
    keep_mean: bool = False,
    max_broken: float = MAX_BROKEN,
) -> PackedCorpus:
    """Pack the utterances of `corpus` into the folder `out`, or go on with that, and open it.

    Each is decoded, averaged to mono, converted to `sample_rate` in Hz, freed of its mean (unless `keep_mean`, for
    room responses) and rounded to 16 bits. What cannot be decoded or is silent is left out, with a row that says
    why. For each of `speeds` everything is packed once more, played so much faster (1.1) or slower (0.9), as a speaker
    `NAME@SPEED`: pitch and formants are another's. A pack of the same corpus and settings is left as it is.

    Raises `CorpusError` when a share above `max_broken` is broken, or `out` holds something else; `StorageError`
    when the disk is full.
    """
    out = Path(out).absolute()
    _require_possible(sample_rate, speeds)
    corpus.require(max_broken)
    jobs = [Job(each, speed) for group in corpus.speakers.values() for speed in (1.0, *speeds) for each in group]
    header: Row = {"format": FORMAT, "sample_rate": sample_rate, "mean_removed": not keep_mean}
    header["plan"] = _plan_digest(jobs, header)
    if _is_there(out, header):
        return PackedCorpus.open(out)
    part = out.with_name(f"{out.name}.part")
    if (part / HEADER).exists() and not _is_same(part, header):
        raise CorpusError(f"{part}: is the beginning of another pack; remove it, or choose another folder")
    atomic_write(part / HEADER, to_json(header))
    limit = functools.partial(_require_few, corpus, max_broken)
    rows, digest = _append_all(jobs, part, functools.partial(_Encoder, sample_rate, keep_mean), workers, limit)
    limit(_broken(rows))
    _close(part, header, corpus, rows, digest)
    with storage_errors(out):
        part.replace(out)
    return PackedCorpus.open(out)


def _require_possible(sample_rate: int, speeds: Sequence[float]) -> None:
    if not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
        raise ConfigError(f"sample_rate: {sample_rate} Hz cannot be meant; 8000 and 16000 are usual")
    if not all(0.5 <= speed <= 2 and speed != 1 for speed in speeds) or len(set(speeds)) < len(speeds):
        raise ConfigError(f"speeds: {list(speeds)} must be different numbers from 0.5 to 2, without 1")


def suffix(speed: float) -> str:
    """Return what a speed adds to the name of a speaker."""
    return "" if speed == 1 else f"@{speed:g}"


def without_mean(samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Return `samples` minus their mean."""
    return samples - np.float32(samples.mean(dtype=np.float64))


class _Encoder:
    """What one process does: decode an utterance at the rate of the pack and the speed of the job."""

    def __init__(self, sample_rate: int, keep_mean: bool) -> None:
        self.sample_rate, self.keep_mean = sample_rate, keep_mean

    def __call__(self, job: Job) -> Encoded:
        source = job.utterance.source
        try:
            samples, source_rate = source.read()
            require_sound(samples, source.name)
            samples = resample(samples, round(source_rate * job.speed), self.sample_rate)
            encoded = to_pcm16(samples if self.keep_mean else without_mean(samples))
            require_sound(encoded.astype(np.float32), source.name)
        except AudioError as error:
            return Encoded(fault=source.fault(error).reason)
        return Encoded(encoded.astype("<i2").tobytes(), source_rate)


def _append_all(
    jobs: Sequence[Job],
    part: Path,
    make: "functools.partial[_Encoder]",
    workers: int,
    limit: Callable[[Sequence[Row]], None],
) -> tuple[list[Row], str]:
    """Append what is missing to the pack in `part`; return all rows and the SHA-256 of the samples.

    `limit` sees the rows of what is broken each time they become more.
    """
    rows, digest, size = _recover(part, jobs)
    missing = jobs[len(rows) :]
    broken = _broken(rows)
    with (
        _appending(part / SAMPLES, size) as samples,
        _appending(part / ROWS, len(to_json_lines(rows))) as records,
        contextlib.closing(ordered_map(make, missing, max(1, min(workers, len(missing))))) as results,
        tqdm(desc=str(part), total=len(jobs), initial=len(rows), unit="utterance") as bar,
    ):
        for job in missing:
            encoded = next(results)
            row = _row(job, encoded)
            if encoded.fault:
                broken.append(row)
                limit(broken)
            digest.update(encoded.data)
            append_whole(samples, encoded.data)
            append_whole(records, to_json_lines([row]))
            rows.append(row)
            bar.update()
        with storage_errors(part):
            os.fsync(samples.fileno())
            os.fsync(records.fileno())
    return rows, digest.hexdigest()


def _row(job: Job, encoded: Encoded) -> Row:
    utterance = job.utterance
    row: Row = {"id": job.id, "speaker": utterance.speaker, "speed": job.speed, "source": utterance.source.name}
    if encoded.fault:
        return {**row, "fault": encoded.fault}
    samples, crc32 = len(encoded.data) // 2, zlib.crc32(encoded.data)
    return {**row, "source_rate": encoded.source_rate, "samples": samples, "crc32": crc32}


def _broken(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "fault" in row]


def _require_few(corpus: Corpus, max_broken: float, broken: Sequence[Row]) -> None:
    """Raise `CorpusError` when what was broken in the listing and in packing is more than the share `max_broken`."""
    found = [Fault(row["source"], row["fault"]) for row in broken if row["speed"] == 1]
    require_share([*corpus.faults, *found], len(corpus.utterances) - len(found), max_broken)


def _recover(part: Path, jobs: Sequence[Job]) -> "tuple[list[Row], hashlib._Hash, int]":
    """Return the rows that are whole and whose samples are there, the running SHA-256 of these, and their bytes."""
    digest, rows, size = hashlib.sha256(), list[Row](), 0
    if not (part / ROWS).exists() or not (part / SAMPLES).exists():
        return rows, digest, size
    with (part / SAMPLES).open("rb") as samples:
        for row, job in zip(whole_rows(part / ROWS), jobs, strict=False):
            if row["id"] != job.id:
                break
            if "fault" not in row:
                data = samples.read(2 * row["samples"])
                if len(data) != 2 * row["samples"] or zlib.crc32(data) != row["crc32"]:
                    break
                digest.update(data)
                size += len(data)
            rows.append(row)
    return rows, digest, size


def _close(part: Path, header: Row, corpus: Corpus, rows: Sequence[Row], digest: str) -> None:
    """Write the index and the finished header."""
    packed = [row for row in rows if "fault" not in row]
    if not packed:
        raise CorpusError("no usable utterance is left in the corpus")
    speakers = list(dict.fromkeys((row["speaker"], row["speed"]) for row in packed))
    numbers = {speaker: number for number, speaker in enumerate(speakers)}
    persons = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in speakers))}
    length = np.array([row["samples"] for row in packed], dtype=np.int64)
    speaker = np.array([numbers[row["speaker"], row["speed"]] for row in packed], dtype=np.int64)
    buffer = io.BytesIO()
    np.save(buffer, np.stack([np.cumsum(length) - length, length, speaker]))
    atomic_write(part / INDEX, buffer.getvalue())
    rates = Counter(row["source_rate"] for row in packed)
    finished = {
        **header,
        "utterances": len(packed),
        "left_out": len(rows) - len(packed),
        "samples": int(length.sum()),
        "source_rates": {str(rate): rates[rate] for rate in sorted(rates)},
        "sha256": {SAMPLES: digest, INDEX: sha256_of(part / INDEX)},
        "speakers": [[name + suffix(speed), corpus.genders.get(name), persons[name]] for name, speed in speakers],
    }
    atomic_write(part / HEADER, to_json(finished))


def _is_there(out: Path, header: Row) -> bool:
    """Say whether `out` already is this pack; raise `CorpusError` when it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if is_pack(out) and _is_same(out, header):
        return True
    kind = "another pack" if is_pack(out) else "something else than a pack"
    raise CorpusError(f"{out}: holds {kind}; choose another folder, or remove it to start anew")


def _is_same(folder: Path, header: Row) -> bool:
    try:
        there = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        return all(there[key] == value for key, value in header.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _plan_digest(jobs: Sequence[Job], header: Row) -> str:
    """Return a hash of what is to be packed: who says what, in which files of which sizes, and how."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for job in jobs:
        source = job.utterance.source
        place = (job.id, job.speed, job.utterance.gender, source.name, source.offset, source.size_bytes())
        digest.update(json.dumps(place).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _appending(path: Path, size: int) -> Iterator[FileIO]:
    """Open a file that is cut back to `size` bytes for appending."""
    with contextlib.ExitStack() as stack:
        with storage_errors(path):
            stream = stack.enter_context(path.open("ab", buffering=0))
            stream.truncate(size)
        yield stream
