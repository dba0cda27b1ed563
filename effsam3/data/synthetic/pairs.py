# SPDX-License-Identifier: Apache-2.0
"""Synthetic images with masks: the scenes of images.py in another look, as a COCO JSON next to its images.

For smoke runs and tests, only where a recipe asks for them by name (`data.source: synthetic`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from effsam3.data.coco import text_rles
from effsam3.data.synthetic.images import make_scene
from effsam3.files import atomic_file, write_json

BIG = 0.02  # share of the image from which a shape is of the category `big shape`
CATEGORIES = {1: "small shape", 2: "big shape"}


def make_synthetic_pairs(folder: str | Path, num_images: int, side_px: int, seed: int = 0) -> None:
    """Write `images/<number>.png` and `annotations.json`; the longest side has `side_px` pixels."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(1, num_images + 1):
        rng = np.random.default_rng([seed, number])
        pixels_HWC, masks_NHW = make_scene(side_px, rng)
        name = f"{number:04d}.png"
        with atomic_file(folder / "images" / name) as file:
            Image.fromarray(as_infrared(pixels_HWC, rng)).save(file, "PNG")
        height, width = pixels_HWC.shape[:2]
        images.append({"id": number, "file_name": name, "height": height, "width": width, "view": f"{number % 2}"})
        for mask_HW, rle in zip(masks_NHW, text_rles(masks_NHW), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 2 if mask_HW.mean() > BIG else 1,
                    "segmentation": rle,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    write_json(folder / "annotations.json", {"images": images, "annotations": annotations, "categories": categories})


def as_infrared(pixels_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an image as another camera would see it: grey, dark where it was bright, soft, with coarse noise."""
    soft = Image.fromarray(pixels_HWC).convert("L").filter(ImageFilter.GaussianBlur(1))
    grey_HW = 1 - np.asarray(soft) / 255
    size = (grey_HW.shape[1], grey_HW.shape[0])
    coarse = Image.fromarray(rng.normal(0, 0.06, (size[1] // 3, size[0] // 3)).astype(np.float32)).resize(size)
    seen_HW = 0.1 + 0.7 * grey_HW**1.5 + np.asarray(coarse)
    return np.repeat((seen_HW.clip(0, 1) * 255).round().astype(np.uint8)[..., None], 3, axis=2)
