# SPDX-License-Identifier: Apache-2.0
"""Boxes by which objects of indexed images are shown: those of their annotations, or places on a grid.

Letters: O boxes of an image.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from effsam3.data.images.sa1b import read_annotations
from effsam3.data.unreadable import UnreadableAnnotations


def boxes_to_show(row: dict, folder: Path, most: int) -> np.ndarray:
    """Return boxes of an image of an index, x1, y1, x2, y2 in shares of its sides, float32 (O, 4), O at most `most`.

    The largest annotated masks' boxes. An image without annotations, or whose annotations cannot be read, has those of
    a grid: they show something, too.
    """
    try:
        annotations = read_annotations(row, folder)
    except UnreadableAnnotations:
        annotations = []
    if not annotations:
        return grid_of_boxes(most)
    largest = sorted(annotations, key=lambda annotation: -annotation["area"])[:most]
    x, y, width, height = np.array([annotation["bbox"] for annotation in largest], dtype=np.float32).T
    sides = np.array([row["width"], row["height"]] * 2, dtype=np.float32)
    return np.stack([x, y, x + width, y + height], 1) / sides


def grid_of_boxes(count: int) -> np.ndarray:
    """Return the first `count` cells of the smallest square grid that has as many, row by row, float32 (count, 4)."""
    side = math.ceil(math.sqrt(count))
    rows, columns = np.divmod(np.arange(count), side)
    return np.stack([columns, rows, columns + 1, rows + 1], 1).astype(np.float32) / side
