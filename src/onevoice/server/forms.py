"""The forms that the API takes, and how its description shows them."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onevoice.errors import ConfigError
from onevoice.extraction.request import Channel, parse_absent, parse_channel
from onevoice.server.problems import ProblemError, invalid, of_fields
from onevoice.server.schemas import Id
from onevoice.server.uploads import Form

Seconds = Annotated[float, Field(ge=0, le=1e6)]
File = dict[str, str]
FILE: File = {"type": "string", "format": "binary"}
Parsed = TypeVar("Parsed", bound=BaseModel)


class _Fields(BaseModel):
    """The text fields of a form."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RecordingFields(_Fields):
    """An upload has only its file."""


class VoiceFields(_Fields):
    """How a voice is saved: from `enrollment` files, or the voice of an extraction."""

    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"\S")]
    """What people call it."""
    extraction: Id | None = None
    """Save the voice that this extraction used, instead of enrollments."""


class ExtractionFields(_Fields):
    """What to extract from what.

    The mixture is a file, or `recording`. The voice is exactly one of: `enrollment` files of one person, `voice`,
    `person`, or `begin` and `end`.
    """

    recording: Id | None = None
    """An upload to use as the mixture."""
    voice: Id | None = None
    """A saved voice."""
    begin: Seconds | None = None
    """Where a stretch of the mixture begins in which the person speaks alone, in seconds."""
    end: Seconds | None = None
    """Where that stretch ends."""
    person: Annotated[int, Field(ge=1, le=1000)] | None = None
    """A person who was found in the mixture (`GET /v1/recordings/{id}/voices`)."""
    channel: str = Field("mean", examples=["mean", "each", "1"])
    """Which channel of the mixture to use: 1, 2, …, their mean, or each by itself."""
    absent: str = Field("keep", examples=["keep", "mute", "20"])
    """What to do where the voice is not heard: keep, mute, or turn down by a number of dB."""
    report: bool = False
    """Also make an HTML page about the extraction."""

    def parsed_channel(self) -> Channel:
        """Return the channel. Raises `ProblemError`."""
        try:
            return parse_channel(self.channel)
        except ConfigError as error:
            raise invalid("channel", str(error).removeprefix("channel: ")) from error

    def absent_db(self) -> float:
        """Return how far to turn down. Raises `ProblemError`."""
        try:
            return parse_absent(self.absent)
        except ConfigError as error:
            raise invalid("absent", str(error).removeprefix("absent: ")) from error


def parse_fields(form: Form, fields: type[Parsed]) -> Parsed:
    """Return the text fields of a form; empty ones count as missing. Raises `ProblemError`."""
    try:
        return fields.model_validate({name: text for name, text in form.texts.items() if text != ""})
    except ValidationError as error:
        raise ProblemError.of(of_fields(error.errors())) from error


def body(fields: type[BaseModel], required: tuple[str, ...] = (), **files: Any) -> dict[str, Any]:
    """Return the part of the OpenAPI description that shows a form: text fields and files."""
    schema = fields.model_json_schema()
    schema["properties"] = {**schema.get("properties", {}), **files}
    schema["required"] = [*schema.get("required", []), *required]
    if not schema["required"]:
        del schema["required"]
    media_types = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": media_types}}


def described(text: str, *, many: bool = False) -> dict[str, Any]:
    """Return the description of a file field."""
    return {"type": "array", "items": FILE, "description": text} if many else {**FILE, "description": text}
