# SPDX-License-Identifier: Apache-2.0
"""The verb `predict`: find or track things on images and in videos, and write pictures, masks and numbers.

effsam3 predict runs/stage1-image-es_rv_m photo.jpg --text "a dog"              every dog
effsam3 predict runs/stage1-image-es_rv_m photo.jpg --box 80,40,210,300         the object in the box
effsam3 predict runs/stage1-image-es_rv_m "photos/*.jpg" --text "a dog"         on every photo
effsam3 predict runs/stage1-image-es_rv_m walk.mp4 --text "a dog" --text "a leash"
effsam3 predict runs/stage1-image-es_rv_m walk.mp4 --point 200,140             the object shown on the first frame
effsam3 predict runs/stage1-image-es_rv_m 0 --text "a dog"                      the first webcam, until Ctrl-C
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from effsam3.benchmarks.pictures.predictions import CocoPredictions, records, refuse_others, write_image
from effsam3.benchmarks.pictures.video_predictions import video_predictions
from effsam3.data.unreadable import Unreadable
from effsam3.files import refuse_unwritable
from effsam3.inputs import Input, find_inputs, is_webcam, read_image, read_video
from effsam3.models.inference.prompt_options import Asked, PredictError
from effsam3.predictor import IMAGE_THRESHOLD, Predictor, refuse_misfit


def run(
    model: str,
    sources: Sequence[str],
    asked: Asked,
    out: str | None = None,
    device: str | None = None,
    images: bool = False,
    frames: int | None = None,
) -> Path:
    """Predict and write; returns the folder with all that is written, one below it for each of several inputs.

    Of an image: predictions.json, overlay.png, mask_NNN.png; of images together: coco.json. Of a video: see
    `video_predictions`.

    Args:
        model: a merged or run folder, a checkpoint file, a Hub id, `tiny` or `random`.
        sources: see `find_inputs`; so is `images`.
        out: the folder; None: predictions/<name of the only input>, or predictions.
        device: as for `Predictor`.
        frames: of a video, at most; None: all.

    Raises:
        PredictError: see the class; with several inputs after the others are done.
        ChassisError: a model that is not whole.
    """
    inputs = find_inputs(sources, images)
    alone = len(inputs) == 1
    target = Path(out or "predictions")
    if alone and out is None:
        target /= inputs[0].name
    # Before the model is found and loaded: a wrong box should cost a second, not a minute.
    first = _open(inputs[0], asked) if alone else None
    refuse_unwritable(target, "--out")
    for one in inputs:
        refuse_others(target if alone else target / one.name)
    task = _Task(model, asked, Predictor(model, device=device), frames)
    for one in tqdm(inputs, unit="input", disable=True if alone else None):
        try:
            opened = _open(one, asked) if first is None else first
            task.do(one, opened, target if alone else target / one.name)
        except (PredictError, Unreadable) as error:
            if alone:
                raise
            task.refused.append(f"{one.source}: {error}")
    if task.images:
        task.coco.write(target / "coco.json")
    task.report(target, inputs)
    return target


class _Task:
    """One model, asked the same of every input."""

    def __init__(self, model: str, asked: Asked, predictor: Predictor, most: int | None):
        self.model, self.asked, self.predictor, self.most = model, asked, predictor, most
        self.coco, self.images = CocoPredictions(), 0
        self.summary, self.refused = Summary(), list[str]()
        self.threshold = IMAGE_THRESHOLD if asked.threshold is None else asked.threshold

    def do(self, one: Input, opened, folder: Path) -> None:
        """Predict on one input and write into a folder of its own."""
        size = _size(opened)
        about = {"model": self.model, "input": one.source, "size": list(size), "prompts": self.asked.as_json()}
        if one.moves:
            self._video(one, opened, folder, about, size)
            return
        rows = [row for instances in self.predictor.on_image(opened, self.asked) for row in records(instances)]
        found = [row | {"id": number} for number, row in enumerate(rows, 1)]
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder, about, opened, found)
        self.coco.add(one.source, size, found)
        self.images += 1
        self.summary.add(one.name, found)

    def _video(self, one: Input, opened, folder: Path, about: dict, size: tuple[int, int]) -> None:
        live = is_webcam(one.source)
        count = self.most if live else min(opened.frames, self.most or opened.frames)
        steps = self.predictor.on_video(opened, self.asked, self.most)
        started = time.monotonic()
        ends = (KeyboardInterrupt, Unreadable) if live else ()
        with video_predictions(folder, about, one.name, size) as written:
            with suppress(*ends):
                for index, instances, image_HW3, time_s in tqdm(steps, total=count, unit="frame", disable=None):
                    rows = records(instances)
                    written.add(index, image_HW3, time_s, rows)
                    self.summary.add(one.name, rows)
            if not written.frames:
                raise PredictError(f"INPUT: {one.name} ended before anything was found on its first frame")
        seconds = time.monotonic() - started
        print(f"{one.name}: {written.frames} frames in {seconds:.1f} s, {written.frames / seconds:.2f} frames/s")
        if self.asked.texts and self.asked.threshold is None:
            self.threshold = self.predictor.concepts.model.new_det_thresh

    def report(self, target: Path, inputs: list[Input]) -> None:
        """Print how many instances there are, and where; raise if some inputs could not be read."""
        best = None
        if self.asked.texts and self.summary.frames:
            best = self.predictor.concepts.best_score, self.threshold
        folder = target if len(inputs) == 1 else target / "*"
        unit = "images" if self.images == self.summary.frames else "frames"
        print(f"{self.summary.text(best, unit)}; see {folder}/overlay.png, {folder}/predictions.json")
        if self.predictor.made_up:
            print("This model has random weights: what it finds means nothing.")
        if self.refused:
            listed = "\n  ".join(self.refused)
            raise PredictError(f"INPUT: {len(self.refused)} of {len(inputs)} inputs are left out:\n  {listed}")


def _open(one: Input, asked: Asked):
    """Open an image or video that the prompts fit."""
    opened = read_video(one.source) if one.moves else read_image(one.source)
    refuse_misfit(asked, one.moves, _size(opened))
    return opened


def _size(opened) -> tuple[int, int]:
    """Return (H, W) of an image, or of a video."""
    return opened.shape[:2] if isinstance(opened, np.ndarray) else tuple(opened.size)


class Summary:
    """How many instances there are, in how many frames; an instance without a pixel anywhere is none."""

    def __init__(self):
        self.frames = 0
        self.listed: set[tuple[str, int]] = set()
        self.seen: set[tuple[str, int]] = set()

    def add(self, name: str, instances: list[dict]) -> None:
        """Count the records of a frame of the input `name`."""
        self.frames += 1
        self.listed |= {(name, one["id"]) for one in instances}
        self.seen |= {(name, one["id"]) for one in instances if coco_mask.area(one["segmentation"])}

    def text(self, best: tuple[float, float] | None = None, unit: str = "frames") -> str:
        """Return it in words; where there is none, why.

        `best` is the best score of all candidates for the texts and the threshold; None: objects were shown.
        """
        count = len(self.seen)
        text = f"{count} {'instance' if count == 1 else 'instances'}"
        text += f" in {self.frames} {unit}" if self.frames > 1 else ""
        if empty := len(self.listed - self.seen):
            text += f" ({empty} more {'has' if empty == 1 else 'have'} no pixel in any frame)"
        if not self.listed and best is not None:
            text += f": the best score is {best[0]:.3f}, --threshold {best[1]:g} asks for more"
        return text
