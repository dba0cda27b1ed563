# SPDX-License-Identifier: Apache-2.0
"""What a model finds on images: the instances of phrases, and the masks of boxes and points that are shown to it.

One image is one job: its features are computed once for all its phrases, and its records are written together. An
image that cannot be read is a record, too, so that one bad file ends nothing; it is tried again by the next run.

Letters: H W rows and columns of the original image, P phrases at once, Q queries of the detector.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from effsam3.benchmarks.concepts.cgf1 import SCORE
from effsam3.benchmarks.concepts.scoring import Detection, Found
from effsam3.benchmarks.journal import Journal
from effsam3.benchmarks.masks import choose_annotations, embeddings_of, iou_each, segment
from effsam3.data import coco
from effsam3.data.concepts.pairs import ConceptPair, Subset
from effsam3.data.unreadable import Unreadable
from effsam3.models.inference.concepts import PHRASES, ConceptModel, masks_of
from effsam3.models.inference.prompted import at_full_size, load_tracker

MASKS = 16  # made as large as the image at once
POOLED = 100  # best detections of an image that mask AP looks at, as COCO has it

QUERY = {"score": float, "box": [float], "mask": (str, None)}
FOUND_FORM = {"key": str, "presence?": float, "queries?": [QUERY], "failed?": str}
SHOWN_FORM = {"key": str, "objects?": [{"area": float}], "failed?": str}

Image = tuple[Subset, str, list[ConceptPair]]  # an image of a subset, and what is asked of it


class Place(Protocol):
    """Where records are made: one of several processes."""

    device: torch.device
    process_index: int
    num_processes: int

    def wait_for_everyone(self) -> None:
        """Return when all processes have called it."""


# ---- jobs


def images_of(subsets: Sequence[Subset]) -> list[Image]:
    """Return all images and their pairs."""
    return [(subset, name, pairs) for subset in subsets for name, pairs in subset.images().items()]


def pair_key(subset: Subset, pair: ConceptPair) -> str:
    """Name a pair among those of all subsets, by all that its record depends on."""
    return "|".join((subset.name, pair.key, pair.image, pair.phrase, "marked" if pair.marked else "not marked"))


def read_records(journal: Journal) -> dict[str, dict]:
    """Return the records by their key; one that succeeded counts more than one that failed before or after."""
    found: dict[str, dict] = {}
    for record in journal.read():
        if record["key"] not in found or "failed" not in record:
            found[record["key"]] = record
    return found


def record(
    images: Sequence[Image],
    keys_of: Callable[[Image], list[str]],
    make: Callable[[], Callable[[np.ndarray, Image], list[dict]]],
    journal: Journal,
    place: Place,
    label: str,
) -> None:
    """Make this process's share of the records that are missing. Collective.

    Args:
        keys_of: the keys of an image's records.
        make: loads a model, once there is anything to do; what it returns makes the records of an image.
        label: of the progress bar.
    """
    from tqdm import tqdm

    done = {key for key, one in read_records(journal).items() if "failed" not in one}
    # All must have read before anyone writes: else they would divide the work differently.
    place.wait_for_everyone()
    todo = [image for image in images if not done.issuperset(keys_of(image))]
    mine = todo[place.process_index :: place.num_processes]
    shown = place.process_index == 0 and sys.stderr.isatty()
    with (
        journal.writer(place.process_index) as add,
        tqdm(total=len(mine), desc=label, unit="image", disable=not shown) as bar,
    ):
        on_image = make() if mine else None
        for job in mine:
            subset, name, pairs = job
            try:
                image_HW3 = subset.read_image(name, pairs[0].size)
            except Unreadable as error:
                records = [{"key": key, "failed": str(error)} for key in keys_of(job)]
            else:
                assert on_image is not None
                records = on_image(image_HW3, job)
            for one in records:
                if one["key"] not in done:
                    add(one)
            bar.update()
    place.wait_for_everyone()


# ---- phrases


def record_found(
    folder: Path, images: Sequence[Image], journal: Journal, place: Place, label: str, coarse_masks: bool = False
) -> None:
    """Record what the model in a folder finds of all pairs. Collective."""

    def make() -> Callable[[np.ndarray, Image], list[dict]]:
        model = ConceptModel(folder, place.device)

        def on_image(image_HW3: np.ndarray, job: Image) -> list[dict]:
            subset, _, pairs = job
            records = found_on(model, image_HW3, pairs, subset.categories is not None, coarse_masks)
            return [{"key": pair_key(subset, pair)} | one for pair, one in zip(pairs, records, strict=True)]

        return on_image

    record(images, lambda job: [pair_key(job[0], pair) for pair in job[2]], make, journal, place, label)


@torch.no_grad()
def found_on(
    model: ConceptModel,
    image_HW3: np.ndarray,
    pairs: Sequence[ConceptPair],
    pooled: bool,
    coarse_masks: bool = False,
) -> list[dict]:
    """Return a record's `presence` and `queries` for each pair of one image.

    Of the queries those are kept that could count with any presence; with masks where something is marked. With
    `pooled`, the best of all pairs together are kept with masks in any case.
    """
    size = (image_HW3.shape[0], image_HW3.shape[1])
    levels, scale = model.look(image_HW3, coarse_masks), torch.tensor([size[1], size[0]] * 2)
    records: list[dict[str, Any]] = []
    best: list[tuple[float, int, int, Tensor]] = []  # score with presence, pair, query, mask logits
    for start in range(0, len(pairs), PHRASES):
        group = pairs[start : start + PHRASES]
        answers = model.detect(levels, [pair.phrase for pair in group])
        queries_PQ, presence_P = answers.logits_LRQ[-1].sigmoid(), answers.presence_LR[-1].sigmoid()
        for place, pair in enumerate(group):
            queries_Q, number = queries_PQ[place], len(records)
            boxes_Q4 = (answers.boxes_LRQ4[-1, place].float().cpu() * scale).tolist()
            counting = (queries_Q >= SCORE).nonzero().flatten().tolist()
            scores_Q = queries_Q * presence_P[place]
            pool = scores_Q.topk(min(POOLED, len(scores_Q))).indices.tolist() if pooled else []
            masked = sorted({*pool, *(counting if pair.marked else ())})
            masked_1F = torch.tensor([masked], dtype=torch.int64, device=scores_Q.device)
            logits = dict(zip(masked, masks_of(levels, answers.phrase(place), masked_1F)[0], strict=True))
            rles: list[str | None] = [None] * len(counting)
            if pair.marked and counting:
                rles = [*_rles(torch.stack([logits[query] for query in counting]), size)]
            kept = {
                query: {"score": float(queries_Q[query]), "box": boxes_Q4[query], "mask": rle}
                for query, rle in zip(counting, rles, strict=True)
            }
            records.append({"presence": float(presence_P[place]), "queries": kept})
            for query in pool:
                own = {"score": float(queries_Q[query]), "box": boxes_Q4[query], "mask": None}
                best.append((float(scores_Q[query]), number, query, logits[query]))
                kept.setdefault(query, own)
        best = sorted(best, key=lambda one: -one[0])[:POOLED]  # masks of all phrases would not fit
    lacking = [one for one in best if records[one[1]]["queries"][one[2]]["mask"] is None]
    if lacking:
        drawn = _rles(torch.stack([logits_LL for *_, logits_LL in lacking]), size)
        for (_, number, query, _), one_rle in zip(lacking, drawn, strict=True):
            records[number]["queries"][query]["mask"] = one_rle
    for one in records:  # what was pushed out by better ones, and does not count either
        one["queries"] = [query for query in one["queries"].values() if query["mask"] or query["score"] >= SCORE]
    return records


def _rles(logits_OLL: Tensor, size: tuple[int, int]) -> list[str]:
    """Return the counts of compressed RLEs of masks as large as the image, a few at a time."""
    found: list[str] = []
    for some_OLL in logits_OLL.split(MASKS):
        found += [rle["counts"].decode("ascii") for rle in coco.rles_of(at_full_size(some_OLL, size).numpy())]
    return found


def read_found(record: dict, size: tuple[int, int]) -> tuple[Found, list[Detection]]:
    """Return what a record holds: what may count as found, and all with masks, the best of which AP takes."""
    detections = [
        Detection(
            one["score"],
            tuple(one["box"]),
            None if one["mask"] is None else {"size": list(size), "counts": one["mask"]},
        )
        for one in record["queries"]
    ]
    found = Found(record["presence"], tuple(one for one in detections if one.query >= SCORE))
    return found, [one for one in detections if one.rle is not None]


# ---- boxes and points


def record_shown(
    folder: Path,
    images: Sequence[Image],
    prompts: Sequence[str],
    most: int,
    journal: Journal,
    place: Place,
    label: str,
) -> None:
    """Record what the tracker in a folder makes of `most` objects' boxes or points on every image. Collective."""

    def make() -> Callable[[np.ndarray, Image], list[dict]]:
        tracker = torch.nn.Module.to(load_tracker(folder), place.device)

        def on_image(image_HW3: np.ndarray, job: Image) -> list[dict]:
            objects = choose_annotations(list(_objects(job[2])), most)
            height, width = image_HW3.shape[:2]
            embeddings = embeddings_of(tracker, image_HW3)
            found = [{"area": one["area"]} for one in objects]
            for prompt in prompts if objects else ():
                masks = segment(tracker, embeddings, objects, prompt, height, width)
                for one, iou in zip(found, iou_each(masks, [one["segmentation"] for one in objects]), strict=True):
                    one[prompt] = iou
            return [{"key": image_key(job), "objects": found}]

        return on_image

    record(images, lambda job: [image_key(job)], make, journal, place, label)


def image_key(job: Image) -> str:
    """Name an image among those of all subsets, by all that its record depends on."""
    subset, name, pairs = job
    objects = repr([(one.rle, one.box) for pair in pairs for one in pair.objects[0]])
    return "|".join((subset.name, name, xxhash.xxh3_64_hexdigest(objects.encode())))


def _objects(pairs: Sequence[ConceptPair]) -> Iterator[dict]:
    """Yield the objects of an image as the prompts' benchmark takes them; of several annotators those of the first."""
    for pair in pairs:
        for one in pair.objects[0]:
            point = coco.middle_of(coco.runs_of(one.rle), pair.size[0])
            yield {"segmentation": one.rle, "bbox": one.box, "area": one.area, "point_coords": [point]}
