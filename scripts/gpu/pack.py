"""Pack code, missing wheels and a corpus for a GPU machine without a network. Runs here.

    python3 scripts/gpu/pack.py OUT --speech SHARD.tar ... [--noise NOISE.tar] [--weights START.safetensors]

OUT gets `call-1`, `call-2`, …, one folder for each transfer, and every folder the scripts that unpack and run. The code
is that of the last commit. Wheels are those of the package's dependencies but torch and numpy, for x86-64 Linux.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

from parts import MIB, Limits, split

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
THERE = ("torch", "numpy")
"""What a machine with PyTorch has."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def gather_wheels(out: Path, python: str) -> None:
    """Download wheels of the dependencies into `out`, and build that of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [line for line in project["dependencies"] if not line.startswith(THERE)]
    place = [f"--platform={platform}" for platform in PLATFORMS]
    _pip("download", "--only-binary=:all:", f"--python-version={python}", *place, "-d", out, *wanted)
    for name in THERE:
        for wheel in out.glob(f"{name}-*.whl"):
            wheel.unlink()
    _pip("wheel", "--no-deps", "-w", out, ROOT)


def main() -> None:
    """Write the folders of the calls and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--speech", type=Path, nargs="+", required=True, help="shards of SPEAKER/UTTERANCE.ENDING")
    parser.add_argument("--noise", type=Path)
    parser.add_argument("--weights", type=Path, help="a checkpoint to start from")
    parser.add_argument("--python", default="3.12", help="the Python there")
    parser.add_argument("--part-mib", type=float, default=15, help="largest file of a transfer")
    parser.add_argument("--call-mib", type=float, default=60, help="largest transfer")
    options = parser.parse_args()
    for path in (*options.speech, options.noise, options.weights):
        if path is not None and not path.is_file():
            sys.exit(f"{path}: no such file")
    if options.out.exists() and any(options.out.iterdir()):
        sys.exit(f"{options.out}: is not empty; name a new folder, or its old parts would travel too")
    limits = Limits(round(options.part_mib * MIB), round(options.call_mib * MIB))
    with tempfile.TemporaryDirectory() as folder:
        code, wheels = Path(folder, "code.tar"), Path(folder, "wheels")
        wheels.mkdir()
        gather_wheels(wheels, options.python)
        with tarfile.open(Path(folder, "wheels.tar"), "w") as tar:
            tar.add(wheels, ".")
        subprocess.run(["git", "-C", ROOT, "archive", "-o", code, "HEAD"], check=True)
        files = {"wheels.tar": Path(folder, "wheels.tar"), "code.tar": code}
        if options.weights is not None:
            files["weights/start.safetensors"] = options.weights
        files |= {} if options.noise is None else {"noise/noise.tar": options.noise}
        files |= {f"speech/{path.name}": path for path in options.speech}
        calls = split(files, options.out, limits)
    for call in calls:
        for script in ("parts.py", "unpack.py", "run.py", "measure.sh"):
            shutil.copy(HERE / script, call)
        size = sum(path.stat().st_size for path in call.iterdir())
        parts = ", ".join(path.name for path in sorted(call.glob("*.[0-9][0-9][0-9]")))
        print(f"{call}: {size / MIB:.1f} MiB: {parts}")


def _pip(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(f"pip {arguments[0]} failed; see above, and try again with a network")


if __name__ == "__main__":
    main()
