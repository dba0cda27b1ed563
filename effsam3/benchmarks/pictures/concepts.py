# SPDX-License-Identifier: Apache-2.0
"""Pictures of pairs of an image and a phrase: what is annotated, what the teacher finds, what the student finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from effsam3.benchmarks.concepts.cgf1 import SCORE
from effsam3.benchmarks.concepts.report import Both
from effsam3.benchmarks.pictures.drawing import (
    Comparison,
    colour_of,
    contact_sheet,
    paint,
    save_png,
    sheet_boxes,
)
from effsam3.data.concepts.pairs import Subset
from effsam3.data.unreadable import Unreadable

WIDTH = 320  # pixels of a panel, at least: of its title


def worst_and_median(answered: Sequence[Both], count: int) -> dict[str, list[Both]]:
    """Return up to `count` pairs in all: those on which the student is worst, and as many around its median.

    Of pairs on which it is equally bad those come first that the teacher can do.
    """
    ordered = sorted(
        answered, key=lambda both: (both.scored["student"].counts().score, -both.scored["teacher"].counts().score)
    )
    worst = ordered[: -(-count // 2)]
    rest = ordered[len(worst) :]
    many = min(count - len(worst), len(rest))
    start = min(max(len(ordered) // 2 - many // 2 - len(worst), 0), len(rest) - many)
    return {"worst": worst, "median": rest[start : start + many]}


def draw_pairs(subset: Subset, answered: Sequence[Both], count: int, out: Path) -> list[Path]:
    """Draw a PNG for each of `worst_and_median` into `out`; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"concepts_{subset.name}_*.png"):  # an earlier run's may be of other pairs
        old.unlink()
    paths = []
    for kind, pairs in worst_and_median(answered, count).items():
        for number, both in enumerate(pairs, 1):
            pair = both.pair
            try:
                image_HW3 = subset.read_image(pair.image, pair.size)
            except Unreadable:
                continue  # it has gone since it was looked at
            masks = {place: coco_mask.decode(one.rle).astype(bool) for place, one in enumerate(pair.objects[0], 1)}
            panels = [(f"{pair.phrase}: {len(masks)} annotated", paint(image_HW3, masks, masks))]
            panels += [(_title(both, model), _found(both, model, image_HW3)) for model in both.scored]
            boxes = dict(zip(("annotated", *both.scored), sheet_boxes(panels, WIDTH), strict=True))
            comparisons = [
                Comparison(pair.phrase, {_title(both, one): boxes[one] for one in ("teacher", model)})
                for model in both.scored
                if model != "teacher"
            ]
            paths.append(out / f"concepts_{subset.name}_{kind}_{number}.png")
            save_png(contact_sheet(panels, WIDTH), paths[-1], comparisons)
    return paths


def _title(both: Both, model: str) -> str:
    counts, presence = both.scored[model].counts(), both.presence(model)
    return f"{model}: {counts.detections} found, F1 {counts.score:.2f}, presence {presence:.2f}"


def _found(both: Both, model: str, image_HW3: np.ndarray) -> Image.Image:
    """Draw a model's detections over the image: masks, or boxes where nothing is annotated and masks were not kept."""
    found = both.scored[model].found
    kept = {number: one for number, one in enumerate(found.detections, 1) if one.query * found.presence >= SCORE}
    masks = {number: coco_mask.decode(one.rle).astype(bool) for number, one in kept.items() if one.rle is not None}
    picture = paint(image_HW3, masks, masks)
    pen = ImageDraw.Draw(picture)
    for number, one in kept.items():
        if one.rle is None:
            pen.rectangle(one.box, outline=tuple(colour_of(number).astype(int)), width=max(1, picture.width // 200))
    return picture
