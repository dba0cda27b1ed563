# SPDX-License-Identifier: Apache-2.0
"""The picture of a tracked video: a contact sheet of a few frames.

It takes annotated frames as they are tracked, and keeps them at the size at which it shows them. Filled areas are
masks, lines the annotated outlines, one colour per object in all rows.

Letters: H W rows and columns of a picture, C colours (RGB).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from effsam3.benchmarks.jaccard import ObjectScore
from effsam3.benchmarks.pictures.drawing import Box, Comparison, colour_of, evenly, paint, save_png
from effsam3.benchmarks.tracking import Masks, TrackedFrame

CELL_WIDTH = 320  # pixels of a frame on the contact sheet
COLUMNS = 6  # frames of a contact sheet
LINE, GAP = 22, 6  # pixels: a line of text, the space between frames
INK, PALE, PAPER = (30, 32, 38), (120, 124, 134), (255, 255, 255)


def reduce(frame: TrackedFrame, width: int) -> TrackedFrame:
    """Return the same frame, `width` pixels wide or as wide as it is."""
    rows, columns = frame.image_HWC.shape[:2]
    width = min(width, columns)
    size = width, round(rows * width / columns)

    def small(masks: Masks) -> Masks:
        return {number: np.asarray(Image.fromarray(mask).resize(size)) for number, mask in masks.items()}

    return TrackedFrame(
        index=frame.index,
        image_HWC=np.asarray(Image.fromarray(frame.image_HWC).resize(size, Image.Resampling.LANCZOS)),
        truths=None if frame.truths is None else small(frame.truths),
        masks={name: small(masks) for name, masks in frame.masks.items()},
        prompted=frame.prompted,
    )


class ContactSheet:
    """A PNG with a few frames across time: what is annotated in the first row, what each tracker finds below."""

    def __init__(self, path: Path, title: str, annotated: list[int]):
        """`annotated`: the video's annotated frames, of which the sheet shows some."""
        self.path, self.title = path, title
        self.chosen = set(evenly(sorted(annotated), COLUMNS))
        self.frames: list[TrackedFrame] = []

    def add(self, frame: TrackedFrame) -> None:
        if frame.index in self.chosen:
            self.frames.append(reduce(frame, CELL_WIDTH))

    def finish(self, scores: dict[str, dict[int, ObjectScore | None]]) -> None:
        """Draw the sheet; every tracker's row and the legend show the J&F."""
        height, width = self.frames[0].image_HWC.shape[:2]
        trackers = list(scores)
        indent = round(max(_font(15).getlength(name) for name in ["annotated", *trackers])) + 5 * GAP
        across = indent + len(self.frames) * (width + GAP)
        down = 3 * LINE + (1 + len(trackers)) * (height + GAP) + 2 * LINE
        sheet = Image.new("RGB", (across + GAP, down), PAPER)
        draw = ImageDraw.Draw(sheet)
        _write(draw, (2 * GAP, GAP), self.title, 17)
        comparisons = []
        for column, frame in enumerate(self.frames):
            left = indent + column * (width + GAP)
            shown = f"{'prompt,' if frame.prompted else 'frame'} {frame.index}"  # as wide as a portrait video
            _write(draw, (left, 2 * LINE - GAP // 2), shown, 14, PALE)
            truths = frame.truths or {}
            rows = [(truths, {}), *((frame.masks[name], truths) for name in trackers)]
            boxes: list[Box] = []
            for row, (filled, outlined) in enumerate(rows):
                top = 3 * LINE + row * (height + GAP)
                sheet.paste(paint(frame.image_HWC, filled, outlined), (left, top))
                boxes.append((left, top, left + width, top + height))
            # All others are held against the first tracker.
            for name, box in zip(trackers[1:], boxes[2:], strict=True):
                comparisons.append(Comparison(f"frame {frame.index}", {trackers[0]: boxes[1], name: box}))
        for row, name in enumerate(["annotated", *trackers]):
            top = 3 * LINE + row * (height + GAP) + height // 2 - LINE
            _write(draw, (2 * GAP, top), name, 15)
            if row:
                _write(draw, (2 * GAP, top + LINE), _j_and_f(scores[name].values()), 14, PALE)
        self._legend(draw, (indent, down - 2 * LINE + GAP), scores)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_png(sheet, self.path, comparisons)

    def _legend(self, draw: ImageDraw.ImageDraw, at: tuple[int, int], scores: dict) -> None:
        left, top = at
        for number in sorted({number for found in scores.values() for number in found}):
            draw.rectangle((left, top + 3, left + 13, top + 16), fill=tuple(colour_of(number).astype(int)))
            left = _write(draw, (left + 20, top), f"object {number}", 14) + 3 * GAP
        _write(draw, (left, top), "area: mask, line: annotated", 14, PALE)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, ink=INK) -> int:
    """Write text and return where it ends."""
    draw.text(at, text, ink, _font(size))
    return round(at[0] + _font(size).getlength(text))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _j_and_f(scores) -> str:
    values = [(score.J + score.F) / 2 for score in scores if score is not None]
    return f"J&F {100 * np.mean(values):.1f}" if values else "not scored"
