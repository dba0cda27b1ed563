# SPDX-License-Identifier: Apache-2.0
"""What a file of EfficientSAM3 holds: students, on their own or in a whole model, however it was saved.

The whole model may be SAM 3.1, with or without students.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

from torch import Tensor

from effsam3.errors import UserError
from effsam3.models.chassis.foreign import foreign
from effsam3.models.keymaps.sam3 import TRUNK
from effsam3.models.merging.formats import IMAGE_PREFIX, TEXT_PREFIX
from effsam3.models.registry import SAM3, ForeignSam3

# What names begin with in files that only hold students, and what a merged file has in its place.
ALONE = (
    (r"(?:student_trunk\.)?((?:backbone\.model|head)\..+)", IMAGE_PREFIX),
    (r"((?:encoder|projector)\..+)", TEXT_PREFIX),
)
INTERACTIVE = "inst_interactive_predictor.model."  # where EfficientSAM3's builder keeps SAM 3's tracker


@dataclass
class UpstreamFile:
    """Students under their own names, the rest under SAM 3's original ones."""

    image: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    left_over: dict[str, Tensor] = field(default_factory=dict)  # of SAM 3's own ViT, next to the student
    foreign: ForeignSam3 | None = None  # the SAM 3 that the rest is of, if it is not SAM 3 itself ...
    without: dict[str, Tensor] = field(default_factory=dict)  # ... and its modules that SAM 3 has not, by its names

    @property
    def has_student(self) -> bool:
        """Whether it is a file of EfficientSAM3 at all."""
        return bool(self.image or self.text)

    @property
    def chassis(self) -> str:
        """What the SAM 3 is called that the rest is of."""
        return self.foreign.label if self.foreign else SAM3.label


def divide(tensors: Mapping[str, Tensor]) -> UpstreamFile:
    """Tell a file's students from the rest, by the names of its tensors."""
    file = UpstreamFile(foreign=foreign(tensors))
    if file.foreign is not None:
        key_map = import_module(f"effsam3.models.keymaps.{file.foreign.key_map}")
        tensors, file.without = key_map.to_sam3(tensors)
    tensors = in_full(tensors)
    has_image = any(name.startswith(IMAGE_PREFIX) for name in tensors)
    has_text = TEXT_PREFIX + "projector.weight" in tensors  # SAM 3's own has a `resizer`
    for name, tensor in tensors.items():
        if name.startswith(IMAGE_PREFIX):
            file.image[name.removeprefix(IMAGE_PREFIX).removeprefix("student_trunk.")] = tensor
        elif has_image and name.startswith(TRUNK):  # whose names begin like the student's
            file.left_over[name] = tensor
        elif has_text and name.startswith(TEXT_PREFIX):
            file.text[name.removeprefix(TEXT_PREFIX)] = tensor
        else:
            file.rest[name] = tensor
    return file


def in_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names that a merged file has.

    A student's own file leaves out their beginnings, a model that was saved after loading calls them otherwise.
    """
    for pattern, prefix in ALONE:
        found = [re.fullmatch(pattern, name) for name in tensors]
        if None not in found:
            return {prefix + match[1]: tensor for match, tensor in zip(found, tensors.values(), strict=True) if match}
    named = {
        f"tracker.{name.removeprefix(INTERACTIVE)}" if name.startswith(INTERACTIVE) else name: tensor
        for name, tensor in tensors.items()
    }
    if len(named) < len(tensors):
        raise UserError(
            f"the tracker is in the file twice, as tracker.* and as {INTERACTIVE}*; leave one of them out and save "
            "it again"
        )
    if any(name.startswith("detector.") for name in named):
        return named
    return {name if name.startswith("tracker.") else f"detector.{name}": tensor for name, tensor in named.items()}
