# Shortcuts for the scripts; `make test` is what CI runs.
.PHONY: setup demo test unit style leaderboard

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

# Of all runs in runs/, or of those in RUNS="runs/a runs/b".
RUNS ?= $(wildcard runs/*)
leaderboard:
	.venv/bin/effsam3 leaderboard $(RUNS) --out docs/leaderboard
