# SPDX-License-Identifier: Apache-2.0
"""Which of a recipe's benchmarks its data allow: asked by `evaluate`, and before a training that it would follow."""

from __future__ import annotations

from effsam3.data.images.sa1b import load_index
from effsam3.errors import UserError


def without_annotations(recipe) -> str:
    """Why `masks` cannot be measured; "" when it can."""
    if any(load_index(recipe.data.index, "val", recipe.data.limit)["num_masks"]):
        return ""
    return (
        f"no held-out image of {recipe.data.index} has annotations to prompt with and to compare with; index images "
        "with their JSON to measure it"
    )


# (stage, benchmark) -> what says why it cannot be measured
WITHOUT = {("image", "masks"): without_annotations}


def measurable(recipe) -> tuple[tuple[str, ...], list[str]]:
    """Return those of `evaluate.benchmarks` that can be measured, and a sentence for every other one.

    Raises:
        UserError: none can.
    """
    found, sentences = [], []
    for name in recipe.evaluate.benchmarks:
        reason = WITHOUT[recipe.stage, name](recipe) if (recipe.stage, name) in WITHOUT else ""
        if reason:
            sentences.append(f"The benchmark `{name}` is left out: {reason}.")
        else:
            found.append(name)
    if not found:
        raise UserError(f"evaluate.benchmarks: nothing is left to measure. {' '.join(sentences)}")
    return tuple(found), sentences
