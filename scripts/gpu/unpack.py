"""Unpack on the GPU machine what `pack.py` sent, call by call. Runs there; needs Python with pip, and PyTorch.

    python3 call-1/unpack.py call-1 SCRATCH
    …
    python3 call-4/unpack.py call-4 SCRATCH

Each call adds its parts to SCRATCH/parts. The one that completes them joins the files, installs the wheels into
SCRATCH/site, holds speakers out for validation, and packs the rest for training: SCRATCH/packs and SCRATCH/data.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from parts import join, missing_calls

SPEEDS = ("0.9", "1.1")
LAW = ("--test", "--snr", "-5", "-2.5", "0", "2.5", "5", "--seed", "7")


def onevoice(scratch: Path, *arguments: object) -> None:
    """Run a verb of `onevoice` as installed in `scratch`, in that folder; leave with its status when it fails."""
    paths = [str(scratch / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "onevoice", *map(str, arguments)]
    done = subprocess.run(command, cwd=scratch, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def install(scratch: Path) -> None:
    """Unpack the code, and install the wheels beside what the machine has."""
    extract(scratch / "code.tar", scratch / "code")
    extract(scratch / "wheels.tar", scratch / "wheels")
    if wheels := sorted((scratch / "wheels").glob("*.whl")):
        target = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", scratch / "site"]
        subprocess.run([sys.executable, "-m", "pip", "-q", "install", *target, *wheels], check=True)


def hold_out(speech: Path, held: Path, count: int) -> None:
    """Move `count` speakers with three utterances or more from `speech` to `held`, drawn by their names alone."""
    able = [folder for folder in speech.iterdir() if sum(path.is_file() for path in folder.rglob("*")) >= 3]
    drawn = sorted(able, key=lambda folder: hashlib.sha256(folder.name.encode()).digest())[:count]
    if len(drawn) < count:
        sys.exit(f"{speech}: only {len(drawn)} speakers have three utterances; hold fewer out with --held-out")
    held.mkdir(parents=True)
    for folder in drawn:
        folder.rename(held / folder.name)


def extract(archive: Path, out: Path) -> None:
    """Unpack a tar file; names that lead out of `out` are refused where Python can."""
    checked = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
    with tarfile.open(archive) as tar:
        tar.extractall(out, **checked)


def main() -> None:
    """Take up one call, and make everything ready after the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--held-out", type=int, default=12, help="speakers kept for validation, at least 2")
    parser.add_argument("--trials", type=int, default=60, help="validation trials made of them")
    options = parser.parse_args()
    scratch = options.scratch.resolve()
    shutil.copytree(options.call, scratch / "parts", dirs_exist_ok=True)
    if missing := missing_calls(scratch / "parts"):
        print(f"{options.call} taken up; still missing: {', '.join(f'call-{number}' for number in missing)}")
        return
    join(scratch / "parts", scratch)
    install(scratch)
    for shard in sorted((scratch / "speech").glob("*.tar")):
        extract(shard, scratch / "train")
    hold_out(scratch / "train", scratch / "valid", options.held_out)
    onevoice(scratch, "corpus", "pack", "train", "packs/pool", "--speeds", *SPEEDS)
    if (scratch / "noise").exists():
        onevoice(scratch, "corpus", "pack", "noise/noise.tar", "packs/noise", "--layout", "flat")
    onevoice(scratch, "mix", "valid", "data/validation", "--count", options.trials, *LAW)
    print(f"ready: python3 {options.call}/run.py {options.scratch} --minutes 8")


if __name__ == "__main__":
    main()
