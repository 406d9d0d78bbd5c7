"""Small corpora for tests: empty files, short speech and tar shards."""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import soundfile
from voices import Voice

from onevoice.audio import write_audio
from onevoice.corpus.listing import Corpus

RATE = 8000
SHARED_SPEECH = Path(__file__).parents[2] / "shared" / "speech"
"""Real recordings, where there are some beside the checkout."""


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def ids(corpus: Corpus) -> list[str]:
    return [utterance.id for utterance in corpus.utterances]


def speak(root: Path, *names: str, sample_rate: int = RATE) -> Path:
    """Write half a second of speech under each name."""
    for number, name in enumerate(names):
        write_audio(root / name, Voice.number(number).say(0, 0.5, sample_rate), sample_rate)
    return root


def shard(path: Path, members: Mapping[str, bytes], cut: int | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if cut is not None:
        os.truncate(path, cut)
    return path


def sound(number: int = 0, seconds: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, Voice.number(number).say(0, seconds), RATE, format="FLAC")
    return buffer.getvalue()
