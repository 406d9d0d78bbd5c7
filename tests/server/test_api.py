"""The API as a client sees it: extractions, recordings, voices, files, progress."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient
from server.test_bad_requests import TERMINAL, wav
from tiny import save_tiny

from onevoice.audio import read_audio
from onevoice.extraction import enrollment
from onevoice.extraction.discovery import FoundVoice
from onevoice.extraction.extractor import Extractor, load
from onevoice.extraction.recording import extract_file
from onevoice.server.app import create_app
from onevoice.server.schemas import Extraction
from onevoice.server.service import Service, open_service
from onevoice.server.settings import Settings


def files(sounds: Path, *fields: str) -> list[tuple[str, Any]]:
    return [(field, (f"{field}.wav", (sounds / f"{field}.wav").read_bytes())) for field in fields]


def extract(client: TestClient, sounds: Path, *fields: str, **texts: Any) -> dict[str, Any]:
    answer = client.post("/v1/extractions", files=files(sounds, *fields) or None, data=texts)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/extractions/{answer.json()['id']}"
    return dict(answer.json())


def upload(client: TestClient, sounds: Path) -> str:
    answer = client.post("/v1/recordings", files={"recording": (sounds / "mixture.wav").read_bytes()})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def download(client: TestClient, job: dict[str, Any], name: str, folder: Path) -> np.ndarray:
    answer = client.get(job["result"]["files"][name])
    assert answer.status_code == 200
    (folder / name).write_bytes(answer.content)
    return read_audio(folder / name)[0]


def test_the_answer_is_what_the_command_writes(
    client: TestClient, sounds: Path, extractor: Extractor, tmp_path: Path
) -> None:
    job = extract(client, sounds, "mixture", "enrollment", report="true")
    mixture, enrollment = sounds / "mixture.wav", sounds / "enrollment.wav"
    expected = extract_file(extractor, mixture, enrollment, tmp_path / "e.wav", tmp_path / "r.wav")
    assert client.get(job["result"]["files"]["voice.wav"]).content == (tmp_path / "e.wav").read_bytes()
    assert client.get(job["result"]["files"]["residual.wav"]).content == (tmp_path / "r.wav").read_bytes()
    assert job["result"]["notes"] == [note.replace(f"{sounds}/", "") for note in expected.notes]
    assert job["status"] == "done"
    assert job["mixture"] == "mixture.wav"
    assert (job["result"]["seconds"], job["result"]["sample_rate"]) == (2.0, 8000)
    assert job["result"]["check_up"]["seconds"] == 2.0
    page = client.get(job["result"]["files"]["report.html"])
    assert "attachment" in page.headers["content-disposition"]
    assert "<h1>" in page.text
    assert "Extraction from mixture.wav" in page.text
    assert "/tmp" not in page.text
    assert "upload-" not in page.text


def test_the_copies_share_one_gain_and_add_up(client: TestClient, sounds: Path, tmp_path: Path) -> None:
    job = extract(client, sounds, "mixture", "enrollment")
    mixture, voice, residual = (
        download(client, job, f"{name}.flac", tmp_path) for name in ("mixture", "voice", "residual")
    )
    gain = float(mixture @ read_audio(sounds / "mixture.wav")[0] / (mixture @ mixture))
    np.testing.assert_allclose(gain * mixture, read_audio(sounds / "mixture.wav")[0], atol=2e-4)
    np.testing.assert_allclose(voice + residual, mixture, atol=2e-4)
    assert len(download(client, job, "voice.mp3", tmp_path)) == pytest.approx(16_000, abs=3000)
    assert "report.html" not in job["result"]["files"]


def test_ranges(client: TestClient, sounds: Path) -> None:
    job = extract(client, sounds, "mixture", "enrollment")
    place = job["result"]["files"]["voice.flac"]
    whole = client.get(place).content
    part = client.get(place, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert client.get(place, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


def test_a_stretch_of_the_mixture_as_the_voice(
    client: TestClient, sounds: Path, extractor: Extractor, tmp_path: Path
) -> None:
    job = extract(client, sounds, recording=upload(client, sounds), begin=0.1, end=0.9)
    extract_file(extractor, sounds / "mixture.wav", f"{sounds / 'mixture.wav'}@0.1-0.9", tmp_path / "e.wav")
    assert client.get(job["result"]["files"]["voice.wav"]).content == (tmp_path / "e.wav").read_bytes()


def test_a_person_found_in_the_mixture(client: TestClient, sounds: Path) -> None:
    number = upload(client, sounds)
    people = client.get(f"/v1/recordings/{number}/voices").json()
    assert [person["number"] for person in people] == list(range(1, len(people) + 1))
    assert extract(client, sounds, recording=number, person=1)["status"] == "done"


def test_a_recording_of_two_people_as_the_voice(
    client: TestClient, sounds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note says what to do in words for people without a terminal."""
    people = [FoundVoice(number, ((0.0, 3.0),), (0.0, 3.0)) for number in (1, 2)]
    monkeypatch.setattr(enrollment, "find_voices", lambda sound, rate, speech: people)
    notes = extract(client, sounds, recording=upload(client, sounds), begin=0.1, end=0.9)["result"]["notes"]
    assert [note for note in notes if " from 0:00.1 to 0:00.9 seems to have 2 voices" in note], notes
    assert not TERMINAL.search(" ".join(notes))


def test_several_enrollments(client: TestClient, sounds: Path) -> None:
    answer = client.post("/v1/extractions", files=files(sounds, "mixture", "enrollment", "enrollment"))
    assert answer.status_code == 201


def test_each_channel(client: TestClient, sounds: Path, extractor: Extractor, tmp_path: Path) -> None:
    mixture = read_audio(sounds / "mixture.wav")[0]
    soundfile.write(tmp_path / "stereo.wav", np.stack([mixture, 0.5 * mixture[::-1]], axis=1), 8000, subtype="FLOAT")
    stereo = ("mixture", ("stereo.wav", (tmp_path / "stereo.wav").read_bytes()))
    answer = client.post("/v1/extractions", files=[stereo, *files(sounds, "enrollment")], data={"channel": "each"})
    assert answer.status_code == 201
    job = answer.json()
    assert job["result"]["channels"] == 2
    extract_file(
        extractor, tmp_path / "stereo.wav", sounds / "enrollment.wav", tmp_path / "e.wav", channel="each"
    )  # fmt: skip
    assert client.get(job["result"]["files"]["voice.wav"]).content == (tmp_path / "e.wav").read_bytes()
    (tmp_path / "m.flac").write_bytes(client.get(job["result"]["files"]["mixture.flac"]).content)
    assert soundfile.read(tmp_path / "m.flac")[0].shape == (16_000, 2)


def test_where_the_voice_is_heard(client: TestClient, sounds: Path, tmp_path: Path, extractor: Extractor) -> None:
    job = extract(client, sounds, "mixture", "enrollment", absent="mute")
    page = tmp_path / "t.csv"
    expected = extract_file(
        extractor, sounds / "mixture.wav", sounds / "enrollment.wav", tmp_path / "e.wav",
        absent_db=float("inf"), timeline=page,
    )  # fmt: skip
    assert client.get(job["result"]["files"]["voice.wav"]).content == (tmp_path / "e.wav").read_bytes()
    assert expected.presence is not None
    assert job["result"]["presence"]["score_db"] == expected.presence.score_db
    assert client.get(job["result"]["files"]["voice.csv"]).text == (
        page.read_text().replace("mixture,enrollment,", "mixture,voice,")
    )
    overview = client.get(f"/v1/extractions/{job['id']}/overview").json()
    np.testing.assert_allclose(overview["presence_db"], expected.presence.levels_db, atol=0.051)


def test_weights_that_cannot_tell(sounds: Path, tmp_path: Path) -> None:
    extractor = load(save_tiny(tmp_path / "tiny.safetensors"), device="cpu")
    with open_service(extractor, Settings(tmp_path / "voices")) as service:
        client = TestClient(create_app(service), base_url="http://localhost")
        job = extract(client, sounds, "mixture", "enrollment")
        assert job["result"]["presence"] is None
        assert not [name for name in job["result"]["files"] if name.endswith(".csv")]
        muted = client.post("/v1/extractions", files=files(sounds, "mixture", "enrollment"), data={"absent": "mute"})
        assert (muted.status_code, "cannot tell where" in muted.json()["detail"]) == (422, True)
        assert client.get("/v1/server").json()["tells_presence"] is False


@pytest.mark.parametrize(
    ("sound", "rate", "note"),
    [
        (np.zeros(4000), 8000, "the recording is silent"),
        (np.array([0.5]), 8000, ""),
        (np.full(4000, 0.5), 8000, ""),
        (np.sign(np.sin(np.arange(19_200) / 50)), 192_000, ""),
    ],
    ids=["silence", "one sample", "DC", "192 kHz, clipped"],
)
def test_odd_mixtures_that_can_be_used(
    client: TestClient, sounds: Path, sound: np.ndarray, rate: int, note: str
) -> None:
    odd = ("mixture", ("odd.wav", wav(sound, rate)))
    job = client.post("/v1/extractions", files=[odd, *files(sounds, "enrollment")]).json()
    assert job["status"] == "done"
    assert (job["result"]["seconds"], job["result"]["sample_rate"]) == (len(sound) / rate, rate)
    assert any(each.startswith(note) for each in job["result"]["notes"])
    voice, _ = soundfile.read(io.BytesIO(client.get(job["result"]["files"]["voice.wav"]).content))
    assert voice.shape == sound.shape
    assert np.isfinite(voice).all()
    assert client.get(f"/v1/extractions/{job['id']}/overview").status_code == 200


def test_a_job_that_is_followed(client: TestClient, sounds: Path) -> None:
    answer = client.post("/v1/extractions?wait=0", files=files(sounds, "mixture", "enrollment"))
    assert answer.status_code == 202
    place = answer.headers["location"]
    events = [line for line in client.get(f"{place}/events").text.splitlines() if line]
    assert events[0::2] == ["event: state"] * (len(events) // 2)
    states = [Extraction.model_validate_json(line.removeprefix("data: ")) for line in events[1::2]]
    assert states[-1].status == "done"
    assert [each.progress for each in states] == sorted(each.progress for each in states)
    assert client.get(place).json() == json.loads(events[-1].removeprefix("data: "))
    assert client.delete(place).status_code == 204
    assert [client.request(way, place).status_code for way in ("GET", "DELETE")] == [404, 404]


def test_a_job_that_fails_says_why(client: TestClient, sounds: Path, tmp_path: Path, service: Service) -> None:
    before = sorted(service.folder.rglob("*"))
    silent = (sounds / "mixture.wav").read_bytes()[:44] + bytes(32_000)
    order = [("enrollment", ("a b.wav", silent)), *files(sounds, "mixture")]
    answer = client.post("/v1/extractions", files=order)
    assert answer.status_code == 422
    assert answer.json()["detail"] == "a b.wav: is silent (all samples are 0); give a recording of speech"
    assert answer.headers["content-type"] == "application/problem+json"
    assert sorted(service.folder.rglob("*")) == before
    later = client.post("/v1/extractions?wait=0", files=order)
    assert client.get(f"{later.headers['location']}/events").status_code == 200
    failed = client.get(later.headers["location"]).json()
    assert (failed["status"], failed["problem"]["type"]) == ("failed", "urn:onevoice:problem:audio")
    assert client.get(f"{later.headers['location']}/overview").status_code == 409


def test_a_recording_at_a_glance(client: TestClient, sounds: Path) -> None:
    number = upload(client, sounds)
    described = client.get(f"/v1/recordings/{number}").json()
    assert (described["seconds"], described["sample_rate"], described["channels"]) == (2.0, 8000, 1)
    overview = client.get(f"/v1/recordings/{number}/overview").json()
    picture = overview["pictures"]["mixture"]
    assert max(np.abs([picture["low"], picture["high"]]).ravel()) == 1.0
    assert picture["spectrogram"].startswith("data:image/png;base64,")
    copy = client.get(f"/v1/recordings/{number}/audio")
    assert (copy.headers["content-type"], copy.content[:4]) == ("audio/flac", b"fLaC")
    job = extract(client, sounds, "enrollment", recording=number)
    assert client.delete(f"/v1/recordings/{number}").status_code == 204
    assert client.get(f"/v1/recordings/{number}").status_code == 404
    assert client.get(job["result"]["files"]["mixture.flac"]).status_code == 200
    overview = client.get(f"/v1/extractions/{job['id']}/overview").json()
    assert list(overview["pictures"]) == ["mixture", "voice", "residual"]


def test_voices_are_kept_only_when_asked(client: TestClient, sounds: Path, service: Service) -> None:
    folder = service.settings.voices
    job = extract(client, sounds, "mixture", "enrollment")
    assert not folder.exists()
    assert client.get("/v1/voices").json() == []
    answer = client.post("/v1/voices", data={"name": "Ann ../../x", "extraction": job["id"]})
    assert answer.status_code == 201
    saved = answer.json()
    assert (saved["name"], saved["fits"], saved["check_up"]["seconds"]) == ("Ann ../../x", True, 2.0)
    (path,) = (each for each in folder.iterdir() if each.is_file())
    (live,) = (folder / "live").iterdir()  # the same voice for live streams
    assert (live.name, live.stat().st_mode & 0o777, live.parent.stat().st_mode & 0o777) == (path.name, 0o600, 0o700)
    assert (path.name, path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (
        f"{saved['id']}.voice", 0o600, 0o700,
    )  # fmt: skip
    assert b"enrollment.wav" not in path.read_bytes()
    other = client.post("/v1/voices", data={"name": "Bob"}, files=files(sounds, "enrollment")).json()
    assert [voice["name"] for voice in client.get("/v1/voices").json()] == ["Ann ../../x", "Bob"]
    assert client.get(f"/v1/voices/{saved['id']}").json() == saved
    again = extract(client, sounds, "mixture", voice=other["id"])
    assert client.get(again["result"]["files"]["voice.wav"]).content == (
        client.get(job["result"]["files"]["voice.wav"]).content
    )
    assert [client.delete(f"/v1/voices/{saved['id']}").status_code for _ in range(2)] == [204, 404]
    assert client.delete(f"/v1/voices/{other['id']}").status_code == 204
    assert [each for each in folder.rglob("*") if each.is_file()] == []


def test_health_limits_samples_and_metrics(client: TestClient, sounds: Path) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/v1/server").json()["max_seconds"] == 20.0
    assert client.get("/v1/samples/mixture.flac").content[:4] == b"fLaC"
    assert client.get("/v1/samples/README.md").status_code == 422
    extract(client, sounds, "mixture", "enrollment")
    text = client.get("/metrics").text
    assert 'onevoice_requests_total{method="GET",route="/healthz",status="200"}' in text
    done = [line for line in text.splitlines() if line.startswith('onevoice_extractions_total{outcome="done"}')]
    assert float(done[0].split()[-1]) >= 1
