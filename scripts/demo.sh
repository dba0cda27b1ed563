#!/usr/bin/env bash
# From nothing to a merged, evaluated student, on a CPU in minutes: drawn images and a tiny SAM 3 with random weights.
#   bash scripts/demo.sh
set -euo pipefail

cd "$(dirname "$0")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # with more threads models this small get slower
bash scripts/run.sh recipes/smoke/image.yaml
echo
echo "That was embed, train, merge and evaluate of recipes/smoke/image.yaml."
echo "  numbers   runs/smoke-image/eval/summary.md"
echo "  pictures  runs/smoke-image/pictures/"
echo "  model     runs/smoke-image/merged/   (a transformers folder)"
