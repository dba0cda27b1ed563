#!/usr/bin/env bash
# Pass the unit tests with the lowest versions that setup.py allows, in an environment of their own, deleted afterwards:
#   bash scripts/test_bounds.sh [pytest arguments]       such as: bash scripts/test_bounds.sh tests/unit/test_students.py
# It takes 6 GB and many minutes, and so is no part of CI: run it after a change of setup.py, or now and then.
# PYTHON names the interpreter: 3.10 to 3.12, as there are no newer wheels of versions that old (python3 by default).
set -euo pipefail

cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
# uv, because pip cannot resolve to the lowest versions. What these need themselves is the newest that fits.
"$python" -m pip install --quiet --disable-pip-version-check uv
"$python" -m uv pip install --python "$python" --resolution lowest-direct --compile-bytecode -r setup.py --extra dev
[ $# -gt 0 ] || set -- tests/unit
PYTHONPATH=$PWD "$python" -m pytest "$@"
