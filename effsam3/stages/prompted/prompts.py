# SPDX-License-Identifier: Apache-2.0
"""Stage prompted: the prompts of a batch.

Letters: N prompts of one kind of all images, P points of a prompt, R further rounds, L side of the masks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from effsam3.models.heads.detector import Asked, ask
from effsam3.models.heads.prompted_student import Prompts
from effsam3.models.heads.tracker import Shown
from effsam3.models.inference.concepts import ANY_CONCEPT
from effsam3.models.memory.prompts import PromptStyle, draw_anywhere, draw_prompt, rescale
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.stages.prompted.facts import PromptedRecipe
from effsam3.stages.protocol import Batch

POINTS = {"point": 1, "box": 2}  # points that show an object: a box's are its corners


def draw_prompts(recipe: PromptedRecipe, batch: Batch, image_size: int, device: torch.device) -> dict[str, Prompts]:
    """Draw the prompts of a batch of `ShownObjects`, by their kind: as many of each on every image.

    Each depends on the seed, the image's number in the run and its own place only; so it is the same on any number of
    ranks and after resuming, and all ranks run the same.
    """
    asked, numbers, side = recipe.prompts, batch["numbers"], batch["masks"].shape[-1]
    style = PromptStyle(jitter=asked.jitter, jitter_px=asked.jitter_px * side / image_size)
    weight_B = (batch["sizes"][:, 0] > 0).float() / (len(numbers) * asked.per_image)
    found, first = {}, 0
    for kind, count in asked.counts().items():
        drawn: list[tuple[Tensor, Tensor]] = []
        chances = []
        for masks_KLL, number in zip(batch["masks"], numbers, strict=True):
            for place in range(count):
                # The last number tells it from the generator that has chosen the image's objects: numpy takes a
                # missing one for 0.
                rng = np.random.default_rng([recipe.train.seed, number, first + place, 1])
                mask_LL = masks_KLL[first + place]
                shows = mask_LL.any()
                one = draw_prompt(mask_LL, kind, rng, style) if shows else draw_anywhere(kind, place, count, side, rng)
                drawn.append(one)
                chances.append(rng.random(asked.rounds - 1))
        points, labels = (torch.stack([part[: POINTS[kind]] for part in parts]) for parts in zip(*drawn, strict=True))
        image_N = torch.arange(len(numbers)).repeat_interleave(count)
        tensors = (
            image_N,
            rescale(points, side, image_size),
            labels,
            weight_B[image_N],
            torch.tensor(np.array(chances)),
        )
        image_N, points_NP2, labels_NP, weight_N, chance_NR = (tensor.to(device) for tensor in tensors)
        found[kind] = Prompts(Shown(image_N, points_NP2, labels_NP), weight_N, chance_NR)
        first += count
    return found


def asks(recipe: PromptedRecipe, number: int) -> bool:
    """Return whether the images of the step to which this number belongs are asked by example boxes.

    By step, not by image, so that all ranks run the same; spread evenly, the first step among them.
    """
    share, step = recipe.prompts.exemplar, number // recipe.train.global_batch_size
    return math.ceil((step + 1) * share) > math.ceil(step * share)


def draw_exemplars(recipe: PromptedRecipe, batch: Batch, tokenizer: PromptTokenizer, device: torch.device) -> Asked:
    """Draw an example box on every image: around the object that is shown first, or anywhere."""
    side, boxes = batch["masks"].shape[-1], []
    for masks_KLL, number in zip(batch["masks"], batch["numbers"], strict=True):
        # The place behind those of the prompts: a generator of its own.
        rng = np.random.default_rng([recipe.train.seed, number, recipe.prompts.per_image, 1])
        if masks_KLL[0].any():
            corners, _ = draw_prompt(masks_KLL[0], "box", rng, PromptStyle(jitter=0.0))
        else:
            corners, _ = draw_anywhere("box", 0, 1, side, rng)
        # From the outer edges of the pixels, 0..1.
        low, high = corners[0] / side, (corners[1] + 1) / side
        boxes.append(torch.cat([(low + high) / 2, high - low]))
    asked = ask([ANY_CONCEPT] * len(boxes), torch.arange(len(boxes), device=device), tokenizer)
    labels_R1 = torch.ones(len(boxes), 1, dtype=torch.int64, device=device)
    return asked._replace(boxes_RN4=torch.stack(boxes)[:, None].to(device), box_labels_RN=labels_R1)
