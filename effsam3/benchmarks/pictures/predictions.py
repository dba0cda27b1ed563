# SPDX-License-Identifier: Apache-2.0
"""What the verb `predict` writes of images: instances as records, masks as PNG, and a picture to look at.

Letters: O instances, H W rows and columns of the original image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from effsam3.benchmarks.pictures.drawing import colour_of, paint, save_png
from effsam3.data.coco import text_rles
from effsam3.data.videos.writing import Tables, measured
from effsam3.errors import UserError
from effsam3.files import atomic_file, write_json
from effsam3.models.inference.concepts import Instances

OVERLAY_WIDTH = 900  # assumed display width; sets label size
JSONS = ("predictions.json", "coco.json", "youtube_vis.json")
SHADES = ((0, 0, 0), (255, 255, 255))  # of prompts with label 0 and 1


def records(found: Instances) -> list[dict]:
    """Return the instances for JSON: id, text, score, box (x1, y1, x2, y2) and the mask as a COCO RLE."""
    rles = text_rles(found.masks_OHW.numpy())
    rows = zip(found.ids, found.texts, found.scores_O.tolist(), found.boxes_O4.tolist(), rles, strict=True)
    return [
        {
            "id": number,
            **({"text": text} if text else {}),
            "score": round(score, 4),
            "box": [round(value, 2) for value in box],
            "segmentation": rle,
        }
        for number, text, score, box, rle in rows
    ]


def write_image(folder: Path, about: dict, image_HW3: np.ndarray, instances: list[dict]) -> None:
    """Write predictions.json, overlay.png and a mask (0 and 255) for every instance."""
    clear(folder)
    for instance in instances:
        instance["mask"] = f"mask_{instance['id']:03d}.png"
        save_png(Image.fromarray(coco_mask.decode(instance["segmentation"]) * 255), folder / instance["mask"])
    save_png(draw(image_HW3, instances, OVERLAY_WIDTH, about["prompts"]), folder / "overlay.png")
    write_json(folder / "predictions.json", about | {"instances": instances})


def refuse_others(folder: Path) -> None:
    """Refuse a folder with files that `clear` would remove, though no earlier run has written them.

    Raises:
        UserError: it is one, such as a data set with its masks.
    """
    if not (folder / JSONS[0]).is_file() and (others := _written(folder)):
        raise UserError(f"--out: {others[0]} is there and is not of an earlier `predict`; name another folder")


def clear(folder: Path) -> None:
    """Remove what an earlier run has written: its masks may be more."""
    for old in _written(folder):
        old.unlink()


def _written(folder: Path) -> list[Path]:
    names = "mask_*.png", "masks/*.png", "overlay.png", "tracked.mp4", *JSONS
    return [old for name in names for old in sorted(folder.glob(name))]


class Categories:
    """Numbers, from 1, of the texts that were asked for; what was shown by boxes or points is an "object"."""

    def __init__(self):
        self._numbers: dict[str, int] = {}

    def of(self, text: str) -> int:
        """Return the number of a text."""
        return self._numbers.setdefault(text or "object", len(self._numbers) + 1)

    def rows(self) -> dict:
        """Return the table `categories` of COCO's JSON."""
        return {"categories": [{"id": number, "name": text} for text, number in self._numbers.items()]}


class CocoPredictions:
    """Instances on images as COCO's JSON, each with its score: pycocotools' `COCO` reads it, `loadRes` its list."""

    def __init__(self):
        self._tables, self._categories = Tables("images", "annotations"), Categories()

    def add(self, source: str, size: tuple[int, int], instances: list[dict]) -> None:
        """Add an image of (H, W) pixels and its records."""
        image = self._tables.add("images", file_name=source, width=size[1], height=size[0])
        for one in instances:
            about = {"category_id": self._categories.of(one.get("text", "")), "score": one["score"], "iscrowd": 0}
            rle = one["segmentation"]
            self._tables.add("annotations", image_id=image, **about, segmentation=rle, **measured(rle))

    def write(self, path: Path) -> None:
        """Write the file, once."""
        with atomic_file(path) as partial:
            self._tables.write(partial, self._categories.rows())


def draw(image_HW3: np.ndarray, instances: list[dict], width: int, prompts: Mapping) -> Image.Image:
    """Draw masks, boxes, scores and texts over an image, and the prompts in white; a colour identifies an id.

    Letters are made to be read when the picture is shown `width` pixels wide.
    """
    masks = {instance["id"]: coco_mask.decode(instance["segmentation"]).astype(bool) for instance in instances}
    picture = paint(image_HW3, masks, {})
    pen = ImageDraw.Draw(picture)
    unit = max(1, round(picture.width / width))
    font = ImageFont.load_default(12 * unit)
    for instance in reversed(instances):  # the best one last, on top
        if not masks[instance["id"]].any():
            continue
        colour = tuple(colour_of(instance["id"]).astype(int))
        x1, y1, x2, y2 = instance["box"]
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=unit)
        label = " ".join(filter(None, [str(instance["id"]), instance.get("text"), f"{instance['score']:.2f}"]))
        at = (max(x1, 0) + 2 * unit, max(y1 - 15 * unit, 0))
        pen.rectangle(pen.textbbox(at, label, font), fill=colour)
        pen.text(at, label, (0, 0, 0), font)
    for *box, label in prompts.get("boxes", ()):
        pen.rectangle(box, outline=SHADES[label], width=2 * unit)
    for x, y, label in prompts.get("points", ()):
        pen.circle((x, y), 4 * unit, fill=SHADES[label], outline=SHADES[1 - label], width=unit)
    return picture
