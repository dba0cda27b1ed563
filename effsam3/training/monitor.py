# SPDX-License-Identifier: Apache-2.0
"""The validation number by which a run's best weights are chosen: `train.monitor`, or the stage's own metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effsam3 import stages
from effsam3.errors import UserError
from effsam3.recipe.common import StageRecipe
from effsam3.training.checkpoint_folders import ranking

MONITOR_FORM = {"stage?": str, "train?": {"monitor?": (str, None)}}  # of a recipe's plain values


@dataclass(frozen=True)
class Monitor:
    """A metric, and whether lower values of it are better."""

    name: str
    lower: bool

    @classmethod
    def of(cls, recipe: StageRecipe) -> Monitor:
        """Return a recipe's monitor."""
        name = recipe.train.monitor or recipe.metric
        return cls(name, recipe.metrics[name] == "lower")

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> Monitor | None:
        """Return that of a recipe's plain values, whichever version wrote them; None where nothing is validated."""
        if values.get("stage") not in stages.STAGES:
            return None
        learned = stages.recipe_class(values["stage"])
        name = values.get("train", {}).get("monitor") or learned.metric
        return None if name is None else cls(name, learned.metrics.get(name) == "lower")

    def order(self, values: Mapping[str, float]) -> float:
        """Return a number by which the best values come first."""
        return values[self.name] if self.lower else -values[self.name]

    def enter(self, state: dict[str, Any], step: int, values: Mapping[str, float], keep: int) -> tuple[bool, bool]:
        """Enter a step's validation into the loop's state; return whether it is the best, and among the best `keep`.

        Raises:
            UserError: the number is not finite: it would compare as no improvement, to the end of the run.
        """
        if self.name not in values:
            raise UserError(
                f"no held-out sample gave {self.name} at step {step}; see unreadable.jsonl, hold out more "
                "(data.held_out), or name another number (train.monitor)"
            )
        if not math.isfinite(values[self.name]):
            raise UserError(
                f"the held-out metric {self.name} is {values[self.name]} at step {step}; nothing of this step was "
                "saved. Lower optim.lr, lengthen the warm-up, or set train.precision=fp32"
            )
        own = {"step": step, **values}
        # The run may have had another monitor until now. Of equals the earlier one comes first.
        known = [one for one in ranking(state) if self.name in one]
        state["best"], *state["runners_up"] = sorted([*known, own], key=self.order)[:keep]
        is_best = state["best"] is own
        state["worse"] = 0 if is_best else state["worse"] + 1
        return is_best, is_best or own in state["runners_up"]
