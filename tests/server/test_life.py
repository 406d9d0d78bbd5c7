"""The life of a server: the queue, who may use it, what expires, and how it ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from extraction.test_stream import EXTRACTOR
from fastapi.testclient import TestClient
from tiny import command, process, save_tiny

from onevoice.audio import encode_audio, read_audio
from onevoice.errors import ConfigError
from onevoice.extraction.checkpoint import save_checkpoint
from onevoice.extraction.extractor import Extractor
from onevoice.server import folders, jobs
from onevoice.server.app import create_app
from onevoice.server.folders import private_folder
from onevoice.server.service import Service, open_service
from onevoice.server.settings import Settings, is_loopback

TOKEN = "0123456789abcdef"


def order(sounds: Path) -> list[Any]:
    return [(name, (name, (sounds / f"{name}.wav").read_bytes())) for name in ("mixture", "enrollment")]


class Gate:
    """Holds extractions back until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.begun = threading.Event(), threading.Semaphore(0)
        extract_file = jobs.extract_file

        def held(*arguments: Any, report: Any, **options: Any) -> Any:
            self.begun.release()
            while not self.opened.wait(0.02):
                report(0.1)
            return extract_file(*arguments, report=report, **options)

        patch.setattr(jobs, "extract_file", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def test_the_queue_has_positions_and_an_end(client: TestClient, sounds: Path, gate: Gate, service: Service) -> None:
    places = [client.post("/v1/extractions?wait=0", files=order(sounds)).headers["location"] for _ in range(4)]
    assert gate.begun.acquire(timeout=10)
    full = client.post("/v1/extractions?wait=0", files=order(sounds))
    assert (full.status_code, full.json()["type"]) == (503, "urn:onevoice:problem:busy")
    assert int(full.headers["retry-after"]) > 0
    assert [client.get(place).json()["position"] for place in places] == [None, 1, 2, 3]
    assert client.get("/healthz").json() | {"version": ""} == {
        "status": "ok", "version": "", "running": 1, "queued": 3,
    }  # fmt: skip
    assert client.delete(places[1]).status_code == 204
    assert [client.get(place).json()["position"] for place in places[2:]] == [1, 2]
    assert client.delete(places[0]).status_code == 204  # it runs: its files go at once, and its work stops
    assert not (service.folder / "extractions" / places[0].split("/")[-1]).exists()
    assert gate.begun.acquire(timeout=10)  # so that the next one begins
    gate.opened.set()
    for place in places[2:]:
        client.get(f"{place}/events")
        assert client.get(place).json()["status"] == "done"
        client.delete(place)
    assert list((service.folder / "extractions").iterdir()) == []


def test_a_server_that_stops_ends_what_runs_and_fails_what_waits(
    extractor: Extractor, sounds: Path, tmp_path: Path, gate: Gate
) -> None:
    with open_service(extractor, Settings(tmp_path / "voices")) as service:
        client = TestClient(create_app(service), base_url="http://localhost")
        first, second = (client.post("/v1/extractions?wait=0", files=order(sounds)).headers["location"] for _ in "12")
        assert gate.begun.acquire(timeout=10)
        assert [job.id for job in service.jobs.stop()] == [first.split("/")[-1]]
        failed = client.get(second).json()
        assert (failed["status"], failed["problem"]["type"]) == ("failed", "urn:onevoice:problem:stopping")
        assert client.post("/v1/extractions", files=order(sounds)).status_code == 503
        assert client.get("/healthz").json()["status"] == "stopping"
        gate.opened.set()
        service.jobs.close()
        assert client.get(first).json()["status"] == "done"


def test_a_client_that_leaves_while_it_waits(address: str, sounds: Path, gate: Gate, service: Service) -> None:
    """It never learned the id of its extraction, so that is deleted."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/extractions", files=order(sounds), timeout=httpx.Timeout(30, read=0.3))
    deadline = time.monotonic() + 30
    while any((service.folder / "extractions").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list((service.folder / "extractions").iterdir()) == []
    assert service.jobs.count()[1] == 0


def test_two_clients_that_delete_one_job(client: TestClient, sounds: Path, gate: Gate) -> None:
    place = client.post("/v1/extractions?wait=0", files=order(sounds)).headers["location"]
    assert gate.begun.acquire(timeout=10)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.delete(place).status_code, range(8)))
    assert sorted(answers) == [204, *[404] * 7]


def test_what_expires(extractor: Extractor, sounds: Path, tmp_path: Path) -> None:
    with open_service(extractor, Settings(tmp_path / "voices", ttl_seconds=100.0)) as service:
        now = time.time()
        service.jobs._clock = service.recordings._clock = lambda: now
        with TestClient(create_app(service), base_url="http://localhost") as client:
            job = client.post("/v1/extractions", files=order(sounds)).headers["location"]
            upload = client.post("/v1/recordings", files={"recording": (sounds / "mixture.wav").read_bytes()}).json()
            now += 99
            service.sweep()
            assert client.get(job).status_code == 200
            assert client.get(f"/v1/recordings/{upload['id']}").status_code == 200  # and is kept for longer
            now += 2
            service.sweep()
            assert client.get(job).status_code == 404
            assert client.get(f"/v1/recordings/{upload['id']}").status_code == 200
            now += 101
            service.sweep()
            assert client.get(f"/v1/recordings/{upload['id']}").status_code == 404
        assert [path for path in service.folder.rglob("*") if path.is_file()] == [service.folder / folders.LOCK]
        folder = service.folder
    assert not folder.exists()


def test_a_folder_is_private_and_that_of_a_killed_server_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / f"{folders.PREFIX}left"
    left.mkdir()
    (left / folders.LOCK).touch()
    (left / "recording").write_bytes(b"x")
    with private_folder() as one:
        assert not left.exists()
        assert one.stat().st_mode & 0o777 == 0o700
        with private_folder() as two:
            assert one.exists()
            assert one != two
    assert list(tmp_path.iterdir()) == []


def test_a_token(extractor: Extractor, sounds: Path, tmp_path: Path) -> None:
    settings = Settings(tmp_path / "voices", token=TOKEN, is_local=False)
    with open_service(extractor, settings) as service:
        client = TestClient(create_app(service), base_url="http://any.example")
        for answer in (
            client.get("/v1/voices"),
            client.get("/metrics"),
            client.get("/v1/voices", headers={"Authorization": "Bearer 0123456789abcdeX"}),
            client.get("/v1/voices", headers={"Authorization": f"Basic {TOKEN}"}),
            client.get("/v1/voices", headers={"Cookie": f"onevoice={TOKEN}"}),
            client.post("/v1/extractions", files=order(sounds)),
        ):
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert [client.get(path).status_code for path in ("/", "/healthz", "/v1/server")] == [200, 200, 200]
        assert client.get("/v1/voices", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert client.post("/v1/session", json={"token": "wrong"}).status_code == 403
        assert client.get("/v1/server").json()["is_allowed"] is False
        signed = client.post("/v1/session", json={"token": TOKEN})
        assert "HttpOnly" in signed.headers["set-cookie"]
        assert "SameSite=strict" in signed.headers["set-cookie"]
        assert TOKEN not in signed.headers["set-cookie"]
        assert client.get("/v1/voices").status_code == 200
        assert client.get("/v1/server").json()["is_allowed"] is True


def test_other_sites_may_not_use_the_server(client: TestClient, sounds: Path) -> None:
    def post(**headers: str) -> int:
        return client.post("/v1/extractions?wait=0", files=order(sounds), headers=headers).status_code

    assert post(origin="http://evil.example") == 403
    assert post(origin="null") == 403
    assert post(host="evil.example") == 403  # a name that was pointed at this machine
    assert post(origin="http://localhost") in (201, 202)
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/healthz", headers={"host": "[::1]:8000"}).status_code == 200
    assert client.get("/healthz", headers={"host": "["}).status_code == 403
    answer = client.options(
        "/v1/voices", headers={"origin": "http://evil.example", "access-control-request-method": "POST"}
    )
    assert not [name for name in answer.headers if name.startswith("access-control")]
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False), ("x", False)],
)
def test_only_a_local_server_needs_no_token(host: str, local: bool) -> None:
    assert is_loopback(host) is local
    if local:
        assert Settings(Path("v"), is_local=is_loopback(host)).token is None
    else:
        with pytest.raises(ConfigError, match="needs a token"):
            Settings(Path("v"), is_local=is_loopback(host))


def test_bad_options(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEVOICE_TOKEN", raising=False)
    (tmp_path / "token").write_text("short\n")
    for options, words in (
        (["--host", "0.0.0.0"], "needs a token"),
        (["--token-file", tmp_path / "token"], "has 5 characters"),
        (["--token-file", tmp_path / "gone"], "cannot be read"),
        (["--port", "70000"], "port: must be 0 to 65535"),
        (["--workers", "0"], "workers: must be above 0"),
        (["--max-streams", "0"], "max_streams: must be above 0"),
        (["--live", tmp_path / "none.safetensors"], "no such checkpoint file"),
        (["--live", save_tiny(tmp_path / "whole.safetensors")], "a stream needs a causal network"),
    ):
        done = command(capsys, "serve", *options)
        assert done.status == 2
        assert words in done.err


def test_without_the_packages_of_the_server(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from onevoice.cli import main; main(['serve'])"
    done = process(["-c", code])
    assert done.status == 2
    assert done.err == 'onevoice: error: serve needs fastapi: pip install "onevoice[serve]"\n'


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_checkpoint(folder / "causal.safetensors", EXTRACTOR.model.state_dict(), EXTRACTOR.card)
    return save_tiny(folder / "tiny.safetensors")


def start(weights: Path, folder: Path) -> tuple["subprocess.Popen[str]", str]:
    """Start `onevoice serve` in a process; return it and its address."""
    folder.mkdir(exist_ok=True)
    options = ["--port", "0", "--pretrained", weights, "--voices", folder / "voices", "--device", "cpu"]
    options += ["--live", weights.with_name("causal.safetensors")]
    process = subprocess.Popen(
        [sys.executable, "-m", "onevoice", "serve", *map(str, options)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("onevoice: open http://localhost:"), line
    return process, line.split()[2]


def test_a_killed_server_leaves_nothing_half_written_and_sigterm_lets_jobs_end(
    weights: Path, sounds: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process, address = start(weights, folder)
    saved = httpx.post(f"{address}/v1/voices", data={"name": "Ann"}, files=order(sounds)[1:], timeout=60).json()
    httpx.post(f"{address}/v1/recordings", files={"recording": (sounds / "mixture.wav").read_bytes()})
    process.kill()
    process.wait()
    assert len(list(folder.glob(f"{folders.PREFIX}*"))) == 1
    assert saved["fits_live"]
    process, address = start(weights, folder)
    assert len(list(folder.glob(f"{folders.PREFIX}*"))) == 1  # its own; the other one is gone
    assert httpx.get(f"{address}/v1/voices").json() == [saved]
    files = [("mixture", ("long.wav", _long(sounds))), *order(sounds)[1:]]
    place = address + httpx.post(f"{address}/v1/extractions?wait=0", files=files, timeout=60).headers["location"]
    while httpx.get(place).json()["status"] == "queued":
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    while httpx.get(f"{address}/healthz").json()["status"] == "ok":
        time.sleep(0.02)
    assert httpx.post(f"{address}/v1/extractions", files=order(sounds)).status_code == 503
    httpx.get(f"{place}/events", timeout=60)
    job = httpx.get(place).json()
    assert job["status"] == "done"
    assert httpx.get(address + job["result"]["files"]["voice.wav"]).status_code == 200
    assert httpx.delete(place).status_code == 204
    assert process.wait(timeout=30) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["voices"]


def _long(sounds: Path) -> bytes:
    samples, rate = read_audio(sounds / "mixture.wav")
    return encode_audio(np.tile(samples, 30), rate, ".wav")
