# SPDX-License-Identifier: Apache-2.0
"""The verb `status`: report whether a run is alive, finished or dead, from its files only.

effsam3 status runs/stage1-image-es_rv_m                 one run, everything
effsam3 status runs/* --watch 10                         several runs, a line each, until all have ended
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from effsam3.training.progress import each_run
from effsam3.training.report import duration, table
from effsam3.training.state import ALIVE, described, examine, percent

UNKNOWN = "-"


def status(runs: Sequence[str], as_json: bool = False) -> str:
    """Return how runs are, for people (one run in full, several as a table) or as a JSON list, an object per run.

    Raises:
        UserError: none of them is a run. Of several, those that are none are named below the table.
    """
    return _text(*each_run(runs, examine), as_json)


def watch(runs: Sequence[str], seconds: float, as_json: bool = False) -> None:
    """Print the status again and again until every run has ended or Ctrl-C."""
    try:
        while True:
            found, left_out = each_run(runs, examine)
            clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
            print(clear + _text(found, left_out, as_json), flush=True)
            if not any(facts["state"] in ALIVE for facts in found):
                return
            time.sleep(seconds)
    except KeyboardInterrupt:  # it is the watching that ends, not the run
        return


def _text(found: list[dict[str, Any]], left_out: list[str], as_json: bool) -> str:
    if as_json:
        # JSON knows no NaN and no infinity.
        return json.dumps(json.loads(json.dumps(found), parse_constant=lambda _: None), indent=2)
    text = as_text(found[0]) if len(found) == 1 else as_table(found)
    return "\n".join([text, *(f"left out: {reason}" for reason in left_out)])


# ---- for people


def as_text(facts: dict[str, Any]) -> str:
    """Return everything about one run, a line per subject."""
    what = ", ".join(filter(None, [facts["stage"], facts["student"]]))
    title = "   ".join(filter(None, [facts["name"], what, facts["run"]]))
    return "\n".join([title, "", *(f"{name:<9} {text}" for name, text in described(facts).items())])


def as_table(found: list[dict[str, Any]]) -> str:
    """Return a line for each of several runs."""
    rows = []
    for facts in found:
        best = facts["best"]
        rows.append(
            [
                facts["run"],
                facts["state"],
                f"{facts['step']:,}" + (f" of {facts['steps']:,}" if facts["steps"] else ""),
                percent(facts),
                duration(facts["eta_s"]) if facts["eta_s"] is not None else UNKNOWN,
                _number(facts["samples_per_s"], "{:.1f}"),
                _number(facts["losses"].get("loss"), "{:.4f}"),
                f"{facts['metric']} {best['value']:.4f} at {best['step']:,}" if best else UNKNOWN,
                _number(facts["latest"] and facts["latest"]["value"], "{:.4f}"),
            ]
        )
    header = ["run", "state", "step", "done", "left", "samples/s", "loss", "best held out", "latest"]
    return table(rows, header, text_columns=2)


def _number(value: float | None, shown: str) -> str:
    return UNKNOWN if value is None else shown.format(value)
