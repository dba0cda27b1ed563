# SPDX-License-Identifier: Apache-2.0
"""Mask AP by text prompts, by pycocotools: every category is asked of every image, the best 100 answers count."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effsam3.benchmarks.concepts.recording import POOLED
from effsam3.benchmarks.concepts.scoring import Detection
from effsam3.data.concepts.pairs import ConceptPair

NAMES = ("AP", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large")  # COCOeval's first six numbers, in its order
Answer = tuple[ConceptPair, float, Sequence[Detection]]  # a pair, the model's presence and detections with masks


def mask_ap(answers: Iterable[Answer], federated: bool = False) -> dict[str, float | None]:
    """Return COCO's mask AP over the pairs' categories, and `AP_positive`, of the categories that are there alone.

    Args:
        federated: as in LVIS, what is found of a category that was not marked to the end is no false detection.

    Returns:
        0..1; None where no object has that size.
    """
    answers = list(answers)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(pair.image for pair, *_ in answers))}
    unfinished = {(numbers[pair.image], pair.category) for pair, *_ in answers if federated and not pair.exhaustive}
    truth, by_image = _truth(answers, numbers), _best(answers, numbers)
    result = dict(zip(NAMES, _evaluate(truth, [one for found in by_image for one in found], unfinished), strict=True))
    present = {(one["image_id"], one["category_id"]) for one in truth["annotations"]}
    positive = [
        one for found in _best((answer for answer in answers if answer[0].marked), numbers) for one in found
        if (one["image_id"], one["category_id"]) in present
    ]  # fmt: skip
    result["AP_positive"] = _evaluate(truth, positive, unfinished)[0]
    return {name: None if value < 0 else float(value) for name, value in result.items()}


def _truth(answers: Sequence[Answer], numbers: Mapping[str, int]) -> dict:
    """Return the pairs' objects as COCO has them."""
    objects = [(pair, one) for pair, *_ in answers for one in pair.annotators[0]]
    annotations = [
        {"id": number, "image_id": numbers[pair.image], "category_id": pair.category, "segmentation": one.rle}
        | {"area": one.area, "bbox": one.box, "iscrowd": int(one.crowd)}
        for number, (pair, one) in enumerate(objects, 1)
    ]
    categories = dict.fromkeys(pair.category for pair, *_ in answers)
    sizes = {numbers[pair.image]: pair.size for pair, *_ in answers}
    return {
        "images": [{"id": number, "height": height, "width": width} for number, (height, width) in sizes.items()],
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in categories],
    }


def _best(answers: Iterable[Answer], numbers: Mapping[str, int]) -> list[list[dict]]:
    """Return the best detections of every image, whichever category they answer."""
    found: dict[int, list[dict]] = {}
    for pair, presence, detections in answers:
        found.setdefault(numbers[pair.image], []).extend(
            {"image_id": numbers[pair.image], "category_id": pair.category, "segmentation": one.rle}
            | {"score": one.query * presence}
            for one in detections
        )
    return [sorted(some, key=lambda one: -one["score"])[:POOLED] for some in found.values()]


def _evaluate(truth: dict, detections: list[dict], unfinished: set[tuple[int, int | None]]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        annotated = COCO()
        annotated.dataset = truth
        annotated.createIndex()
        if not detections:  # which loadRes does not take
            return [0.0 if truth["annotations"] else -1.0] * len(NAMES)
        evaluation = COCOeval(annotated, annotated.loadRes(detections), "segm")
        evaluation.evaluate()
        for one in filter(None, evaluation.evalImgs):
            if (one["image_id"], one["category_id"]) in unfinished:
                one["dtIgnore"] = np.logical_or(one["dtIgnore"], one["dtMatches"] == 0)
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[: len(NAMES)].tolist()
