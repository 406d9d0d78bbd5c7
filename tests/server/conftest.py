"""Toy recordings, and servers of a tiny network."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from extraction.test_stream import EXTRACTOR
from fastapi.testclient import TestClient
from tiny import TINY, save_tiny
from voices import Voice

from onevoice.audio import write_audio
from onevoice.extraction import vad
from onevoice.extraction.extractor import Extractor, load
from onevoice.server.app import configure, create_app
from onevoice.server.service import Service, open_service
from onevoice.server.settings import Limits, Settings

RATE = 8000


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    config = replace(TINY, has_level=True)
    return load(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors", config), device="cpu")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 2 s, whose first second is one person alone, an enrollment, and a stereo file."""
    folder = tmp_path_factory.mktemp("sounds")
    first, second = Voice.number(0).say(1, 2.0), Voice.number(1).say(0, 2.0)
    second[:RATE] = 0
    write_audio(folder / "mixture.wav", (first + second) / 2, RATE)
    write_audio(folder / "enrollment.wav", Voice.number(0).say(9, 2.0), RATE)
    return folder


@pytest.fixture(scope="module", autouse=True)
def by_level() -> Iterator[None]:
    """The level finds speech, as without silero-vad: toy voices are no speech to its network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vad, "package_file", lambda package, name: None)
        yield


LIMITS = Limits(max_bytes=2_000_000, max_seconds=20.0, max_channels=2)


@pytest.fixture(scope="module")
def service(extractor: Extractor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = Settings(tmp_path_factory.mktemp("data") / "voices", limits=LIMITS, max_queued=3, max_streams=2)
    with open_service(extractor, settings, EXTRACTOR) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url="http://localhost") as client:
        yield client


@contextlib.contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serve in a thread; yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(configure(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with serving(service) as address:
        yield address


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)
