"""Files elsewhere, by fsspec: recordings, outputs, job lists and tar shards."""

import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import command, save_tiny

from onevoice.addresses import as_address, connect, local_copy, local_name, read_range, upload
from onevoice.errors import AudioError, ConfigError, MissingDependencyError, StorageError
from onevoice.extraction.jobs import ExtractBatch

fsspec = pytest.importorskip("fsspec", reason='fsspec is not installed: pip install "onevoice[remote]"')
WEIGHTS = ("--pretrained", "tiny.safetensors", "--precision", "float32", "--device", "cpu")


@pytest.fixture
def memory() -> Iterator[Any]:
    """A file system in the memory of this process."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.fixture
def names(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Any) -> list[str]:
    """The names of two trials, which are in memory://in too; the current folder has weights."""
    found = sorted(path.name.removesuffix("-mixed.wav") for path in trials.glob("*-mixed.wav"))[:2]
    for name in found:
        for kind in ("mixed", "ref"):
            memory.pipe(f"/in/{name}-{kind}.wav", (trials / f"{name}-{kind}.wav").read_bytes())
    save_tiny(tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    return found


def test_what_is_an_address() -> None:
    assert as_address("s3://bucket/a.wav") == as_address(Path("s3://bucket/a.wav")) == "s3://bucket/a.wav"
    assert as_address("memory:///in/a.wav") == "memory:///in/a.wav"
    for name in ("a.wav", "/a.wav", "c:/a.wav", "https://example.org/a.wav", "file:///a.wav", "-", "a.mp3@1:20-1:31"):
        assert as_address(name) is None
    assert (local_name("file:///a/b.wav"), local_name("s3://a")) == ("/a/b.wav", "s3://a")


def test_an_extraction_from_and_to_addresses_has_the_same_bytes(
    names: list[str], trials: Path, memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names of a job list at an address start at its folder there."""
    rows = [
        {"mixture": f"../in/{name}-mixed.wav", "voice": f"memory://in/{name}-ref.wav", "output": f"{name}.flac"}
        for name in names
    ]
    rows[0]["residual"] = "rest.wav"
    rows[1]["output"] = (tmp_path / "second.flac").as_uri()
    memory.pipe("/lists/jobs.jsonl", "\n".join(map(json.dumps, rows)).encode())
    done = command(capsys, "extract", "--list", "memory://lists/jobs.jsonl", *WEIGHTS)
    assert done.status == 0, done.err
    assert f"memory://lists/{names[0]}.flac: 1.0 s of sound" in done.out
    for name in names:
        mixture, voice = (trials / f"{name}-{kind}.wav" for kind in ("mixed", "ref"))
        done = command(capsys, "extract", mixture, voice, f"{name}.flac", "--residual", "rest.wav", "--force", *WEIGHTS)
        assert done.status == 0, done.err
        if name == names[0]:
            assert memory.cat(f"/lists/{name}.flac") == Path(f"{name}.flac").read_bytes()
            assert memory.cat("/lists/rest.wav") == Path("rest.wav").read_bytes()
    assert Path("second.flac").read_bytes() == Path(f"{names[1]}.flac").read_bytes()


def test_an_s3_server(
    names: list[str], trials: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client of S3 that users install, against a server of moto."""
    moto, s3fs = (
        pytest.importorskip(name, reason='pip install s3fs "moto[s3,server]"') for name in ("moto.server", "s3fs")
    )
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ):
            monkeypatch.setenv(name, value)
        bucket = s3fs.S3FileSystem()
        bucket.mkdir("bucket")
        given = [f"{names[0]}-{kind}.wav" for kind in ("mixed", "ref")]
        for name in given:
            bucket.put_file(str(trials / name), f"bucket/in/{name}")
        done = command(capsys, "extract", *(f"s3://bucket/in/{name}" for name in given), "s3://bucket/a.flac", *WEIGHTS)
        assert done.status == 0, done.err
        assert command(capsys, "extract", *(trials / name for name in given), "a.flac", *WEIGHTS).status == 0
        assert bucket.cat_file("bucket/a.flac") == Path("a.flac").read_bytes()
        done = command(capsys, "extract", "s3://bucket/in/none.wav", trials / given[1], "b.flac", *WEIGHTS)
        assert (done.status, done.err) == (2, "onevoice: error: s3://bucket/in/none.wav: no such file\n")
    finally:
        server.stop()


def test_addresses_that_cannot_be_used(names: list[str], memory: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mixture, voice = (f"memory://in/{names[0]}-{kind}.wav" for kind in ("mixed", "ref"))
    memory.pipe("/there.wav", b"")
    for arguments, complaint in (
        (("memory://in/gone.wav", voice, "a.wav"), "memory://in/gone.wav: no such file"),
        ((mixture, "memory://in/gone.wav", "a.wav"), "memory://in/gone.wav: no such file"),
        ((mixture, f"{voice}#2", "a.wav"), "a numbered voice needs a file of this machine"),
        ((mixture, voice, "memory://there.wav"), "memory://there.wav: exists; choose another name"),
        ((mixture, voice, mixture, "--force"), "is the name of an input, or of two outputs"),
        ((mixture, voice, "memory://a.xyz"), "unknown extension"),
        (("nowhere://a.wav", voice, "a.wav"), "nowhere://a.wav: is no address that fsspec knows"),
    ):
        done = command(capsys, "extract", *arguments, *WEIGHTS)
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert complaint in done.err
    assert memory.cat("/there.wav") == b""


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_s3(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", without_s3)
    with pytest.raises(MissingDependencyError, match=r"s3://b/a\.wav: needs another package \(Install s3fs"):
        connect("s3://b/a.wav")
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(MissingDependencyError, match=r'needs fsspec: pip install "onevoice\[remote\]"'):
        connect("s3://b/a.wav")


def test_errors_of_a_library_are_one_line(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError("access is denied\nby policy")

    for name in ("get_file", "put_file", "cat_file"):
        monkeypatch.setattr(type(memory), name, refuse)
    with pytest.raises(AudioError, match=r"memory://a: cannot be read \(PermissionError: access is denied\)"):
        local_copy("memory://a").__enter__()
    with pytest.raises(AudioError, match="cannot be read"):
        read_range(Path("memory://a"), 0, 1)
    with pytest.raises(StorageError, match=r"memory://a: cannot be written \(PermissionError: access is denied\)"):
        upload(tmp_path, "memory://a")


def test_tar_shards_pack_to_the_same_samples(
    corpus: Path, memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(path for path in corpus.rglob("*") if path.suffix in (".wav", ".flac"))
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for file in files:
            tar.add(file, arcname=f"{file.parent.parent.name}/{file.name}")
    (tmp_path / "shard.tar").write_bytes(shard.getvalue())
    memory.pipe("/shards/shard.tar", shard.getvalue())
    for source, out in ((tmp_path / "shard.tar", "here"), ("memory://shards/shard.tar", "there")):
        options = ("--sample-rate", 8000, "--workers", 1)
        done = command(capsys, "corpus", "pack", source, tmp_path / out, *options)
        assert done.status == 0, done.err
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("here", "there"))
    assert here == there
    for source, complaint in (
        ("memory://shards/gone.tar", "memory://shards/gone.tar: no such file"),
        ("memory://shards", "memory://shards: only .tar shards can be read from an address"),
    ):
        done = command(capsys, "corpus", "pack", source, tmp_path / "no")
        assert (done.status, done.err) == (2, f"onevoice: error: {complaint}\n")


def test_batches_of_rows(names: list[str], trials: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The callable can be pickled before and after it has loaded the network; failed rows say why."""
    batch = {
        "mixture": np.array([f"{trials}/{names[0]}-mixed.wav", "gone.wav"]),
        "voice": np.array([f"{trials}/{name}-ref.wav" for name in names]),
        "output": np.array(["a.wav", "b.wav"]),
    }
    extract = pickle.loads(pickle.dumps(ExtractBatch("tiny.safetensors", device="cpu", precision="float32")))
    result = extract(batch)
    assert result["seconds"].tolist() == [1.0, 0.0]
    assert result["error"].tolist() == ["", "gone.wav: no such file"]
    assert result["output"] is batch["output"]
    assert command(capsys, "extract", batch["mixture"][0], batch["voice"][0], "c.wav", *WEIGHTS).status == 0
    assert Path("a.wav").read_bytes() == Path("c.wav").read_bytes()
    again = pickle.loads(pickle.dumps(extract))
    assert again == extract
    assert len(pickle.dumps(extract)) < 1000  # without the network
    assert "a.wav: exists" in again(batch)["error"][0]
    with pytest.raises(ConfigError, match="row 0: output"):
        extract({"mixture": ["a"], "voice": ["b"]})
