# SPDX-License-Identifier: Apache-2.0
"""A row of the table of verbs, and its arguments."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Argument = tuple[str, dict[str, Any]]  # as argparse's `add_argument` takes it


def arg(name: str, text: str, **options: Any) -> Argument:
    """An argument with its help."""
    return name, {"help": text, **options}


def flag(name: str, text: str) -> Argument:
    """An option without a value."""
    return arg(name, text, action="store_true")


RECIPE = (
    arg(
        "recipe",
        "YAML file of a run, a short name such as stage1/image/es_rv_m (`effsam3 recipes`), or a run's folder",
        metavar="RECIPE",
    ),
    arg(
        "overrides",
        "change single keys of the recipe, such as optim.lr=5e-4 or train.loggers=[wandb]",
        metavar="key=value",
        nargs="*",
    ),
)


@dataclass(frozen=True)
class Verb:
    """A row of the table of verbs.

    `call` is a function, or `module:function` below effsam3, imported only when its verb runs, and torch with it. It
    is given the loaded recipe, if the verb has one, and the arguments by name. Without a loaded recipe, a text that
    it returns is printed and a number is the exit code.
    """

    does: str
    call: str | Callable[..., str | int | None]
    arguments: Sequence[Argument] = ()
    recipe: Literal["", "loaded", "path"] = ""  # path: the function loads it itself
    more: str = ""  # for the verb's own --help

    def parser(self, verb: str) -> ArgumentParser:
        """Return the parser of this row."""
        # allow_abbrev: an abbreviated option would change its meaning when a longer one is added.
        parser = ArgumentParser(prog=f"effsam3 {verb}", description=f"{self.does}{self.more}", allow_abbrev=False)
        for argument in [*(RECIPE if self.recipe else ()), *self.arguments]:
            action = parser.add_argument(argument[0], **argument[1])
            if action.nargs == "*":
                action.required = False  # argparse would ask for it where another one is missing
        return parser

    def function(self) -> Callable[..., str | int | None]:
        """Return the function, imported."""
        if not isinstance(self.call, str):
            return self.call
        module, _, name = self.call.partition(":")
        return getattr(import_module(f"effsam3.{module}"), name)


# ---- values of arguments


def count(text: str) -> int:
    """Parse a number above 0 for argparse."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{text} is not above 0")
    return number
