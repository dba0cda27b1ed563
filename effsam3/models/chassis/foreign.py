# SPDX-License-Identifier: Apache-2.0
"""Files of a SAM 3 that only `import` takes, recognised by the names of their tensors and refused elsewhere.

EfficientSAM3 has put students into SAM 3.1, too (`efficient_sam3p1_*`, `stage1_sam3p1`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from effsam3.errors import ChassisError
from effsam3.models.registry import FOREIGN, SAM3, ForeignSam3

STUDENT = ".vision_backbone.trunk.model.", ".language_backbone.projector."


def foreign(names: Iterable[str]) -> ForeignSam3 | None:
    """Return the foreign SAM 3 that is the only one with tensors of these names, None if there is none."""
    # One search over all names; the patterns are anchored line by line.
    text = "\n".join(names)
    return next((row for row in FOREIGN.values() if re.search(row.tensor_names, text, re.MULTILINE)), None)


def what_foreign(names: Iterable[str]) -> str:
    """Say what a file with tensors of these names is and what to do with it, empty if it is no foreign SAM 3."""
    names = list(names)
    if (row := foreign(names)) is None:
        return ""
    if any(part in f".{name}" for name in names for part in STUDENT):
        return f"is a student of EfficientSAM3 in {_refusal(row, 'efficient_sam3p1_*.pt')}"
    return f"is {_refusal(row, row.file)}"


def _refusal(row: ForeignSam3, file: str) -> str:
    return (
        f"{row.label} ({row.released}), whose {row.lacks} transformers does not have; `effsam3 import {file} --sam3 "
        f"{SAM3.hub_id}` makes a model of the rest, with {SAM3.label}'s video memory: name that as sam3.checkpoint"
    )


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """Refuse the tensors of a SAM 3 that only `import` takes; `where` is what the message calls their file.

    Raises:
        ChassisError: they are; the message names what the file is and how it is used.
    """
    if problem := what_foreign(names):
        raise ChassisError(f"{where} {problem}")


def refuse_foreign_id(repo_id: str) -> None:
    """Refuse the name on the Hub of a SAM 3 that only `import` takes, before anything is fetched.

    Raises:
        ChassisError: it is one.
    """
    for row in FOREIGN.values():
        if re.search(row.hub_name, repo_id):
            raise ChassisError(
                f"sam3.checkpoint: {repo_id} is {_refusal(row, row.file)} (`hf download {row.hub_id} {row.file}`)"
            )
