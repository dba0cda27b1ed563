# SPDX-License-Identifier: Apache-2.0
"""The slot `vision` of SAM 3: a trained student's tensors and config as the merged model has them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Sam3VisionConfig

from effsam3.models.chassis.tensors import TRUNK, to_float32
from effsam3.models.merging.slots import (
    MergeError,
    Part,
    model_folder,
    part_of_model,
    read_card,
    refuse_other_student,
)
from effsam3.models.vision.student import VisionTrunkConfig, vision_trunk_config
from effsam3.models.vision.training import VisionStudent, in_whole_model

OWN_TRUNK = "trunk."  # timm's trunk in a `VisionTrunk` and in a `StudentTrunk`


def encoder_config(encoder: Sam3VisionConfig, trunk: VisionTrunkConfig) -> Sam3VisionConfig:
    """Return the config of a SAM 3's vision encoder with a vision student in it."""
    encoder = deepcopy(encoder)
    encoder.backbone_config = deepcopy(trunk)
    return encoder


def build_vision_student(
    encoder: Sam3VisionConfig, student: str, widths: tuple[int, ...], seen: int | None
) -> VisionStudent:
    """Build a student by its name in recipes for the SAM 3 whose vision encoder has the config `encoder`.

    Raises:
        UserError: there is no such student, or it cannot be one at this size; `seen` is its `student_image_size`.
    """
    own: Any = encoder.backbone_config
    trunk = vision_trunk_config(student, widths, seen, own.image_size, own.patch_size)
    return VisionStudent(encoder_config(encoder, trunk))


def vision_part(
    student: str,
    widths: tuple[int, ...],
    seen: int | None,
    weights: Mapping[str, Tensor],
    config: PreTrainedConfig,
    **about,
) -> Part:
    """Make a part of a trained `VisionStudent`'s tensors for the chassis with this config.

    `about` are the part's other attributes.

    Raises:
        MergeError: the tensors are not this student's.
    """
    chassis: Any = config
    with torch.device("meta"):
        built = build_vision_student(chassis.detector_config.vision_config, student, widths, seen)
    refuse_other_student(built.state_dict(), weights, f"{student} with widths {list(widths)}")
    tensors = in_whole_model({name: to_float32(tensor) for name, tensor in weights.items()})
    return Part(slot="vision", student=student, config=built.trunk.config, tensors=tensors, **about)


def start_vision_from(student: VisionStudent, place: Path) -> None:
    """Give a new student the weights of the same one in a merged model, or of an image student its trunk.

    Raises:
        MergeError: there is no model, or another student in it.
    """
    folder = model_folder(place)
    slots = {} if folder is None else read_card(folder)["slots"]
    slot = "image" if "image" in slots and "vision" not in slots else "vision"
    part = part_of_model(slot, place)
    naming = f"the recipe's student (student_init: it is {part.student})"
    if slot == "vision":
        own = student.state_dict()
        wanted = in_whole_model(own)
        refuse_other_student(wanted, part.tensors, naming)
        # The statistics in the necks are part of what they compute, so they come along.
        student.load_state_dict({name: part.tensors[there] for name, there in zip(own, wanted, strict=True)})
        return
    image: Any = part.config
    if image.timm_name != student.trunk.config.timm_name:
        raise MergeError(
            f"student_init: {place} has the image student {part.student}, whose trunk is timm's {image.timm_name}; "
            f"that of the recipe's student is {student.trunk.config.timm_name}"
        )
    prefix = TRUNK + OWN_TRUNK
    trunk = {name.removeprefix(prefix): part.tensors[name] for name in part.tensors if name.startswith(prefix)}
    refuse_other_student(student.trunk.trunk.state_dict(), trunk, naming)
    student.trunk.trunk.load_state_dict(trunk)
