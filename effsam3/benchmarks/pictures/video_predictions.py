# SPDX-License-Identifier: Apache-2.0
"""What the verb `predict` writes of a video, frame by frame: nothing here grows with the number of frames.

Letters: H W rows and columns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from effsam3.benchmarks.pictures.drawing import CELL_WIDTH, contact_sheet, evenly, save_png
from effsam3.benchmarks.pictures.predictions import OVERLAY_WIDTH, Categories, clear, draw
from effsam3.data.videos.mask_pngs import HIGHEST_ID
from effsam3.data.videos.mp4 import Mp4Writer
from effsam3.data.videos.writing import Tables, map_of_ids, measured, write_palette_png
from effsam3.files import atomic_file, atomic_folder

SHOWN = 12  # frames on the contact sheet


@contextmanager
def video_predictions(folder: Path, about: dict, name: str, size: tuple[int, int]) -> Iterator[VideoPredictions]:
    """Yield what writes into a folder frame by frame; at the end of the block these are there:

    predictions.json (a frame a line), tracked.mp4, masks/<frame>.png (palette PNGs of ids), youtube_vis.json and
    overlay.png, a sheet of a few frames. An error leaves what an earlier run has written.

    Args:
        about: begins predictions.json.
        name: of the video.
        size: its (H, W).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        atomic_folder(folder / "masks") as masks,
        atomic_file(folder / "predictions.json") as rows,
        atomic_file(folder / "tracked.mp4") as video,
        tempfile.TemporaryDirectory() as tracks,
        open(rows, "w", encoding="utf-8") as file,
        closing(Mp4Writer(video)) as mp4,
    ):
        written = VideoPredictions(about, size, file, mp4, masks, Tracks(Path(tracks)))
        yield written
        clear(folder)
        written.finish(folder, name)


class VideoPredictions:
    """Takes frames in order; `frames` counts them."""

    def __init__(self, about: dict, size: tuple[int, int], file: IO[str], mp4: Mp4Writer, masks: Path, tracks: Tracks):
        self.prompts, self.size = about["prompts"], size
        self.file, self.mp4, self.masks, self.tracks = file, mp4, masks, tracks
        self.frames, self._every = 0, 1
        self._sheet: list[tuple[int, Image.Image]] = []
        file.write(json.dumps(about, indent=1).removesuffix("\n}") + ',\n "frames": [')

    def add(self, index: int, image_HW3: np.ndarray, time_s: float, instances: list[dict]) -> None:
        """Write the next frame, uint8 RGB, with its records."""
        self.file.write(",\n" if self.frames else "\n")
        self.file.write(json.dumps({"frame": index, "instances": instances}))
        # The prompts belong to the first frame and are drawn there only.
        prompts = {} if self.frames else self.prompts
        self.mp4.add(np.asarray(draw(image_HW3, instances, OVERLAY_WIDTH, prompts)), time_s)
        masks = {one["id"]: coco_mask.decode(one["segmentation"]).astype(bool) for one in instances}
        kept = {number: mask for number, mask in masks.items() if number <= HIGHEST_ID}
        write_palette_png(map_of_ids(kept, self.size), self.masks / f"{index:05d}.png")
        self.tracks.add(self.frames, instances)
        if self.frames % self._every == 0:
            cell = draw(image_HW3, instances, CELL_WIDTH, prompts)
            cell.thumbnail((CELL_WIDTH, max(self.size)))
            self._sheet.append((index, cell))
        # Nobody knows how many frames there will be: when they are too many, every other one is dropped.
        if len(self._sheet) > 2 * SHOWN:
            self._sheet, self._every = self._sheet[::2], 2 * self._every
        self.frames += 1

    def finish(self, folder: Path, name: str) -> None:
        """Write what is about all frames."""
        self.file.write("\n ]\n}\n")
        pictures = [(f"frame {index}", cell) for index, cell in evenly(self._sheet, SHOWN)]
        save_png(contact_sheet(pictures), folder / "overlay.png")
        with atomic_file(folder / "youtube_vis.json") as path:
            self.tracks.write(path, name, self.size, self.frames)


class Tracks:
    """YouTube-VIS' JSON of one video: an annotation is one object in all frames. Masks wait on the disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.texts: dict[int, str] = {}

    def add(self, frame: int, instances: list[dict]) -> None:
        """Keep the objects of a frame."""
        for one in instances:
            if not coco_mask.area(one["segmentation"]):
                continue  # absent: evaluators take an empty mask for an object that is there
            self.texts.setdefault(one["id"], one.get("text", ""))
            with (self.folder / str(one["id"])).open("a", encoding="utf-8") as file:
                file.write(json.dumps([frame, one["score"], one["segmentation"]]) + "\n")

    def write(self, path: Path, name: str, size: tuple[int, int], frames: int) -> None:
        """Write the JSON; the score of a track is the mean of its frames' scores."""
        tables, categories = Tables("videos", "annotations"), Categories()
        sides = {"width": size[1], "height": size[0]}
        files = [f"{name}/{frame:05d}.jpg" for frame in range(frames)]
        video = tables.add("videos", name=name, file_names=files, length=frames, **sides)
        for number, text in sorted(self.texts.items()):
            rles: list[dict | None] = [None] * frames
            scores = []
            for line in (self.folder / str(number)).read_text(encoding="utf-8").splitlines():
                frame, score, rles[frame] = json.loads(line)
                scores.append(score)
            found = [rle and measured(rle) for rle in rles]
            tables.add(
                "annotations",
                video_id=video,
                track_id=number,
                category_id=categories.of(text),
                score=round(float(np.mean(scores)), 4),
                iscrowd=0,
                **sides,
                segmentations=rles,
                bboxes=[one and one["bbox"] for one in found],
                areas=[one and one["area"] for one in found],
            )
        tables.write(path, categories.rows())
