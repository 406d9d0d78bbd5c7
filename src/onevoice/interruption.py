"""Being asked to stop: SIGTERM and the first Ctrl-C let the present step finish."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the process was asked to stop, and by which signal."""

    signal: str | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them, and restore the handlers after.

    A second signal of the kind does what it always did. Outside the main thread, where Python delivers no signals,
    nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        signal.signal(number, before[number])

    for number in STOPPING:
        before[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield request
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


def ignore_stop_requests() -> None:
    """Leave stopping to the parent: for its helper processes, which get the signals of the whole group too."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
