"""Files elsewhere, which have an address such as s3://bucket/name; fsspec and its libraries transfer them."""

import contextlib
import importlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from onevoice.errors import AudioError, ConfigError, MissingDependencyError, OnevoiceError, StorageError

_ADDRESS = re.compile(r"([a-z][a-z0-9+]+):/{1,2}(.*)", re.DOTALL)
"""A scheme of two letters or more, as one letter is a drive; a `Path` has only one of the two slashes."""
_WEB = ("http", "https")


def as_address(name: str | Path) -> str | None:
    """Return the address of a file elsewhere, such as s3://bucket/name; None for a file of this machine."""
    found = _ADDRESS.fullmatch(str(name))
    if found is None or found[1] in ("file", *_WEB):
        return None
    return f"{found[1]}://{found[2]}"


def local_name(name: str) -> str:
    """Return a file:// address as a path, and any other name as it is."""
    return name.removeprefix("file://") if name.startswith("file:///") else name


def connect(address: str) -> tuple[Any, str]:
    """Return the file system of an address, by fsspec, and the path there.

    Raises `MissingDependencyError` if a package is missing, and `ConfigError` for an unknown kind of address.
    """
    try:
        fsspec = importlib.import_module("fsspec.core")
    except ImportError as error:
        raise MissingDependencyError(f'{address}: needs fsspec: pip install "onevoice[remote]"') from error
    try:
        system, path = fsspec.url_to_fs(address)
    except ImportError as error:
        raise MissingDependencyError(f"{address}: needs another package ({_first_line(error)})") from error
    except ValueError as error:
        raise ConfigError(f"{address}: is no address that fsspec knows ({_first_line(error)})") from error
    return system, str(path)


def check_addresses(inputs: Iterable[str | Path], outputs: Iterable[str | Path]) -> None:
    """Check that the packages for all addresses are there, and that no output is an input or another output.

    Raises `ConfigError`, and `MissingDependencyError`.
    """
    seen = set(filter(None, map(as_address, inputs)))
    for address in filter(None, map(as_address, outputs)):
        if address in seen:
            raise ConfigError(f"{address}: is the name of an input, or of two outputs; give it another name")
        seen.add(address)
    for address in {address.split(":")[0]: address for address in seen}.values():
        connect(address)


@contextlib.contextmanager
def local_copy(name: str | Path, folder: Path | None = None) -> Iterator[Path]:
    """Give a file of this machine as it is, and one elsewhere as a temporary copy in `folder`. Raises `AudioError`."""
    address = as_address(name)
    if address is None:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onevoice-") as place:
        copy = Path(place) / Path(address).name
        system, path = connect(address)
        with _transfer(address, AudioError, "read"):
            system.get_file(path, str(copy))
        yield copy


def upload(path: Path, address: str) -> None:
    """Copy a file to an address. Raises `StorageError`."""
    system, place = connect(address)
    with _transfer(address, StorageError, "written"):
        system.makedirs(system._parent(place), exist_ok=True)
        system.put_file(str(path), place)


def open_bytes(path: Path) -> Any:
    """Open a file, here or elsewhere, as a stream of bytes with any position. Raises `AudioError` for one elsewhere."""
    address = as_address(path)
    if address is None:
        return path.open("rb")
    system, place = connect(address)
    with _transfer(address, AudioError, "read"):
        return system.open(place, "rb")


def read_range(path: Path, first: int, size: int) -> bytes:
    """Return `size` bytes of a file, here or elsewhere. Raises `OSError`, and `AudioError` for a file elsewhere."""
    address = as_address(path)
    if address is None:
        with path.open("rb") as stream:
            stream.seek(first)
            return stream.read(size)
    system, place = connect(address)
    with _transfer(address, AudioError, "read"):
        return bytes(system.cat_file(place, start=first, end=first + size))


def exists(address: str) -> bool:
    """Check whether an address has a file. Raises `StorageError`."""
    system, place = connect(address)
    with _transfer(address, StorageError, "looked up"):
        return bool(system.exists(place))


@contextlib.contextmanager
def _transfer(address: str, kind: type[OnevoiceError], verb: str) -> Iterator[None]:
    """Turn the errors of a library that transfers files into one line. Each library has its own kinds of errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{address}: no such file") from error
    except Exception as error:
        raise kind(f"{address}: cannot be {verb} ({type(error).__name__}: {_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
