"""All speed tables, one after the other: `python benchmarks` (about five minutes on two cores)."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "mix_speed",
    "pack_speed",
    "data_speed",
    "model_speed",
    "train_speed",
    "eval_speed",
    "extract_speed",
    "live_speed",
)

for script in SCRIPTS:
    print(f"\n== {script}", flush=True)
    subprocess.run([sys.executable, str(Path(__file__).with_name(f"{script}.py"))], check=True)
