# SPDX-License-Identifier: Apache-2.0
"""What travels with the package: recipes and accelerate configs. A shipped recipe has a short name, such as
`stage1/image/es_rv_m` for recipes/stage1/image/es_rv_m.yaml, by which it is found from any folder.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ENDINGS = (".yaml", ".yml")
NAME = re.compile(r"^name: .*$", re.MULTILINE)
PARENT = re.compile(r"^inherits: (\S+)$", re.MULTILINE)


def shipped(name: str) -> Path:
    """Return the folder `recipes` or `accelerate_configs`: inside an installed package, next to it in a clone."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def short_names() -> dict[str, Path]:
    """Return the shipped recipes by their short names, in alphabetical order."""
    folder = shipped("recipes")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def recipe_file(name: str | Path) -> Path:
    """Return the file of a recipe: the path itself where it exists, else the shipped recipe of that short name.

    The file is not there where neither exists: `nearest` knows what may have been meant.
    """
    path = Path(name)
    return path if path.exists() else short_names().get(short_name(path), path)


def nearest(path: Path) -> str:
    """Return the recipe that a wrong path or short name may mean, "" where none is near."""
    siblings = {file.stem: str(file) for file in sorted(path.parent.glob("*.yaml"))}
    names = {name: name for name in short_names()}
    by_stem = {name.rpartition("/")[2]: name for name in reversed(names)}  # of several, the first
    for word, choices in ((path.stem, siblings), (short_name(path), names), (path.stem, by_stem)):
        if near := difflib.get_close_matches(word, choices, n=1):
            return choices[near[0]]
    return ""


def short_name(path: Path) -> str:
    """Return the short name that a path may mean."""
    return (path.with_suffix("") if path.suffix in ENDINGS else path).as_posix().removeprefix("recipes/")


def texts() -> dict[str, str]:
    """Return the text of each shipped recipe by its short name, without those that are only there to be inherited."""
    found = {name: file.read_text(encoding="utf-8") for name, file in short_names().items()}
    return {name: text for name, text in found.items() if NAME.search(text)}


def listing() -> str:
    """Return a line per shipped recipe: its short name and the comment that it begins with."""
    found = texts()
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {text.partition(chr(10))[0][2:]}" for name, text in found.items())
