"""The private folder of a server, and what a killed one left."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onevoice.files import storage_errors

PREFIX = "onevoice-serve-"
LOCK = ".lock"
"""A running server holds a lock on this file of its folder; the lock ends with the process, however that ends."""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a temporary folder that only this user can read, and remove it at the end.

    First remove the folders of servers that were killed. Raises `StorageError`.
    """
    base = Path(tempfile.gettempdir())
    for folder in base.glob(f"{PREFIX}*"):
        _remove_if_left(folder)
    with storage_errors(base):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder and what is in it, also while somebody writes into it."""
    shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        with (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
    except OSError:  # it is in use, or gone
        return
