#!/usr/bin/env bash
# Every verb of one recipe in order, on the hardware that it names:
#   bash scripts/run.sh RECIPE [key=value ...]
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi
bin="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin"
if [ -x "$bin/effsam3" ]; then
    export PATH="$bin:$PATH"
fi
recipe=$1
shift
exec effsam3 launch "$recipe" "$@"
