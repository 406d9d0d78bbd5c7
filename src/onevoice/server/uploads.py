"""Forms with recordings: written to disk while they arrive, and cut off when they exceed a limit.

A form is multipart/form-data (RFC 7578), or URL-encoded if it has no files. Its files get names of ours; the client's
names are only shown. The limit on bytes holds while they arrive. Once the header of a file is there, it must not
announce more channels or seconds than allowed. After the last byte the file is decoded in blocks, without keeping the
sound, and decoding stops at the limits: a few bytes that decode to hours of silence cost no more than an honest file.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl

from anyio import to_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from onevoice.audio import open_audio
from onevoice.errors import AudioError
from onevoice.files import storage_errors
from onevoice.server.problems import ProblemError, invalid
from onevoice.server.settings import Limits
from onevoice.streams import open_source

HEADER_BYTES = 2**18
"""After these bytes of a file, its header is looked at."""
MAX_TEXT_BYTES, MAX_PARTS = 10_000, 50
MAX_NAME_LENGTH = 120


@dataclass(frozen=True)
class Upload:
    """A file of a form."""

    field: str
    name: str
    """What the client calls it; only for people."""
    path: Path


@dataclass
class Form:
    """What a form holds."""

    texts: dict[str, str] = field(default_factory=dict)
    files: list[Upload] = field(default_factory=list)

    def named(self, name: str) -> list[Upload]:
        """Return the files of a field."""
        return [each for each in self.files if each.field == name]

    @property
    def names(self) -> dict[Path, str]:
        """What the client calls the files."""
        return {each.path: each.name for each in self.files}


@dataclass(frozen=True)
class Facts:
    """What decoding a recording tells."""

    sample_rate: int
    channels: int
    samples: int
    """Per channel."""

    @property
    def seconds(self) -> float:
        """The length."""
        return self.samples / self.sample_rate


async def receive_form(request: Request, folder: Path, limits: Limits, files: Collection[str]) -> Form:
    """Read the form of a request; the fields in `files` are written to `folder`.

    Raises `ProblemError` for another content type, a broken or unknown part, and more than the limits allow. If the
    client leaves in the middle, this raises `ClientDisconnect`; removing the folder is up to the caller.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"application/x-www-form-urlencoded":
        return Form(await _read_texts(request))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ProblemError(
            "media-type", "Unsupported content type", 415, "send the request as multipart/form-data, with a boundary"
        )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.max_bytes + MAX_PARTS * MAX_TEXT_BYTES:
        raise too_large(f"an upload may have {limits.max_bytes} bytes, not {announced}")
    receiver = _Receiver(folder, limits, files)
    parser = MultipartParser(options[b"boundary"], receiver.callbacks())  # type: ignore[arg-type]
    try:
        async for chunk in request.stream():
            if chunk:
                await to_thread.run_sync(parser.write, chunk)
        if not receiver.is_complete:
            raise ProblemError("truncated", "The request is incomplete", 400, "the form ends before its last boundary")
    except FormParserError as error:
        raise ProblemError("form", "The form is broken", 400, f"the form cannot be read ({error})") from error
    finally:
        receiver.close()
    return receiver.form


async def _read_texts(request: Request) -> dict[str, str]:
    """Return the fields of a form without files."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_TEXT_BYTES:
            raise too_large(f"a form without files may have {MAX_TEXT_BYTES} bytes")
    pairs = parse_qsl(content.decode(errors="replace"), keep_blank_values=True, max_num_fields=MAX_PARTS)
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise invalid(twice[0], "appears twice")
    return dict(pairs)


def too_large(detail: str) -> ProblemError:
    """Return the problem of an upload that exceeds a limit."""
    return ProblemError("too-large", "The upload exceeds a limit of this server", 413, detail)


def measure(upload: Upload, limits: Limits) -> Facts:
    """Decode a recording to its end, or to a limit. Raises `AudioError` and `ProblemError`."""
    samples = 0
    with open_source(upload.path) as source:
        _require_limits(upload.name, limits, source.channels, (source.samples or 0) / source.sample_rate)
        for block in source.blocks():
            samples += len(block)
            _require_limits(upload.name, limits, source.channels, samples / source.sample_rate)
        if not samples:
            raise AudioError(f"{upload.path}: holds no samples")
        return Facts(source.sample_rate, source.channels, samples)


def display_name(name: str) -> str:
    """Return a name as it can be shown: its last part, without control characters, and not too long."""
    base = re.split(r"[/\\]", name)[-1]
    shown = "".join(sign for sign in base if unicodedata.category(sign)[0] != "C").strip()
    return shown if len(shown) <= MAX_NAME_LENGTH else f"…{shown[1 - MAX_NAME_LENGTH :]}"


def _require_limits(name: str, limits: Limits, channels: int, seconds: float) -> None:
    if channels > limits.max_channels:
        raise too_large(f"{name}: has {channels} channels; a recording may have {limits.max_channels}")
    if seconds > limits.max_seconds:
        raise too_large(f"{name}: is longer than {limits.max_seconds:g} s; cut it into pieces")


class _Receiver:
    """Takes the parts of a form from the parser as they arrive."""

    def __init__(self, folder: Path, limits: Limits, files: Collection[str]) -> None:
        self.form = Form()
        self.is_complete = False
        self._folder, self._limits, self._file_fields = folder, limits, files
        self._bytes = self._parts = 0
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._field = ""
        self._text = bytearray()
        self._upload: tuple[Upload, BinaryIO] | None = None
        self._is_header_due = False

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """Return what the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_end": self._complete,
        }

    def close(self) -> None:
        """Close the file of an unfinished part."""
        if self._upload is not None:
            self._upload[1].close()

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise too_large(f"a form may have {MAX_PARTS} parts")
        self._headers, self._text = {}, bytearray()
        self._header = (bytearray(), bytearray())

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._field = options.get(b"name", b"").decode(errors="replace")
        filename = options.get(b"filename")
        if self._field not in self._file_fields:
            if filename is not None:
                raise invalid(self._field, f"is no field for a file; use {' or '.join(self._file_fields)}")
            return
        shown = display_name((filename or b"").decode(errors="replace")) or self._field
        path = self._folder / f"upload-{len(self.form.files) + 1}"
        with storage_errors(path):
            self._upload = Upload(self._field, shown, path), path.open("wb")
        self._is_header_due = True

    def _take(self, data: bytes, start: int, end: int) -> None:
        self._bytes += end - start
        if self._upload is None:
            self._text += data[start:end]
            if len(self._text) > MAX_TEXT_BYTES:
                raise invalid(self._field, f"is longer than {MAX_TEXT_BYTES} bytes")
            return
        if self._bytes > self._limits.max_bytes:
            raise too_large(f"an upload may have {self._limits.max_bytes} bytes")
        upload, stream = self._upload
        with storage_errors(upload.path):
            stream.write(data[start:end])
            if self._is_header_due and stream.tell() >= HEADER_BYTES:
                self._is_header_due = False
                stream.flush()
                _look_at_header(upload, self._limits)

    def _end(self) -> None:
        if self._upload is None:
            if self._field in self.form.texts:
                raise invalid(self._field, "appears twice")
            self.form.texts[self._field] = self._text.decode(errors="replace")
            return
        upload, stream = self._upload
        with storage_errors(upload.path):
            stream.close()
        self._upload = None
        self.form.files.append(upload)

    def _complete(self) -> None:
        self.is_complete = True


def _look_at_header(upload: Upload, limits: Limits) -> None:
    """Refuse a file whose header announces too much; headers that do not open before the last byte say nothing yet."""
    try:
        with open_audio(upload.path, upload.name) as file:
            channels, seconds = file.channels, file.frames / file.samplerate
    except AudioError:
        return
    _require_limits(upload.name, limits, channels, seconds)
