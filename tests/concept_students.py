# SPDX-License-Identifier: Apache-2.0
"""A small student in the place of the trunk of `tiny_concepts`: a folder that recipes of stage concepts start from."""

from __future__ import annotations

from pathlib import Path

import torch
from run_folders import shaken

from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, quiet_transformers, read_config, read_tensors
from effsam3.models.image.student import StudentTrunk, student_config
from effsam3.models.merging.slots import SLOTS


def student_folder(folder: Path, student: str = "tiny_separable_w4") -> Path:
    """Write a `tiny_concepts` whose trunk is a student of random weights."""
    chassis = chassis_folder("tiny_concepts")
    tensors, config = read_tensors(chassis), read_config(chassis)
    backbone = config.detector_config.vision_config.backbone_config
    sizes = {name: getattr(backbone, name) for name in ("hidden_size", "image_size", "patch_size")}
    torch.manual_seed(0)
    trunk = shaken(StudentTrunk(student_config(student, "linear", None, **sizes)))
    config = SLOTS["image"].install(config, trunk.config)
    with quiet_transformers():
        model = model_class(config.model_type)(config)
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(TRUNK)}
        model.load_state_dict(rest | {TRUNK + name: tensor for name, tensor in trunk.state_dict().items()})
        model.save_pretrained(folder, save_original_format=False)
    return folder
