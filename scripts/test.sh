#!/usr/bin/env bash
# Pass the tests, in the same .venv as the demo: no network, no GPU, two cores.
#   bash scripts/test.sh [pytest arguments]       such as: bash scripts/test.sh tests/unit
set -euo pipefail

cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# A file at a time in two processes: most of the time goes into starting things, one after the other.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --durations 30
