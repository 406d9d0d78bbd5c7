"""What Prometheus reads at `/metrics`."""

import logging
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("onevoice.server")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "onevoice_requests", "Answered requests.", ("method", "route", "status"), registry=self._registry
        )
        self._durations = Histogram(
            "onevoice_request_seconds", "Time to the first byte of an answer.", ("route",), buckets=BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        self._jobs = Counter("onevoice_extractions", "Extractions that ended.", ("outcome",), registry=self._registry)
        self._sound = Counter("onevoice_sound_seconds", "Length of the recordings done.", registry=self._registry)
        self._work = Counter("onevoice_work_seconds", "Time spent on extractions.", registry=self._registry)
        self._state = Gauge("onevoice_queue", "Extractions by state.", ("state",), registry=self._registry)

    def watch(self, count: Callable[[], tuple[int, int]]) -> None:
        """Read the state of the queue from `count`, which returns how many jobs run and wait."""
        self._state.labels("running").set_function(lambda: count()[0])
        self._state.labels("queued").set_function(lambda: count()[1])

    def watch_streams(self, count: Callable[[], int]) -> None:
        """Read the number of live streams from `count`."""
        Gauge("onevoice_streams", "Live streams that are open.", registry=self._registry).set_function(count)

    def count_job(self, outcome: str, sound_seconds: float, work_seconds: float) -> None:
        """Count an extraction that ended."""
        self._jobs.labels(outcome).inc()
        if outcome == "done":
            self._sound.inc(sound_seconds)
        self._work.inc(work_seconds)

    def log_failure(self, what: str, error: Exception) -> None:
        """Log an error that is ours; `what` is what failed."""
        LOG.error("%s failed", what, exc_info=error)

    def text(self) -> bytes:
        """Return the text format of Prometheus."""
        return generate_latest(self._registry)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Return an app that counts the requests to `app`, by the pattern of their route."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            begin = time.perf_counter()

            async def watch(message: Message) -> None:
                if message["type"] == "http.response.start":
                    route = getattr(scope.get("route"), "path", "other")
                    self._requests.labels(scope["method"], route, message["status"]).inc()
                    self._durations.labels(route).observe(time.perf_counter() - begin)
                await send(message)

            await app(scope, receive, watch)

        return counted
