# SPDX-License-Identifier: Apache-2.0
"""The verb `predict`: find or track things on an image or in a video, and write pictures, masks and numbers.

effsam3 predict runs/stage1-image-es_rv_m photo.jpg --text "a dog"              every dog
effsam3 predict runs/stage1-image-es_rv_m photo.jpg --box 80,40,210,300         the object in the box
effsam3 predict runs/stage1-image-es_rv_m walk.mp4 --text "a dog" --text "a leash"
effsam3 predict runs/stage1-image-es_rv_m walk.mp4 --point 200,140             the object shown on the first frame
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask
from tqdm import tqdm

from effsam3.benchmarks.pictures.predictions import records, write_image, write_video
from effsam3.files import refuse_unwritable
from effsam3.models.inference.prompt_options import Asked
from effsam3.predictor import IMAGE_THRESHOLD, Images, Predictor, is_video, read_image, read_video, refuse_misfit


def run(model: str, source: str, asked: Asked, out: str | None = None) -> Path:
    """Predict and write predictions.json, overlay.png and, for an image, mask_NNN.png; returns their folder.

    Args:
        model: a merged or run folder, a checkpoint file, a Hub id, `tiny` or `random`.
        source: an image, a video or a folder of frames.
        out: the folder; None: predictions/<name of the source>.

    Raises:
        PredictError: see the class.
        ChassisError: a model that is not whole.
    """
    moves = is_video(source)
    opened: Any = read_video(source) if moves else read_image(source)
    size = tuple(opened.size) if moves else opened.shape[:2]
    # Before the model is found and loaded: a wrong box should cost a second, not a minute.
    refuse_misfit(asked, moves, size)
    target = Path("predictions") / Path(source).stem if out is None else Path(out)
    refuse_unwritable(target, "--out")
    predictor = Predictor(model)
    about = {"model": model, "input": source, "size": list(size), "prompts": asked.as_json()}
    if moves:
        steps = tqdm(predictor.on_video(opened, asked), total=opened.frames, unit="frame", disable=None)
        found = {index: records(instances) for index, instances in steps}
        target.mkdir(parents=True, exist_ok=True)
        write_video(target, about, found, Images(opened))
    else:
        rows = [row for instances in predictor.on_image(opened, asked) for row in records(instances)]
        found = {0: [row | {"id": number} for number, row in enumerate(rows, 1)]}
        target.mkdir(parents=True, exist_ok=True)
        write_image(target, about, opened, found[0])
    best = None
    if asked.texts:
        threshold = IMAGE_THRESHOLD if asked.threshold is None else asked.threshold
        best = predictor.concepts.best_score, predictor.concepts.model.new_det_thresh if moves else threshold
    print(f"{summarise(found, best)}; see {target}/overlay.png, {target}/predictions.json")
    if predictor.made_up:
        print("This model has random weights: what it finds means nothing.")
    return target


def summarise(found: dict[int, list[dict]], best: tuple[float, float] | None = None) -> str:
    """Return how many instances there are, in how many frames; where there is none, why.

    `best` is the best score of all candidates for the texts and the threshold; None: objects were shown.
    """
    listed = {instance["id"] for instances in found.values() for instance in instances}
    seen = {
        instance["id"]
        for instances in found.values()
        for instance in instances
        if coco_mask.area(instance["segmentation"])
    }
    text = f"{len(seen)} {'instance' if len(seen) == 1 else 'instances'}"
    text += f" in {len(found)} frames" if len(found) > 1 else ""
    if empty := len(listed - seen):
        text += f" ({empty} more {'has' if empty == 1 else 'have'} no pixel in any frame)"
    if not listed and best is not None:
        text += f": the best score is {best[0]:.3f}, --threshold {best[1]:g} asks for more"
    return text
