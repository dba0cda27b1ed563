#!/usr/bin/env bash
# wandb in offline mode writes its file in blocks of 32 KiB, so a training that is killed (SIGKILL, out of memory, power)
# loses everything logged since the last full block: a run with less than one block leaves 7 bytes, no step at all.
# The file is written by a process of its own, wandb-core, which outlives the training and writes nothing more either.
#
# Versions:  wandb 0.31.0
# Behaviour: 100 steps with a second of waiting, then SIGKILL to the training alone; wandb-core ends by itself later. The
#            .wandb file has its magic number and nothing else. The same run that ends by finish() has all of it.
# A guess:   what log() was given is on the disk after a moment, and at the latest when wandb-core sees that its client
#            has died; `wandb sync` uploads a killed run up to its last steps.
# Seen:      killed: 7 bytes
#            finished: more than 10000 bytes
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
cd "$folder"
export WANDB_MODE=offline WANDB_SILENT=true WANDB_ERROR_REPORTING=false

cat > train.py <<'PYTHON'
import os
import signal
import sys
import time

import wandb

run = wandb.init(project="p", dir=sys.argv[1])
for step in range(1, 101):
    run.log({"loss": 1 / step}, step=step)
    time.sleep(0.01)
time.sleep(3)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
run.finish()
PYTHON

size() { # of the .wandb file below a folder, once wandb-core, which has it open, has ended
    local file
    file=$(ls "$1"/wandb/offline-run-*/*.wandb)
    while ls -l /proc/[0-9]*/fd 2> /dev/null | grep -qF "$file"; do sleep 0.5; done
    stat --format %s "$file"
}

mkdir killed finished
venv/bin/python train.py killed || true
venv/bin/python train.py finished
killed=$(size killed)
finished=$(size finished)
echo "killed: $killed bytes"
echo "finished: $([ "$finished" -gt 10000 ] && echo "more than 10000" || echo "$finished") bytes"
[ "$killed" -eq 7 ] && [ "$finished" -gt 10000 ]
