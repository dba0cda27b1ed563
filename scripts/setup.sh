#!/usr/bin/env bash
# Make .venv with effsam3 in it, once; a second call finds it ready:
#   bash scripts/setup.sh [extra]        extra: `dev` for the tests; default: `all` (DeepSpeed, wandb, peft, Gradio ...)
# PYTHON names the interpreter to build it from (3.10 or newer; python3 by default).
set -euo pipefail

cd "$(dirname "$0")/.."
extra=${1:-all}
stamp=".venv/effsam3-$extra.stamp"
# The tests of the demo page drive a browser; Debian's packages and Ubuntu's runners have one.
if [ "$extra" = dev ] && [ -z "$(command -v chromium chromium-browser google-chrome)" ] && [ -n "$(command -v apt-get)" ]; then
    echo "installing chromium, which the tests of the demo page drive"
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update --quiet=2 && $as_root apt-get install --yes --quiet=2 chromium >/dev/null
fi
if [ -f "$stamp" ] && cmp -s setup.py "$stamp"; then
    exit 0
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $("$python" --version) is too old; effsam3 needs Python 3.10 or newer. Name one: PYTHON=python3.12 $0" >&2
    exit 1
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing effsam3 and what it needs into .venv (about 6 GB with PyTorch's CUDA build; minutes, once)"
# To stay with a CPU build of PyTorch, install torch and torchvision into .venv first: they are then left alone.
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extra]"
cp setup.py "$stamp"
