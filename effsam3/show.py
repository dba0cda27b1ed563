# SPDX-License-Identifier: Apache-2.0
"""The verb `show`: the resolved recipe and the numbers that follow from it, without reading data.

`show` itself goes without torch. `flops` counts and `budget` measures, for a few seconds, of stage 2 up to a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from effsam3.errors import RecipeError, UserError, did_you_mean
from effsam3.hardware.accelerate_configs import read_config
from effsam3.recipe.common import Recipe, StageRecipe
from effsam3.recipe.derived import accumulation
from effsam3.recipe.reader import dump_recipe, flat


def show(recipe: Recipe, key: str | None = None) -> str:
    """Return the recipe as YAML followed by the derived numbers as YAML comments, or the value of one dotted key.

    Raises:
        UserError: there is no such key, or keys contradict the hardware or the data.
    """
    if key is not None:
        values = flat(recipe)
        if key not in values:
            raise UserError(f"--key: the recipe has no {key}{did_you_mean(key, values)}")
        value = values[key]
        return " ".join(value) if isinstance(value, tuple) and value and isinstance(value[0], str) else str(value)
    derived = {"hardware": partial(_hardware, recipe)}
    if isinstance(recipe, StageRecipe):
        derived["batch"] = partial(_batch, recipe)
    lines = [f"# {title:<9} {_known(line)}" for title, line in (derived | recipe.derived()).items()]
    return dump_recipe(recipe) + "\n" + "\n".join(lines)


def budget(recipe: Recipe, device_gib: float | None = None) -> str:
    """Return what the training takes of a device's memory and of the disk as YAML comments.

    Raises:
        UserError: there is no such hardware, or `device_gib` is not above 0.
    """
    if device_gib is not None and not device_gib > 0:
        raise UserError(f"--device-gib: {device_gib:g} is not above 0")
    if not isinstance(recipe, StageRecipe):
        return "# device    nothing is trained here; show the recipes of its parts instead"
    from effsam3.hardware.budget.estimates import table

    text = _known(partial(table, recipe, device_gib))
    if text.startswith("unknown"):
        text = f"device    {text}"
    return "\n".join(f"# {line}" for line in text.splitlines())


def flops(recipe: Recipe) -> str:
    """Return the operations of every part of the model that the recipe makes, next to SAM 3's, as YAML comments.

    Raises:
        UserError: a part of a release is not there.
    """
    from effsam3.benchmarks.flops import chassis_row, config_of, gflop_table, part_gflop

    row = chassis_row(recipe.sam3.checkpoint)
    text = _known(lambda: gflop_table(part_gflop(config_of(recipe)), row.gflop or part_gflop(row.config()), row.label))
    return "\n".join(f"# {line}" for line in text.splitlines())


def _known(line: Callable[[], str]) -> str:
    try:
        return line()
    except RecipeError:
        raise
    except UserError as error:  # something is not on this machine yet: the other numbers still hold
        return f"unknown yet: {error}"


def _hardware(recipe: Recipe) -> str:
    config = read_config(recipe.hardware)
    return f"{config.file}, processes: {config.processes}"


def _batch(recipe: StageRecipe) -> str:
    processes = read_config(recipe.hardware).processes
    micros = accumulation(recipe, processes)
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    return f"{batch} = {micro} per process x {processes} (processes) x {micros} (accumulated)"
