"""The packed corpus: all utterances in one memory-mapped file, from which any crop is read in microseconds.

A pack is a folder:

    samples.int16      all utterances in a row, mono, 16-bit little-endian, sorted by speaker
    index.npy          int64, three rows: first sample, number of samples, and speaker of each utterance
    utterances.jsonl   one row per recording; for one that was left out, the reason
    pack.json          sample rate, speakers, counts, SHA-256 of the other files and of all that is in this one

Full scale 1.0 is 32768. The mean of each utterance is removed, unless the pack was written with `keep_mean`.
`packing` writes packs.
"""

import functools
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, SupportsIndex

import numpy as np
from jaxtyping import Float32, Int16, Int64
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as section

from onevoice.errors import CorpusError
from onevoice.files import Row, checksum, parse_row

FORMAT = 1
HEADER = "pack.json"
SAMPLES = "samples.int16"
INDEX = "index.npy"
ROWS = "utterances.jsonl"
CHECKSUM = "sha256_of_this"
ROWS_CHECKSUM = "sha256_of_rows"
BLOCK_BYTES = 1 << 24


@section(config=ConfigDict(strict=True, extra="ignore"))
class Header:
    """What `pack.json` must hold; there may be more."""

    sample_rate: PositiveInt
    utterances: PositiveInt
    samples: PositiveInt
    left_out: NonNegativeInt
    source_rates: dict[Annotated[str, Field(pattern="^[0-9]+$")], PositiveInt]
    sha256: Annotated[dict[Literal["samples.int16", "index.npy"], str], Field(min_length=2)]
    speakers: list[tuple[str, str | None, NonNegativeInt]]


@dataclass(frozen=True, eq=False)
class PackedCorpus:
    """A pack that is open for reading.

    Utterances and speakers are numbered. The utterances of speaker `s` are `speaker_start[s]` up to
    `speaker_start[s + 1]`, so finding them takes two lookups. A speed-perturbed copy of a speaker is another speaker,
    but the same person: `person_of_speaker` numbers the persons, in order, each with the original speed first.
    Pickling keeps only the path, and opening reads no samples.
    """

    path: Path
    sample_rate: int
    speakers: tuple[str, ...]
    genders: tuple[str | None, ...]
    samples: Int16[np.ndarray, " total"] = field(repr=False)
    offset: Int64[np.ndarray, " utterances"] = field(repr=False)
    length: Int64[np.ndarray, " utterances"] = field(repr=False)
    speaker: Int64[np.ndarray, " utterances"] = field(repr=False)
    speaker_start: Int64[np.ndarray, " speakers_and_end"] = field(repr=False)
    person_of_speaker: Int64[np.ndarray, " speakers"] = field(repr=False)
    header: Row = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "PackedCorpus":
        """Open the pack in the folder `path`; raise `CorpusError` if it is not a complete pack."""
        path = Path(path)
        header = read_header(path)
        try:
            if sha256_of(path / INDEX) != header["sha256"][INDEX]:
                raise ValueError(f"{INDEX} differs from its checksum")
            offset, length, speaker = np.load(path / INDEX, mmap_mode="r", allow_pickle=False)
            size = (path / SAMPLES).stat().st_size
        except (OSError, ValueError) as error:
            raise CorpusError(f"{path}: the pack is damaged ({error}); copy or pack it again") from error
        total = header["samples"]
        if size != 2 * total or len(offset) != header["utterances"]:
            raise CorpusError(f"{path / SAMPLES}: has {size} bytes instead of {2 * total}; copy or pack it again")
        if len(header["speakers"]) != speaker[-1] + 1:
            raise CorpusError(f"{path / HEADER}: does not name all speakers; copy or pack it again")
        samples = np.memmap(path / SAMPLES, dtype="<i2", mode="r", shape=(total,))
        names, genders, persons = zip(*header["speakers"], strict=True)
        return cls(
            path=path,
            sample_rate=header["sample_rate"],
            speakers=names,
            genders=genders,
            samples=np.asarray(samples),
            offset=np.asarray(offset),
            length=np.asarray(length),
            speaker=np.asarray(speaker),
            speaker_start=np.searchsorted(speaker, np.arange(len(names) + 1)).astype(np.int64),
            person_of_speaker=np.array(persons, dtype=np.int64),
            header=header,
        )

    def __len__(self) -> int:
        return len(self.offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedCorpus.open, (self.path,)

    @property
    def seconds(self) -> float:
        """The duration of all utterances in total."""
        return len(self.samples) / self.sample_rate

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids `speaker/utterance`, read on first use."""
        return tuple(row["id"] for row in self.rows() if "fault" not in row)

    def rows(self) -> Iterator[Row]:
        """Yield a row per recording: `id`, `speaker`, `speed`, `source`, and its sample rate or its `fault`."""
        with (self.path / ROWS).open("rb") as stream:
            for number, line in enumerate(stream, 1):
                row = parse_row(line)
                if row is None or "id" not in row:
                    raise CorpusError(f"{self.path / ROWS}: line {number} is damaged; copy or pack it again")
                yield row

    def utterances_of(self, speaker: SupportsIndex) -> range:
        """Return the numbers of a speaker's utterances."""
        return range(int(self.speaker_start[speaker]), int(self.speaker_start[speaker.__index__() + 1]))

    def crop(
        self, utterance: SupportsIndex, start: SupportsIndex, length: SupportsIndex
    ) -> Float32[np.ndarray, " {length}"]:
        """Return `length` samples from `start` on in a new float32 array; raise `ValueError` beyond the ends."""
        first, count = start.__index__(), length.__index__()
        if first < 0 or count < 0 or first + count > self.length[utterance]:
            raise ValueError(
                f"samples {first} to {first + count} of utterance {utterance}, which has {self.length[utterance]}"
            )
        begin = int(self.offset[utterance]) + first
        crop: Float32[np.ndarray, " samples"] = self.samples[begin : begin + count].astype(np.float32)
        crop *= np.float32(2**-15)
        return crop

    def read(self, utterance: SupportsIndex) -> Float32[np.ndarray, " samples"]:
        """Return a whole utterance as float32."""
        return self.crop(utterance, 0, int(self.length[utterance]))

    def summary(self) -> str:
        """Return one line on the contents of the pack, what was converted and what was left out."""
        rates, persons = self.header["source_rates"], int(self.person_of_speaker[-1]) + 1
        copies = len(self.speakers) - persons
        and_copies = f" and {copies} speed-perturbed copies of them" if copies else ""
        converted = sum(count for rate, count in rates.items() if int(rate) != self.sample_rate)
        return (
            f"{self.path}: {persons} speakers{and_copies}, {len(self)} utterances, {self.seconds / 3600:.2f} h "
            f"at {self.sample_rate} Hz ({converted} converted from other rates); {self.header['left_out']} left out"
        )

    def verify(self) -> None:
        """Read everything and compare the checksums; raise `CorpusError` that names the first damaged utterance."""
        for name in (SAMPLES, INDEX):
            if sha256_of(self.path / name) != self.header["sha256"][name]:
                raise CorpusError(f"{self.path / name}: is damaged ({self._first_damaged()}); copy or pack it again")
        rows = [row for row in self.rows() if "fault" not in row]
        names = [str(row["id"]).partition("/")[0] for row in rows]
        if names != [self.speakers[number] for number in self.speaker]:
            raise CorpusError(f"{self.path / ROWS}: names other speakers than {HEADER}; copy or pack it again")
        if [row.get("samples") for row in rows] != self.length.tolist():
            raise CorpusError(f"{self.path / ROWS}: has other lengths than {INDEX}; copy or pack it again")
        if self.header.get(ROWS_CHECKSUM) not in (None, sha256_of(self.path / ROWS)):
            raise CorpusError(f"{self.path / ROWS}: differs from its checksum; copy or pack it again")

    def _first_damaged(self) -> str:
        """Say which utterance is the first whose samples differ from those packed."""
        rows = (row for row in self.rows() if "fault" not in row)
        for row, begin, length in zip(rows, self.offset, self.length, strict=False):
            if zlib.crc32(self.samples[begin : begin + length].tobytes()) != row.get("crc32"):
                return f"first in {row['id']}"
        return "no utterance is"


def read_header(path: Path) -> Row:
    """Return the content of `pack.json`; raise `CorpusError` if it is missing, incomplete or of an unknown format."""
    file = path / HEADER
    try:
        header: Row = json.loads(file.read_text(encoding="utf-8"))
        is_known = header["format"] == FORMAT
        _ = header["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorpusError(f"{path}: is not a complete packed corpus; write one with `onevoice corpus pack`") from error
    if not is_known:
        raise CorpusError(f"{file}: has the format {header['format']!r}, not {FORMAT}; pack the corpus again")
    try:
        TypeAdapter(Header).validate_json(json.dumps(header))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise CorpusError(f"{file}: is damaged (at {place}); copy or pack it again") from error
    expected = header.pop(CHECKSUM, None)  # older packs have none
    if expected is not None and expected != checksum(header):
        raise CorpusError(f"{file}: is damaged (it differs from its checksum); copy or pack it again")
    return header


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
