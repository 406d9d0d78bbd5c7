"""How corpora lie on disk: which recordings belong to whom, for each layout that is known.

    librispeech  part/speaker/chapter/*.flac, one part or the folder of all parts; gender from SPEAKERS.TXT
    vctk         wav48_silence_trimmed or wav48/pXXX/*, first microphone; gender from speaker-info.txt
    voxceleb     [dev|test/][wav|aac/]idXXXXX/video/*; gender from vox1_meta.csv or vox2_meta.csv
    aishell      wav/{train,dev,test}/SXXXX/*.wav; gender from resource_aishell/speaker.info
    folder       speaker/…/* at any depth
    tar          *.tar of <speaker>/<utterance>.<ending>: a shard, or a folder of shards
    manifest     a CSV file with a header, or JSONL: `path` and `speaker`, optionally `utterance` and `gender`
    flat         a tar or a folder without speakers, as of noises: all is of one, named like the source

The layout is found out by what lies there, in this order, and `flat` has to be asked for. Paths in a manifest are
relative to the manifest.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from onevoice.audio import EXTENSIONS
from onevoice.corpus.recordings import Fault, Listing, Recording, Utterance, require_uncompressed, tar_members
from onevoice.errors import ConfigError, CorpusError

UNREADABLE = (".m4a", ".aac", ".mp4", ".wma", ".amr", ".sph", ".shn", ".webm", ".3gp")
"""Endings of sound that libsndfile does not decode."""
GENDERS = {"f": "female", "female": "female", "m": "male", "male": "male"}
MANIFESTS = (".csv", ".jsonl")

NO_SOUND = "without a sound ending"
NOT_MATCHED = "not matching the pattern"
SECOND_MICROPHONE = "of the second microphone, the same sentences again"


@dataclass(frozen=True)
class FolderLayout:
    """A layout of one folder per speaker.

    `roots` finds the folders that hold speakers (none: not this layout); a folder is a speaker when its name fits
    `speaker`. Files are named by their stem where that is unique in the corpus, else by their path below the
    speaker. `info` are the places of the table of speakers, seen from the corpus, and `prefix` is what the table
    leaves off the names. Files that fit `skip` are passed over for the reason given with it.
    """

    roots: Callable[[Path], list[Path]]
    speaker: str = r".+"
    stem_names: bool = False
    info: tuple[str, ...] = ()
    prefix: str = ""
    skip: tuple[str, str] | None = None


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
    """Return a finder of those of `places` below the corpus that hold folders named like speakers."""

    def roots(path: Path) -> list[Path]:
        there = [path / place for place in places if (path / place).is_dir()]
        return [place for place in there if any(re.fullmatch(speaker, folder.name) for folder in folders(place))]

    return roots


_VOXCELEB = tuple(
    f"{part}{kind}" for part in ("", "dev/", "test/", "vox1/", "vox2/") for kind in (".", "wav", "aac", "mp4")
)
_AISHELL = tuple(
    f"{base}{part}" for base in ("", "wav/", "data_aishell/wav/") for part in ("train", "dev", "test", ".")
)

FOLDER_LAYOUTS = {
    "librispeech": FolderLayout(_librispeech_roots, r"\d+", stem_names=True, info=("SPEAKERS.TXT", "../SPEAKERS.TXT")),
    "vctk": FolderLayout(
        _vctk_roots,
        r"[ps]\d+",
        stem_names=True,
        info=("speaker-info.txt", "../speaker-info.txt"),
        prefix="p",
        skip=("*_mic2.*", SECOND_MICROPHONE),
    ),
    "voxceleb": FolderLayout(
        _roots_among(*_VOXCELEB, speaker=r"id\d{5}"),
        r"id\d{5}",
        info=tuple(f"{up}vox{number}_meta.csv" for up in ("", "../", "../../") for number in (1, 2)),
    ),
    "aishell": FolderLayout(
        _roots_among(*_AISHELL, speaker=r"S\d{4}"),
        r"S\d{4}",
        stem_names=True,
        info=tuple(f"{up}resource_aishell/speaker.info" for up in ("", "../", "../../")),
        prefix="S",
    ),
    "folder": FolderLayout(lambda path: [path]),
}
LAYOUTS = (*FOLDER_LAYOUTS, "tar", "manifest", "flat")


def list_source(path: Path, layout: str | None = None, pattern: str | None = None) -> tuple[str, Listing]:
    """Return the layout of what lies at `path` and what it holds, sorted by speaker; no sound file is opened.

    `layout` forces one of `LAYOUTS`; with `pattern` the end of a path must match that glob. Raises `CorpusError`
    when there is nothing to list, `ConfigError` for an unknown layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"{layout}: unknown layout; choose one of {', '.join(LAYOUTS)}")
    if not path.exists():
        raise CorpusError(f"{path}: no such file or folder; name a corpus")
    layout = layout or detect(path)
    if path.is_dir() != (layout in FOLDER_LAYOUTS) and layout != "flat" and not (path.is_dir() and layout == "tar"):
        kind = "a folder" if path.is_dir() else "a file"
        raise CorpusError(f"{path}: is {kind}, which the layout {layout!r} cannot be; leave --layout off")
    if layout == "tar" or (layout == "flat" and detect(path) == "tar"):
        listing = _list_tars(path, pattern, flat=layout == "flat")
    elif layout == "flat":
        listing = _list_flat(path, pattern)
    elif layout == "manifest":
        listing = _list_manifest(path, pattern)
    else:
        listing = _list_folder(path, FOLDER_LAYOUTS[layout], pattern)
    if not listing.utterances:
        raise CorpusError(f"{path}: holds no utterances in the layout {layout!r}; {_what_is_there(listing)}")
    listing.utterances.sort(key=lambda utterance: (utterance.speaker, utterance.id))
    return layout, listing


def detect(path: Path) -> str:
    """Return the layout of an existing file or folder; raise `CorpusError` for a file of an unknown kind."""
    if path.is_dir():
        if not folders(path) and _tars(path):
            return "tar"
        return next(name for name, layout in FOLDER_LAYOUTS.items() if layout.roots(path))
    require_uncompressed(path)
    if path.suffix.lower() == ".tar":
        return "tar"
    if path.suffix.lower() in MANIFESTS:
        return "manifest"
    raise CorpusError(f"{path}: is not a corpus; name a folder, a .tar, or a manifest in .csv or .jsonl")


def speaker_table(path: Path) -> dict[str, str]:
    """Return the gender by speaker of a CSV or JSONL table with the columns `speaker` and `gender`.

    Rows without a known gender are left out. Raises `CorpusError` for a table that is missing or tells nothing.
    """
    genders = {}
    for number, row in _rows(path, "speaker"):
        if isinstance(row, str):
            raise CorpusError(f"{path}, line {number}: {row}; correct it")
        gender = GENDERS.get(row.get("gender", "").lower())
        if gender is not None:
            genders[row["speaker"]] = gender
    if not genders:
        raise CorpusError(f"{path}: tells no speaker's gender; it needs a column gender with F or M")
    return genders


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in `folder`, without names that begin with a dot; raise `CorpusError` if not allowed to."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error


def folders(folder: Path) -> list[Path]:
    """Return the folders in `folder`, sorted."""
    return sorted(folder / entry.name for entry in entries(folder) if entry.is_dir())


def files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files beneath `folder`; a link back to a folder `above` is not followed again."""
    place = os.path.realpath(folder)
    if place in above:
        return
    for entry in entries(folder):
        if entry.is_dir():
            yield from files(folder / entry.name, above | {place})
        else:
            yield folder / entry.name


def _list_folder(path: Path, layout: FolderLayout, pattern: str | None) -> Listing:
    listing = Listing()
    genders = _genders(path, layout)
    for root in layout.roots(path):
        for folder in folders(root):
            if not re.fullmatch(layout.speaker, folder.name):
                continue
            for file in sorted(files(folder)):
                name = Path(os.path.relpath(file, path.parent)).as_posix()
                if layout.skip and file.match(layout.skip[0]):
                    listing.pass_over(name, layout.skip[1])
                    continue
                inner = file.stem if layout.stem_names else file.relative_to(folder).with_suffix("").as_posix()
                _add(listing, Recording(file, name), folder.name, inner, genders.get(folder.name), pattern)
    return listing


def _list_flat(path: Path, pattern: str | None) -> Listing:
    listing = Listing()
    for file in sorted(files(path)):
        inner = file.relative_to(path)
        _add(
            listing,
            Recording(file, f"{path.name}/{inner.as_posix()}"),
            path.name,
            inner.with_suffix("").as_posix(),
            None,
            pattern,
        )
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
    listing: Listing, source: Recording, speaker: str, inner: str, gender: str | None, pattern: str | None
) -> None:
    """Put a file into the listing, as what its name says it is."""
    path = PurePosixPath(source.name.rpartition(":")[2])
    ending = path.suffix.lower()
    if ending in UNREADABLE:
        listing.faults.append(Fault(source.name, f"{ending} cannot be decoded; convert it to .wav or .flac by ffmpeg"))
    elif ending not in EXTENSIONS:
        listing.pass_over(source.name, NO_SOUND)
    elif pattern is not None and not path.match(pattern):
        listing.pass_over(source.name, NOT_MATCHED)
    else:
        listing.utterances.append(Utterance(f"{speaker}/{inner}", speaker, source, gender))


def _genders(path: Path, layout: FolderLayout) -> dict[str, str]:
    """Return the gender by speaker from those of the layout's tables that are there.

    All of them have a line per speaker: the name first, and among the other columns one that is a gender.
    """
    genders = {}
    for table in (path / place for place in layout.info):
        if not table.is_file():
            continue
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            name, *columns = [word for word in re.split(r"[\s|,]+", line) if word] or [""]
            found = [GENDERS[word.lower()] for word in columns if word.lower() in GENDERS]
            if found:
                genders[layout.prefix + name if name.isdecimal() else name] = found[0]
    return genders


def _rows(path: Path, *required: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yield the line number of each row of a CSV or JSONL table with its columns, or with what is wrong with it."""
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
            except ValueError as error:
                yield number, f"is not JSON ({error})"
                continue
            is_row = isinstance(row, dict)
            yield number, {key: str(row[key]) for key in row if row[key] not in (None, "")} if is_row else "no object"


def _tars(folder: Path) -> list[Path]:
    return sorted(folder / entry.name for entry in entries(folder) if entry.name.lower().endswith(".tar"))


def _what_is_there(listing: Listing) -> str:
    if listing.faults:
        return f"{len(listing.faults)} files were refused, such as {listing.faults[0]}"
    there = [f"{count} files {why} ({listing.examples[why]}, …)" for why, count in listing.passed_over.items()]
    return " and ".join(there) or f"put one folder per speaker there; known endings are {', '.join(EXTENSIONS)}"
