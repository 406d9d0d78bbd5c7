"""The client in docs/serve.md works against a server."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from test_docs import blocks
from tiny import ROOT

from onevoice.audio import read_audio
from onevoice.server.app import create_app
from onevoice.server.service import Service


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    """A server in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_the_client_of_the_docs(address: str, sounds: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    for kind, text in blocks(ROOT / "docs" / "serve.md"):
        if kind == "python":
            exec(compile(text, "serve.md", "exec"), names)
    client = names["Client"](address, "not needed")
    notes = client.extract(sounds / "mixture.wav", sounds / "enrollment.wav", tmp_path / "voice.flac")
    assert isinstance(notes, list)
    assert len(read_audio(tmp_path / "voice.flac")[0]) == 16_000
    with pytest.raises(ValueError, match="cannot be decoded"):
        client.extract(ROOT / "LICENSE", sounds / "enrollment.wav", tmp_path / "voice.flac")
