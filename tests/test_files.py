"""Files are complete under their name or do not exist."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from onevoice.errors import StorageError
from onevoice.files import atomic_write, storage_errors


@pytest.fixture
def small_disk() -> Iterator[int]:
    """No file may grow beyond 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("durable", [True, False])
def test_content_and_folders_appear(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    for content in (b"first", b"", b"third"):
        atomic_write(path, content, durable=durable)
        assert path.read_bytes() == content
    assert [each.name for each in path.parent.iterdir()] == ["c.bin"]


def test_a_function_writes_to_a_temporary_path(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(path: Path) -> None:
        seen.append(path)
        path.write_bytes(b"content")

    atomic_write(tmp_path / "a.bin", write)
    assert (tmp_path / "a.bin").read_bytes() == b"content"
    assert seen[0].parent == tmp_path
    assert seen[0].name.startswith(".")  # hidden, so a listing of audio files ignores it
    assert not seen[0].exists()


def test_the_old_content_stays_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of the n")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk(tmp_path: Path, small_disk: int) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, b"x" * small_disk)
    with pytest.raises(StorageError, match=r"a\.bin: cannot be written \(File too large\); free space or choose"):
        atomic_write(path, b"y" * (small_disk + 1))
    assert path.read_bytes() == b"x" * small_disk
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.bin", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="cannot be written"):
            atomic_write(path, b"y")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


def test_only_os_errors_become_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), storage_errors(tmp_path):
        raise ValueError("mine")
    with pytest.raises(StorageError, match="odd"), storage_errors(tmp_path):
        raise OSError("odd")
