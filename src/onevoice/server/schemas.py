"""The JSON of the API."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from onevoice.server.problems import Problem

Id = Annotated[str, Field(pattern="^[0-9a-f]{32}$", examples=["0123456789abcdef0123456789abcdef"])]
Stretch = tuple[float, float]
"""Begin and end in seconds."""


class Body(BaseModel):
    """A JSON object, whose fields are described by their docstrings."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Recording(Body):
    """An upload."""

    id: Id
    name: str
    seconds: float
    sample_rate: int
    channels: int
    expires: datetime


class Picture(Body):
    """What a recording looks like."""

    low: list[float]
    """The lowest sample of each column, in shares of the largest peak of all pictures that belong together."""
    high: list[float]
    spectrogram: str
    """An image as a data URI: time to the right, 0 Hz to half the sample rate upward."""


class Overview(Body):
    """A recording, or the sounds of an extraction, at a glance."""

    seconds: float
    sample_rate: int
    pictures: dict[str, Picture]
    presence_db: list[float] | None = None
    """Level of the voice against the mixture over time, at most 1,000 values; null: unknown."""


class Person(Body):
    """Somebody who was found in a recording."""

    number: int
    seconds: float
    turns: list[Stretch]
    solo: Stretch
    """The stretch in which this voice is heard best."""


class CheckUp(Body):
    """What is known about the recordings of a voice."""

    seconds: float
    speech_seconds: float
    level_db: float
    clipped_share: float
    snr_db: float | None
    people: int
    text: str
    warnings: list[str]


class SavedVoice(Body):
    """A voice that is kept until it is deleted."""

    id: Id
    name: str
    created: datetime
    check_up: CheckUp | None
    fits: bool
    """Whether the weights of this server made it; others cannot use it."""
    fits_live: bool
    """Whether live streams can use it too: it was saved while the live network was there."""


class Presence(Body):
    """Where the voice is heard."""

    is_present: bool
    score_db: float
    threshold_db: float
    share: float
    """Of the recording, 0 to 1."""
    stretches: list[Stretch]
    text: str


class Result(Body):
    """What became of an extraction."""

    seconds: float
    sample_rate: int
    channels: int
    elapsed_seconds: float
    notes: list[str]
    """What one should know about the result."""
    levels_db: dict[str, float]
    """RMS of mixture, voice and residual in dB relative to full scale."""
    presence: Presence | None
    """Null: these weights cannot tell."""
    check_up: CheckUp | None
    files: dict[str, str]
    """Where each file can be downloaded, by name."""


Status = Literal["queued", "running", "done", "failed"]


class Extraction(Body):
    """A job: one voice out of one recording."""

    id: Id
    status: Status
    mixture: str
    """The name of the recording."""
    position: int | None = None
    """In the queue: 1 is next."""
    progress: float
    """0 to 1."""
    remaining_seconds: float | None = None
    """While it runs; null: not known yet."""
    created: datetime
    expires: datetime | None = None
    """When a job that ended is deleted."""
    result: Result | None = None
    problem: Problem | None = None


class Health(Body):
    """That the server answers."""

    status: Literal["ok", "stopping"]
    version: str
    running: int
    queued: int


class Server(Body):
    """What the page must know about its server."""

    version: str
    needs_token: bool
    is_allowed: bool
    """Whether this request may use the API."""
    max_bytes: int
    max_seconds: float
    max_channels: int
    ttl_seconds: float
    has_ffmpeg: bool
    has_live: bool
    """Whether there is a network for live streams."""
    tells_presence: bool
    """Whether the weights can tell where a voice is heard."""


class StreamChange(Body):
    """What a client of `WS /v1/stream` can change at any time: the voice, by at most one of its fields, and its share.

    `{"voice": null}` goes back to no voice: everything passes through.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    voice: Id | None = None
    """A saved voice."""
    recording: Id | None = None
    """An upload of the wanted person alone (`POST /v1/recordings`)."""
    enrollment: Base64Bytes | None = None
    """A recording of the wanted person alone, of any format, in Base64."""
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share of the voice in the output, from 0, everything as it came, to 1, which is the default."""
    absent_db: Annotated[float, Field(ge=0)] | None = None
    """How far the voice is turned down where it is not heard, in dB; 0, the default, leaves it."""
    end: bool = False
    """That no more sound comes: the server sends the rest, and closes."""


class StreamStart(StreamChange):
    """The first message of a client of `WS /v1/stream`."""

    sample_rate: Annotated[int, Field(ge=8000, le=192_000)]
    """In Hz, of the blocks in both directions."""
    format: Literal["int16", "float32"] = "int16"
    """Of the samples in both directions, little-endian; floats have full scale 1.0."""
    channels: Annotated[int, Field(ge=1)] = 1
    """Interleaved in the blocks of the client, and averaged. The blocks of the server have one."""


class StreamReady(Body):
    """What the server of `WS /v1/stream` answers to a message of its client, once the voice is in."""

    type: Literal["ready"] = "ready"
    has_voice: bool
    """False: everything passes through."""
    strength: float
    latency_seconds: float
    """How much later than a sample came in it goes out, apart from the time for the network and for computing."""
    check_up: CheckUp | None = None
    """Of the recordings of the voice, if the message named a voice."""


class StreamProblem(Body):
    """What is wrong in `WS /v1/stream`. If the server closes next, the reason of the close is the detail."""

    type: Literal["problem"] = "problem"
    problem: Problem


class StreamEnd(Body):
    """The last message of the server of `WS /v1/stream`, after all sound."""

    type: Literal["end"] = "end"
    silenced_blocks: int
    """Blocks that held NaN or infinite samples, and became silence."""


STREAM_MESSAGES: tuple[type[Body], ...] = (StreamStart, StreamChange, StreamReady, StreamProblem, StreamEnd)
"""The description of the API shows them beside those of its routes."""
