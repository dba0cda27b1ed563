# SPDX-License-Identifier: Apache-2.0
"""Write docs/recipes.md, the reference of every recipe key, and docs/schema/<stage>.json, the same for editors.

python scripts/write_reference.py

Both come from the dataclasses in effsam3/recipe/ and effsam3/stages/*/facts.py: types and defaults from the fields,
meanings from the comments next to them.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import sys
import tokenize
import types
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from effsam3.files import write_text
from effsam3.recipe import rules
from effsam3.recipe.typed_yaml import type_name
from effsam3.stages import STAGES, recipe_class

DOCS = Path(__file__).parents[1] / "docs"
SCALARS = {int: "integer", float: "number", bool: "boolean", str: "string"}
# What JSON schema can say of a rule; the reader checks the others as well.
LIMITS = {
    rules.positive: {"exclusiveMinimum": 0},
    rules.not_negative: {"minimum": 0},
    rules.below_one: {"minimum": 0, "exclusiveMaximum": 1},
    rules.share: {"minimum": 0, "maximum": 1},
    rules.at_least_one: {"minItems": 1},
    rules.each_once: {"uniqueItems": True},
}
HEAD = """# Recipe reference

<!-- Written by scripts/write_reference.py: change the dataclasses in effsam3/ and run it again. -->

```bash
effsam3 recipes                                      # what comes with effsam3, by short name
effsam3 launch smoke/image                           # from any folder, with or without a clone
effsam3 new my --stage image                         # my.yaml, one of your own; nothing is overwritten
effsam3 show my.yaml                                 # every key and its value
```

Verbs take a recipe by its path, its short name or its run folder. `inherits:` takes a path, relative to the file, or a
short name. A child's keys are merged into its parent's.

Every key of every recipe. A key without a default must be given, in the recipe or in one that it inherits from. On the
command line a key is `section.key=value`. [schema/](schema) has the same as JSON schemas, for editors; in VS Code's
settings with its YAML extension:

```json
{"yaml.schemas": {"docs/schema/image.json": "recipes/stage1/image/*.yaml"}}
```
"""


def comments(section: type) -> dict[str, str]:
    """Return {field: meaning} from a dataclass's source: comment lines above a field and the comment behind it."""
    source = inspect.getsource(section)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    lines = source.split("\n")
    meanings = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while lines[first - 2].strip().startswith("#"):
                first -= 1
            places = (*range(first, node.lineno), node.end_lineno)
            told = [found[place] for place in places if place in found]
            meanings[node.target.id] = " ".join(told)
    return meanings


def meanings(section: type) -> dict[str, str]:
    """Return {field: meaning} of a section, those of its parents included."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if is_dataclass(cls):
            found |= comments(cls)
    return found


def subsection(hint: Any) -> type | None:
    """Return the dataclass that a key holds, None for a key with a value."""
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def default(field: Field) -> Any:
    """Return a key's default as YAML would say it, MISSING where it has none."""
    value = field.default
    return json.loads(json.dumps(asdict(value) if is_dataclass(value) else value)) if value is not MISSING else MISSING


def schema(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a key's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if subsection(hint):
        return section_schema(hint)
    if origin is Annotated:
        found = schema(arguments[0])
        for rule in arguments[1:]:
            found |= LIMITS.get(rule, {})
        return found
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if one is types.NoneType else schema(one) for one in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": schema(arguments[0])}
    if origin is tuple:
        count = len(arguments)
        return {"type": "array", "items": schema(arguments[0]), "minItems": count, "maxItems": count}
    return {"type": SCALARS[hint]}


def section_schema(section: type) -> dict[str, Any]:
    """Return the JSON schema of a section. No key is required: a recipe may inherit it."""
    told, hints = meanings(section), get_type_hints(section, include_extras=True)
    properties = {}
    for field in fields(section):
        hint = hints[field.name]
        properties[field.name] = schema(hint) | {
            "description": told[field.name] or (subsection(hint) and summary(hint))
        }
        if (value := default(field)) is not MISSING and not subsection(hint):
            properties[field.name]["default"] = value
    return {"type": "object", "properties": properties, "additionalProperties": False}


def recipe_schema(stage: str) -> dict[str, Any]:
    """Return the JSON schema of a stage's recipes."""
    found = section_schema(recipe_class(stage))
    inherits = {"type": "string", "description": "another recipe, whose keys hold where this one says nothing"}
    found["properties"] = {"inherits": inherits} | found["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"recipe of stage {stage}"} | found


def summary(section: type) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())


def table(section: type) -> str:
    """Return a section's keys as a Markdown table."""
    told, hints = meanings(section), get_type_hints(section, include_extras=True)
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for field in fields(section):
        hint = hints[field.name]
        if not subsection(hint):
            value = default(field)
            shown = "" if value is MISSING else f"`{json.dumps(value)}`"
            meaning = told[field.name].replace("|", "\\|").replace("<", "\\<")
            rows.append(f"| `{field.name}` | {choices(hint)} | {shown} | {meaning} |")
    return "\n".join(rows)


def choices(hint: Any) -> str:
    """Name a key's type; of a list, what is in it."""
    if get_origin(hint) is Annotated:
        return choices(get_args(hint)[0])
    if get_origin(hint) is tuple:
        return f"a list of {choices(get_args(hint)[0])}"
    return type_name(hint)


def reference() -> str:
    """Return docs/recipes.md."""
    blocks, shared = [HEAD], {}
    for stage in STAGES:
        recipe = recipe_class(stage)
        blocks += [f"## stage: {stage}", summary(recipe), table(recipe)]
        hints = get_type_hints(recipe, include_extras=True)
        for name in (field.name for field in fields(recipe)):
            section = subsection(hints[name])
            if section and section.__module__.startswith("effsam3.stages."):
                blocks += [f"### `{name}` of stage {stage}", summary(section), table(section)]
            elif section:
                shared.setdefault(section, (name, []))[1].append(stage)
    blocks.append("## Sections that stages share")
    for section, (name, stages) in shared.items():
        blocks += [f"### `{name}` of {', '.join(stages)}", summary(section), table(section)]
    return "\n\n".join(blocks) + "\n"


def documents() -> dict[Path, str]:
    """Return {file: its text}."""
    schemas = {DOCS / f"schema/{stage}.json": json.dumps(recipe_schema(stage), indent=1) + "\n" for stage in STAGES}
    return {DOCS / "recipes.md": reference()} | schemas


def main() -> int:
    """Write all of them."""
    for file, text in documents().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
