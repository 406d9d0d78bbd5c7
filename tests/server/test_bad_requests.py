"""Whatever arrives, the answer is a problem that says what to do, and nothing is left on the disk."""

import io
import itertools
import re
from collections.abc import Iterable
from typing import Any

import anyio
import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient
from server.conftest import RATE, noise
from tiny import full_disk

from onevoice.audio import encode_audio
from onevoice.server.app import create_app
from onevoice.server.problems import MEDIA_TYPE
from onevoice.server.service import Service

ID = "0" * 32
VOICE = {"enrollment": encode_audio(noise(1), RATE, ".wav")}
GOOD = {**VOICE, "mixture": encode_audio(noise(2), RATE, ".wav")}


TERMINAL = re.compile(r"/tmp|upload-\d|FILE|\bonevoice \w|--\w|pip install|\bapt\b")
"""What means nothing to people without a terminal: paths of the server, commands, options."""


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def nothing_is_left(service: Service) -> Any:
    before = sorted(service.folder.rglob("*"))
    yield
    assert sorted(service.folder.rglob("*")) == before


def refused(answer: Any, status: int, kind: str, *words: str) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, MEDIA_TYPE), answer.text
    problem = answer.json()
    assert problem["type"] == f"urn:onevoice:problem:{kind}"
    assert problem["status"] == status
    assert not TERMINAL.search(answer.text)
    for word in words:
        assert word in problem["detail"]


@pytest.mark.parametrize(
    ("files", "texts", "words"),
    [
        ({}, {"channel": "mean"}, ["mixture: give one file"]),
        (VOICE, {}, ["mixture: give one file"]),
        (GOOD, {"recording": ID}, ["mixture: give one file"]),
        ({"mixture": GOOD["mixture"]}, {}, ["voice: give exactly one"]),
        (GOOD, {"person": "1"}, ["voice: give exactly one"]),
        (GOOD, {"recording": "../../etc"}, ["recording: String should match"]),
        (GOOD, {"channel": "left"}, ["channel: 'left' is not a channel"]),
        (GOOD, {"channel": "3"}, ["no channel 3, only 1 to 1"]),
        (GOOD, {"absent": "loud"}, ["absent: 'loud'"]),
        (GOOD, {"colour": "red"}, ["colour: Extra inputs"]),
        ({**GOOD, "picture": b"x"}, {}, ["picture: is no field for a file"]),
        ({"mixture": GOOD["mixture"]}, {"begin": "1"}, ["end: give both"]),
        ({"mixture": GOOD["mixture"]}, {"begin": "1", "end": "0.5"}, ["end: give both"]),
        ({"mixture": GOOD["mixture"]}, {"begin": "7", "end": "9"}, ["begin: mixture ends after 2.0 s"]),
        ({"mixture": GOOD["mixture"]}, {"begin": "nan", "end": "9"}, ["begin"]),
        ({"mixture": GOOD["mixture"]}, {"begin": "0", "end": "9" * 10_001}, ["longer than 10000 bytes"]),
    ],
)  # fmt: skip
def test_fields(client: TestClient, files: dict[str, bytes], texts: dict[str, str], words: list[str]) -> None:
    named = {name: (name, content) for name, content in files.items()}
    refused(client.post("/v1/extractions", files=named or None, data=texts), 422, "request", *words)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        (b"", ["meeting.wav: the file is empty"]),
        (b"RIFF", ["meeting.wav: cannot be decoded"]),
        (b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", ["meeting.wav: cannot be decoded"]),
        (GOOD["mixture"][:20_000], ["meeting.wav: truncated"]),
        (wav(np.full(RATE, np.nan)), ["meeting.wav: holds NaN"]),
    ],
)  # fmt: skip
def test_mixtures(client: TestClient, mixture: bytes, words: list[str]) -> None:
    files = {"mixture": ("/home/me/meeting.wav", mixture), "enrollment": ("ann.wav", VOICE["enrollment"])}
    refused(client.post("/v1/extractions", files=files), 422, "audio", *words)


def test_a_format_that_needs_ffmpeg_where_there_is_none(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onevoice.streams.find_ffmpeg", lambda: None)
    answer = client.post("/v1/recordings", files={"recording": ("talk.m4a", b"\0\0\0\x18ftypM4A " + bytes(1000))})
    refused(answer, 422, "audio", "talk.m4a: this server cannot read its format; convert it to WAV")


def test_places_in_a_recording_have_names_for_people(client: TestClient) -> None:
    mixture = {"mixture": ("team meeting.wav", GOOD["mixture"])}
    answer = client.post("/v1/extractions", files=mixture, data={"begin": "0.5", "end": "0.75"})
    refused(answer, 422, "audio", "team meeting.wav from 0:00.5 to 0:00.8: lasts 0.25 s")
    answer = client.post("/v1/extractions", files=mixture, data={"person": "9"})
    refused(answer, 422, "audio", "person 9 of team meeting.wav: was not found")


def test_a_list_of_files_is_no_recording(client: TestClient) -> None:
    """ffmpeg could read it, and would read other files of the machine."""
    files = {"mixture": ("m", b"ffconcat version 1.0\nfile 'upload-2'\n"), "enrollment": ("e", VOICE["enrollment"])}
    refused(client.post("/v1/extractions", files=files), 422, "audio", "m: cannot be decoded")


def test_a_short_enrollment(client: TestClient) -> None:
    files = {"mixture": ("m", GOOD["mixture"]), "enrollment": ("C:\\x\\nn.wav", wav(noise(0.2)))}
    refused(client.post("/v1/extractions", files=files), 422, "audio", "nn.wav: lasts 0.20 s")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encode_audio(noise(21), RATE, ".wav"), "longer than 20 s"),
        (encode_audio(np.zeros(600 * RATE, np.float32), RATE, ".flac"), "longer than 20 s"),
        (wav(np.zeros((100, 3))), "has 3 channels; a recording may have 2"),
        (bytes(2_000_001), "may have 2000000 bytes"),
    ],
    ids=["long", "bomb", "channels", "bytes"],
)
def test_limits(client: TestClient, content: bytes, words: str) -> None:
    for answer in (
        client.post("/v1/recordings", files={"recording": ("r", content)}),
        client.post("/v1/voices", files={"enrollment": ("r", content)}, data={"name": "x"}),
        client.post("/v1/extractions", files={"mixture": ("r", content), "enrollment": VOICE["enrollment"]}),
    ):
        refused(answer, 413, "too-large", words)


HEAD = b'--b\r\nContent-Disposition: form-data; name="recording"; filename="r"\r\n\r\n'


def arrive(service: Service, messages: Iterable[dict[str, Any]]) -> tuple[int, list[Any]]:
    """Send an upload in pieces; return how many were taken, and what was sent back."""
    taken, sent, waiting = 0, [], iter(messages)

    async def receive() -> Any:
        nonlocal taken
        taken += 1
        return next(waiting)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/recordings", "raw_path": b"", "query_string": b"",
        "root_path": "", "scheme": "http", "http_version": "1.1", "client": None, "server": ("localhost", 80),
        "headers": [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=b")],
    }  # fmt: skip
    anyio.run(create_app(service), scope, receive, send)
    return taken, sent


@pytest.mark.parametrize(
    ("first", "most", "words"),
    [(b"", 22, b"2000000 bytes"), (encode_audio(noise(60), RATE, ".flac")[:270_000], 3, b"longer than 20 s")],
    ids=["bytes", "header"],
)
def test_an_upload_is_cut_off_while_it_arrives(service: Service, first: bytes, most: int, words: bytes) -> None:
    """No length is announced. The server stops at the limit, or after a header that announces too much."""
    pieces = itertools.chain([HEAD + first], itertools.repeat(bytes(100_000), 100))
    taken, sent = arrive(service, ({"type": "http.request", "body": piece, "more_body": True} for piece in pieces))
    assert taken <= most
    assert sent[0]["status"] == 413
    assert words in sent[1]["body"]


@pytest.mark.parametrize(
    ("kind", "content", "status", "problem"),
    [
        ("application/json", b"{}", 415, "media-type"),
        ("multipart/form-data", b"x", 415, "media-type"),
        ("", b"x", 415, "media-type"),
        ("multipart/form-data; boundary=b", b"nonsense", 400, "form"),
        ("multipart/form-data; boundary=b", HEAD + b"abc", 400, "truncated"),
        ("multipart/form-data; boundary=b", b"", 400, "truncated"),
        ("multipart/form-data; boundary=b", (HEAD + b"x\r\n") * 51 + b"--b--\r\n", 413, "too-large"),
        ("application/x-www-form-urlencoded", b"a=1&a=2", 422, "request"),
        ("application/x-www-form-urlencoded", b"a" * 20_000, 413, "too-large"),
    ],
)
def test_broken_forms(client: TestClient, kind: str, content: bytes, status: int, problem: str) -> None:
    refused(client.post("/v1/recordings", content=content, headers={"Content-Type": kind}), status, problem)


def test_a_client_that_leaves_in_the_middle(service: Service) -> None:
    piece = {"type": "http.request", "body": HEAD + bytes(300_000), "more_body": True}
    taken, sent = arrive(service, [piece, {"type": "http.disconnect"}])
    assert (taken, sent[0]["status"]) == (2, 400)


@pytest.mark.parametrize("route", ["recordings", "voices", "extractions"])
def test_a_full_disk(client: TestClient, route: str) -> None:
    fields = {"recordings": ["recording"], "voices": ["enrollment"], "extractions": ["mixture", "enrollment"]}[route]
    files = [(field, (field, wav(noise(2)))) for field in fields]
    with full_disk(30_000):
        answer = client.post(f"/v1/{route}", files=files, data={"name": "x"} if route == "voices" else {})
    refused(answer, 507, "storage", "cannot write")


def test_a_disk_that_fills_during_the_work(client: TestClient) -> None:
    """The uploads still fit; what the network writes does not."""
    files = [(field, (field, GOOD[field])) for field in ("mixture", "enrollment")]
    with full_disk(40_000):
        refused(client.post("/v1/extractions", files=files), 507, "storage", "cannot write")


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/nothing", 404, "not-found"),
        ("GET", "/nothing", 404, "not-found"),
        ("PUT", "/v1/voices", 405, "method"),
        ("GET", f"/v1/recordings/{ID}", 404, "not-found"),
        ("GET", f"/v1/extractions/{ID}/events", 404, "not-found"),
        ("GET", f"/v1/extractions/{ID}/files/voice.wav", 404, "not-found"),
        ("GET", f"/v1/extractions/{ID}/files/overview.json", 422, "request"),
        ("GET", f"/v1/extractions/{ID}/files/..%2Fmixture", 404, "not-found"),
        ("DELETE", "/v1/voices/..%2F..%2Fx", 404, "not-found"),
        ("DELETE", "/v1/voices/x", 422, "request"),
        ("GET", "/static/../app.py", 404, "not-found"),
        ("GET", "/static/%2e%2e/app.py", 404, "not-found"),
    ],
)
def test_addresses(client: TestClient, method: str, path: str, status: int, kind: str) -> None:
    refused(client.request(method, path), status, kind)


def test_the_voice_of_other_weights(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = client.post("/v1/voices", data={"name": "x"}, files={"enrollment": VOICE["enrollment"]}).json()
    monkeypatch.setattr(service.voices, "_model_hash", "0" * 64)
    assert client.get(f"/v1/voices/{saved['id']}").json()["fits"] is False
    answer = client.post("/v1/extractions", files={"mixture": GOOD["mixture"]}, data={"voice": saved["id"]})
    refused(answer, 409, "voice", "saved with another network")
    client.delete(f"/v1/voices/{saved['id']}")


def test_a_bug_is_a_problem_too(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr("onevoice.server.jobs.extract_file", broken)
    answer = client.post("/v1/extractions", files=[(name, (name, GOOD[name])) for name in GOOD])
    refused(answer, 500, "internal")
    assert "secret" not in answer.text
