# SPDX-License-Identifier: Apache-2.0
"""Files of a SAM 3 that cannot be built yet, recognised by the names of their tensors and refused with a sentence.

EfficientSAM3 has put students into SAM 3.1, too (`efficient_sam3p1_*`, `stage1_sam3p1`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from effsam3.errors import ChassisError
from effsam3.models.registry import SAM3, UNSUPPORTED, UnsupportedSam3

STUDENT = ".vision_backbone.trunk.model.", ".language_backbone.projector."
INSTEAD = f"name a SAM 3, such as {SAM3.hub_id} or its sam3.pt, or one of EfficientSAM3's files without `sam3p1`"


def unsupported(names: Iterable[str]) -> UnsupportedSam3 | None:
    """Return the unsupported SAM 3 that is the only one with tensors of these names, None if there is none."""
    # One search over all names; the patterns are anchored line by line.
    text = "\n".join(names)
    return next((row for row in UNSUPPORTED.values() if re.search(row.tensor_names, text, re.MULTILINE)), None)


def what_unsupported(names: Iterable[str]) -> str:
    """Say what a file with tensors of these names is and what to use instead, empty if it is supported."""
    names = list(names)
    if (row := unsupported(names)) is None:
        return ""
    has_student = any(part in f".{name}" for name in names for part in STUDENT)
    return f"is {'a student of EfficientSAM3 in ' if has_student else ''}{row.label}, {row.why}; {INSTEAD}"


def refuse_unsupported(names: Iterable[str], where: str) -> None:
    """Refuse the tensors of a SAM 3 that cannot be built; `where` is what the message calls their file.

    Raises:
        ChassisError: they are; the message names what the file is and what can be used instead.
    """
    if problem := what_unsupported(names):
        raise ChassisError(f"{where} {problem}")


def refuse_unsupported_id(repo_id: str) -> None:
    """Refuse the name on the Hub of a SAM 3 that cannot be built, before anything is fetched.

    Raises:
        ChassisError: it is one.
    """
    for row in UNSUPPORTED.values():
        if re.search(row.hub_name, repo_id):
            raise ChassisError(f"sam3.checkpoint: {repo_id} is {row.label}, {row.why}; {INSTEAD}")
