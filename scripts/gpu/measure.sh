#!/bin/sh
# The rows of docs/performance.md that want a GPU: sh call-1/measure.sh SCRATCH [OUT], after unpack.py.
set -eu
out=${2:-$1/measured}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$1"
export PYTHONPATH="$PWD/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
measure() { # NAME COMMAND...: show and keep what a command prints; the others go on when one fails
    name=$1
    shift
    echo "== $*"
    "$@" >"$out/$name.txt" 2>&1 || echo "failed, status $?"
    cat "$out/$name.txt"
}
for precision in bfloat16 float32; do
    measure "profile-$precision" python3 -m onevoice train --config code/configs/gpu_pool.json \
        --set "name=profile-$precision" "training.precision=$precision" --profile 20
    cp "runs/profile-$precision/profile/profile.json" "$out/profile-$precision.json" || true
done
measure train_speed python3 code/benchmarks/train_speed.py --device cuda --batch 64
measure data_speed python3 code/benchmarks/data_speed.py --pack packs/pool --device cuda --batch 64 --step-batch 64
measure model_speed python3 code/benchmarks/model_speed.py --device cuda --batch 16
