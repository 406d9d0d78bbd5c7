"""Live streams over a WebSocket: blocks of sound come in, one voice goes out.

    client                               server
    {"sample_rate": 48000, …}     →      ← {"type": "ready", …}
    blocks of samples             →      ← blocks of samples, as many in total, a little later
    {"recording": "…"}            →      ← {"type": "ready", …}, once the new voice is in
    {"end": true}                 →      ← the rest of the samples, {"type": "end", …}

`schemas` describes the messages. The sound goes on while a new voice is looked at. Blocks are computed in a thread, the
blocks of one stream in their order; the next one is read only when the last one was sent, so a client that is faster
than the network is slowed down and nothing piles up.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from jaxtyping import Shaped
from pydantic import ValidationError

from onevoice.errors import OnevoiceError
from onevoice.extraction.extractor import Extractor
from onevoice.extraction.stream import Stream
from onevoice.extraction.voice import Voice
from onevoice.files import storage_errors
from onevoice.server.folders import remove
from onevoice.server.problems import ProblemError, close_with, explain, invalid, of_fields
from onevoice.server.schemas import Body, StreamChange, StreamEnd, StreamProblem, StreamReady, StreamStart
from onevoice.server.service import Service
from onevoice.server.uploads import Upload, too_large
from onevoice.server.voices import describe_check_up

MAX_MESSAGE_BYTES = 2**20
"""Of a block, or of a message with an enrollment in it."""
CUT_OFF_BYTES = 2 * MAX_MESSAGE_BYTES
"""A message is cut off after these while it arrives; shorter ones that are too long get a problem."""
DTYPES: dict[str, np.dtype[Any]] = {"int16": np.dtype("<i2"), "float32": np.dtype("<f4")}
Message = TypeVar("Message", bound=Body)
VOICE_FIELDS = ("voice", "recording", "enrollment")


async def serve_stream(socket: WebSocket, service: Service) -> None:
    """Serve one client until it ends, leaves, or breaks a rule."""
    await socket.accept()
    try:
        with service.streaming() as extractor:
            await _run(socket, service, extractor)
        await socket.close()
    except WebSocketDisconnect:
        return
    except Exception as error:
        problem = explain(error, {})
        if problem.status == 500:
            service.metrics.log_failure("a live stream", error)
        with contextlib.suppress(TimeoutError, RuntimeError, WebSocketDisconnect):  # the client may be gone
            async with asyncio.timeout(service.settings.idle_seconds):
                await close_with(problem, socket.send)


async def _run(socket: WebSocket, service: Service, extractor: Extractor) -> None:
    wire = _Wire(socket, service)
    given = await wire.receive()
    if isinstance(given, bytes):
        raise invalid("sample_rate", "the first message must be JSON with it")
    start = _parse(given, StreamStart)
    if start.channels > service.settings.limits.max_channels:
        raise invalid("channels", f"a stream may have {service.settings.limits.max_channels}, not {start.channels}")
    client = _Client(wire, service, extractor, extractor.stream(None, start.sample_rate), start)
    await client.change(start)
    try:
        while not client.has_ended:
            given = await wire.receive()
            if isinstance(given, bytes):
                await client.push(given)
            else:
                await client.begin_change(_parse(given, StreamChange))
        await client.finish()
    finally:
        client.changing.cancel()
        await asyncio.gather(client.changing, return_exceptions=True)


def _parse(text: str, kind: type[Message]) -> Message:
    """Return a message of the client. Raises `ProblemError`."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ProblemError.of(of_fields(error.errors())) from error


@dataclass
class _Wire:
    """The socket with the limits of the server."""

    socket: WebSocket
    service: Service

    async def receive(self) -> str | bytes:
        """Return the next message. Raises `ProblemError`, and `WebSocketDisconnect` if the client has left."""
        idle = self.service.settings.idle_seconds
        try:
            async with asyncio.timeout(idle):
                message = await self.socket.receive()
        except TimeoutError as error:
            raise ProblemError("idle", "Nothing came", 408, f"nothing came for {idle:g} seconds") from error
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        self.service.jobs.require_running()
        text = message.get("text")
        content: str | bytes = message["bytes"] if text is None else text
        if len(content) > MAX_MESSAGE_BYTES:
            raise too_large(f"a message may have {MAX_MESSAGE_BYTES} bytes, not {len(content)}")
        return content

    async def send(self, content: Body | bytes) -> None:
        """Send a message. Raises `ProblemError` if the client does not take it."""
        idle = self.service.settings.idle_seconds
        try:
            async with asyncio.timeout(idle):
                if isinstance(content, bytes):
                    await self.socket.send_bytes(content)
                else:
                    await self.socket.send_text(content.model_dump_json())
        except TimeoutError as error:
            raise ProblemError("idle", "Nothing was taken", 408, f"nothing was taken for {idle:g} seconds") from error


def _no_change() -> "asyncio.Future[None]":
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done


@dataclass
class _Client:
    """One client and its stream."""

    wire: _Wire
    service: Service
    extractor: Extractor
    stream: Stream
    start: StreamStart
    has_ended: bool = False
    changing: "asyncio.Future[None]" = field(default_factory=_no_change)
    """The last change of the voice, while the sound goes on."""

    async def push(self, data: bytes) -> None:
        """Send what is ready after a block. Raises `ProblemError`."""
        block = self._decode(data)
        await self._send(await self.service.on_blocks(lambda: self.stream.push(block)))

    async def finish(self) -> None:
        """Send the rest."""
        await self.changing
        await self._send(await self.service.on_blocks(self.stream.flush))
        await self.wire.send(StreamEnd(silenced_blocks=self.stream.silenced_blocks))

    async def begin_change(self, change: StreamChange) -> None:
        """Make a change without holding up the sound, once the change before it is made."""
        await self.changing
        self.has_ended = change.end
        if not change.end:
            self.changing = asyncio.create_task(self._try_change(change))

    async def change(self, change: StreamChange) -> None:
        """Make a change, and say that it is made. Raises `ProblemError` and `OnevoiceError`."""
        check_up = None
        if change.strength is not None:
            self.stream.strength = change.strength
        if change.absent_db is not None:
            self.stream.absent_db = change.absent_db
        if change.model_fields_set & {*VOICE_FIELDS}:
            voice = await self._find_voice(change)
            await self.service.on_blocks(lambda: self.stream.set_voice(voice))
            check_up = None if voice is None else describe_check_up(voice, {})
        stream = self.stream
        ready = StreamReady(
            has_voice=stream.voice is not None, strength=stream.strength, latency_seconds=stream.latency_seconds,
            check_up=check_up,
        )  # fmt: skip
        await self.wire.send(ready)

    async def _try_change(self, change: StreamChange) -> None:
        """Make a change; what is wrong with it is said, and the stream goes on."""
        try:
            await self.change(change)
        except (ProblemError, OnevoiceError) as error:
            await self.wire.send(StreamProblem(problem=explain(error, {})))

    async def _find_voice(self, change: StreamChange) -> Voice | None:
        """Return the voice that a change names; None for no voice. Raises `ProblemError`, `AudioError`."""
        named = [name for name in VOICE_FIELDS if getattr(change, name) is not None]
        if len(named) > 1:
            raise invalid("voice", f"give one of {', '.join(VOICE_FIELDS)}, not {' and '.join(named)}")
        if change.voice is not None:
            return self.service.voices.load_live(change.voice)
        if change.recording is not None:
            return await self._enroll(self.service.recordings.get(change.recording).upload)
        if change.enrollment is None:
            return None
        folder = self.service.recordings.new_folder()
        try:
            upload = Upload("enrollment", "enrollment", folder / "enrollment")
            return await self._enroll(upload, change.enrollment)
        finally:
            remove(folder)

    async def _enroll(self, upload: Upload, content: bytes | None = None) -> Voice:
        """Return the voice of an upload, or of a recording that came in a message."""
        try:
            if content is not None:
                await self.service.on_files(lambda: _write(upload.path, content))
            return await self.service.enroll(await self.service.places_of([upload]), self.extractor)
        except OnevoiceError as error:
            raise ProblemError.of(explain(error, {upload.path: upload.name})) from error

    def _decode(self, data: bytes) -> Shaped[np.ndarray, "_channels _samples"]:
        dtype, channels = DTYPES[self.start.format], self.start.channels
        size = channels * dtype.itemsize
        if len(data) % size:
            detail = f"a block of {len(data)} bytes does not hold whole samples of {size} bytes"
            raise ProblemError("block", "The block does not fit", 422, detail)
        return np.asarray(np.frombuffer(data, dtype).reshape(-1, channels).T)

    async def _send(self, samples: Shaped[np.ndarray, " _samples"]) -> None:
        if len(samples):
            await self.wire.send(samples.astype(DTYPES[self.start.format]).tobytes())


def _write(path: Path, content: bytes) -> None:
    with storage_errors(path):
        path.write_bytes(content)
