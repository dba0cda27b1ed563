# Shortcuts for the scripts; `make test` is what CI runs.
.PHONY: setup demo test unit style leaderboard zoo pictures

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

# The README's first picture and the one of docs/runs.md, of the demo's run.
SMOKE = runs/smoke-image
pictures: setup demo
	cp $(SMOKE)/pictures/sa_121.png docs/images/smoke.png
	EFFSAM3_REPORT_RUN=$(CURDIR)/$(SMOKE) EFFSAM3_SCREENSHOTS=$(CURDIR)/docs/images \
		.venv/bin/python -m pytest tests/e2e/test_report_page.py

# Of all runs in runs/, or of those in RUNS="runs/a runs/b".
RUNS ?= $(wildcard runs/*)
leaderboard:
	.venv/bin/effsam3 leaderboard $(RUNS) --out docs/leaderboard

# Of the models in RELEASES="runs/a runs/b"; without any the page says that there are none.
zoo:
	.venv/bin/effsam3 zoo $(RELEASES) --out docs/zoo.md
