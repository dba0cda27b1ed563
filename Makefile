# Shortcuts for the scripts; `make test` is what CI runs.
.PHONY: setup demo test unit style

setup:
	bash scripts/setup.sh dev

demo:
	bash scripts/demo.sh

test:
	bash scripts/test.sh

unit:
	bash scripts/test.sh tests/unit

style: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
