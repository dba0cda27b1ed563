# SPDX-License-Identifier: Apache-2.0
"""The names below `checkpoints/`: which are complete, newest or best.

Light: no torch, so that `status` may ask, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from effsam3.checked_files import read_json

STEP = re.compile(r"(best-)?step-(\d{6,})$")
VALIDATION_FORM = {"step": int, str: float}
# The best validations at the time of saving, best first: `best`, and `runners_up` where train.keep_best is above 1.
RANKING_FORM = {"best?": (VALIDATION_FORM, None), "runners_up?": [VALIDATION_FORM]}


def step_folder(checkpoints: Path, step: int, best: bool = False) -> Path:
    """Return the folder name of a step."""
    return checkpoints / f"{'best-' if best else ''}step-{step:06d}"


def complete(checkpoints: Path, best: bool = False) -> list[Path]:
    """Return the complete checkpoints (or the best ones), oldest first."""
    found = []
    for path in checkpoints.glob("*step-*"):
        if (match := STEP.match(path.name)) and bool(match[1]) == best:
            found.append((int(match[2]), path))
    return [path for _, path in sorted(found)]


def latest(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint, None if there is none."""
    found = complete(checkpoints)
    return found[-1] if found else None


def ranking(trainer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the validations that a trainer.json knows as the best, best first."""
    best = trainer.get("best")
    return [*([] if best is None else [best]), *trainer.get("runners_up", ())]


def best_first(checkpoints: Path) -> list[Path]:
    """Return the folders of the best validations' weights, the best one first.

    Raises:
        UserError: a trainer.json is damaged.
    """
    found = complete(checkpoints, best=True)[::-1]
    if len(found) < 2:
        return found
    # The newest was saved when the last change was made to the ranking.
    trainer = read_json(found[0] / "trainer.json", RANKING_FORM, "choose another merge.checkpoint")
    order = [step_folder(checkpoints, validation["step"], best=True) for validation in ranking(trainer)]
    return sorted(found, key=lambda path: order.index(path) if path in order else len(order))


def validation_of(trainer: dict[str, Any]) -> dict[str, Any] | None:
    """Return the validation of a checkpoint: its own where it is among the best, else the run's best, if any."""
    best = ranking(trainer)
    return next((one for one in best if one["step"] == trainer["step"]), best[0] if best else None)
