#!/usr/bin/env bash
# SIGTERM to torchrun (or to accelerate launch, which is torchrun inside) kills the DataLoader workers of a rank that
# handles SIGTERM itself, so that a training which saves on preemption fails in the very batch after the signal.
# torch's agent passes the signal on with killpg: each rank leads a process group in which its data workers are, too.
#
# Versions:  torch 2.14.1
# Behaviour: one script: a handler for SIGTERM sets a flag, the loop over a DataLoader with one worker looks at it and
#            takes three more batches before it ends. Alone, `kill -TERM` of the process ends as planned. Under torchrun,
#            `kill -TERM` of torchrun alone, no group, ends in RuntimeError, as the worker was killed by SIGTERM (or the
#            loop waits for it until torchrun kills the rank). With a worker_init_fn that ignores SIGTERM it ends as
#            planned.
# A guess:   torchrun signals the processes that it has started, the ranks; a rank that handles SIGTERM works on.
# Seen:      alone: saved
#            torchrun: RuntimeError: DataLoader worker exited unexpectedly
#            torchrun, workers ignore SIGTERM: saved
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

cat > "$folder/train.py" <<'PYTHON'
import os
import re
import signal
import sys
import time
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

asked = False


def note(number, frame):
    global asked
    asked = True


class Samples(Dataset):
    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        time.sleep(0.02)
        return index


def ignore(worker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    result, init = Path(sys.argv[1]), ignore if sys.argv[2] == "ignore" else None
    signal.signal(signal.SIGTERM, note)
    more = 3
    try:
        for batch in DataLoader(Samples(), batch_size=4, num_workers=1, worker_init_fn=init, prefetch_factor=1):
            result.with_suffix(".up").touch()
            more -= asked
            if more == 0:
                result.write_text("saved")
                os.kill(os.getpid(), signal.SIGKILL)  # how a worker ends at exit is no part of this
    except RuntimeError as error:
        result.write_text(f"RuntimeError: {re.sub(r' [(]pid.*?[0-9]+[)]', '', str(error).splitlines()[0]).strip()}")
PYTHON

try() { # NAME MODE COMMAND...
    local name=$1 mode=$2
    shift 2
    "$@" "$folder/train.py" "$folder/$name" "$mode" > "$folder/log" 2>&1 &
    local process=$!
    until [ -e "$folder/$name.up" ]; do
        kill -0 "$process" || { cat "$folder/log"; exit 1; }
        sleep 0.1
    done
    kill -TERM "$process"
    wait "$process" || true
    cat "$folder/$name" 2> "$folder/log" || echo "nothing: killed by torchrun"
}

export OMP_NUM_THREADS=1
launcher=("$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 1)
alone=$(try alone plain "$folder/venv/bin/python")
echo "alone: $alone"
launched=$(try launched plain "${launcher[@]}")
echo "torchrun: $launched"
ignored=$(try ignored ignore "${launcher[@]}")
echo "torchrun, workers ignore SIGTERM: $ignored"
[ "$alone" = saved ]
[[ $launched == "RuntimeError: DataLoader worker "* || $launched == nothing* ]]
[ "$ignored" = saved ]
