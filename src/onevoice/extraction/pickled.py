"""Dicts of tensors and plain values in the format of `torch.save`, read without running any code in them.

What only resuming needs is in such a file, `<name>.resume.pt` beside a checkpoint; other programs keep weights in them
(`.pth`). A resume file ends with the SHA-256 of what comes before it, as the comment of the zip archive that
`torch.save` writes; loading compares it. Files of other programs and of earlier versions have none.
"""

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from onevoice.errors import CheckpointError
from onevoice.files import atomic_write, describe_file

PICKLES = ("a zip archive", "a pickle", None)
"""What `describe_file` may return for a file of `torch.save`, damaged or not."""

TAG = b"onevoice sha256 "
COMMENT_BYTES = len(TAG) + 64


def save_resume(path: Path, content: Mapping[str, Any]) -> None:
    """Write what resuming needs (tensors and plain values only) to `path`, atomically. Raises `StorageError`."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    whole = buffer.getvalue()[:-2] + COMMENT_BYTES.to_bytes(2, "little")  # a zip archive ends with this length, now 0
    atomic_write(path, whole + TAG + hashlib.sha256(whole).hexdigest().encode())


def resume_path(checkpoint: str | Path) -> Path:
    """Return the path of the resume file beside a checkpoint; a resume file is returned unchanged."""
    checkpoint = Path(checkpoint)
    return checkpoint if checkpoint.name.endswith(".resume.pt") else checkpoint.with_suffix(".resume.pt")


def load_pickled(path: str | Path) -> dict[str, Any]:
    """Read a dict written by `torch.save` without running any of its code. Raises `CheckpointError`.

    Objects of foreign classes (the original system pickled its config parser) become inert placeholders.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if describe_file(path) not in PICKLES:
        raise unreadable_error(path, "")
    _require_checksum(path)
    try:
        foreign = [_placeholder(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(str(path))]
        with torch.serialization.safe_globals(cast(Any, foreign)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint: a pickle that contains code, none of which was run; "
            "give a .safetensors file or a dict with 'state_dict'"
        ) from error
    except Exception as error:  # torch raises a dozen types, one for each way in which a file can be broken
        reason = str(error).strip().split("\n")[0].split(". ")[0][:150] or type(error).__name__
        raise unreadable_error(path, reason) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not the dict of a checkpoint")
    return content


def _require_checksum(path: Path) -> None:
    """Raise `CheckpointError` if a file has a checksum and differs from it."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - COMMENT_BYTES))
        if not (comment := stream.read()).startswith(TAG):
            return
        stream.seek(0)
        whole = stream.read()[:-COMMENT_BYTES]
    if comment[len(TAG) :] != hashlib.sha256(whole).hexdigest().encode():
        raise unreadable_error(path, "its content differs from its checksum")


def unreadable_error(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file that `reason` makes unreadable, which names the kind of a file of another program."""
    kind = describe_file(path)
    what = f" ({reason}); copy it again" if kind in PICKLES else f": it is {kind}; give a .safetensors or .pth file"
    return CheckpointError(f"{path}: not a readable checkpoint{what}")


def _placeholder(name: str) -> tuple[type, str]:
    """Return an inert class that stands in for the global `name` of a pickle, and the name."""

    class Foreign:
        contents: Any = None

        def __new__(cls, *args: Any, **kwargs: Any) -> "Foreign":
            return super().__new__(cls)

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def __setstate__(self, state: Any) -> None:
            self.contents = state

    return Foreign, name
