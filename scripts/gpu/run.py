"""Train on the GPU machine for some minutes, judge the weights, and cut them into parts to send back. Runs there.

    python3 call-1/run.py SCRATCH --minutes 8 [--out OUT] [--config FILE] [--set KEY=VALUE ...]

Goes on with the run in SCRATCH when there is one; otherwise starts from the weights that were sent, if any.
SCRATCH/return gets `call-1` (the weights to use, the scores, the config, and what else has room) and the further calls
that resuming elsewhere needs; `call-1` is copied to OUT.
"""

import argparse
import json
import shutil
from pathlib import Path

from parts import Limits, read_manifest, split
from unpack import onevoice

CONFIG = Path("code", "configs", "gpu_pool.json")


def main() -> None:
    """Train, evaluate, split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, help="where the machine looks for files to return")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", nargs="*", default=[])
    options = parser.parse_args()
    scratch = options.scratch.resolve()
    config = (options.config or scratch / CONFIG).resolve()
    run = scratch / "runs" / json.loads(config.read_text())["name"]
    begin = scratch / "weights" / "start.safetensors"
    start = ["--load", begin] if begin.exists() else []
    if (run / "last.resume.pt").exists():
        start = ["--resume", run / "last.safetensors"]
    changes = ["--set", *options.set] if options.set else []
    onevoice(scratch, "train", "--config", config, "--minutes", options.minutes, *start, *changes)
    weights = next(path for name in ("best", "last") if (path := run / f"{name}.safetensors").exists())
    metrics = ["--jobs", "1", "--metrics", "si_sdr", "si_sdr_improvement", "--output", run / "validation.json"]
    onevoice(scratch, "eval", "--checkpoint", weights, "-t", "data/validation", *metrics)
    small = ("validation.json", "metrics.jsonl", "config.json")
    files = {path.name: path for path in (weights, *(run / name for name in small), run / "last.resume.pt")}
    shutil.rmtree(scratch / "return", ignore_errors=True)
    calls = split(files, scratch / "return", Limits(**read_manifest(scratch / "parts")["limits"]))
    if options.out is not None:
        shutil.copytree(calls[0], options.out, dirs_exist_ok=True)
    print(
        f"{calls[0]} holds {weights.name}; to resume elsewhere fetch all of {len(calls)} calls in {scratch / 'return'}"
    )


if __name__ == "__main__":
    main()
