"""Packing: decodes a corpus once into the form that `onevoice.corpus.pack` reads.

A pack is written in `NAME.part`, by one process at a time, and renamed when it is complete. If packing is killed, the
next run starts over. The same corpus and settings give the same bytes for any number of workers.

A shard packs its part of the utterances into a folder of its own, `NAME.I-of-N`, which only the packing of the whole
reads: it takes over what the shards have packed, packs the rest, and removes their folders.
"""

import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from onevoice.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, require_not_silent, resample, to_pcm16
from onevoice.cluster import Workers
from onevoice.corpus.listing import MAX_BROKEN, Corpus, require_few_broken
from onevoice.corpus.pack import CHECKSUM, FORMAT, HEADER, INDEX, ROWS, ROWS_CHECKSUM, SAMPLES, PackedCorpus, sha256_of
from onevoice.corpus.recordings import Fault, Utterance
from onevoice.errors import AudioError, ConfigError, CorpusError
from onevoice.files import (
    Row,
    Shard,
    append_whole,
    atomic_write,
    checksum,
    shard_path,
    shard_paths,
    sole_writer,
    storage_errors,
    to_json,
    to_json_lines,
)
from onevoice.processes import ordered_map


@dataclass(frozen=True)
class Job:
    """An utterance to pack at a speed; any speed but 1 makes it another speaker's."""

    utterance: Utterance
    speed: float = 1.0

    @property
    def id(self) -> str:
        """The id of the utterance in the pack."""
        speaker = self.utterance.speaker
        return f"{speaker}{speed_suffix(self.speed)}{self.utterance.id.removeprefix(speaker)}"


@dataclass(frozen=True)
class Encoded:
    """A job's result: the bytes of the samples and the source's rate in Hz, or the reason why there are none."""

    data: bytes = b""
    source_rate: int = 0
    fault: str = ""


def pack_corpus(
    corpus: Corpus,
    out: str | Path,
    *,
    sample_rate: int = 16_000,
    workers: Workers = 1,
    speeds: Sequence[float] = (),
    keep_mean: bool = False,
    max_broken: float = MAX_BROKEN,
) -> PackedCorpus:
    """Pack the utterances of `corpus` into the folder `out`, and open the pack.

    Each utterance is decoded, averaged to mono, converted to `sample_rate` in Hz and rounded to 16 bits. Its mean is
    removed unless `keep_mean` is set (for room responses). An utterance that cannot be decoded or is silent is left
    out, and its row says why. For each of `speeds`, everything is packed again, faster (1.1) or slower (0.9), as the
    speaker `NAME@SPEED`, since this changes pitch and formants. An existing pack of the same corpus and settings is
    left as it is. What shards have packed is taken over.

    Raises `CorpusError` if a share above `max_broken` is broken or `out` holds something else, and `StorageError` if
    the disk is full.
    """
    out = Path(out).absolute()
    jobs, header = _plan(corpus, sample_rate, speeds, keep_mean, max_broken)
    if not _is_packed(out, header):
        _clear_unfinished_shards(out)
        with _new_folder(out) as part, _PackedByShards(out, jobs, header["plan"]) as packed:
            left = [job for number, job in enumerate(jobs) if number not in packed.places]
            with _encode(left, sample_rate, keep_mean, workers) as made:
                results = (
                    packed.read(number) if number in packed.places else next(made) for number in range(len(jobs))
                )
                rows, digest = _write_samples(jobs, results, part, corpus, max_broken)
            _write_index(part, header, corpus, rows, digest)
    for folder in shard_paths(out):
        _read_header(folder, header["plan"])
        shutil.rmtree(folder)
    return PackedCorpus.open(out)


def pack_shard(
    corpus: Corpus,
    out: str | Path,
    shard: Shard,
    *,
    sample_rate: int = 16_000,
    workers: Workers = 1,
    speeds: Sequence[float] = (),
    keep_mean: bool = False,
    max_broken: float = MAX_BROKEN,
) -> Path:
    """Pack a shard of what `pack_corpus` packs, which takes it over, and return its folder; raises the same errors."""
    folder = shard_path(Path(out).absolute(), shard)
    jobs, header = _plan(corpus, sample_rate, speeds, keep_mean, max_broken)
    header = {"plan": header["plan"], "shard": [shard.number, shard.count]}
    if not _is_packed(folder, header):
        with _new_folder(folder) as part:
            jobs = list(shard.of(jobs))
            with _encode(jobs, sample_rate, keep_mean, workers) as results:
                rows, _ = _write_samples(jobs, results, part, corpus, max_broken)
            atomic_write(part / ROWS, to_json_lines(rows))
            header |= {ROWS_CHECKSUM: sha256_of(part / ROWS)}
            atomic_write(part / HEADER, to_json({**header, CHECKSUM: checksum(header)}))
    return folder


def _plan(
    corpus: Corpus, sample_rate: int, speeds: Sequence[float], keep_mean: bool, max_broken: float
) -> tuple[list[Job], Row]:
    """Return what is to be packed, and the header of the pack as far as it is known before."""
    _check_settings(sample_rate, speeds)
    corpus.require_usable(max_broken)
    jobs = [Job(each, speed) for group in corpus.speakers.values() for speed in (1.0, *speeds) for each in group]
    header: Row = {"format": FORMAT, "sample_rate": sample_rate, "mean_removed": not keep_mean}
    header["plan"] = _digest_of_plan(jobs, header)
    return jobs, header


def speed_suffix(speed: float) -> str:
    """Return what a speed adds to the name of a speaker."""
    return "" if speed == 1 else f"@{speed:g}"


def remove_mean(samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Return `samples` minus their mean."""
    return samples - np.float32(samples.mean(dtype=np.float64))


class _Encoder:
    """The work of one process: decode an utterance at the pack's sample rate and the job's speed."""

    def __init__(self, sample_rate: int, keep_mean: bool) -> None:
        self.sample_rate, self.keep_mean = sample_rate, keep_mean

    def __call__(self, job: Job) -> Encoded:
        recording = job.utterance.recording
        try:
            samples, source_rate = recording.read()
            require_not_silent(samples, recording.name)
            samples = resample(samples, round(source_rate * job.speed), self.sample_rate)
            encoded = to_pcm16(samples if self.keep_mean else remove_mean(samples))
            require_not_silent(encoded.astype(np.float32), recording.name)
        except AudioError as error:
            return Encoded(fault=recording.fault(error).reason)
        return Encoded(encoded.astype("<i2").tobytes(), source_rate)


def _encode(
    jobs: Sequence[Job], sample_rate: int, keep_mean: bool, workers: Workers
) -> contextlib.closing[Generator[Encoded, None, None]]:
    """Return the results of the jobs in order, to be closed at the end."""
    make_encoder = functools.partial(_Encoder, sample_rate, keep_mean)
    return contextlib.closing(ordered_map(make_encoder, jobs, workers, _set_aside))


def _set_aside(job: Job, reason: str) -> Encoded:
    """Return the result of a job that took down its workers."""
    return Encoded(fault=reason)


def _check_settings(sample_rate: int, speeds: Sequence[float]) -> None:
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise ConfigError(f"sample_rate: {sample_rate} Hz is not usable; choose 8000 or 16000")
    if not all(0.5 <= speed <= 2 and speed != 1 for speed in speeds) or len(set(speeds)) < len(speeds):
        raise ConfigError(f"speeds: {list(speeds)} must be different numbers from 0.5 to 2, without 1")


def _digest_of_plan(jobs: Sequence[Job], header: Row) -> str:
    """Return a hash of what is to be packed: the utterances, the files with their sizes, and the settings."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for job in jobs:
        file = job.utterance.recording
        item = (job.id, job.speed, job.utterance.gender, file.name, file.offset, file.size_bytes())
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()


def _is_packed(out: Path, header: Row) -> bool:
    """Check whether `out` already is this pack; raise `CorpusError` if it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        existing = json.loads((out / HEADER).read_text(encoding="utf-8"))
        if all(existing[key] == value for key, value in header.items()):
            return True
        kind = "another pack"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = "something other than a pack"
    raise CorpusError(f"{out}: holds {kind}; choose another folder, or remove it to start over")


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder to write to, named `out` at the end; what a killed run left there is removed."""
    part = out.with_name(f"{out.name}.part")
    if part.exists():
        _clear(part)
    with sole_writer(part):
        try:
            yield part
            with storage_errors(out):
                part.replace(out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


class _PackedByShards:
    """What shards have packed of `jobs`. Raises `CorpusError` for a folder that is damaged or of another pack."""

    def __init__(self, out: Path, jobs: Sequence[Job], plan: str) -> None:
        self.places: dict[int, tuple[Path, int, Row]] = {}
        """The folder, the offset in bytes and the row of each packed job, by its number in `jobs`."""
        self._files = contextlib.ExitStack()
        self._open: dict[Path, IO[bytes]] = {}
        for folder in shard_paths(out):
            shard = _read_header(folder, plan)
            offset = 0
            for number, line in zip(shard.of(range(len(jobs))), (folder / ROWS).read_bytes().splitlines(), strict=True):
                row = json.loads(line)
                self.places[number] = folder, offset, row
                offset += 2 * row.get("samples", 0)

    def __enter__(self) -> "_PackedByShards":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self, number: int) -> Encoded:
        """Return the result of a job. Raises `CorpusError` if the samples are not those that the shard wrote."""
        folder, offset, row = self.places[number]
        if "fault" in row:
            return Encoded(fault=row["fault"])
        if folder not in self._open:
            self._open[folder] = self._files.enter_context((folder / SAMPLES).open("rb"))
        self._open[folder].seek(offset)
        data = self._open[folder].read(2 * row["samples"])
        if zlib.crc32(data) != row["crc32"]:
            raise CorpusError(f"{folder}: is damaged; remove it, and pack this shard again")
        return Encoded(data, row["source_rate"])


def _read_header(folder: Path, plan: str) -> Shard:
    """Return which shard a folder holds. Raises `CorpusError` if it does not belong to `plan` or is damaged."""
    try:
        header = json.loads((folder / HEADER).read_bytes())
        is_damaged = header.pop(CHECKSUM) != checksum(header) or header[ROWS_CHECKSUM] != sha256_of(folder / ROWS)
        shard, is_other = Shard(*header["shard"]), header["plan"] != plan
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        is_damaged, is_other, shard = True, False, Shard(1, 1)
    if is_damaged or is_other:
        kind = "is damaged" if is_damaged else "belongs to a pack of something else"
        raise CorpusError(f"{folder}: {kind}; remove it, and pack this shard again")
    return shard


def _clear_unfinished_shards(out: Path) -> None:
    """Remove what killed shards left. Raises `ConfigError` if a shard is being packed."""
    for part in out.parent.glob(f"{glob.escape(out.stem)}.*-of-*{glob.escape(out.suffix)}.part"):
        _clear(part)


def _clear(part: Path) -> None:
    """Remove what a killed run left. Raises `CorpusError` if something else is there, `ConfigError` if one runs."""
    foreign = [path for path in part.iterdir() if path.name not in (SAMPLES, INDEX, ROWS, HEADER)]
    if any(not path.name.startswith(".") for path in foreign):
        raise CorpusError(f"{foreign[0]}: is in the way of packing; move it, or choose another folder")
    with sole_writer(part):
        shutil.rmtree(part)


def _write_samples(
    jobs: Sequence[Job], results: Iterable[Encoded], part: Path, corpus: Corpus, max_broken: float
) -> tuple[list[Row], str]:
    """Write the samples of all jobs; return a row per job and the SHA-256 of the samples."""
    rows: list[Row] = []
    faults = list(corpus.faults)
    digest = hashlib.sha256()
    with _open_for_writing(part / SAMPLES) as stream:
        progress = tqdm(results, desc=str(part), total=len(jobs), unit="utterance", disable=None)
        for job, encoded in zip(jobs, progress, strict=True):
            row = _row(job, encoded)
            if encoded.fault and job.speed == 1:
                faults.append(Fault(row["source"], encoded.fault))
                found = len(faults) - len(corpus.faults)
                require_few_broken(faults, len(corpus.utterances) - found, max_broken)
            digest.update(encoded.data)
            append_whole(stream, encoded.data)
            rows.append(row)
        with storage_errors(part / SAMPLES):
            os.fsync(stream.fileno())
    return rows, digest.hexdigest()


@contextlib.contextmanager
def _open_for_writing(path: Path) -> Iterator[io.FileIO]:
    with contextlib.ExitStack() as stack:
        with storage_errors(path):
            stream = stack.enter_context(path.open("wb", buffering=0))
        yield stream


def _row(job: Job, encoded: Encoded) -> Row:
    utterance = job.utterance
    row: Row = {"id": job.id, "speaker": utterance.speaker, "speed": job.speed, "source": utterance.recording.name}
    if encoded.fault:
        return {**row, "fault": encoded.fault}
    samples, crc32 = len(encoded.data) // 2, zlib.crc32(encoded.data)
    return {**row, "source_rate": encoded.source_rate, "samples": samples, "crc32": crc32}


def _write_index(part: Path, header: Row, corpus: Corpus, rows: Sequence[Row], digest: str) -> None:
    """Write the rows, the index and, last, the header."""
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
    rates = Counter(row["source_rate"] for row in packed)
    atomic_write(part / ROWS, to_json_lines(rows))
    atomic_write(part / INDEX, buffer.getvalue())
    complete = {
        **header,
        "utterances": len(packed),
        "left_out": len(rows) - len(packed),
        "samples": int(length.sum()),
        "source_rates": {str(rate): rates[rate] for rate in sorted(rates)},
        "sha256": {SAMPLES: digest, INDEX: sha256_of(part / INDEX)},
        ROWS_CHECKSUM: sha256_of(part / ROWS),
        "speakers": [[name + speed_suffix(speed), corpus.genders.get(name), persons[name]] for name, speed in speakers],
    }
    atomic_write(part / HEADER, to_json({**complete, CHECKSUM: checksum(complete)}))
