"""Files cut into parts that pass through small transfers, and joined again.

    python3 scripts/gpu/parts.py RECEIVED OUT      join all parts below RECEIVED into OUT, every byte checked

A sender writes `call-1`, `call-2`, …: folders within the limits of one transfer, each with its parts and a manifest of
all. Needs nothing but Python.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Limits:
    """What one transfer takes; a little less than the machine says, for what travels beside."""

    part_bytes: int = 15 * MIB
    call_bytes: int = 60 * MIB
    call_files: int = 7
    """Beside the manifest."""


def sha256(data: bytes) -> str:
    """Return the checksum as text."""
    return hashlib.sha256(data).hexdigest()


def split(files: Mapping[str, Path], out: Path, limits: Limits) -> list[Path]:
    """Cut `files`, by the names they shall have, into parts below `out`; return the folders of the calls.

    A part goes into the first call that has room, so that what comes first arrives first.
    """
    calls: list[list[int]] = []
    manifest: dict[str, dict[str, object]] = {}
    for name, path in files.items():
        data, parts = path.read_bytes(), []
        for number, start in enumerate(range(0, max(1, len(data)), limits.part_bytes)):
            piece = data[start : start + limits.part_bytes]
            call = _room(calls, len(piece), limits)
            part = f"{name.replace('/', '-')}.{number:03d}"
            place = out / f"call-{call}" / part
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(piece)
            parts.append({"name": part, "call": call, "sha256": sha256(piece)})
        manifest[name] = {"sha256": sha256(data), "bytes": len(data), "parts": parts}
    folders = [out / f"call-{number}" for number in range(1, len(calls) + 1)]
    for folder in folders:
        (folder / MANIFEST).write_text(json.dumps({"limits": asdict(limits), "files": manifest}, indent=1))
    return folders


def missing_calls(received: Path) -> list[int]:
    """Return the numbers of the calls of which parts below `received` are missing or damaged."""
    found = {path.name: path for path in received.rglob("*.[0-9][0-9][0-9]")}
    wanted = [part for entry in read_manifest(received)["files"].values() for part in entry["parts"]]
    return sorted(
        {
            part["call"]
            for part in wanted
            if part["name"] not in found or sha256(found[part["name"]].read_bytes()) != part["sha256"]
        }
    )


def join(received: Path, out: Path) -> list[Path]:
    """Write the files whose parts lie below `received` into `out`; end with one line when any is missing or damaged."""
    if missing := missing_calls(received):
        calls = ", ".join(f"call-{number}" for number in missing)
        sys.exit(f"{received}: parts of {calls} are missing or damaged; transfer these again")
    found = {path.name: path for path in received.rglob("*.[0-9][0-9][0-9]")}
    written = []
    for name, entry in read_manifest(received)["files"].items():
        place = out / name
        if not place.resolve().is_relative_to(out.resolve()):
            sys.exit(f"{received}: its manifest names {name}, which lies outside {out}; nothing more was written")
        data = b"".join(found[part["name"]].read_bytes() for part in entry["parts"])
        if sha256(data) != entry["sha256"]:
            sys.exit(f"{received}: {name} is not what was sent; pack it again")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        written.append(place)
    return written


def read_manifest(received: Path) -> dict:
    """Return the manifest below `received`; end with one line when there is none."""
    for path in sorted(received.rglob(MANIFEST)):
        return json.loads(path.read_text())
    sys.exit(f"{received}: holds no {MANIFEST}; name the folder that holds the parts")


def _room(calls: list[list[int]], size: int, limits: Limits) -> int:
    """Return the number (from 1) of the first call with room for a part of `size` bytes, and put it there."""
    for number, call in enumerate(calls, 1):
        if len(call) < limits.call_files and sum(call) + size <= limits.call_bytes:
            call.append(size)
            return number
    calls.append([size])
    return len(calls)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("received", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for place in join(options.received, options.out):
        print(place)
