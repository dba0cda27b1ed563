#!/usr/bin/env bash
# Everything that can only be seen on a GPU, in under 8 minutes; what was found is left in a folder:
#   bash scripts/gpu_check.sh [FOLDER]
# tests-*.txt: drift in bf16, ZeRO-2 and ZeRO-3 next to none, memory next to `show --budget`, the smoke recipes; rates.md:
# what the GPU computes in a second; benchmark.md: ratios.
# Each part has its own limit; the last one to start may be cut short, which its file then says.
set -uo pipefail

out=$(realpath -m "${1:-gpu-check}")
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD" OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
if ! nvidia-smi -L 2>/dev/null; then
    echo "there is no GPU here" >&2
    exit 2
fi
mkdir -p "$out"
failed=0

part() { # part FILE SECONDS COMMAND...: what it prints goes to the file too
    local file=$1 limit=$2
    shift 2
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$file"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "exit code $code (124: cut short after $limit s): $*" | tee -a "$out/$file" >&2
    fi
    return "$code"
}

jobs=()
for name in trajectories budget smoke_recipes; do # at the same time: nothing in them is timed
    part "tests-$name.txt" 265 python -m pytest -m gpu "tests/gpu/test_gpu_$name.py" -s -v &
    jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
part rates.md 95 python scripts/gpu_rates.py --out "$out/rates.json" || failed=1
part benchmark.md 115 python scripts/benchmark.py --suite gpu --rounds 4 --out "$out/benchmark.json" || failed=1
exit $failed
