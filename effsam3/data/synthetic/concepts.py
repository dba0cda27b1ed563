# SPDX-License-Identifier: Apache-2.0
"""Synthetic concepts: coloured shapes and the phrases that name them ("red circle"), in SA-Co's JSON with PNG images.

Every image is asked for all phrases that it shows, and for as many that it does not; most of these share a colour or a
shape with something that is there, so that neither of the two words tells alone.

For smoke runs and tests, only where a recipe asks for them by name (`data.source: synthetic`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from effsam3.data.coco import text_rles
from effsam3.files import atomic_file, write_json

COLOURS = {"red": (210, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 215), "yellow": (220, 205, 40)}
SHAPES = ("circle", "square", "triangle")
PHRASES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
SUBSETS = ("train", "held_out")  # each is a JSON file and a folder of images

MOST_SHAPES = 4
REPEATED = 0.4  # share of shapes that are of the same kind as the one before
HARD = 0.6  # share of the absent phrases that have a word in common with what is there


class Scene(NamedTuple):
    """An image, uint8 RGB, and what it shows: the phrase and the mask of each shape. No shape hides another."""

    image_HW3: np.ndarray
    masks_NHW: np.ndarray
    phrases: list[str]


def make_synthetic_concepts(folder: str | Path, images: int, held_out: int, side_px: int = 160, seed: int = 0) -> None:
    """Write `train.json`, `held_out.json` and their images; `side_px` is the side of the images.

    Image N of a subset depends on (seed, subset, N, side_px) alone.
    """
    folder = Path(folder)
    for code, (name, count) in enumerate(zip(SUBSETS, (images, held_out), strict=True), start=1):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pairs: list[dict] = []
        annotations: list[dict] = []
        for number in range(1, count + 1):
            rng = np.random.default_rng([seed, code, number])
            scene = draw_scene(side_px, rng)
            path = f"{name}/{number:05d}.png"
            with atomic_file(folder / path) as file:
                Image.fromarray(scene.image_HW3).save(file, "PNG", compress_level=1)
            for phrase in asked_of(scene, rng):
                _add_pair(scene, phrase, path, pairs, annotations)
        content = {"images": pairs, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
        write_json(folder / f"{name}.json", content)


def asked_of(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return all phrases that a scene shows, and as many that it does not, by chance."""
    present = sorted(set(scene.phrases))
    words = {word for phrase in present for word in phrase.split()}
    absent = [phrase for phrase in PHRASES if phrase not in present]
    hard = [phrase for phrase in absent if words & set(phrase.split())]
    chosen: set[str] = set()
    while len(chosen) < len(present):
        chosen.add(rng.choice(hard if rng.random() < HARD else absent))
    return [*present, *sorted(chosen)]


def _add_pair(scene: Scene, phrase: str, path: str, pairs: list[dict], annotations: list[dict]) -> None:
    from pycocotools import mask

    height, width = scene.image_HW3.shape[:2]
    pair = len(pairs) + 1
    pairs.append(
        {
            "id": pair,
            "file_name": path,
            "text_input": phrase,
            "width": width,
            "height": height,
            "queried_category": str(PHRASES.index(phrase)),
            "is_instance_exhaustive": 1,
            "is_pixel_exhaustive": 1,
        }
    )
    for rle in text_rles(own_HW for own_HW, own in zip(scene.masks_NHW, scene.phrases, strict=True) if own == phrase):
        box = mask.toBbox(rle) / (width, height, width, height)
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": pair,
                "bbox": box.tolist(),
                "area": float(mask.area(rle)) / (height * width),
                "segmentation": rle,
                "category_id": 1,
                "iscrowd": 0,
                "source": "drawn",
            }
        )


# ---- scenes; lengths are in units of the image's side


def draw_scene(side_px: int, rng: np.random.Generator) -> Scene:
    """Draw one to four shapes on a noisy grey ground."""
    y_HW, x_HW = np.mgrid[0.5:side_px, 0.5:side_px] / side_px
    slope = rng.uniform(-32, 32, 2)
    image_HW3 = rng.uniform(60, 190) + rng.uniform(-12, 12, 3) + (x_HW * slope[0] + y_HW * slope[1])[..., None]
    image_HW3 = image_HW3 + rng.normal(0, 8, image_HW3.shape)
    masks: list[np.ndarray] = []
    phrases: list[str] = []
    wanted = rng.integers(1, MOST_SHAPES + 1)
    while len(masks) < wanted:
        size = rng.uniform(0.08, 0.17)
        x, y = rng.uniform(size, 1 - size, 2)
        phrase = phrases[-1] if phrases and rng.random() < REPEATED else str(rng.choice(PHRASES))
        colour, shape = phrase.split()
        mask_HW = _inside(shape, (x_HW - x) / size, (y_HW - y) / size)
        if any((mask_HW & other_HW).any() for other_HW in masks):
            continue
        image_HW3[mask_HW] = COLOURS[colour] + rng.uniform(-25, 25, 3) + rng.normal(0, 6, (mask_HW.sum(), 3))
        masks.append(mask_HW)
        phrases.append(phrase)
    return Scene(image_HW3.clip(0, 255).astype(np.uint8), np.stack(masks), phrases)


def _inside(shape: str, u_HW: np.ndarray, v_HW: np.ndarray) -> np.ndarray:
    """Return the mask of a shape that fits into the unit circle around u = v = 0; v points down."""
    if shape == "circle":
        return u_HW**2 + v_HW**2 < 1
    if shape == "square":
        return np.maximum(abs(u_HW), abs(v_HW)) < 0.88
    return (v_HW < 0.8) & (v_HW > 1.9 * abs(u_HW) - 1)
