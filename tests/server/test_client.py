"""The client in docs/serve.md works against a server."""

from pathlib import Path
from typing import Any

import pytest
from test_docs import blocks
from tiny import ROOT

from onevoice.audio import read_audio


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
