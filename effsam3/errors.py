# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix; the command line prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Says what is wrong (with the value), what would be right, and the key or command to change."""


class RecipeError(UserError):
    """A recipe that cannot be used; the message lists every mistake."""


class ChassisError(UserError):
    """A SAM 3 checkpoint that is missing, incomplete or not what it claims to be."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest of the choices, or `; choose from A, B` when none is near."""
    choices = list(choices)
    near = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; choose from {', '.join(choices)}" if choices else ""
