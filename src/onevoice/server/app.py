"""The app: the page, the API, their description, health and metrics; and the process that serves it."""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

import onevoice
import onevoice.server.schemas as schemas
from onevoice.extraction.extractor import Extractor
from onevoice.processes import stop_requests
from onevoice.server.api import router
from onevoice.server.live import CUT_OFF_BYTES
from onevoice.server.problems import MEDIA_TYPE, handle_errors
from onevoice.server.security import guard
from onevoice.server.service import Service, open_service
from onevoice.server.settings import Settings

STATIC = Path(__file__).parent / "static"
PAGES = {"/": "index.html", "/docs": "docs.html"}
SWEEP_SECONDS = 5.0
SWITCH_SECONDS = 0.001
"""How long the thread that answers waits for one that computes; Python's default of 0.005 adds up under load."""
KEEP_ALIVE_SECONDS = 75
"""Idle connections are closed later than clients close them (httpx: 5 s, proxies: 60 s), and not at the same time."""
LINGER_SECONDS = 10.0
"""How long the server answers after the last job has ended, so that its client can fetch the result."""
DESCRIPTION = """Extract one voice from a recording of several people.

Errors are problem details (RFC 9457). Uploads and results are deleted after a while; only saved voices stay.
`WS /v1/stream` takes a voice out of live sound."""


def create_app(service: Service) -> ASGIApp:
    """Return the app of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(service))
        yield
        sweeping.cancel()

    app = FastAPI(
        title="onevoice", version=onevoice.__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None,
        redoc_url=None, openapi_url="/openapi.json",
    )  # fmt: skip
    app.state.service = service
    app.include_router(router)
    _add_pages(app)
    _add_health(app, service)
    handle_errors(app)
    _describe_problems(app)
    _describe_streams(app)
    return guard(service.metrics.middleware(app), service.settings)


def _add_pages(app: FastAPI) -> None:
    def page_of(name: str) -> Callable[[], FileResponse]:
        return lambda: FileResponse(STATIC / name, media_type="text/html", headers={"Cache-Control": "no-cache"})

    for path, name in PAGES.items():
        app.add_api_route(path, page_of(name), include_in_schema=False, response_class=FileResponse)
    app.mount("/static", StaticFiles(directory=STATIC))


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["server"])
    async def health() -> schemas.Health:
        """Return that the server answers, and how much it has to do."""
        running, queued = service.jobs.count()
        status = "stopping" if service.jobs.is_stopping else "ok"
        return schemas.Health(status=status, version=onevoice.__version__, running=running, queued=queued)

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @app.get("/metrics", tags=["server"], response_class=Response, responses=text)
    def metrics() -> Response:
        """Return counters in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _describe_problems(app: FastAPI) -> None:
    """Name the media type of problems in the description, where FastAPI names that of other answers."""
    document = app.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for status, answer in operation["responses"].items():
                if status in ("4XX", "5XX"):
                    answer["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}


def _describe_streams(app: FastAPI) -> None:
    """Show the messages of live streams; OpenAPI has no routes for sockets."""
    template = "#/components/schemas/{model}"
    _, schema = models_json_schema([(each, "validation") for each in schemas.STREAM_MESSAGES], ref_template=template)
    app.openapi()["components"]["schemas"].update(schema["$defs"])


async def _sweep(service: Service) -> None:
    while True:
        await asyncio.sleep(min(SWEEP_SECONDS, service.settings.ttl_seconds / 4))
        await asyncio.to_thread(service.sweep)


def configure(service: Service, host: str = "localhost", port: int = 0) -> uvicorn.Config:
    """Return how a service is served.

    Live streams have limits of their own on silence. Pings would fail them: while the network is behind, nothing of the
    client is read, its answers included.
    """
    return uvicorn.Config(
        create_app(service), host, port, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=round(LINGER_SECONDS), timeout_keep_alive=KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=2**16, ws_max_size=CUT_OFF_BYTES, ws_per_message_deflate=False,
        ws_ping_interval=None,
    )  # fmt: skip


def serve(
    extractor: Extractor,
    live: Extractor | None,
    settings: Settings,
    host: str,
    port: int,
    started: Callable[[str], None],
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then let running jobs end. `started` gets the address.

    `live` is the causal network of live streams. A second signal ends the process at once; what that leaves, the next
    server removes.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    with open_service(extractor, settings, live) as service:
        server = uvicorn.Server(configure(service, host, port))
        with stop_requests() as request:
            thread = threading.Thread(target=server.run, daemon=True)  # signals reach the main thread, which decides
            thread.start()
            while thread.is_alive() and not server.started:
                time.sleep(0.02)
            if server.started:
                (bound, *_) = server.servers[0].sockets[0].getsockname()[1:]
                started(f"http://{host if ':' not in host else f'[{host}]'}:{bound}")
            while thread.is_alive() and request.signal is None:
                thread.join(0.2)
            _drain(service, thread)
            server.should_exit = True
            thread.join()


def _drain(service: Service, thread: threading.Thread) -> None:
    """Wait for running jobs, and a moment longer for the clients that want their results."""
    running = service.jobs.stop()
    while thread.is_alive() and service.jobs.count()[0]:
        time.sleep(0.1)
    deadline = time.monotonic() + LINGER_SECONDS
    while thread.is_alive() and time.monotonic() < deadline and not all(job.is_deleted for job in running):
        time.sleep(0.1)
