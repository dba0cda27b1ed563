# SPDX-License-Identifier: Apache-2.0
"""Packages that a run needs only if its recipe asks for them: extras of setup.py, most named like their packages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from effsam3.errors import UserError
from effsam3.hardware.accelerate_configs import read_config
from effsam3.recipe.common import Recipe, StageRecipe


def refuse_missing_extras(recipe: Recipe, verbs: Sequence[str], processes: int = 1) -> None:
    """Refuse verbs whose recipe asks for a package that is not installed.

    Raises:
        UserError: the command that installs it.
    """
    asked: dict[str, str] = {}  # package -> key of the recipe
    extras: dict[str, str] = {}  # package -> its extra, where that has another name
    if processes > 1 and {"embed", "train"} & set(verbs) and read_config(recipe.hardware).kind == "DEEPSPEED":
        asked["deepspeed"] = f"hardware: {recipe.hardware}"
    if "train" in verbs and isinstance(recipe, StageRecipe):
        asked |= {logger: f"train.loggers: {logger}" for logger in recipe.train.loggers}
        asked |= dict.fromkeys(recipe.packages, f"stage: {recipe.stage}")
        extras |= recipe.packages
    for package, key in asked.items():
        refuse_missing(package, key, extras.get(package, package), ", or change the key")


def refuse_missing(package: str, key: str, extra: str, or_else: str = "") -> None:
    """Refuse what a package is missing for.

    Raises:
        UserError: the command that installs it.
    """
    if find_spec(package) is None:
        raise UserError(f'{key} needs {package}, which is not installed: pip install "effsam3[{extra}]"{or_else}')
