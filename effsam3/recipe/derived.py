# SPDX-License-Identifier: Apache-2.0
"""What follows from a recipe's numbers: steps and batches. No data is read, only the report next to an index."""

from __future__ import annotations

import math
from pathlib import Path

from effsam3.checked_files import read_json
from effsam3.errors import RecipeError, UserError
from effsam3.recipe.common import StageRecipe


def accumulation(recipe: StageRecipe, world_size: int) -> int:
    """Return how many micro-batches each rank accumulates per optimizer step.

    Raises:
        RecipeError: the global batch is not a whole number of micro-batches on every rank.
    """
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    # Refused rather than rounded: another batch would be another learning.
    if batch % (micro * world_size):
        raise RecipeError(
            f"train.global_batch_size ({batch}) is not a multiple of micro_batch_size x world size "
            f"({micro} x {world_size} = {micro * world_size}); change train.micro_batch_size or --num_processes"
        )
    return batch // (micro * world_size)


def total_steps(recipe: StageRecipe, train_samples: int) -> int:
    """Return the optimizer steps of the whole training on `train_samples` samples (what `data.limit` leaves)."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return _steps(recipe.train.epochs, recipe, train_samples)


def warmup_steps(recipe: StageRecipe, train_samples: int) -> int:
    """Return the optimizer steps of warm-up.

    Raises:
        RecipeError: warm-up would take all of the training.
    """
    steps, total = recipe.optim.warmup_steps, total_steps(recipe, train_samples)
    if steps is None:
        steps = _steps(recipe.optim.warmup_epochs, recipe, train_samples)
    if steps >= total:
        raise RecipeError(
            f"warm-up takes {steps} steps and the whole training {total} ({train_samples} images); lower "
            "optim.warmup_steps or optim.warmup_epochs, or train longer"
        )
    return steps


def _steps(epochs: float | None, recipe: StageRecipe, train_samples: int) -> int:
    assert epochs is not None  # the recipe gives steps or epochs
    # Exact: in floats a product such as 0.7 x 10240 may round up to one step too many.
    from fractions import Fraction  # a moment, which `show` of a recipe with steps does not have to wait

    return math.ceil(Fraction(str(epochs)) * train_samples / recipe.train.global_batch_size)


def index_counts(index: str, what: str, remedy: str) -> dict[str, int]:
    """Return how many images or videos (`what`) of each split an index has, from the report next to it.

    Raises:
        UserError: there is no report; `remedy` tells what makes it.
    """
    report = Path(index.removesuffix(".parquet") + ".report.json")
    if not report.is_file():
        raise UserError(f"no {report}; {remedy}")
    return read_json(report, {what: {"train": int, "val": int}}, "make the index again")[what]
