# SPDX-License-Identifier: Apache-2.0
"""Write videos with masks in the formats that other tools read, one video after another.

| writer | masks | frames |
|---|---|---|
| `coco_video` | annotations.json: an annotation per object and frame, with `track_id` | <video>/<frame>.jpg |
| `youtube_vis` | annotations.json: an annotation per object, null where it is absent | <video>/<frame>.jpg |
| `sav` (SA-V train) | <video>_manual.json | <video>.mp4, or <video>/<index>.jpg |
| `davis` (as MOSE, YouTube-VOS) | Annotations/<video>/<frame>.png, palette | JPEGImages/<video>/<frame>.jpg |

An absent object has no annotation or null, never an empty mask: evaluators count that as an object that is there. Only
SA-V's own form has a mask for every object. What a format cannot hold is counted in `lost`, by the keys of LOSSES.

Letters: N objects, H W rows and columns.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from effsam3.data.coco import MOST, runs_of, text_rles
from effsam3.data.videos.files import UnreadableVideo
from effsam3.data.videos.mask_pngs import HIGHEST_ID
from effsam3.data.videos.sav import FRAME_STRIDE, sav_record
from effsam3.data.videos.vos_video import VosVideo
from effsam3.errors import UserError
from effsam3.files import write_json, write_text

LOSSES = {
    "overlap": "frames have objects that overlap; a palette PNG has one object per pixel, which the smaller one gets",
    "too_many_objects": f"objects are left out: a palette PNG holds {HIGHEST_ID} per video",
    "never_visible": "objects are visible on no frame, so nothing would tell that they are there",
    "unannotated_frames": "frames without masks are left out: every image that such a JSON lists is an annotated one",
    "unannotated_objects": "objects on a frame are not annotated there, and become absent",
    "void": "masks have void, neither object nor background: it becomes background",
    "off_stride": f"annotated frames are left out: SA-V annotates frames 0, {FRAME_STRIDE}, {2 * FRAME_STRIDE} ...",
}


JPEG_QUALITY = 95  # of frames that were in a video file


class Writer(ABC):
    """Writes the masks of videos into a folder; `add` for each, then `close`.

    Attributes:
        lost: how often something could not be kept, by LOSSES.
        categories: {video's new name: {object's new id: what it is}}, where the format has no place for it.
        renamed: {video: {"name": its new name, "objects": {old id: new id}}}, where either had to change.
    """

    keeps_mp4 = False  # whether frames that are in an mp4 stay there

    def __init__(self, folder: Path):
        self.folder = folder
        self.lost: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # where each loss was first seen
        self.renamed: dict[str, dict] = {}
        self.categories: dict[str, dict[int, str]] = {}
        self._names: dict[str, str] = {}  # new name: old one

    @abstractmethod
    def add(self, video: VosVideo) -> dict[int, str]:
        """Write a video's masks. Returns {frame: file of its image in the folder, without the ending}.

        Raises:
            Unreadable: as `VosVideo`.
            UserError: another video has this name.
        """

    def close(self) -> None:
        """Write what is about all videos."""
        for name, table in (("renamed", self.renamed), ("categories", self.categories)):
            if table:
                write_json(self.folder / f"{name}.json", table)

    def lose(self, reason: str, where: str, count: int = 1) -> None:
        """Count a loss."""
        if count > 0:
            self.lost[reason] += count
            self.first.setdefault(reason, where)

    def _begin(self, video: VosVideo) -> str:
        """Return a name that is one folder below this one, whatever a JSON calls its videos; count what is void."""
        video.objects  # noqa: B018  reads all masks, so that the notes are complete
        void = [note.where for note in video.notes if note.reason == "void"]
        self.lose("void", "".join(void[:1]), len(void))
        name = re.sub(r"[^\w.-]+", "_", video.name).lstrip(".") or "video"
        if (other := self._names.setdefault(name, video.name)) != video.name:
            raise UserError(f"the videos {other!r} and {video.name!r} would both be the folder {name}; rename one")
        if name != video.name:
            self.renamed.setdefault(video.name, {})["name"] = name
        return name

    def _ids(self, video: VosVideo, least: int, most: int) -> dict[int, int]:
        """Return {object: whole number from `least` to `most`}: its own, or 1, 2, 3 ... where they do not fit."""
        own = {number: name for number, name in video.object_names.items() if isinstance(name, int)}
        if len(own) == len(video.objects) and all(least <= name <= most for name in own.values()):
            return {number: own[number] for number in video.objects}
        ids = {number: place for place, number in enumerate(video.objects, 1)}
        table = {str(video.object_names[number]): place for number, place in ids.items()}
        self.renamed.setdefault(video.name, {})["objects"] = table
        return ids

    def _annotated(self, video: VosVideo) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
        """Yield (frame, masks of the visible objects); count the objects that are lost where only those are told."""
        seen: set[int] = set()
        for index in video.annotated:
            masks = video.masks(index)
            self.lose("unannotated_objects", f"{video.name}, frame {index}", len(video.objects) - len(masks))
            visible = {number: mask for number, mask in masks.items() if mask.any()}
            seen |= visible.keys()
            yield index, visible
        self._never_seen(video, [number for number in video.objects if number not in seen])

    def _note_categories(self, video: VosVideo, name: str, ids: dict[int, int]) -> None:
        """Keep what the objects are next to masks that have no place for it."""
        if video.categories:
            self.categories[name] = {ids[number]: category for number, category in video.categories.items()}

    def _never_seen(self, video: VosVideo, objects: list[int]) -> None:
        self.lose("never_visible", f"{video.name}, object {''.join(map(str, objects[:1]))}", len(objects))


class Davis(Writer):
    def add(self, video: VosVideo) -> dict[int, str]:
        name, ids = self._begin(video), self._ids(video, 1, HIGHEST_ID)
        self._note_categories(video, name, ids)
        masks_folder = self.folder / "Annotations" / name
        masks_folder.mkdir(parents=True)
        self.lose("too_many_objects", video.name, len(ids) - HIGHEST_ID)
        for index, masks in self._annotated(video):
            kept = {ids[number]: mask for number, mask in masks.items() if ids[number] <= HIGHEST_ID}
            ids_HW = map_of_ids(kept, video.size)
            areas = sum(int(mask.sum()) for mask in kept.values())
            self.lose("overlap", f"{video.name}, frame {index}", int(areas > np.count_nonzero(ids_HW)))
            write_palette_png(ids_HW, masks_folder / f"{video.frame_names[index]}.png")
        return {index: f"JPEGImages/{name}/{file}" for index, file in enumerate(video.frame_names)}


class Sav(Writer):
    keeps_mp4 = True

    def add(self, video: VosVideo) -> dict[int, str]:
        name, ids = self._begin(video), self._ids(video, 0, MOST)
        self._note_categories(video, name, ids)
        masklet: list[list[dict] | None] = [None] * -(-video.frames // FRAME_STRIDE)
        empty = np.zeros(video.size, bool)
        for index in video.annotated:
            if index % FRAME_STRIDE:
                self.lose("off_stride", f"{video.name}, frame {index}")
                continue
            masks = video.masks(index)
            self.lose("unannotated_objects", f"{video.name}, frame {index}", len(ids) - len(masks))
            masklet[index // FRAME_STRIDE] = text_rles([masks.get(number, empty) for number in video.objects])
        record = sav_record(name, video.frames, video.size, list(ids.values()), masklet)
        write_text(self.folder / f"{name}_manual.json", json.dumps(record))
        return {index: f"{name}/{index:05d}" for index in range(video.frames)}


class JsonWriter(Writer):
    """One annotations.json next to the videos' folders of frames; both kinds list annotated frames only."""

    tables: tuple[str, ...]

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._tables = Tables(*self.tables)
        self._category_ids: dict[str, int] = {}

    def close(self) -> None:
        rows = [{"id": number, "name": name} for name, number in self._category_ids.items()]
        self._tables.write(self.folder / "annotations.json", {"categories": rows})
        super().close()

    def _category(self, video: VosVideo, number: int) -> int:
        """Return the id of an object's category; objects of no category are of one called "object"."""
        return self._category_ids.setdefault(video.categories.get(number, "object"), len(self._category_ids) + 1)

    def _listed(self, video: VosVideo) -> dict[int, str]:
        """Return the files of the frames that are listed, without their endings."""
        name = self._begin(video)
        self.lose("unannotated_frames", video.name, video.frames - len(video.annotated))
        return {index: f"{name}/{video.frame_names[index]}" for index in video.annotated}


class CocoVideo(JsonWriter):
    tables = ("videos", "images", "annotations")

    def add(self, video: VosVideo) -> dict[int, str]:
        files = self._listed(video)
        height, width = video.size
        size = {"width": width, "height": height}
        video_id = self._tables.add("videos", name=video.name, length=len(files), **size)
        for order, (index, masks) in enumerate(self._annotated(video)):
            file = files[index] + ending(video, index)
            image = {"video_id": video_id, "order_in_video": order, "path": file, "file_name": file}
            image_id = self._tables.add("images", **image, **size)
            for number, rle in zip(masks, text_rles(masks.values()), strict=True):
                track = {"image_id": image_id, "video_id": video_id, "track_id": video.object_names[number]}
                about = {"category_id": self._category(video, number), "iscrowd": 0, "segmentation": rle}
                self._tables.add("annotations", **track, **about, **measured(rle))
        return files


class YoutubeVis(JsonWriter):
    """Masks are uncompressed RLEs: trackeval takes only those, or polygons, for a ground truth."""

    tables = ("videos", "annotations")

    def add(self, video: VosVideo) -> dict[int, str]:
        files = self._listed(video)
        height, width = video.size
        listed = [file + ending(video, index) for index, file in files.items()]
        size = {"width": width, "height": height}
        video_id = self._tables.add("videos", name=video.name, file_names=listed, length=len(listed), **size)
        tracks: dict[int, list[dict | None]] = {number: [None] * len(listed) for number in video.objects}
        for order, (_, masks) in enumerate(self._annotated(video)):
            for number, rle in zip(masks, text_rles(masks.values()), strict=True):
                tracks[number][order] = rle
        for number, rles in tracks.items():
            found = [rle and measured(rle) for rle in rles]
            self._tables.add(
                "annotations",
                video_id=video_id,
                track_id=video.object_names[number],
                category_id=self._category(video, number),
                iscrowd=0,
                **size,
                segmentations=[rle and {"size": rle["size"], "counts": runs_of(rle).tolist()} for rle in rles],
                bboxes=[one and one["bbox"] for one in found],
                areas=[one and one["area"] for one in found],
            )
        return files

    def _never_seen(self, video: VosVideo, objects: list[int]) -> None:
        """Nothing is lost: such an object is a list of nulls."""


WRITERS: dict[str, type[Writer]] = {"coco_video": CocoVideo, "youtube_vis": YoutubeVis, "sav": Sav, "davis": Davis}


# ---- frames


def ending(video: VosVideo, index: int) -> str:
    """Return the ending that the file of a frame gets: its own, or .jpg."""
    return video.image_files[index].suffix.lower() if video.image_files else ".jpg"


def put_frames(video: VosVideo, files: dict[int, str], folder: Path, how: str, keep_mp4: bool = False) -> None:
    """Copy or link frames into a folder; those of a video file are saved as JPEGs.

    Args:
        files: as `Writer.add` returns them.
        how: copy or link: symbolic links to where the frames are now.
        keep_mp4: copy or link an mp4 as it is.

    Raises:
        UnreadableVideo: a frame that cannot be decoded, or is not there.
        UserError: links to the frames of a video file.
    """
    place = {"copy": shutil.copyfile, "link": lambda file, target: target.symlink_to(file.resolve())}[how]
    whole = video.video_file
    if whole and keep_mp4 and whole.suffix.lower() == ".mp4":
        place(whole, folder / f"{Path(files[0]).parent}.mp4")
        return
    if not video.image_files and how == "link":
        raise UserError(f"--frames link: the frames of {whole} are no files of their own; use --frames copy or none")
    for index, name in files.items():
        target = folder / (name + ending(video, index))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not video.image_files:
            (image_3HW,) = video.read([index])
            Image.fromarray(image_3HW.transpose(1, 2, 0)).save(target, quality=JPEG_QUALITY)
        elif video.image_files[index].is_file():
            place(video.image_files[index], target)
        else:
            raise UnreadableVideo(video.name, "missing_frame", str(video.image_files[index]))


# ---- parts of files


class Tables:
    """A JSON of lists of rows that never is in memory as a whole. Rows of a table get ids 1, 2, 3 ..."""

    def __init__(self, *names: str):
        self._files: dict[str, IO[str]] = {name: tempfile.TemporaryFile("w+", encoding="utf-8") for name in names}
        self._counts = Counter(names) - Counter(names)

    def add(self, table: str, **row) -> int:
        """Append a row and return its id."""
        self._counts[table] += 1
        self._files[table].write(",\n" if self._counts[table] > 1 else "")
        self._files[table].write(json.dumps({"id": self._counts[table], **row}, separators=(",", ":")))
        return self._counts[table]

    def write(self, path: Path, rest: dict) -> None:
        """Write the tables and the rest of the JSON as one file."""
        with open(path, "w", encoding="utf-8") as out:
            out.write("{")
            for name, file in self._files.items():
                out.write(f'"{name}": [\n')
                file.seek(0)
                shutil.copyfileobj(file, out)
                file.close()
                out.write("\n],\n")
            out.write(json.dumps(rest)[1:] + "\n")


def measured(rle: dict) -> dict:
    """Return the area of a mask in pixels and the box around it, [x, y, width, height]."""
    from pycocotools import mask

    return {"area": int(mask.area(rle)), "bbox": mask.toBbox(rle).tolist()}


def map_of_ids(masks: dict[int, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return the id, 1 to 255, of each pixel (H, W), uint8, 0 where there is none; of two the smaller object's."""
    ids_HW = np.zeros(size, np.uint8)
    areas = {number: int(mask.sum()) for number, mask in masks.items()}
    for number in sorted(areas, key=areas.__getitem__, reverse=True):  # a part lies over the whole
        ids_HW[masks[number]] = number
    return ids_HW


def write_palette_png(ids_HW: np.ndarray, path: Path) -> None:
    """Write a map of ids 0 to 255 as an 8-bit palette PNG in DAVIS' colours."""
    image = Image.fromarray(ids_HW)
    image.putpalette(voc_palette())
    image.save(path)


@functools.cache
def voc_palette() -> list[int]:
    """The colours of ids 0 to 255 in DAVIS and PASCAL VOC: bit 3k + c of an id is bit 7 - k of colour channel c."""
    return [
        sum((number >> (3 * step + channel) & 1) << (7 - step) for step in range(3))
        for number in range(256)
        for channel in range(3)
    ]
