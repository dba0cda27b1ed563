# SPDX-License-Identifier: Apache-2.0
"""What stages that train through a SAM 3's heads have in common: whole models, a teacher's trunk in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from effsam3.data.store.reader import StoreReader
from effsam3.errors import UserError
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import config_at_hand
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.image.student import student_config
from effsam3.models.merging.slots import SLOTS
from effsam3.recipe.common import Data
from effsam3.recipe.reader import load_recipe
from effsam3.shipped import texts
from effsam3.stages.base import open_features
from effsam3.stages.image.facts import ImageRecipe
from effsam3.stages.image.training import FACTS


def load_sam3(folder: Path) -> Any:
    """Load a whole SAM 3, frozen."""
    return load_whole(model_class(read_config(folder).model_type), folder)


def trunk_config(config: Any) -> Any:
    """Return the config of the trunk of a whole SAM 3."""
    return config.detector_config.vision_config.backbone_config


def config_to_come(checkpoint: str) -> Any:
    """Return the config of a whole SAM 3 without its weights or a download, even where it is still to be trained.

    A run that is not merged yet is taken for that of the shipped stage 1 recipe with its name: the chassis of that
    recipe with its image student.

    Raises:
        UserError: the sizes are not known.
    """
    path = Path(checkpoint)
    merged = any((folder / "config.json").is_file() for folder in (path / "merged", path))
    named = [short for short, text in texts().items() if f"\nname: {path.name}\n" in text]
    recipe = load_recipe(named[0]) if named and not merged else None
    if not isinstance(recipe, ImageRecipe):
        return config_at_hand(checkpoint)
    config = config_at_hand(recipe.sam3.checkpoint)
    sizes = {name: getattr(trunk_config(config), name) for name in ("hidden_size", "image_size", "patch_size")}
    sizes["image_size"] = recipe.image_size or sizes["image_size"]
    student = student_config(recipe.student, recipe.head, recipe.student_image_size, **sizes)
    return SLOTS["image"].install(config, student)


def without_trunk(model: Any) -> Any:
    """Take the trunk out of a whole SAM 3, half of its weights."""
    model.detector_model.vision_encoder.backbone = nn.Identity()
    return model


def refuse_other_sizes(own: Any, teacher: Any) -> None:
    """Refuse a teacher of another image or grid: its features would not fit the student's.

    Raises:
        UserError: it is one.
    """
    for name in ("image_size", "patch_size", "hidden_size"):
        mine, other = (getattr(trunk_config(config), name) for config in (own, teacher))
        if mine != other:
            raise UserError(
                f"teacher.checkpoint: its {name} is {other}, that of sam3.checkpoint {mine}; name the SAM 3 that the "
                "student was made for. One with an image_size of its own has no teacher here: of these stages only "
                "`concepts` trains it, by annotations (loss.teacher=0)"
            )


def open_trunk_store(teacher: Any, data: Data) -> StoreReader | None:
    """Open the store of a teacher's trunk features; None where its trunk runs next to the student.

    Args:
        teacher: the recipe's section: `checkpoint`, `fingerprint`, and `store`, None or what a stage 1 recipe of the
            same images has embedded to.

    Raises:
        StoreError: it is not there, or holds features of another teacher.
        UserError: the heads cannot read them.
    """
    if teacher.store is None:
        return None
    naming = dict(key="teacher.store", section="teacher")
    store = open_features(teacher.store, "image", teacher, data, FACTS, "resize", **naming)
    facts, config = store.manifest.description, trunk_config(config_at_hand(teacher.checkpoint))
    grid = config.image_size // config.patch_size
    if facts["tap"] != "trunk" or facts["grid"] != grid:
        raise UserError(
            f"teacher.store: SAM 3's heads read whole trunk maps; {teacher.store} holds {facts['tap']} features on a "
            f"{facts['grid']}x{facts['grid']} grid. Embed with embed.tap=trunk and without embed.grid, or set "
            "teacher.store=null"
        )
    return store
