# SPDX-License-Identifier: Apache-2.0
"""The reader of every JSON and YAML file that this project wrote itself: whole and of the expected form, or refused.

A form describes what a value must be:
    str, bool, int, float, dict, list, None    a value of that type; float: any number
    object                                     anything
    (a, b)                                     one of several forms
    [a]                                        a list of a
    {"key": a, "other?": b}                    a mapping with these keys, `other` where it is there; it may have more
    {str: a}, {}                               a mapping of names to a; an empty mapping
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from effsam3.errors import UserError

LARGEST_BYTES = 2**28  # the index of a million tensors is smaller
NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
    None: "null",
}


class DamagedFileError(UserError):
    """A file that cannot be read, or does not hold what this project writes there."""


def read_json(path: Path, form: Any, remedy: str, error: type[UserError] = DamagedFileError) -> Any:
    """Read a JSON file of a known form.

    Args:
        remedy: what to do about a damaged file; the message ends with it.
        error: what to raise.

    Raises:
        UserError: as `error`: it cannot be read, is cut short or something else, or not of the form.
    """
    return parse_json(read_text(path, remedy, error), form, str(path), remedy, error)


def parse_json(text: str, form: Any, where: str, remedy: str, error: type[UserError] = DamagedFileError) -> Any:
    """Read a JSON text of a known form; `where` is what messages call it.

    Raises:
        UserError: as `error`: it is not JSON, or not of the form.
    """
    return _parsed(lambda: json.loads(text, object_pairs_hook=_without_repetition), form, where, remedy, error)


def read_yaml(path: Path, form: Any, remedy: str, loader: type = yaml.SafeLoader) -> Any:
    """Read a YAML file of a known form; see `read_json`. `loader` is one of yaml's safe ones."""
    text = read_text(path, remedy)
    return _parsed(lambda: yaml.load(text, Loader=loader), form, str(path), remedy, DamagedFileError)


def read_text(path: Path, remedy: str, error: type[UserError] = DamagedFileError) -> str:
    """Read a text file in UTF-8.

    Raises:
        UserError: as `error`: it cannot be read, is empty, too large, or not UTF-8.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_BYTES:
            raise error(f"{path} has {size:,} bytes, far more than such a file can have; {remedy}")
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); {remedy}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path} is damaged: it is not a text in UTF-8 ({problem}); {remedy}") from problem
    if not text.strip():
        raise error(f"{path} is empty; {remedy}")
    return text


def can_be_path(text: str) -> bool:
    """Whether a text can name a file at all; others make the operating system fail instead of finding nothing."""
    return "\0" not in text and len(text) < 4096 and all(len(part.encode()) < 256 for part in text.split("/"))


def _parsed(parse: Callable[[], Any], form: Any, where: str, remedy: str, error: type[UserError]) -> Any:
    try:
        content = parse()
    except RecursionError as problem:
        raise error(f"{where} is damaged: its values are nested too deep; {remedy}") from problem
    except (ValueError, yaml.YAMLError) as problem:
        raise error(f"{where} is damaged: {' '.join(str(problem).split())[:200]}; {remedy}") from problem
    if wrong := mismatch(content, form):
        raise error(f"{where} is damaged: {wrong}; {remedy}")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a mapping; JSON's own rule for a repeated key, that the last one counts, would hide one of two answers."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(names) if key in names[:place])
        raise ValueError(f"the key {twice} is in it twice")
    return content


def mismatch(value: Any, form: Any, name: str = "") -> str:
    """Say where a value is not of a form, empty if it is; `name` is that of the value."""
    if isinstance(form, tuple):
        wrong = [mismatch(value, one, name) for one in form]
        # Of several forms, the one of the value's own type tells most about what is wrong.
        same = [text for text, one in zip(wrong, form, strict=True) if _kind(one) is type(value)]
        return "" if not all(wrong) else same[0] if same else _unexpected(value, form, name)
    if isinstance(form, list):
        if not isinstance(value, list):
            return _unexpected(value, list, name)
        return next(filter(None, (mismatch(one, form[0], f"{name}[{at}]") for at, one in enumerate(value))), "")
    if isinstance(form, dict):
        if not isinstance(value, dict) or (value and not form):
            return _unexpected(value, form, name)
        return next(filter(None, (_mismatch_in(value, key, inner, name) for key, inner in form.items())), "")
    return "" if _fits(value, form) else _unexpected(value, form, name)


def _mismatch_in(value: dict, key: Any, form: Any, name: str) -> str:
    """Return the same for one entry of a form's mapping."""
    if key is str:
        if (other := next((key for key in value if not isinstance(key, str)), None)) is not None:
            return f"{name or 'it'} has the key {other!r}, expected text"
        inside = (mismatch(one, form, _inside(name, key)) for key, one in value.items())
        return next(filter(None, inside), "")
    bare = key.removesuffix("?")
    if bare not in value:
        return "" if key != bare else f"{_inside(name, bare)} is missing"
    return mismatch(value[bare], form, _inside(name, bare))


def _inside(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _fits(value: Any, form: Any) -> bool:
    if form is object:
        return True
    if form is None:
        return value is None
    kinds = (int, float) if form is float else form
    return isinstance(value, kinds) and (form is bool or not isinstance(value, bool))


def _unexpected(value: Any, form: Any, name: str) -> str:
    forms = form if isinstance(form, tuple) else (form,)
    expected = " or ".join(dict.fromkeys(NAMES[_kind(one)] for one in forms))
    found = NAMES[_kind(value)] if isinstance(value, (dict, list)) else repr(value)[:60]
    return f"{name or 'it'} is {found}, expected {expected}"


def _kind(form: Any) -> Any:
    """Return the type that a form begins with."""
    return type(form) if isinstance(form, (dict, list)) else form
