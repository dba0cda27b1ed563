# SPDX-License-Identifier: Apache-2.0
"""SAM 3.1's files, recognised by the names of their tensors, so that they are refused with a sentence.

SAM 3.1 tracks many objects in one pass (object multiplex): its neck has three towers, its tracker two decoders, under
names that SAM 3 does not have. EfficientSAM3 has put students into it, too (`efficient_sam3p1_*`, `stage1_sam3p1`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from effsam3.errors import ChassisError

# In the original format and in folders that others have converted.
NAMES = re.compile(r"(^|\.)(interactive_convs|propagation_convs)\.|(^|\.)tracker(_model)?\.(model\.|interactive_sam_)")
HUB_NAME = re.compile(r"(^|/)sam-?3[._-]?1\b|sam3p1", re.IGNORECASE)
STUDENT = ".vision_backbone.trunk.model.", ".language_backbone.projector."
WHAT = (
    "SAM 3.1, whose video tracker (object multiplex) neither transformers nor this project has, so that nothing of it "
    "can be loaded"
)
INSTEAD = "name a SAM 3, such as facebook/sam3 or its sam3.pt, or one of EfficientSAM3's files without `sam3p1`"


def what_sam31(names: Iterable[str]) -> str:
    """Say what a file with tensors of these names is and what to use instead, empty if it is no SAM 3.1."""
    names = list(names)
    if not any(NAMES.search(name) for name in names):
        return ""
    has_student = any(part in f".{name}" for name in names for part in STUDENT)
    return f"is {'a student of EfficientSAM3 in ' if has_student else ''}{WHAT}; {INSTEAD}"


def refuse_sam31(names: Iterable[str], where: str) -> None:
    """Refuse the tensors of a SAM 3.1; `where` is what the message calls their file.

    Raises:
        ChassisError: they are; the message says what the file is and what can be used instead.
    """
    if problem := what_sam31(names):
        raise ChassisError(f"{where} {problem}")


def refuse_sam31_id(repo_id: str) -> None:
    """Refuse the name of a SAM 3.1 on the Hub before anything is fetched.

    Raises:
        ChassisError: it is one.
    """
    if HUB_NAME.search(repo_id):
        raise ChassisError(f"sam3.checkpoint: {repo_id} is {WHAT}; {INSTEAD}")
