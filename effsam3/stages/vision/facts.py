# SPDX-License-Identifier: Apache-2.0
"""Recipes of stage 1, vision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from effsam3.models.flops import vision_gflop
from effsam3.models.registry import ImageStudent, vision_params
from effsam3.models.registry import Sam3 as Sam3Row
from effsam3.recipe.common import Merge, Optim, Sam3, Train
from effsam3.recipe.push import Push
from effsam3.recipe.rules import (
    FileName,
    NonNegativeFloat,
    PositiveInt,
    Section,
    image_student_name,
    initialisation,
    student_side,
)
from effsam3.stages.image.facts import ImageData, ImageEmbed, ImageEvaluate, ImagesRecipe


@dataclass(frozen=True, kw_only=True)
class VisionLoss(Section):
    """Weights of the terms of the loss; mse and cosine are means over the six maps, in standardised channels."""

    mse: NonNegativeFloat = 1.0  # mean squared error per position
    cosine: NonNegativeFloat = 1.0  # 1 - cosine similarity per position
    trunk: NonNegativeFloat = 1.0  # error of the trunk's map, as a share of what SAM 3's varies in as many components

    def check(self) -> Iterator[str]:
        if self.mse == self.cosine == 0:
            yield "mse: both weights (mse, cosine) are 0; the necks would not learn"


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(ImagesRecipe):
    """Stage 1, vision: a student learns what SAM 3's necks make of its trunk, and takes the place of all three."""

    starter = "stage1/vision/es_rv_m"
    replaces = "vision trunk and necks"
    knobs = ("train.micro_batch_size", "hardware", "train.ema", "image_size", "student_image_size", "teacher")

    stage: Literal["vision"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    # A row of effsam3/models/registry.py (see `effsam3 compare`), or timm/NAME, any backbone with feature maps
    student: Annotated[str, image_student_name]
    # px of the images that its model takes: SAM 3's heads work on the grid that follows; null: SAM 3's own 1008
    image_size: Annotated[int, student_side] | None = None
    student_image_size: Annotated[int, student_side] | None = None  # px that it sees of these; null: all
    # imagenet, random, weights file, or a model's folder: of a run of this stage, or of stage image for its trunk
    student_init: Annotated[str, initialisation] = "imagenet"
    # Channels of the trunk's map, where SAM 3's has 1024; inside each neck, of its fine, its middle and its top level
    widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (96, 32, 64, 96)
    teacher: Literal["stored", "online"] = "stored"  # stored: reads embed.to; online: runs the teacher next to it
    sam3: Sam3 = Sam3()
    data: ImageData
    embed: ImageEmbed  # the trunk's features, as stage image has them; the necks always run next to the student
    loss: VisionLoss = VisionLoss()
    optim: Optim
    train: Train
    evaluate: ImageEvaluate = ImageEvaluate()
    merge: Merge = Merge()
    push: Push = Push()

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.embed.tap != "trunk" or self.embed.grid is not None:
            yield (
                f"embed.tap: SAM 3's necks run next to the student, on whole trunk maps; tap={self.embed.tap} and "
                f"grid={self.embed.grid} are not those. Set embed.tap=trunk and embed.grid=null"
            )

    def counted(self, row: ImageStudent) -> tuple[dict[str, int], int]:
        sizes = self.sizes
        head, necks = vision_params(row.channels, self.widths, sizes.fpn_hidden_size)
        parts = {"trunk": row.trunk_params, "head": head, "necks": necks}
        return parts, sizes.trunk_params + 2 * sizes.neck_params

    def replaced_gflop(self, row: ImageStudent, seen: int, sam3: Sam3Row) -> dict[str, float]:
        return vision_gflop(row, self.widths, seen, sam3)


RECIPE = VisionRecipe
