# SPDX-License-Identifier: Apache-2.0
"""YAML whose values stay text until their key's declared type decides what they are.

So YAML's own guesses (`no` is false, `1e-3` is text, `012` is ten, `1:30` is ninety) never happen, and a repeated key
is noticed.
"""

from __future__ import annotations

import math
import re
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from effsam3.errors import RecipeError, did_you_mean

INTEGER = re.compile(r"[-+]?\d+(_\d+)*")
NUMBER = re.compile(r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?")
LEADING_ZERO = re.compile(r"[-+]?0[\d_]")
# YAML 1.1's words; its `y` and `n` are left out, as they are letters more often than answers.
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
MOST_NODES, DEEPEST = 10_000, 50
NULLS = ("", "~", "null", "Null", "NULL")


class Mistake(Exception):
    """One value that does not fit its type, in a sentence."""


@dataclass(frozen=True)
class Scalar:
    """A value as it is written."""

    text: str
    plain: bool  # not in quotes
    where: str  # such as `base.yaml line 3`

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in NULLS

    def __str__(self) -> str:
        return "nothing" if self.is_null else repr(self.text)


@dataclass(frozen=True)
class Items:
    """A list of Scalars (or of anything else, which no key takes)."""

    nodes: tuple[Any, ...]
    where: str

    def __str__(self) -> str:
        return "a list"


class Mapping(dict):
    """Keys and what they hold: Mapping, Items or Scalar."""

    def __init__(self, items: Any = (), where: str = ""):
        super().__init__(items)
        self.where = where

    def __str__(self) -> str:
        return "a mapping"


Tree = Mapping | Items | Scalar


def parse(text: str, name: str, problems: list[str], where: str | None = None) -> Tree:
    """Return the tree of one YAML document, adding repeated keys to `problems`.

    `name` is what messages call the document; `where`, if given, replaces `name` and line in messages.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{name} is not YAML: {what}{line}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError(f"{name} is damaged: its values are nested too deep") from error
    nodes = 0

    def place(node: yaml.Node) -> str:
        return where or f"{name} line {node.start_mark.line + 1}"

    def tree(node: yaml.Node, above: tuple[yaml.Node, ...]) -> Tree:
        nonlocal nodes
        nodes += 1
        if nodes > MOST_NODES or len(above) > DEEPEST:  # aliases inside aliases multiply
            raise RecipeError(
                f"{name} is not a recipe: it holds more than {MOST_NODES:,} values, or they lie too deep"
            )
        if any(node is other for other in above):
            raise RecipeError(f"{place(node)}: a YAML alias to the mapping or list it is in; write it out")
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            raise RecipeError(f"{place(node)}: {node.tag} is a YAML tag; recipes hold plain values only")
        above = (*above, node)
        if isinstance(node, yaml.ScalarNode):
            return Scalar(node.value, node.style is None, place(node))
        if isinstance(node, yaml.SequenceNode):
            return Items(tuple(tree(item, above) for item in node.value), place(node))
        mapping = Mapping(where=place(node))
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{place(key)}: a key must be one word")
            if key.value in mapping:
                places = f"{mapping[key.value].where}, {place(value)}"
                problems.append(f"key {key.value} is given twice ({places}); keep one")
            mapping[key.value] = tree(value, above)
        return mapping

    return Scalar("", True, where or name) if root is None else tree(root, ())


def convert(hint: Any, node: Tree) -> Any:
    """Return the value of a node as the type that a key declares.

    Types: int, float, bool, str, Literal of texts, `X | None`, tuple[X, ...], tuple[X, Y], and Annotated with rules
    (functions of the value that return what is wrong with it, or an empty text).

    Raises:
        Mistake: it is not one.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = convert(arguments[0], node)
        for rule in arguments[1:]:
            if problem := rule(value):
                raise Mistake(problem)
        return value
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return None if isinstance(node, Scalar) and node.is_null else convert(inner, node)
    if origin is tuple:
        return _tuple(arguments, node)
    if not isinstance(node, Scalar) or node.is_null:
        raise Mistake(f"expected {type_name(hint)}, got {node}")
    if origin is Literal:
        if node.text not in arguments:
            raise Mistake(f"{node.text!r} is not one of {', '.join(arguments)}{_near(node.text, arguments)}")
        return node.text
    return SCALARS[hint](node)


def type_name(hint: Any) -> str:
    """Return how messages call a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " or ".join(arguments)
    if origin is tuple:
        return "a list"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if argument is types.NoneType else type_name(argument) for argument in arguments)
    return {str: "text", bool: "true or false"}.get(hint, hint.__name__)


def _tuple(arguments: tuple[Any, ...], node: Tree) -> tuple[Any, ...]:
    if not isinstance(node, Items):
        example = f"; write [{node.text}]" if isinstance(node, Scalar) and not node.is_null else ""
        raise Mistake(f"expected a list, got {node}{example}")
    hints = [arguments[0]] * len(node.nodes) if arguments[-1] is Ellipsis else list(arguments)
    if len(hints) != len(node.nodes):
        raise Mistake(f"expected a list of {len(hints)}, got {len(node.nodes)} values")
    return tuple(convert(hint, item) for hint, item in zip(hints, node.nodes, strict=True))


def _number(node: Scalar, form: re.Pattern[str], name: str) -> str:
    # Quotes say text: `"1"` for a number is more likely a slip than a wish.
    if not node.plain and form.fullmatch(node.text):
        raise Mistake(f"expected {name}, got the text {node}; remove the quotes")
    if node.text.lower().lstrip("+-.") in ("nan", "inf", "infinity"):
        raise Mistake(f"{node.text} is not a number that can be computed with; expected {name}")
    if not form.fullmatch(node.text):
        raise Mistake(f"expected {name}, got {node}")
    if LEADING_ZERO.match(node.text):
        raise Mistake(f"{node.text} begins with a zero, which YAML may read as octal; remove the zero")
    return node.text.replace("_", "")


def _integer(node: Scalar) -> int:
    return int(_number(node, INTEGER, "int"))


def _float(node: Scalar) -> float:
    value = float(_number(node, NUMBER, "float"))
    if not math.isfinite(value):
        raise Mistake(f"{node.text} is too large for a float")
    return value


def _boolean(node: Scalar) -> bool:
    if not node.plain or node.text.lower() not in BOOLEANS:
        raise Mistake(f"expected {type_name(bool)}, got {node}")
    return BOOLEANS[node.text.lower()]


SCALARS = {int: _integer, float: _float, bool: _boolean, str: lambda node: node.text}


def _near(text: str, choices: tuple[str, ...]) -> str:
    """did_you_mean for choices that have been listed already."""
    hint = did_you_mean(text, choices)
    return hint if "did you mean" in hint else ""
