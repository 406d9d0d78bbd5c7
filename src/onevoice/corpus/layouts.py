"""The layouts of corpora on disk: which recordings belong to which speaker.

    librispeech  part/speaker/chapter/*.flac, one part or the folder of all parts; gender from SPEAKERS.TXT
    vctk         wav48_silence_trimmed or wav48/pXXX/*, first microphone; gender from speaker-info.txt
    voxceleb     [dev|test/][wav|aac/]idXXXXX/video/*; gender from vox1_meta.csv or vox2_meta.csv
    aishell      wav/{train,dev,test}/SXXXX/*.wav; gender from resource_aishell/speaker.info
    folder       speaker/…/* at any depth
    tar          *.tar of <speaker>/<utterance>.<extension>: a shard, or a folder of shards
    manifest     a CSV file with a header, or JSONL: `path` and `speaker`, optionally `utterance` and `gender`
    flat         a tar or a folder without speakers, such as noise: one speaker, named after the source

The layout is detected in this order, except `flat`, which must be requested. Paths in a manifest are relative to the
manifest.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from onevoice.addresses import as_address
from onevoice.audio import EXTENSIONS
from onevoice.corpus.recordings import Fault, Listing, Recording, Utterance, require_uncompressed, tar_members
from onevoice.errors import ConfigError, CorpusError
from onevoice.files import to_json_lines

UNREADABLE_EXTENSIONS = (".m4a", ".aac", ".mp4", ".wma", ".amr", ".sph", ".shn", ".webm", ".3gp")
"""Extensions of audio files that libsndfile does not decode."""
GENDERS = {"f": "female", "female": "female", "m": "male", "male": "male"}
MANIFESTS = (".csv", ".jsonl")

NOT_AUDIO = "without an audio extension"
NOT_MATCHED = "not matching the pattern"
SECOND_MICROPHONE = "from the second microphone, with the same sentences"


@dataclass(frozen=True)
class FolderLayout:
    """A layout with one folder per speaker."""

    find_roots: Callable[[Path], list[Path]]
    """Finds the folders that hold the speaker folders; an empty list means another layout."""
    speaker: str = r".+"
    """A regular expression that the name of a speaker folder matches."""
    has_unique_stems: bool = False
    """Utterances are named by their stem, which is unique in the corpus, instead of their path below the speaker."""
    gender_tables: tuple[str, ...] = ()
    """Places of tables with the speakers' genders, relative to the corpus."""
    prefix: str = ""
    """What these tables omit from the names of speakers."""
    ignore: tuple[str, str] | None = None
    """A glob of files to ignore, and the reason."""


def _librispeech_roots(path: Path) -> list[Path]:
    if (path / "SPEAKERS.TXT").is_file():
        return folders(path)
    if (path.parent / "SPEAKERS.TXT").is_file():
        return [path]
    first = next((file.relative_to(path).as_posix() for file in files(path) if file.suffix in EXTENSIONS), "")
    return [path] if re.fullmatch(r"(\d+)/(\d+)/\1[-_]\2[-_].+", first) else []


def _vctk_roots(path: Path) -> list[Path]:
    names = ("wav48_silence_trimmed", "wav48")
    return [path] if path.name in names else [path / name for name in names if (path / name).is_dir()][:1]


def _roots_among(*places: str, speaker: str) -> Callable[[Path], list[Path]]:
    """Return a function that finds which of `places` below the corpus hold folders named like speakers."""

    def find_roots(path: Path) -> list[Path]:
        existing = [path / place for place in places if (path / place).is_dir()]
        return [place for place in existing if any(re.fullmatch(speaker, folder.name) for folder in folders(place))]

    return find_roots


_VOXCELEB = tuple(
    f"{part}{kind}" for part in ("", "dev/", "test/", "vox1/", "vox2/") for kind in (".", "wav", "aac", "mp4")
)
_AISHELL = tuple(
    f"{base}{part}" for base in ("", "wav/", "data_aishell/wav/") for part in ("train", "dev", "test", ".")
)

FOLDER_LAYOUTS = {
    "librispeech": FolderLayout(
        _librispeech_roots, r"\d+", has_unique_stems=True, gender_tables=("SPEAKERS.TXT", "../SPEAKERS.TXT")
    ),
    "vctk": FolderLayout(
        _vctk_roots,
        r"[ps]\d+",
        has_unique_stems=True,
        gender_tables=("speaker-info.txt", "../speaker-info.txt"),
        prefix="p",
        ignore=("*_mic2.*", SECOND_MICROPHONE),
    ),
    "voxceleb": FolderLayout(
        _roots_among(*_VOXCELEB, speaker=r"id\d{5}"),
        r"id\d{5}",
        gender_tables=tuple(f"{up}vox{number}_meta.csv" for up in ("", "../", "../../") for number in (1, 2)),
    ),
    "aishell": FolderLayout(
        _roots_among(*_AISHELL, speaker=r"S\d{4}"),
        r"S\d{4}",
        has_unique_stems=True,
        gender_tables=tuple(f"{up}resource_aishell/speaker.info" for up in ("", "../", "../../")),
        prefix="S",
    ),
    "folder": FolderLayout(lambda path: [path]),
}
LAYOUTS = (*FOLDER_LAYOUTS, "tar", "manifest", "flat")


def list_source(path: Path, layout: str | None = None, pattern: str | None = None) -> tuple[str, Listing]:
    """Return the layout of the corpus at `path` and its contents, sorted by speaker; no audio file is opened.

    `layout` forces one of `LAYOUTS`. `pattern` is a glob that the end of each path must match. Raises `CorpusError`
    if there are no utterances, and `ConfigError` for an unknown layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"{layout}: unknown layout; choose one of {', '.join(LAYOUTS)}")
    address = as_address(path)
    if address is not None and (path.suffix.lower() != ".tar" or layout not in (None, "tar", "flat")):
        raise CorpusError(f"{address}: only .tar shards can be read from an address")
    if address is None and not path.exists():
        raise CorpusError(f"{path}: no such file or folder; name a corpus")
    layout = layout or detect_layout(path)
    if path.is_dir() != (layout in FOLDER_LAYOUTS) and layout != "flat" and not (path.is_dir() and layout == "tar"):
        kinds = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise CorpusError(f"{path}: is {kinds[0]}, but the layout {layout!r} needs {kinds[1]}; omit --layout")
    if layout == "tar" or (layout == "flat" and detect_layout(path) == "tar"):
        listing = _list_tars(path, pattern, flat=layout == "flat")
    elif layout == "flat":
        listing = _list_flat(path, pattern)
    elif layout == "manifest":
        listing = _list_manifest(path, pattern)
    else:
        listing = _list_folder(path, FOLDER_LAYOUTS[layout], pattern)
    if not listing.utterances:
        raise CorpusError(f"{path}: holds no utterances in the layout {layout!r}; {_why_empty(listing)}")
    listing.utterances.sort(key=lambda utterance: (utterance.speaker, utterance.id))
    return layout, listing


def detect_layout(path: Path) -> str:
    """Return the layout of an existing file or folder; raise `CorpusError` for an unknown type of file."""
    if path.is_dir():
        if not folders(path) and _tars(path):
            return "tar"
        return next(name for name, layout in FOLDER_LAYOUTS.items() if layout.find_roots(path))
    require_uncompressed(path)
    if path.suffix.lower() == ".tar":
        return "tar"
    if path.suffix.lower() in MANIFESTS:
        return "manifest"
    raise CorpusError(f"{path}: is not a corpus; name a folder, a .tar, or a manifest in .csv or .jsonl")


def read_genders(path: Path) -> dict[str, str]:
    """Read the gender of each speaker from a CSV or JSONL table with the columns `speaker` and `gender`.

    Rows without a known gender are skipped. Raises `CorpusError` if the table is missing or has no genders.
    """
    genders = {}
    for number, row in _rows(path, "speaker"):
        if isinstance(row, str):
            raise CorpusError(f"{path}, line {number}: {row}; correct it")
        gender = GENDERS.get(row.get("gender", "").lower())
        if gender is not None:
            genders[row["speaker"]] = gender
    if not genders:
        raise CorpusError(f"{path}: has no speaker's gender; add a column gender with F or M")
    return genders


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of `folder` except hidden ones; raise `CorpusError` if it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error


def folders(folder: Path) -> list[Path]:
    """Return the folders in `folder`, sorted and without hidden ones."""
    return sorted(folder / entry.name for entry in entries(folder) if entry.is_dir())


def files(folder: Path, parents: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below `folder`; a link back to one of its `parents` is not followed."""
    place = os.path.realpath(folder)
    if place in parents:
        return
    for entry in entries(folder):
        if entry.is_dir():
            yield from files(folder / entry.name, parents | {place})
        else:
            yield folder / entry.name


def _list_folder(path: Path, layout: FolderLayout, pattern: str | None) -> Listing:
    listing = Listing()
    genders = _genders(path, layout)
    for root in layout.find_roots(path):
        for folder in folders(root):
            if not re.fullmatch(layout.speaker, folder.name):
                continue
            for file in sorted(files(folder)):
                name = Path(os.path.relpath(file, path.parent)).as_posix()
                if layout.ignore and file.match(layout.ignore[0]):
                    listing.ignore(name, layout.ignore[1])
                    continue
                inner = file.stem if layout.has_unique_stems else file.relative_to(folder).with_suffix("").as_posix()
                _add(listing, Recording(file, name), folder.name, inner, genders.get(folder.name), pattern)
    return listing


def _list_flat(path: Path, pattern: str | None) -> Listing:
    listing = Listing()
    for file in sorted(files(path)):
        inner = file.relative_to(path)
        recording = Recording(file, f"{path.name}/{inner.as_posix()}")
        _add(listing, recording, path.name, inner.with_suffix("").as_posix(), None, pattern)
    return listing


def _list_tars(path: Path, pattern: str | None, *, flat: bool) -> Listing:
    listing = Listing()
    for shard in _tars(path) if path.is_dir() else [path]:
        for member in tar_members(shard):
            if isinstance(member, Fault):
                listing.faults.append(member)
                continue
            inner = PurePosixPath(member.name.removeprefix(f"{shard.name}:"))
            parts = [part for part in inner.with_suffix("").parts if part != "."]
            parts = [shard.stem, *parts] if flat else parts
            if any(part.startswith(".") for part in parts):
                continue
            if len(parts) < 2 and inner.suffix.lower() in EXTENSIONS:
                listing.faults.append(Fault(member.name, "has no speaker; members must be <speaker>/<utterance>"))
                continue
            _add(listing, member, parts[0], "/".join(parts[1:]), None, pattern)
    return listing


def _list_manifest(path: Path, pattern: str | None) -> Listing:
    listing = Listing()
    for number, row in _rows(path, "path", "speaker"):
        if isinstance(row, str):
            listing.faults.append(Fault(f"{path.name}, line {number}", row))
            continue
        file = path.parent / row["path"]
        inner = row.get("utterance") or file.stem
        gender = GENDERS.get(row.get("gender", "").lower())
        _add(listing, Recording(file, row["path"]), row["speaker"], inner, gender, pattern)
    return listing


def _add(
    listing: Listing, recording: Recording, speaker: str, inner: str, gender: str | None, pattern: str | None
) -> None:
    """Add a file to the listing: as an utterance, a fault or an ignored file, by its name."""
    path = PurePosixPath(recording.name.rpartition(":")[2])
    extension = path.suffix.lower()
    if extension in UNREADABLE_EXTENSIONS:
        reason = f"{extension} cannot be decoded; convert it to .wav or .flac with ffmpeg"
        listing.faults.append(Fault(recording.name, reason))
    elif extension not in EXTENSIONS:
        listing.ignore(recording.name, NOT_AUDIO)
    elif pattern is not None and not path.match(pattern):
        listing.ignore(recording.name, NOT_MATCHED)
    else:
        listing.utterances.append(Utterance(f"{speaker}/{inner}", speaker, recording, gender))


def _genders(path: Path, layout: FolderLayout) -> dict[str, str]:
    """Return the gender of each speaker from the layout's tables, as far as they exist.

    Each table has a line per speaker: first the name, and in one of the other columns the gender.
    """
    genders = {}
    for table in (path / place for place in layout.gender_tables):
        if not table.is_file():
            continue
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            name, *columns = [word for word in re.split(r"[\s|,]+", line) if word] or [""]
            found = [GENDERS[word.lower()] for word in columns if word.lower() in GENDERS]
            if found:
                genders[layout.prefix + name if name.isdecimal() else name] = found[0]
    return genders


def _rows(path: Path, *required: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yield the line number of each row of a CSV or JSONL table, and its columns or what is wrong with it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = _json_rows(stream) if path.suffix.lower() == ".jsonl" else _csv_rows(path, stream, required)
            for number, row in rows:
                missing = [] if isinstance(row, str) else [key for key in required if key not in row]
                yield number, f"has no {' and no '.join(missing)}" if missing else row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path}: cannot be read as a table ({error}); give CSV or JSONL in UTF-8") from error


def _csv_rows(
    path: Path, stream: Iterator[str], required: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str] | str]]:
    reader = csv.DictReader(stream)
    for key in required:
        if key not in (reader.fieldnames or ()):
            raise CorpusError(f"{path}: has no column {key!r}; its first line must name the columns")
    for row in reader:
        yield reader.line_num, {key: value.strip() for key, value in row.items() if key and value and value.strip()}


def _json_rows(stream: Iterator[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if "\\ud" in line.lower():
                    to_json_lines([row])  # half of a pair of surrogates is no text
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON ({error})"
                continue
            is_row = isinstance(row, dict)
            yield (
                number,
                {key: str(row[key]) for key in row if row[key] not in (None, "")} if is_row else "is not a JSON object",
            )


def _tars(folder: Path) -> list[Path]:
    return sorted(folder / entry.name for entry in entries(folder) if entry.name.lower().endswith(".tar"))


def _why_empty(listing: Listing) -> str:
    if listing.faults:
        return f"{len(listing.faults)} files cannot be used, for example {listing.faults[0]}"
    found = [f"{count} files {reason} ({listing.examples[reason]}, …)" for reason, count in listing.ignored.items()]
    return " and ".join(found) or f"put one folder per speaker there, with {', '.join(EXTENSIONS)}"
