"""The routes of the API, below `/v1`."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response, WebSocket
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel
from starlette.requests import HTTPConnection

import onevoice
import onevoice.server.schemas as schemas
from onevoice.evaluation.demo import SAMPLES
from onevoice.extraction.voice import Voice
from onevoice.server.files import TYPES, FileName, make_file, names_of
from onevoice.server.folders import remove
from onevoice.server.forms import ExtractionFields, RecordingFields, VoiceFields, body, described, parse_fields
from onevoice.server.jobs import Job
from onevoice.server.live import serve_stream
from onevoice.server.problems import MEDIA_TYPE, Problem, ProblemError, invalid, not_found
from onevoice.server.security import COOKIE, cookie_of, is_allowed, is_token
from onevoice.server.service import Service, exactly
from onevoice.streams import find_ffmpeg

POLL_SECONDS, POLL_QUEUED_SECONDS = 0.25, 1.0
"""Between two looks at a job whose progress is sent, while it runs and while it waits."""
KEEP_ALIVE_SECONDS = 15.0
MAX_ENROLLMENTS = 10
MAX_WAIT_SECONDS = 60.0


def service_of(connection: HTTPConnection) -> Service:
    """Return the service of the app that got a request."""
    service: Service = connection.app.state.service
    return service


Serving = Annotated[Service, Depends(service_of)]
Id = Annotated[str, PathParameter(alias="id", pattern="^[0-9a-f]{32}$")]
PROBLEM: dict[str, Any] = {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "A problem (RFC 9457)"}


def _ranges(*types: str) -> dict[int | str, dict[str, Any]]:
    """Return how the description shows a file that is sent whole, or as a range."""
    content = {name: {"schema": {"type": "string", "format": "binary"}} for name in sorted({*types})}
    return {
        200: {"content": content, "description": "The file"}, 206: {"content": content, "description": "A range of it"}
    }  # fmt: skip


router = APIRouter(prefix="/v1", responses={"4XX": PROBLEM, "5XX": PROBLEM})


class Token(BaseModel):
    """What signs the page in."""

    token: str


@router.get("/server", tags=["server"])
def describe_server(request: Request, service: Serving) -> schemas.Server:
    """Return the limits of the server, and whether this request may use it."""
    settings = service.settings
    limits = settings.limits
    return schemas.Server(
        version=onevoice.__version__, needs_token=settings.token is not None,
        is_allowed=is_allowed(request.headers, settings.token), max_bytes=limits.max_bytes,
        max_seconds=limits.max_seconds, max_channels=limits.max_channels, ttl_seconds=settings.ttl_seconds,
        has_ffmpeg=find_ffmpeg() is not None, has_live=service.live is not None,
        tells_presence=service.extractor.card.config.has_level,
    )  # fmt: skip


@router.post("/session", status_code=204, tags=["server"])
def sign_in(given: Token, request: Request, service: Serving) -> Response:
    """Exchange the token for a cookie that no script can read, for pages; other clients send the token itself."""
    token = service.settings.token
    if token is None or not is_token(given.token, token):
        raise ProblemError("token", "Wrong token", 403, "this is not the token of the server")
    response = Response(status_code=204)
    is_secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, cookie_of(token), httponly=True, samesite="strict", secure=is_secure, path="/")
    return response


@router.get("/samples/{name}", tags=["server"], responses=_ranges("audio/flac"), response_class=FileResponse)
def get_sample(name: Literal["mixture.flac", "enrollment.flac"]) -> FileResponse:
    """Return a sample recording to try: two voices at once, or the first of them alone."""
    return FileResponse(SAMPLES / name, media_type="audio/flac")


@router.post(
    "/recordings", status_code=201, tags=["recordings"],
    openapi_extra=body(RecordingFields, ("recording",), recording=described("A recording of any format.")),
)  # fmt: skip
async def upload_recording(request: Request, service: Serving) -> schemas.Recording:
    """Upload a recording to look at and to use in extractions; it expires after a while without use."""
    return (await service.keep_recording(request)).describe()


@router.get("/recordings/{id}", tags=["recordings"])
def get_recording(number: Id, service: Serving) -> schemas.Recording:
    """Return what is known about a recording."""
    return service.recordings.get(number).describe()


@router.get("/recordings/{id}/overview", tags=["recordings"])
async def get_recording_overview(number: Id, service: Serving) -> schemas.Overview:
    """Return the waveform and the spectrogram of a recording."""
    return await service.on_files(service.recordings.get(number).overview)


@router.get(
    "/recordings/{id}/audio", tags=["recordings"], responses=_ranges("audio/flac"),
    response_class=FileResponse,
)  # fmt: skip
async def get_recording_audio(number: Id, service: Serving) -> FileResponse:
    """Return a recording as FLAC, which every browser plays."""
    path = await service.on_files(service.recordings.get(number).copy)
    return FileResponse(path, media_type="audio/flac")


@router.get("/recordings/{id}/voices", tags=["recordings"])
async def find_voices(number: Id, service: Serving) -> list[schemas.Person]:
    """Return the people who speak in a recording, found without any enrollment."""
    return await service.find_people(service.recordings.get(number))


@router.delete("/recordings/{id}", status_code=204, tags=["recordings"])
def delete_recording(number: Id, service: Serving) -> None:
    """Delete a recording. Extractions from it keep their own."""
    service.recordings.delete(number)


@router.websocket("/stream")
async def stream(socket: WebSocket, service: Serving) -> None:
    """Take one voice out of sound while it comes; `live` describes the messages."""
    await serve_stream(socket, service)


@router.get("/voices", tags=["voices"])
def list_voices(service: Serving) -> list[schemas.SavedVoice]:
    """Return all saved voices."""
    return service.voices.list()


@router.post(
    "/voices", status_code=201, tags=["voices"],
    openapi_extra=body(VoiceFields, enrollment=described("Recordings of one person alone.", many=True)),
)  # fmt: skip
async def save_voice(request: Request, response: Response, service: Serving) -> schemas.SavedVoice:
    """Save a voice by name until it is deleted. A voice is biometric data: ask the person first."""
    folder = service.recordings.new_folder()
    async with service.receive(request, folder, ["enrollment"]) as form:
        fields = parse_fields(form, VoiceFields)
        if fields.extraction is not None:
            exactly(form, "enrollment", 0, 0)
            job = service.jobs.get(fields.extraction)
            if job.voice is None:
                raise invalid("extraction", "has no voice yet; wait until it is done")
            voice, places = job.voice, () if isinstance(job.order.voice, Voice) else job.order.voice
        else:
            places = await service.places_of(exactly(form, "enrollment", 1, MAX_ENROLLMENTS))
            voice = await service.enroll(places)
        saved = service.voices.save(voice, fields.name.strip(), form.names, await service.enroll_twin(places))
    remove(folder)
    response.headers["Location"] = f"/v1/voices/{saved.id}"
    return saved


@router.get("/voices/{id}", tags=["voices"])
def get_voice(number: Id, service: Serving) -> schemas.SavedVoice:
    """Return what is known about a saved voice."""
    return service.voices.describe(number)


@router.delete("/voices/{id}", status_code=204, tags=["voices"])
def delete_voice(number: Id, service: Serving) -> None:
    """Delete a saved voice."""
    service.voices.delete(number)


@router.post(
    "/extractions", status_code=201, tags=["extractions"],
    responses={202: {"model": schemas.Extraction, "description": "Not done yet; look again"}},
    openapi_extra=body(
        ExtractionFields, mixture=described("The recording of several people, of any format."),
        enrollment=described("Recordings of the wanted person alone.", many=True),
    ),
)  # fmt: skip
async def extract(
    request: Request,
    response: Response,
    service: Serving,
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for the result.")] = 30.0,
) -> schemas.Extraction:
    """Extract a voice from a recording.

    The answer is 201 with the result if that takes no longer than `wait`, and 202 otherwise; then ask for the state, or
    follow the events. If the client leaves while it waits, the extraction is deleted.
    """
    service.jobs.require_room()
    folder = service.jobs.new_folder()
    async with service.receive(request, folder, ["mixture", "enrollment"]) as form:
        fields = parse_fields(form, ExtractionFields)
        exactly(form, "enrollment", 0, MAX_ENROLLMENTS)
        job = service.jobs.submit(folder, await service.prepare(folder, form, fields))
    deadline = time.monotonic() + wait
    while job.expires is None and not job.is_deleted and time.monotonic() < deadline:
        assert job.future is not None
        left = max(0.0, min(1.0, deadline - time.monotonic()))
        await asyncio.wait([asyncio.wrap_future(job.future)], timeout=left)
        if await request.is_disconnected():
            service.jobs.delete(job.id)
            break
    if job.is_deleted:
        raise not_found(f"extraction {job.id}")
    if job.problem is not None:
        service.jobs.delete(job.id)
        raise ProblemError.of(job.problem)
    response.headers["Location"] = f"/v1/extractions/{job.id}"
    response.status_code = 201 if job.status == "done" else 202
    return describe(service, job)


@router.get("/extractions/{id}", tags=["extractions"])
def get_extraction(number: Id, service: Serving) -> schemas.Extraction:
    """Return the state of an extraction, and its result once it is done."""
    return describe(service, service.jobs.get(number))


@router.get(
    "/extractions/{id}/events", tags=["extractions"], response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events"}},
)  # fmt: skip
async def follow(number: Id, service: Serving) -> StreamingResponse:
    """Send the state of an extraction whenever it changes, as server-sent events, until it ends.

    Each event has the type `state` and the JSON of `GET /v1/extractions/{id}` as its data; the last one is of a job
    that is done or failed, or has the type `deleted`.
    """
    return StreamingResponse(_events(service, service.jobs.get(number)), media_type="text/event-stream")


@router.get("/extractions/{id}/overview", tags=["extractions"])
async def get_overview(number: Id, service: Serving) -> schemas.Overview:
    """Return waveforms and spectrograms of mixture, voice and residual, and where the voice is heard."""
    job = _done(service.jobs.get(number))
    text = await service.on_files(lambda: (job.folder / "overview.json").read_text(encoding="utf-8"))
    return schemas.Overview.model_validate_json(text)


@router.get(
    "/extractions/{id}/files/{name}", tags=["extractions"], responses=_ranges(*TYPES.values()),
    response_class=FileResponse,
)  # fmt: skip
async def get_file(number: Id, name: FileName, service: Serving) -> FileResponse:
    """Return a file of an extraction that is done, or a range of it.

    `.wav` is 32-bit float, and voice + residual is the mixture. The others share one gain if they would clip.
    """
    job = _done(service.jobs.get(number))
    path = await service.on_files(lambda: make_file(job, name))
    shown = f"{Path(job.order.mixture.name).stem}-{name}"
    kind = "attachment" if path.suffix == ".html" else "inline"
    return FileResponse(path, media_type=TYPES[path.suffix], filename=shown, content_disposition_type=kind)


@router.delete("/extractions/{id}", status_code=204, tags=["extractions"])
def delete_extraction(number: Id, service: Serving) -> None:
    """Delete an extraction and its files; stop it if it is not done."""
    service.jobs.delete(number)


def describe(service: Service, job: Job) -> schemas.Extraction:
    """Return the JSON of a job, with the addresses of its files."""
    described = service.jobs.describe(job)
    if described.result is not None:
        files = {name: f"/v1/extractions/{job.id}/files/{name}" for name in names_of(job)}
        described.result = described.result.model_copy(update={"files": files})
    return described


def _done(job: Job) -> Job:
    if job.status != "done":
        raise ProblemError("state", "Not done", 409, f"extraction {job.id} is {job.status}; wait until it is done")
    return job


async def _events(service: Service, job: Job) -> AsyncIterator[str]:
    sent, when = "", time.monotonic()
    while True:
        if job.is_deleted:
            yield "event: deleted\ndata: {}\n\n"
            return
        state = describe(service, job)
        text = state.model_dump_json()
        if text != sent:
            yield f"event: state\ndata: {text}\n\n"
            sent, when = text, time.monotonic()
        if state.status in ("done", "failed"):
            return
        if time.monotonic() - when > KEEP_ALIVE_SECONDS:
            yield ": still here\n\n"
            when = time.monotonic()
        await asyncio.sleep(POLL_QUEUED_SECONDS if state.status == "queued" else POLL_SECONDS)
