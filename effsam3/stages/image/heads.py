# SPDX-License-Identifier: Apache-2.0
"""Validation of stage image through SAM 3's heads: a student's features are judged by what they are for.

Letters: B images, D channels of the trunk, G side of its grid, O objects and R phrases of all images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from effsam3.data.images.boxes import boxes_to_show
from effsam3.data.images.features import ImageFeatures
from effsam3.models.chassis.classes import empty_model, model_class
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.sizes import at_image_size
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.heads.agreement import agreement_sums
from effsam3.models.heads.detector import ask
from effsam3.models.heads.known import only_heads
from effsam3.models.heads.tracker import Shown
from effsam3.models.image.teacher import parameter_count
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.stages.image.facts import ImageRecipe
from effsam3.stages.protocol import Batch

CORNERS = (2, 3)  # labels of a box's, as in models/memory/prompts.py


class Heads:
    """The frozen heads of the recipe's SAM 3, and what they are asked on each held-out image."""

    def __init__(self, recipe: ImageRecipe, model: Any):
        """Keep of a whole SAM 3 what is needed.

        Raises:
            TextTooLong: a phrase has more tokens than SAM 3 reads.
        """
        self.asked, self.tokenizer = recipe.validate, PromptTokenizer()
        self.scale = recipe.side / recipe.sizes.image_size  # pixels of the heads' images to one of the teacher's
        self.model = only_heads(model, self.asked.phrases, self.tokenizer)
        self.boxes: list[np.ndarray] = []  # of each held-out image, in shares of its sides

    @classmethod
    def from_recipe(cls, recipe: ImageRecipe, images: ImageFeatures) -> Heads:
        """Load them, and read the boxes of the held-out images."""
        folder = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
        config = at_image_size(read_config(folder), recipe.side)
        heads = cls(recipe, load_whole(model_class(config.model_type), folder, config))
        heads.boxes = [boxes_to_show(row, images.folder, heads.asked.boxes_per_image) for row in images.index]
        return heads

    @classmethod
    def from_shapes(cls, recipe: ImageRecipe) -> Heads:
        """Build them without weights and data."""
        return cls(recipe, empty_model(at_image_size(config_at_hand(recipe.sam3.checkpoint), recipe.side)))

    def describe(self) -> str:
        """Say what judges the student, for the run's header."""
        asked, size = self.asked, parameter_count(self.model) / 1e6
        return (
            f"by SAM 3's heads ({size:.2f} M parameters, frozen), asked for {asked.phrases_per_image} of "
            f"{len(asked.phrases)} phrases and at most {asked.boxes_per_image} boxes an image"
        )

    def sums(self, batch: Batch, feat_BDGG: Tensor, teacher_BDGG: Tensor) -> dict[str, Tensor]:
        """Return the sums of `agreement_sums` of a held-out batch; images that could not be read are not prompted.

        Phrases are asked in turn, by the image's place among those that are held out, so that they are the same in
        every validation.
        """
        points, phrases, image_O, image_R = [], [], [], []
        for image, (position, size) in enumerate(
            zip(batch["positions"].tolist(), batch["sizes"].tolist(), strict=True)
        ):
            if not size[0]:
                continue
            rows, columns = size
            own_O22 = (
                torch.from_numpy(self.boxes[position]).view(-1, 2, 2) * torch.tensor([columns, rows]) * self.scale
            )
            points.append(own_O22)
            image_O += [image] * len(own_O22)
            first, count = position * self.asked.phrases_per_image, self.asked.phrases_per_image
            phrases += [self.asked.phrases[place % len(self.asked.phrases)] for place in range(first, first + count)]
            image_R += [image] * count
        device = feat_BDGG.device
        labels_O2 = torch.tensor([CORNERS] * len(image_O), dtype=torch.int32, device=device).view(-1, 2)
        points_O22 = torch.cat(points).to(device) if points else torch.zeros(0, 2, 2, device=device)
        shown = Shown(torch.tensor(image_O, dtype=torch.int64, device=device), points_O22, labels_O2)
        asked = ask(phrases, torch.tensor(image_R, dtype=torch.int64, device=device), self.tokenizer)
        return agreement_sums(self.model, feat_BDGG, self.model, teacher_BDGG, shown, asked)
