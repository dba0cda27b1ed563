#!/usr/bin/env bash
# One recipe on the machines of a Slurm job, every verb in order or one; submitted from the repository:
#   sbatch --nodes 4 --time 24:00:00 scripts/sbatch.sh RECIPE [VERB] [key=value ...]
# Any option below can be given to sbatch instead. docs/cluster.md says what happens when, and why.
#SBATCH --job-name=effsam3
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi
# Slurm runs a copy of this file from a folder of its own, in the working directory of sbatch.
if [ -x .venv/bin/effsam3 ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
logs=slurm-$SLURM_JOB_ID
mkdir -p "$logs"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((10000 + SLURM_JOB_ID % 20000)) # of this job alone, below the ports that the kernel hands out
machines=(--nodes slurm --main-address "${hosts%%$'\n'*}" --main-port "$port" --log-dir "$logs")
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    machines+=(--processes-per-node "$SLURM_GPUS_ON_NODE")
fi

# USR1: the time is nearly up (--signal). TERM: scancel or preemption, and requeueing is not ours to decide. srun hands
# USR1 on to its tasks, whereas TERM would make it kill them.
step= cancelled=
trap '[ -z "$step" ] || kill -USR1 "$step"' USR1
trap 'cancelled=yes; [ -z "$step" ] || kill -USR1 "$step"' TERM
# --cpu-bind=none: the one task starts ranks and data workers for every core. --wait=0: node 0 merges and evaluates when
# the others have ended. --kill-on-bad-exit=0: a node that has ended first must not take the time to finish from the one
# that writes; ranks without their peers end by themselves.
srun --ntasks-per-node=1 --cpu-bind=none --wait=0 --kill-on-bad-exit=0 --open-mode=append \
    --output="$logs/node-%n.log" effsam3 launch "${machines[@]}" "$@" &
step=$!
while true; do
    code=0
    wait "$step" || code=$? # also ends, too early, with the trap
    kill -0 "$step" 2>/dev/null || break
done
echo "$(date '+%F %T') ended with code $code; $logs/node-0.log tells the story, $logs/node-*/ has a file per rank"
if [ "$code" -eq 75 ] && [ -z "$cancelled" ]; then # stopped and saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
