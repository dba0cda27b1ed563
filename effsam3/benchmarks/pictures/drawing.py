# SPDX-License-Identifier: Apache-2.0
"""Masks drawn over images, one colour per object, and sheets of such pictures.

A PNG tells which places of it compare the same thing between two models, for pages that lay one over the other.

Letters: H W rows and columns of a picture, C colours (RGB).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from effsam3.benchmarks.jaccard import boundary
from effsam3.checked_files import parse_json
from effsam3.files import atomic_file

Item = TypeVar("Item")
Masks = dict[int, np.ndarray]  # {object: bool (H, W)}
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
# Far from one another and from most of what is filmed; after the last, the first is used again.
COLOURS = tuple(
    np.array(ImageColor.getrgb(text), np.float32)
    for text in ("#ff3b6b", "#22c7ff", "#ffd400", "#7dff5a", "#b784ff", "#ff9d2e", "#19e3b1", "#ff7ad9", "#5b8cff")
)
CELL_WIDTH = 400  # pixels of a picture on a sheet, at most
COLUMNS = 4
LINE, GAP = 20, 6  # pixels: a line of text, the space between pictures
NOTE = "comparisons"  # key of a PNG's text
NOTE_FORM = [{"title": str, "sides": {str: [int]}}]


def evenly(items: list[Item], count: int) -> list[Item]:
    """Up to `count` of the items, evenly spaced, with the first and the last one."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def colour_of(number: int) -> np.ndarray:
    """RGB 0..255, float, of the object with this id: whoever sees two pictures of a video compares like with like."""
    return COLOURS[(number - 1) % len(COLOURS)]


def paint(image_HWC: np.ndarray, filled: Masks, outlined: Masks) -> Image.Image:
    """Draw masks over an image: `filled` as coloured areas, `outlined` as lines with a dark seam."""
    canvas = image_HWC * np.float32(0.85)
    for number, mask in filled.items():
        canvas[mask] = 0.45 * canvas[mask] + 0.55 * colour_of(number)
    for number, mask in outlined.items():
        line = boundary(mask)
        seam = line.copy()
        seam[1:] |= line[:-1]
        seam[:-1] |= line[1:]
        seam[:, 1:] |= line[:, :-1]
        seam[:, :-1] |= line[:, 1:]
        canvas[seam] *= 0.3
        canvas[line] = 0.4 * 255 + 0.6 * colour_of(number)
    return Image.fromarray(canvas.round().astype(np.uint8))


def compare(image_HWC: np.ndarray, truths: Masks, found: Masks) -> Image.Image:
    """Draw an image twice: what is annotated on the left, what was found on the right with the truth as lines."""
    height, width = image_HWC.shape[:2]
    both = Image.new("RGB", (2 * width, height))
    both.paste(paint(image_HWC, truths, {}), (0, 0))
    both.paste(paint(image_HWC, found, truths), (width, 0))
    return both


@dataclass(frozen=True)
class Comparison:
    """Two places of a picture, of the same size, that show the same by two models; `sides` are {title: place}."""

    title: str
    sides: dict[str, Box]


def save_png(picture: Image.Image, path: Path, comparisons: Sequence[Comparison] = ()) -> None:
    """Write a picture whole or not at all, and in it what it compares."""
    notes = PngInfo()
    for key, text in comparison_notes(comparisons).items():
        notes.add_text(key, text)
    with atomic_file(path) as file:
        picture.save(file, "PNG", pnginfo=notes)


def comparison_notes(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Return comparisons as the text that a PNG holds of them."""
    return {NOTE: json.dumps([asdict(one) for one in comparisons])} if comparisons else {}


def read_comparisons(picture: Image.Image, path: Path) -> list[Comparison]:
    """Return what a picture compares, [] if it tells nothing; `path` is where it is from.

    Raises:
        UserError: what it tells is not what is written there.
    """
    found = parse_json(picture.info.get(NOTE, "[]"), NOTE_FORM, f"{path}, {NOTE}", "draw it again")
    return [Comparison(one["title"], {title: tuple(box) for title, box in one["sides"].items()}) for one in found]


def contact_sheet(pictures: Sequence[tuple[str, Image.Image]], least_width: int = 1) -> Image.Image:
    """Put (title, picture) side by side, in rows of COLUMNS, each under its title, as wide as the widest.

    `least_width`: in pixels, so that titles do not run into each other.
    """
    font, boxes = ImageFont.load_default(14), sheet_boxes(pictures, least_width)
    width, height = max(right for _, _, right, _ in boxes), max(bottom for *_, bottom in boxes)
    sheet = Image.new("RGB", (width + GAP, height + GAP), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for (title, picture), (left, top, right, bottom) in zip(pictures, boxes, strict=True):
        pen.text((left, top - LINE), title, (60, 60, 60), font)
        sheet.paste(picture.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    return sheet


def sheet_boxes(pictures: Sequence[tuple[str, Image.Image]], least_width: int = 1) -> list[Box]:
    """Return where on a `contact_sheet` each picture is."""
    across = min(CELL_WIDTH, max(least_width, *(picture.width for _, picture in pictures)))
    heights = [round(across * picture.height / picture.width) for _, picture in pictures]
    boxes = []
    for place, height in enumerate(heights):
        row, column = divmod(place, COLUMNS)
        left, top = GAP + column * (across + GAP), GAP + LINE + row * (max(heights) + LINE + GAP)
        boxes.append((left, top, left + across, top + height))
    return boxes
