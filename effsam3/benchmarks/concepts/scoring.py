# SPDX-License-Identifier: Apache-2.0
"""From what a model found for a pair to its counts, by masks or boxes, with its own presence or another.

Letters: D detections, G annotated objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pycocotools import mask as coco_mask

from effsam3.benchmarks.concepts.cgf1 import SCORE, Counts, best_annotator, count
from effsam3.data.concepts.pairs import ConceptPair


@dataclass(frozen=True)
class Detection:
    """A query's answer: its score without the presence, box x1, y1, x2, y2 in pixels, compressed RLE of its mask.

    The mask is None where nobody has marked anything: there, only their number counts.
    """

    query: float
    box: tuple[float, float, float, float]
    rle: dict | None


@dataclass(frozen=True)
class Found:
    """What a model found for a pair: whether the phrase is there at all (0..1), and its queries' answers."""

    presence: float
    detections: tuple[Detection, ...]


@dataclass(frozen=True)
class Scored:
    """A pair, and what one model found for it."""

    pair: ConceptPair
    found: Found

    @cached_property
    def mask_ious(self) -> list[np.ndarray]:
        """IoU (D, G) of all detections with each annotator's objects."""
        rles = [detection.rle for detection in self.found.detections]
        return [_iou(rles, [one.rle for one in objects]) for objects in self.pair.objects]

    @cached_property
    def box_ious(self) -> list[np.ndarray]:
        """The same of boxes."""
        boxes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (one.box for one in self.found.detections)]
        return [_iou(boxes, [one.box for one in objects]) for objects in self.pair.objects]

    def counts(self, presence: float | None = None, boxes: bool = False) -> Counts:
        """Return the pair's counts against the annotator that it is held against.

        Args:
            presence: instead of the model's own.
            boxes: compare boxes, not masks.
        """
        presence = self.found.presence if presence is None else presence
        kept = [place for place, one in enumerate(self.found.detections) if one.query * presence >= SCORE]
        by_annotator = [count(iou_DG[kept]) for iou_DG in (self.box_ious if boxes else self.mask_ious)]
        return by_annotator[best_annotator(by_annotator)]


def _iou(detections: list, objects: list) -> np.ndarray:
    """Return the IoU of RLEs, or of boxes x, y, width, height; pycocotools has no empty matrix."""
    if not detections or not objects:
        return np.zeros((len(detections), len(objects)))
    return coco_mask.iou(detections, objects, [0] * len(objects))
