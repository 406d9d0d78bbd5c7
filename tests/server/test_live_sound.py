"""Live streams: what comes back is what the stream of the package gives, and whatever a client does frees its place."""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from extraction.test_stream import EXTRACTOR, RATE, noise, push_all
from fastapi.testclient import TestClient
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from onevoice.audio import encode_audio
from onevoice.extraction.enrollment import enroll_files
from onevoice.extraction.extractor import Extractor
from onevoice.server.app import create_app
from onevoice.server.live import CUT_OFF_BYTES, MAX_MESSAGE_BYTES
from onevoice.server.service import Service, open_service
from onevoice.server.settings import Settings

TOKEN = "0123456789abcdef"
PLACE = "ws://localhost/v1/stream"
START = {"sample_rate": RATE}


@contextlib.contextmanager
def opened(address: str, **start: Any) -> Iterator[tuple[ClientConnection, dict[str, Any]]]:
    """Open a stream; yield it with the first answer."""
    with connect(f"{address.replace('http', 'ws')}/v1/stream", proxy=None) as socket:
        socket.send(json.dumps({**START, **start}))
        yield socket, json.loads(socket.recv())


def take(socket: ClientConnection, dtype: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Take all that comes until the server closes; return the samples, and the other messages."""
    sound, messages = [], []
    try:
        while True:
            message = socket.recv()
            if isinstance(message, bytes):
                sound.append(np.frombuffer(message, dtype))
            else:
                messages.append(json.loads(message))
    except ConnectionClosed:
        return np.concatenate([*sound, np.zeros(0, dtype)]), messages


def refused(socket: ClientConnection) -> tuple[str, int, str]:
    """Return the kind of the problem with which the server closed, the code, and the reason."""
    _, messages = take(socket, "<i2")
    problem = messages[-1]["problem"]
    assert messages[-1]["type"] == "problem"
    assert problem["detail"].startswith(str(socket.close_reason))
    return problem["type"].rpartition(":")[2], int(socket.close_code or 0), str(socket.close_reason)


def until_free(service: Service) -> None:
    """Wait until no stream is open."""
    deadline = time.monotonic() + 60
    while service.open_streams and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.open_streams == 0


@pytest.fixture(autouse=True)
def all_places_are_free(service: Service) -> Iterator[None]:
    yield
    until_free(service)


def enrollment(sounds: Path) -> str:
    return base64.b64encode((sounds / "enrollment.wav").read_bytes()).decode()


@pytest.mark.parametrize(
    ("form", "dtype", "channels", "rate"), [("int16", "<i2", 1, RATE), ("float32", "<f4", 2, 48_000)]
)
def test_it_gives_what_the_stream_of_the_package_gives(
    address: str, sounds: Path, form: str, dtype: str, channels: int, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onevoice.extraction.stream.HEARD_DB", 60.0)  # the voice is never heard
    monkeypatch.setattr("onevoice.extraction.stream.ABSENT_DB", 59.0)
    sound = noise(channels * (rate // 4 + 1)).reshape(-1, channels)
    sound = (sound * 32767).astype(dtype) if form == "int16" else sound.astype(dtype)
    size = rate // 100
    start = {"sample_rate": rate, "format": form, "channels": channels, "strength": 0.75, "absent_db": 9.0}
    with opened(address, **start, enrollment=enrollment(sounds)) as (socket, ready):
        for first in range(0, len(sound), size):
            socket.send(sound[first : first + size].tobytes())
        socket.send(json.dumps({"end": True}))
        output, messages = take(socket, dtype)
    stream = EXTRACTOR.stream(enroll_files(EXTRACTOR, sounds / "enrollment.wav"), rate, 0.75, 9.0)
    expected = [stream.push(sound[first : first + size].T) for first in range(0, len(sound), size)]
    np.testing.assert_array_equal(output, np.concatenate([*expected, stream.flush()]))
    assert len(output) == len(sound)
    assert (ready["type"], ready["has_voice"], ready["strength"]) == ("ready", True, 0.75)
    assert ready["latency_seconds"] == stream.latency_seconds
    assert ready["check_up"]["seconds"] == 2.0
    assert messages == [{"type": "end", "silenced_blocks": 0}]
    assert socket.close_code == 1000


def test_two_streams_at_once_and_no_third(address: str, sounds: Path) -> None:
    """Each has its own sound and state; their blocks alternate."""
    voices = [enroll_files(EXTRACTOR, sounds / "enrollment.wav"), None]
    inputs = [(noise(4000, seed) * 32767).astype("<i2") for seed in (3, 4)]
    with opened(address, enrollment=enrollment(sounds)) as (one, _), opened(address) as (two, _):
        with connect(f"{address.replace('http', 'ws')}/v1/stream", proxy=None) as third:
            assert refused(third) == ("busy", 1013, "all 2 live streams of this server are in use; try again later")
        for first in range(0, 4000, 400):
            for socket, sound in zip((one, two), inputs, strict=True):
                socket.send(sound[first : first + 400].tobytes())
        for socket in (one, two):
            socket.send(json.dumps({"end": True}))
        with ThreadPoolExecutor(2) as pool:
            outputs = [output for output, _ in pool.map(take, (one, two), ("<i2", "<i2"))]
    for voice, sound, output in zip(voices, inputs, outputs, strict=True):
        np.testing.assert_array_equal(output, push_all(EXTRACTOR.stream(voice, RATE), sound, [400]))


def test_a_client_that_leaves_frees_its_place(address: str, service: Service) -> None:
    for _ in range(3):  # more than there are places
        with opened(address) as (socket, ready):
            assert ready["type"] == "ready"
            assert service.open_streams == 1
            socket.send(bytes(4000))
            socket.socket.close()  # without a farewell
        until_free(service)


def test_the_voice_can_change_while_the_sound_goes_on(address: str, client: TestClient, sounds: Path) -> None:
    """Nobody, then an upload, then a saved voice, then nobody; what is wrong does not end the stream."""
    sound = (noise(8000) * 32767).astype("<i2")
    voice = enroll_files(EXTRACTOR, sounds / "enrollment.wav")
    stream, expected = EXTRACTOR.stream(None, RATE), []
    upload = client.post("/v1/recordings", files={"recording": (sounds / "enrollment.wav").read_bytes()}).json()["id"]
    silent = client.post("/v1/recordings", files={"recording": ("s.wav", encode_audio(np.zeros(9000), RATE, ".wav"))})
    saved = client.post(
        "/v1/voices", data={"name": "x"}, files={"enrollment": (sounds / "enrollment.wav").read_bytes()}
    ).json()
    assert (saved["fits"], saved["fits_live"]) == (True, True)
    output: list[np.ndarray] = []
    with opened(address) as (socket, ready):
        assert ready["has_voice"] is False

        def change(**given: Any) -> dict[str, Any]:
            socket.send(json.dumps(given))
            while isinstance(answer := socket.recv(), bytes):
                output.append(np.frombuffer(answer, "<i2"))
            return dict(json.loads(answer))

        def push(first: int) -> None:
            socket.send(sound[first : first + 1600].tobytes())
            output.append(np.frombuffer(socket.recv(), "<i2"))
            expected.append(stream.push(sound[first : first + 1600]))

        push(0)
        assert change(recording=upload)["has_voice"]
        stream.set_voice(voice)
        push(1600)
        assert change(recording=silent.json()["id"])["problem"]["detail"].startswith("s.wav: is silent")
        assert change(recording="0" * 32)["problem"]["status"] == 404
        assert change(voice="0" * 32)["problem"]["status"] == 404
        assert change(voice=saved["id"], recording=upload)["problem"]["status"] == 422
        push(3200)
        assert change(voice=saved["id"], strength=0.5) == {
            "type": "ready", "has_voice": True, "strength": 0.5, "latency_seconds": stream.latency_seconds,
            "check_up": saved["check_up"],
        }  # fmt: skip
        stream.strength = 0.5
        stream.set_voice(voice)
        push(4800)
        assert change(voice=None)["has_voice"] is False
        stream.set_voice(None)
        push(6400)
        socket.send(json.dumps({"end": True}))
        output.append(take(socket, "<i2")[0])
    np.testing.assert_array_equal(np.concatenate(output), np.concatenate([*expected, stream.flush()]))
    assert client.delete(f"/v1/voices/{saved['id']}").status_code == 204


@pytest.mark.parametrize(
    ("messages", "kind", "code", "words"),
    [
        (["x"], "request", 1008, "form: Invalid JSON"),
        ([b"abcd"], "request", 1008, "sample_rate: the first message"),
        (["{}"], "request", 1008, "sample_rate: Field required"),
        ([{"sample_rate": 10}], "request", 1008, "sample_rate: Input should be greater"),
        ([{**START, "format": "int24"}], "request", 1008, "format: "),
        ([{**START, "channels": 3}], "request", 1008, "channels: a stream may have 2, not 3"),
        ([{**START, "strength": 2}], "request", 1008, "strength: "),
        ([{**START, "absent_db": -1}], "request", 1008, "absent_db: "),
        ([{**START, "colour": "red"}], "request", 1008, "colour: Extra inputs"),
        ([{**START, "voice": "../x"}], "request", 1008, "voice: String should match"),
        ([{**START, "voice": "0" * 32}], "not-found", 1008, "voice 000"),
        ([{**START, "enrollment": "AAAA"}], "audio", 1008, "enrollment: cannot be decoded"),
        ([{**START, "enrollment": "not Base64"}], "request", 1008, "enrollment: "),
        ([START, b"abc"], "block", 1008, "a block of 3 bytes does not hold whole samples of 2 bytes"),
        ([START, START], "request", 1008, "sample_rate: Extra inputs"),
        ([START, bytes(MAX_MESSAGE_BYTES + 2)], "too-large", 1009, "a message may have 1048576 bytes"),
    ],
)  # fmt: skip
def test_what_is_refused(address: str, service: Service, messages: list[Any], kind: str, code: int, words: str) -> None:
    before = sorted((service.folder / "recordings").iterdir())
    with connect(f"{address.replace('http', 'ws')}/v1/stream", proxy=None) as socket:
        for message in messages:
            socket.send(json.dumps(message) if isinstance(message, dict) else message)
        got = refused(socket)
    assert got[:2] == (kind, code)
    assert got[2].startswith(words)
    assert sorted((service.folder / "recordings").iterdir()) == before


def test_a_message_without_end_is_cut_off(address: str) -> None:
    with opened(address) as (socket, _):
        with contextlib.suppress(ConnectionClosed):
            socket.send(bytes(CUT_OFF_BYTES + 1))
        take(socket, "<i2")
    assert socket.close_code == 1009


def one_shot(service: Service, *messages: Any) -> tuple[dict[str, Any], int]:
    """Send messages to an app without a socket; return the last answer and the code of the close."""
    client = TestClient(create_app(service), base_url="http://localhost")
    answer: dict[str, Any] = {}
    with client.websocket_connect(PLACE) as socket:
        for message in messages:
            socket.send_json(message)
        while (message := socket.receive())["type"] == "websocket.send":
            answer = json.loads(message["text"])
    assert answer["problem"]["detail"].startswith(message["reason"])
    return answer["problem"], message["code"]


def test_a_server_without_a_live_network_says_how_to_get_one(extractor: Extractor, tmp_path: Path) -> None:
    with open_service(extractor, Settings(tmp_path / "voices")) as service:
        problem, code = one_shot(service)
        client = TestClient(create_app(service), base_url="http://localhost")
        assert client.get("/v1/server").json()["has_live"] is False
    assert (problem["type"], code) == ("urn:onevoice:problem:no-live", 1008)
    assert "onevoice serve --live MODEL" in problem["detail"]


def test_a_stream_in_which_nothing_comes_ends(extractor: Extractor, tmp_path: Path) -> None:
    with open_service(extractor, Settings(tmp_path / "voices", idle_seconds=0.05), EXTRACTOR) as service:
        for messages in ([], [START]):
            problem, code = one_shot(service, *messages)
            assert (problem["detail"], code) == ("nothing came for 0.05 seconds", 1008)
        assert service.open_streams == 0


def test_a_server_that_stops_ends_its_streams(extractor: Extractor, tmp_path: Path) -> None:
    with open_service(extractor, Settings(tmp_path / "voices"), EXTRACTOR) as service:
        client = TestClient(create_app(service), base_url="http://localhost")
        with client.websocket_connect(PLACE) as socket:
            socket.send_json(START)
            assert socket.receive_json()["type"] == "ready"
            service.jobs.stop()
            socket.send_bytes(bytes(100))
            assert socket.receive_json()["problem"]["type"] == "urn:onevoice:problem:stopping"
            assert socket.receive()["code"] == 1001
        assert one_shot(service)[1] == 1001


def test_a_bug_is_a_problem_too(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(EXTRACTOR, "stream", broken)
    problem, code = one_shot(service, START)
    assert (problem["status"], code) == (500, 1011)
    assert "secret" not in problem["detail"]


def test_others_are_answered_while_a_block_is_computed(
    address: str, sounds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()
    step = EXTRACTOR.engine.step

    def held(*given: Any) -> Any:
        entered.set()
        assert release.wait(60)
        return step(*given)

    with opened(address, enrollment=enrollment(sounds)) as (one, _), opened(address) as (two, _):
        monkeypatch.setattr(EXTRACTOR.engine, "step", held)
        one.send(bytes(2000))
        assert entered.wait(60)
        assert httpx.get(f"{address}/healthz", timeout=30).status_code == 200
        two.send(bytes(2000))
        assert len(two.recv(timeout=30)) == 2 * (1000 - 1000 % EXTRACTOR.engine.hop - EXTRACTOR.engine.hop)
        release.set()
        assert one.recv(timeout=60)


def test_a_token_and_the_origin_hold_for_streams_too(extractor: Extractor, tmp_path: Path, address: str) -> None:
    for origin, kind in (("http://evil.example", "origin"), ("null", "origin")):
        with connect(f"{address.replace('http', 'ws')}/v1/stream", proxy=None, origin=origin) as socket:  # type: ignore[arg-type]
            assert refused(socket) == (kind, 1008, "pages of other sites may not use this server")
    settings = Settings(tmp_path / "voices", token=TOKEN, is_local=False)
    with open_service(extractor, settings, EXTRACTOR) as service:
        guarded = TestClient(create_app(service), base_url="http://localhost")

        def answer_to(**headers: str) -> str:
            with guarded.websocket_connect(PLACE, headers=headers) as socket:
                socket.send_json(START)
                answer = socket.receive_json()
                return str(answer["problem"]["type"] if answer["type"] == "problem" else answer["type"])

        assert answer_to() == answer_to(authorization="Bearer wrong") == "urn:onevoice:problem:token"
        assert service.open_streams == 0
        assert answer_to(authorization=f"Bearer {TOKEN}") == "ready"
        guarded.post("/v1/session", json={"token": TOKEN})  # as the page does, which cannot set a header
        assert answer_to() == "ready"


def test_a_voice_saved_without_the_live_network_does_not_fit(
    extractor: Extractor, sounds: Path, tmp_path: Path
) -> None:
    settings = Settings(tmp_path / "voices")
    files = {"enrollment": (sounds / "enrollment.wav").read_bytes()}
    with open_service(extractor, settings) as service:
        client = TestClient(create_app(service), base_url="http://localhost")
        saved = client.post("/v1/voices", data={"name": "x"}, files=files).json()
        assert (saved["fits"], saved["fits_live"]) == (True, False)
    with open_service(extractor, settings, EXTRACTOR) as service:
        problem, code = one_shot(service, {**START, "voice": saved["id"]})
        assert (problem["status"], code) == (409, 1008)
        assert "saved without the network for live sound" in problem["detail"]
        client = TestClient(create_app(service), base_url="http://localhost")
        other = client.post("/v1/voices", data={"name": "y"}, files=files).json()
        paths = sorted(path for path in (tmp_path / "voices").rglob("*.voice"))
        assert len(paths) == 3
        assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
        assert [voice["fits_live"] for voice in client.get("/v1/voices").json()] == [False, True]
        for voice in (saved, other):
            assert client.delete(f"/v1/voices/{voice['id']}").status_code == 204
        assert not list((tmp_path / "voices").rglob("*.voice"))


def test_weights_that_are_causal_serve_both(tmp_path: Path, sounds: Path) -> None:
    settings = Settings(tmp_path / "voices")
    with open_service(EXTRACTOR, settings, EXTRACTOR) as service:
        client = TestClient(create_app(service), base_url="http://localhost")
        files = {"enrollment": (sounds / "enrollment.wav").read_bytes()}
        saved = client.post("/v1/voices", data={"name": "x"}, files=files).json()
        assert (saved["fits"], saved["fits_live"]) == (True, True)
        assert len(list((tmp_path / "voices").rglob("*.voice"))) == 1
