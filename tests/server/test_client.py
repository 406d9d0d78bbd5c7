"""The clients in docs/serve.md work against a server."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extraction.test_stream import EXTRACTOR, RATE, noise, push_all
from test_docs import blocks
from tiny import ROOT

from onevoice.audio import read_audio
from onevoice.extraction.enrollment import enroll_files
from onevoice.server.service import Service


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the code of the page defines."""
    names: dict[str, Any] = {}
    for kind, text in blocks(ROOT / "docs" / "serve.md"):
        if kind == "python":
            exec(compile(text, "serve.md", "exec"), names)
    return names


def test_the_live_client_of_the_docs(names: dict[str, Any], address: str, sounds: Path, service: Service) -> None:
    voice = enroll_files(EXTRACTOR, sounds / "enrollment.wav")
    saved = service.voices.save(voice, "Ann", {}, voice)
    sound = (noise(3000) * 32767).astype("<i2")
    sent = [sound[first : first + 500].tobytes() for first in range(0, 3000, 500)]
    one_voice, place = names["one_voice"], address.replace("http", "ws")
    output = np.frombuffer(b"".join(one_voice(sent, RATE, saved.id, place)), "<i2")
    np.testing.assert_array_equal(output, push_all(EXTRACTOR.stream(voice, RATE), sound, [500]))
    with pytest.raises(ValueError, match="voice 000"):
        list(one_voice(sent, RATE, "0" * 32, place))


def test_the_client_of_the_docs(names: dict[str, Any], address: str, sounds: Path, tmp_path: Path) -> None:
    client = names["Client"](address, "not needed")
    notes = client.extract(sounds / "mixture.wav", sounds / "enrollment.wav", tmp_path / "voice.flac")
    assert isinstance(notes, list)
    assert len(read_audio(tmp_path / "voice.flac")[0]) == 16_000
    with pytest.raises(ValueError, match="cannot be decoded"):
        client.extract(ROOT / "LICENSE", sounds / "enrollment.wav", tmp_path / "voice.flac")
