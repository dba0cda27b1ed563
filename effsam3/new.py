# SPDX-License-Identifier: Apache-2.0
"""The verb `new`: begin a recipe of your own, from the one that a stage is shipped with or from any other.

effsam3 new ships --stage video                          ships.yaml: all keys that matter, with comments
effsam3 new small --from stage1/image/es_rv_m            small.yaml: inherits what that one inherits
"""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

from effsam3 import stages
from effsam3.errors import UserError, did_you_mean
from effsam3.files import write_text
from effsam3.recipe.rules import file_name
from effsam3.shipped import NAME, PARENT, shipped, short_name, texts

# What only its user can know: where things are, by the folders that shipped recipes call them, and the machine.
YOURS = re.compile(
    r"^( *[a-z_]+: (?:\[?(?:data|runs)/|\{.*: (?:data|runs)/)[^#\n]*?|hardware: \S+)( *)(# (.*))?$", re.M
)
MARK = "YOURS"


def new(name: str, stage: str | None = None, source: str | None = None, out: str | None = None) -> str:
    """Write a recipe with the name `name`; return what to do with it.

    Args:
        stage: begin with the recipe that this stage is shipped with, whole: without parent and with all comments.
        source: or with this shipped one, by its short name, as it is.
        out: the file; None: <name>.yaml.

    Raises:
        UserError: the name cannot be a folder's, no such stage or recipe comes with effsam3, or the file is there.
    """
    if problem := file_name(name):
        raise UserError(f"{problem}; it names the folder of the run")
    if (stage is None) == (source is None):
        raise UserError(
            f"begin with --stage {'|'.join(stages.STAGES)}, or --from a recipe that `effsam3 recipes` lists"
        )
    if stage is not None and stage not in stages.STAGES:
        raise UserError(f"--stage: {stage!r} is not a stage{did_you_mean(stage, stages.STAGES)}")
    found = texts()
    short = stages.recipe_class(stage).starter if stage is not None else short_name(Path(str(source)))
    if short not in found:
        raise UserError(f"no recipe called {source} comes with effsam3{did_you_mean(short, found)}")
    path = Path(out or f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} is there already; nothing was written. Name another file with --out")
    text = whole(short, found[short]) if stage is not None else on_its_own(short, found[short])
    text = YOURS.sub(_marked, NAME.sub(f"name: {name}", text, count=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"# Begun from {short}. {MARK} marks what depends on your data and machine.\n{text}")
    return (
        f"{path} will run in runs/{name}; change its lines marked {MARK}, then `effsam3 show {path}` prints its keys "
        f"and `effsam3 launch {path}` runs it"
    )


def on_its_own(short: str, text: str) -> str:
    """Return a shipped recipe's text for a file elsewhere: its parent goes by its short name."""
    parent = parent_of(short, text)
    return text if parent is None else PARENT.sub(f"inherits: {parent}", text)


def whole(short: str, text: str) -> str:
    """Return a shipped recipe with the text of its parents in place of `inherits`; all comments stay."""
    parent = parent_of(short, text)
    if parent is None:
        return text
    head, own = _divided(text)
    # The parent's first lines say what its children are; the child's say what this one is.
    _, lines = _divided(whole(parent, (shipped("recipes") / f"{parent}.yaml").read_text(encoding="utf-8")))
    section, keys = "", []
    for line in own:
        if not line.startswith(" "):
            section = line if line.endswith(":") else ""
        if line and line != section and not PARENT.match(line):
            keys.append((section, line))
    for section, line in reversed(keys):
        _enter(lines, section, line)
    return "\n".join([*head, *lines]) + "\n"


def parent_of(short: str, text: str) -> str | None:
    """Return the short name of a shipped recipe's parent, None without one."""
    folder = shipped("recipes").resolve()
    parent = PARENT.search(text)
    return short_name((folder / short / ".." / parent[1]).resolve().relative_to(folder)) if parent else None


def _divided(text: str) -> tuple[list[str], list[str]]:
    """Return the lines of comments that a recipe begins with, and the others."""
    lines = text.splitlines()
    count = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    return lines[:count], lines[count:]


def _enter(lines: list[str], section: str, line: str) -> None:
    """Enter a key into the lines of a recipe: where it has it, else behind `stage` or first in its section."""
    first = next(place for place, one in enumerate(lines) if one.startswith("stage:")) + 1
    if section:
        if section not in lines:
            lines.insert(first, section)
        first = lines.index(section) + 1
    name = line.partition(":")[0] + ":"
    # A name is indented where it is in a section, and a section's lines end where the next one begins.
    places = range(first, len(lines)) if section else range(len(lines))
    inside = takewhile(lambda place: not section or lines[place].startswith(" "), places)
    here = next((place for place in inside if lines[place].startswith(name)), None)
    lines[first if here is None else here : first if here is None else here + 1] = [line]


def _marked(line: re.Match) -> str:
    """Return a line whose comment begins with the mark."""
    text, space, said = line[1], line[2], line[4]
    return f"{text}{space or '  '}# {MARK}{f': {said}' if said else ''}"
