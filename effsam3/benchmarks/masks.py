# SPDX-License-Identifier: Apache-2.0
"""Prompted masks: box and point prompts from SA-1B annotations, through the tracker heads of teacher and student.

Letters: O objects of an image, L low-resolution mask side, H W rows and columns of the original image.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from effsam3.benchmarks.models import Pair
from effsam3.benchmarks.pictures.drawing import evenly
from effsam3.data.coco import rles_of
from effsam3.data.images.sa1b import read_annotations, read_image
from effsam3.data.transforms import normalise, resize_image
from effsam3.data.unreadable import Unreadable
from effsam3.errors import UserError
from effsam3.models.inference.prompted import prompted_masks

# An object's size in positions of the trunk's grid: the grid is what small objects are lost on.
SIZES = (("small", 0.0, 4.0), ("medium", 4.0, 64.0), ("large", 64.0, float("inf")))


def annotated_rows(index, most: int) -> Iterator[dict]:
    """Yield the first `most` rows that have annotations."""
    places = (place for place, masks in enumerate(index["num_masks"]) if masks)
    yield from (index[place] for place in islice(places, most))


def choose_annotations(annotations: list[dict], count: int) -> list[dict]:
    """Choose up to `count` annotations evenly over the range of areas, so that small objects count, too."""
    return evenly(sorted(annotations, key=lambda annotation: annotation["area"]), count)


def embeddings_of(model, image_HW3: np.ndarray) -> list[Tensor]:
    """Return what a tracker makes of an image (uint8), resized as it takes it."""
    pixels_3SS = normalise(resize_image(image_HW3, model.config.image_size, "square")[0])
    return model.get_image_embeddings(pixels_3SS[None].to(model.device))


def segment(model, embeddings, annotations: list[dict], prompt: str, height: int, width: int) -> Tensor:
    """Masks (O, H, W), bool, of one image's annotations, prompted by their `bbox` or first `point_coords`."""
    device, side = embeddings[-1].device, model.config.image_size
    scale_xy = torch.tensor([side / width, side / height])
    boxes = points = None
    if prompt == "box":
        xywh_O4 = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
        boxes = torch.cat([xywh_O4[:, :2], xywh_O4[:, :2] + xywh_O4[:, 2:]], 1) * scale_xy.repeat(2)
        boxes = boxes.to(device)
    else:
        xy_O2 = torch.tensor([annotation["point_coords"][0] for annotation in annotations], dtype=torch.float32)
        points = (xy_O2 * scale_xy).to(device)
    logits_OLL, _ = prompted_masks(model, embeddings, boxes, points)
    # At the original's size before the threshold: masks that were cut small have stairs, and small objects lose by
    # them.
    logits_OHW = F.interpolate(logits_OLL[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    return (logits_OHW > 0).cpu()


def iou_each(masks_OHW: Tensor, rles: list[dict]) -> list[float]:
    """Intersection over union of mask o with RLE o; two empty masks agree."""
    own = rles_of(masks_OHW.numpy())
    values = []
    for mask, rle in zip(own, rles, strict=True):
        both_empty = not coco_mask.area(mask) and not coco_mask.area(rle)
        values.append(1.0 if both_empty else float(coco_mask.iou([mask], [rle], [0])[0, 0]))
    return values


def size_of(annotation: dict, height: int, width: int, grid: int) -> str:
    """Name an object's size by the grid positions that it covers."""
    positions = annotation["area"] / (height * width) * grid**2
    return next(name for name, low, high in SIZES if low <= positions < high)


def prompted_mask_quality(pair: Pair, index, folder, prompts: tuple[str, ...], most: int, per_image: int) -> dict:
    """Measure both models on the first `most` rows of the index that have annotations.

    Returns, per prompt, `student`, `teacher` (mIoU against the annotations), `agreement` (student against teacher's
    masks), the same by object size, and the number of masks; and the number of `images`.

    Raises:
        UserError: none of the images can be read.
    """
    vision: Any = pair.teacher.config.vision_config
    grid = pair.image_size // vision.backbone_config.patch_size
    found: dict[str, list[dict]] = {prompt: [] for prompt in prompts}
    images, unreadable = 0, []
    for row in annotated_rows(index, most):
        try:
            image, annotations = read_image(row, folder), read_annotations(row, folder)
        except Unreadable as error:
            unreadable.append(str(error))
            continue
        images += 1
        height, width = image.shape[:2]
        chosen = choose_annotations(annotations, per_image)
        truths = [annotation["segmentation"] for annotation in chosen]
        embeddings = {name: embeddings_of(model, image) for name, model in pair.models.items()}
        for prompt in prompts:
            masks = {
                name: segment(model, embeddings[name], chosen, prompt, height, width)
                for name, model in pair.models.items()
            }
            teacher_rles = rles_of(masks["teacher"].numpy())
            scores = zip(
                iou_each(masks["student"], truths), iou_each(masks["teacher"], truths),
                iou_each(masks["student"], teacher_rles), chosen, strict=True,
            )  # fmt: skip
            found[prompt] += [
                {"student": student, "teacher": teacher, "agreement": agreement,
                 "size": size_of(annotation, height, width, grid)}
                for student, teacher, agreement, annotation in scores
            ]  # fmt: skip
    if not images:
        reason = unreadable[0] if unreadable else "no image of the index has annotations"
        raise UserError(f"masks cannot be measured: {reason}; build the index again")
    result = {prompt: _means(entries) for prompt, entries in found.items()}
    for prompt, entries in found.items():
        by_size = {name: [entry for entry in entries if entry["size"] == name] for name, _, _ in SIZES}
        result[prompt]["by_size"] = {name: _means(group) for name, group in by_size.items() if group}
    return result | {"images": images, "unreadable": unreadable}


def _means(entries: list[dict]) -> dict:
    means = {name: float(np.mean([entry[name] for entry in entries])) for name in ("student", "teacher", "agreement")}
    return means | {"masks": len(entries)}
