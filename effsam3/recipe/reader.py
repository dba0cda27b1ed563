# SPDX-License-Identifier: Apache-2.0
"""The strict reader of recipes: YAML to the dataclasses of every stage's facts.py."""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from effsam3 import stages
from effsam3.errors import RecipeError, did_you_mean
from effsam3.recipe.common import Recipe
from effsam3.recipe.typed_yaml import Mapping, Mistake, Scalar, Tree, convert, parse, type_name
from effsam3.shipped import nearest, recipe_file

__all__ = [
    "RecipeError",
    "differing_keys",
    "dump_recipe",
    "flat",
    "load_recipe",
    "refuse_verb",
]
COMMAND_LINE = "command line"
RECIPE = "recipe.yaml"  # in a run folder
# Keys of older recipes, so that these are told what to write now.
RENAMED = {"export": "embed", "train.trackers": "train.loggers"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read a recipe, its parents and `section.key=value` overrides into the dataclass of its stage.

    A recipe that comes with the package goes by its short name, too, such as `stage1/image/es_rv_m`. The folder of a
    run means the recipe in it, and the run itself: a run that was moved or copied is one where it is.

    Mappings of a child merge into those of its parent, everything else replaces. A section with a mistake in one of
    its keys is not searched for contradictions between keys until that is fixed.

    Raises:
        RecipeError: naming all mistakes, each with the nearest thing that would be right.
    """
    problems: list[str] = []
    run = Path(path)
    if (run / RECIPE).is_file():
        path = run / RECIPE
        overrides = [*_place(load_recipe(path), run), *overrides]
    tree = _read(recipe_file(path), problems, ())
    for override in overrides:
        tree = _merge(tree, _override(override, problems))
    recipe = None
    stage = tree.get("stage")
    if stage is None:
        problems.append(f"stage is missing{did_you_mean('', stages.STAGES)}")
    elif not isinstance(stage, Scalar) or stage.text not in stages.STAGES:
        text = stage.text if isinstance(stage, Scalar) else str(stage)
        problems.append(f"stage: {text!r} is not a stage{did_you_mean(text, stages.STAGES)} ({stage.where})")
    else:
        cls = stages.recipe_class(stage.text)
        recipe = _build(cls, tree, "", problems, _keys(cls))
    if problems:
        raise RecipeError(f"{path}:" + "".join(f"\n  - {problem}" for problem in problems))
    return recipe


def _place(recipe: Recipe, run: Path) -> list[str]:
    """Return the overrides by which a recipe's run folder is `run`; none where it is."""
    if recipe.folder.resolve() == run.resolve():
        return []
    return [f"name={json.dumps(run.resolve().name)}", f"{recipe.runs_key}={json.dumps(str(run.resolve().parent))}"]


class _Dumper(yaml.SafeDumper):
    """YAML with lists on one line."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load_recipe` of it gives an equal object."""
    values: Any = recipe  # each stage's class is a dataclass
    return yaml.dump(asdict(values), Dumper=_Dumper, sort_keys=False, width=10_000)


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the recipe's values by dotted key, in the order of its classes."""
    values: dict[str, Any] = {}
    for field in fields(section):
        value = getattr(section, field.name)
        values |= flat(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name: value}
    return values


def differing_keys(a: Any, b: Any) -> list[str]:
    """Return one text like `optim.lr 0.001 -> 0.0005` for every key in which two recipes differ."""
    before, after = flat(a), flat(b)
    return [
        f"{key} {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in {**before, **after}
        if before.get(key, MISSING) != after.get(key, MISSING)
    ]


def refuse_verb(recipe: Recipe, verb: str) -> None:
    """Refuse a verb that the recipe's stage does not have.

    Raises:
        RecipeError: the stage has none.
    """
    if verb not in (*recipe.verbs, "push", "show"):
        raise RecipeError(
            f"{verb}: {recipe.name} is of stage {recipe.stage}, which knows {', '.join(recipe.verbs)}, push and "
            f"show; {recipe.why_no_more}"
        )


# ---- files and overrides to one tree


def _read(path: Path, problems: list[str], children: tuple[Path, ...]) -> Mapping:
    """Read one file and its parents; `children` are the files that led here."""
    if path.resolve() in children:
        raise RecipeError(f"inherits goes round in a circle: {' -> '.join(map(str, [*children, path.resolve()]))}")
    if not path.is_file():
        raise RecipeError(_no_recipe(path, children))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text file in UTF-8 ({error})") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); name a recipe that you may read") from error
    tree = parse(text, path.name, problems)
    if not isinstance(tree, Mapping):
        raise RecipeError(f"{path} holds {tree}; a recipe is made of lines `key: value`")
    parent = tree.pop("inherits", None)
    if parent is None:
        return tree
    if not isinstance(parent, Scalar) or parent.is_null:
        raise RecipeError(
            f"inherits: expected the path of one recipe, relative to {path}, or a short name, got {parent}"
        )
    # Next to the recipe first, so that a folder of recipes can be moved as a whole.
    sibling = path.parent / parent.text
    file = sibling if sibling.exists() else recipe_file(parent.text)
    return _merge(_read(file if file.exists() else sibling, problems, (*children, path.resolve())), tree)


def _no_recipe(path: Path, children: tuple[Path, ...]) -> str:
    """Say that there is no such recipe, and which of those nearby may be meant."""
    wanted = f" (inherited by {children[-1].name})" if children else ""
    if path.is_dir():
        names = ", ".join(file.name for file in sorted(path.glob("*.yaml")))
        if names:
            return f"{path} is a folder{wanted}; name one recipe in it: {names}"
        run = next((parent for parent in path.absolute().parents if (parent / RECIPE).is_file()), None)
        meant = (
            f"; it belongs to the run {os.path.relpath(run)}, name that" if run else ", nor is it the folder of a run"
        )
        return f"{path} is a folder{wanted} without a recipe in it{meant}"
    near = nearest(path)
    meant = f"did you mean {near}?" if near else "`effsam3 recipes` lists those that come with effsam3"
    return f"no recipe at {path}{wanted}; {meant}"


def _override(override: str, problems: list[str]) -> Mapping:
    """Turn `section.key=value` into a tree."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"{override!r} is not an override; write section.key=value, such as optim.lr=5e-4")
        return Mapping()
    # By the parser of files, so that `optim.lr=1e-3` means what it means there.
    tree: Tree = parse(text, f"{COMMAND_LINE} ({override})", problems, COMMAND_LINE)
    *above, last = key.split(".")
    found = Mapping({last: tree}, COMMAND_LINE)
    for part in reversed(above):
        found = Mapping({part: found}, COMMAND_LINE)
    return found


def _merge(parent: Mapping, child: Mapping) -> Mapping:
    merged = Mapping(parent, parent.where)
    for key, value in child.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged


# ---- a tree to dataclasses


def _build(cls: type, tree: Tree, prefix: str, problems: list[str], known: list[str]) -> Any:
    """Return `cls` made of the tree, or None after a mistake in one of its keys; `known` are all keys of a recipe."""
    if not isinstance(tree, Mapping):
        problems.append(f"{prefix[:-1]}: expected keys below it, got {tree} ({tree.where})")
        return None
    hints = _hints(cls)
    # Unknown keys first, then missing ones: all mistakes are named at once, none hides another.
    names = [field.name for field in fields(cls)]
    for key, node in tree.items():
        if key not in names:
            problems.append(f"unknown key {prefix}{key}{_meant(prefix, key, known)} ({node.where})")
    values, complete = {}, True
    for field in fields(cls):
        key, hint, node = prefix + field.name, hints[field.name], tree.get(field.name)
        if isinstance(hint, type) and is_dataclass(hint):
            values[field.name] = _build(hint, Mapping() if node is None else node, f"{key}.", problems, known)
            complete = complete and values[field.name] is not None
        elif node is not None:
            try:
                values[field.name] = convert(hint, node)
            except Mistake as mistake:
                below = [f"{key}_{word}" for word in node] if isinstance(node, Mapping) else []
                meant = next((f"; did you mean {name}?" for name in below if name in known), "")
                problems.append(f"{key}: {mistake}{meant} ({node.where})")
                complete = False
        elif field.default is MISSING:
            problems.append(f"{key} is missing; expected {type_name(hint)}")
            complete = False
    if not complete:
        return None
    instance = cls(**values)
    problems += [prefix + problem for problem in instance.check()]
    return instance


@functools.cache  # reading them takes as long as all the rest of a recipe's keys
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Return all dotted keys of a recipe class, sections among them."""
    keys: list[str] = []
    hints = _hints(cls)
    for name, hint in ((field.name, hints[field.name]) for field in fields(cls)):
        keys += [
            prefix + name,
            *(_keys(hint, f"{prefix}{name}.") if isinstance(hint, type) and is_dataclass(hint) else []),
        ]
    return keys


def _meant(prefix: str, key: str, known: list[str]) -> str:
    """Suggest for an unknown key: the same word in another section, then a near one here, then a near one anywhere."""
    word = {name: name.rpartition(".")[2] for name in known}
    here = [name for name in known if name.rpartition(".")[0] == prefix[:-1]]
    if prefix + key in RENAMED:
        return f"; it is called {RENAMED[prefix + key]} now"
    if key == "inherits":
        return "; it belongs at the top of a file, next to stage and name"
    same = [name for name in known if word[name] == key] or [name for name in known if name.endswith(f"_{key}")]
    for names, cutoff in [(here, 0.6)] * (not same) + [(known, 0.75)]:
        near = difflib.get_close_matches(key, [word[name] for name in names], n=1, cutoff=cutoff)
        same = same or [name for name in names if word[name] in near]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    return f"; choose from {', '.join(word[name] for name in here)}"
