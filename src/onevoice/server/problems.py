"""Errors of the API as problem details (RFC 9457): one type for each kind of error, one sentence that says what to do.

Messages name recordings as the client named them, never the paths of this machine.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from onevoice.errors import (
    AudioError,
    CheckpointError,
    ConfigError,
    OnevoiceError,
    StorageError,
)
from onevoice.streams import GET_FFMPEG

MEDIA_TYPE = "application/problem+json"
URN = "urn:onevoice:problem:"
CLOSE_CODES = {"busy": 1013, "stopping": 1001, "too-large": 1009, "internal": 1011}
"""Of the close of a WebSocket, by the kind of the problem; the others are violations of our rules."""
VIOLATION = 1008
MAX_REASON_BYTES = 123


class Problem(BaseModel):
    """What went wrong, and what to do (RFC 9457)."""

    type: str = Field(examples=[f"{URN}audio"])
    """The kind of error."""
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] | None = None
    """The fields of the request that are wrong, if these are the problem."""


class ProblemError(Exception):
    """An error of a request, with the problem to answer."""

    def __init__(self, kind: str, title: str, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.problem = Problem(type=f"{URN}{kind}", title=title, status=status, detail=detail)
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @classmethod
    def of(cls, problem: Problem) -> "ProblemError":
        """Return the error whose answer is `problem`."""
        error = cls("", problem.title, problem.status, problem.detail)
        error.problem = problem
        return error


UNREADABLE = "this server cannot read its format; convert it to WAV, FLAC, Ogg, Opus or MP3"
FULL = "the server cannot write its files; try again later, or delete what is no longer needed"
KINDS: tuple[tuple[type[OnevoiceError], str, str, int], ...] = (
    (AudioError, "audio", "The recording cannot be used", 422),
    (ConfigError, "request", "The request does not fit", 422),
    (CheckpointError, "voice", "The voice cannot be used", 409),
    (StorageError, "storage", "The server is out of disk space", 507),
)
"""The problem of each error of the package; others are errors of the server."""


def not_found(what: str) -> ProblemError:
    """Return the problem of an address that leads nowhere, or no longer."""
    return ProblemError("not-found", "Not found", 404, f"{what}: unknown, deleted, or expired")


def invalid(field: str, message: str) -> ProblemError:
    """Return the problem of one field of a form."""
    error = ProblemError("request", "The request does not fit", 422, f"{field}: {message}")
    error.problem.errors = [{"field": field, "message": message}]
    return error


def explain(error: Exception, names: Mapping[Path, str]) -> Problem:
    """Return the problem of any error; `names` are what the client calls the files."""
    if isinstance(error, ProblemError):
        return error.problem
    if GET_FFMPEG in str(error):  # that advice is for whoever runs the server
        error = AudioError(f"{str(error).partition(': ')[0]}: {UNREADABLE}")
    for kind, name, title, status in KINDS:
        if isinstance(error, kind):
            detail = FULL if kind is StorageError else without_paths(str(error), names)
            return Problem(type=f"{URN}{name}", title=title, status=status, detail=detail)
    return Problem(
        type=f"{URN}internal", title="The server failed", status=500,
        detail="an error of the server; its log has the details",
    )  # fmt: skip


def without_paths(text: str, names: Mapping[Path, str]) -> str:
    """Return a message that names files as the client does, and no other path."""
    for path, name in sorted(names.items(), key=lambda item: -len(str(item[0]))):
        text = text.replace(str(path), name)
    return re.sub(r"(?:/[^/\s:'\"]+){2,}/", "", text)


def respond(problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the answer with a problem."""
    content = problem.model_dump(exclude_none=True)
    return JSONResponse(content, problem.status, dict(headers or {}), media_type=MEDIA_TYPE)


async def close_with(problem: Problem, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Close an accepted WebSocket: a last message with the problem, then a code and the reason (RFC 6455)."""
    message = {"type": "problem", "problem": problem.model_dump(exclude_none=True)}
    await send({"type": "websocket.send", "text": json.dumps(message)})
    reason = problem.detail.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
    code = CLOSE_CODES.get(problem.type.removeprefix(URN), VIOLATION)
    await send({"type": "websocket.close", "code": code, "reason": reason})


def handle_errors(app: FastAPI) -> None:
    """Make every error of an app a problem."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ProblemError)
        return respond(error.problem, error.headers)

    async def of_package(_: Request, error: Exception) -> JSONResponse:
        return respond(explain(error, {}))

    async def of_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kind = {404: "not-found", 405: "method"}.get(error.status_code, "http")
        problem = Problem(type=f"{URN}{kind}", title=error.detail, status=error.status_code, detail=error.detail)
        return respond(problem, error.headers)

    async def of_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return respond(of_fields(error.errors()))

    async def of_nobody(_: Request, __: Exception) -> Response:
        return Response(status_code=400)  # the client left; nobody reads this

    app.add_exception_handler(ProblemError, known)
    app.add_exception_handler(ClientDisconnect, of_nobody)
    app.add_exception_handler(OnevoiceError, of_package)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(Exception, of_package)


def of_fields(errors: Any) -> Problem:
    """Return the problem of what pydantic found in the fields of a request."""
    fields = [{"field": ".".join(map(str, each["loc"])) or "form", "message": str(each["msg"])} for each in errors]
    detail = "; ".join(f"{each['field']}: {each['message']}" for each in fields)
    return Problem(
        type=f"{URN}request", title="The request does not fit", status=422, detail=detail, errors=fields
    )  # fmt: skip
