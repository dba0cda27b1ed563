# SPDX-License-Identifier: Apache-2.0
"""Rules of single keys: functions of a value that return what is wrong with it, or an empty text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from effsam3.errors import UserError, did_you_mean
from effsam3.models.image.backbones import refuse_unknown_student
from effsam3.models.registry import TEXT_STUDENTS, TINY_TEXT_STUDENTS

WEIGHTS_FILES = (".safetensors", ".bin", ".pth", ".pt")  # what timm loads


# Rules: a function of the value that returns what is wrong with it, or an empty text.
def positive(value: float) -> str:
    return "" if value > 0 else f"must be above 0, got {value}"


def not_negative(value: float) -> str:
    return "" if value >= 0 else f"must be 0 or more, got {value}"


def below_one(value: float) -> str:
    return "" if 0 <= value < 1 else f"must be at least 0 and below 1, got {value}"


def context(value: int) -> str:
    return "" if value in (16, 32) else f"must be 16 or 32, got {value}: SAM 3's text encoder reads 32 tokens at most"


def share(value: float) -> str:
    return "" if 0 <= value <= 1 else f"must be between 0 and 1, got {value}"


def file_name(value: str) -> str:
    allowed = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value)
    return "" if allowed else f"{value!r} must be letters, digits, '.', '_' and '-', beginning with a letter or digit"


def parquet(value: str) -> str:
    return "" if value.endswith(".parquet") else f"{value!r} must end in .parquet"


def each_once(values: tuple[str, ...]) -> str:
    repeated = sorted({value for value in values if values.count(value) > 1})
    return f"{', '.join(repeated)} is listed twice" if repeated else ""


def at_least_one(values: tuple[str, ...]) -> str:
    return "" if values else "is empty; list at least one"


def image_student_name(value: str) -> str:
    try:
        refuse_unknown_student(value)
    except UserError as error:
        return str(error)
    return ""


def text_student_name(value: str) -> str:
    rows = TEXT_STUDENTS | TINY_TEXT_STUDENTS
    return "" if value in rows else f"{value!r} is not a text student{did_you_mean(value, rows)}"


def names_a_model(student_init: str) -> bool:
    """Return whether `student_init` is the folder of a merged or imported model (or of its run)."""
    return "/" in student_init and not student_init.endswith(WEIGHTS_FILES)


def text_initialisation(value: str) -> str:
    return _initialisation(value, "mobileclip")


def initialisation(value: str) -> str:
    return _initialisation(value, "imagenet")


def _initialisation(value: str, own: str) -> str:
    if value in (own, "random") or value.endswith(WEIGHTS_FILES) or names_a_model(value):
        return ""
    files = ", ".join(WEIGHTS_FILES)
    return f"{value!r} is not {own}, random or a weights file ({files}), nor a model's folder, such as runs/x/merged"


def student_side(value: int) -> str:
    return "" if value >= 64 else f"must be 64 px or more, got {value}: two positions of a map of stride 32"


PositiveInt = Annotated[int, positive]
NonNegativeInt = Annotated[int, not_negative]
PositiveFloat = Annotated[float, positive]
NonNegativeFloat = Annotated[float, not_negative]
Decay = Annotated[float, below_one]
FileName = Annotated[str, file_name]


def exactly_one(section: object, *names: str) -> Iterator[str]:
    """Yield a mistake unless exactly one of the section's keys has a value."""
    given = [f"{name} ({getattr(section, name):g})" for name in names if getattr(section, name) is not None]
    if not given:
        yield f"{names[0]}: give it or {' or '.join(names[1:])}; neither is set"
    if len(given) > 1:
        yield f"{names[0]}: {' and '.join(given)} are both set; set one of them to null"


class Section:
    """A group of keys of a recipe."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # every section is a dataclass

    def check(self) -> Iterator[str]:
        """Yield a sentence, beginning with a key of this section, for every mistake that two or more keys make."""
        yield from ()
