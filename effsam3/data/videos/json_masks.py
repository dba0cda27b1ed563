# SPDX-License-Identifier: Apache-2.0
"""What JSONs of videos have in common: masks as RLEs or polygons, tracks by any name, and where their frames are.

Letters: H W rows and columns.
"""

from __future__ import annotations

import functools
import itertools
import re
import reprlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from effsam3.data import coco
from effsam3.data.problems import Note
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.files import VIDEO_EXTENSIONS, VideoFile
from effsam3.data.videos.frame_list import FrameList
from effsam3.data.videos.frame_numbers import missing_numbers
from effsam3.data.videos.vos_video import Annotations, Frames, Shown
from effsam3.errors import UserError

FRAME_FOLDERS = ("", "images", "JPEGImages", "frames", "videos")  # next to a JSON
ANNOTATION_FOLDERS = ("annotations", "labels")  # that hold only JSONs: frames are next to the folder
TRACKS = ("track_id", "instance_id")  # keys of an annotation that tell which object it is of
LONGEST = 255  # characters of a file's name
Size = tuple[int, int]


class Segment(NamedTuple):
    """One annotation of an object on a frame."""

    where: str  # of which annotation errors and notes tell
    value: Any  # RLE or list of polygons; None: the object is there, but nobody knows where


class JsonMasks(Annotations):
    """Masks of a video, decoded when asked for.

    Args:
        sizes: (rows, columns) of each annotated frame; None where the file does not say, then those of `frames`.
        segments: {number of a frame: {object: its annotations}}; an object that is not in it is absent.
        names: what the file calls the objects.
        categories: what it says that they are.
    """

    def __init__(
        self,
        video: str,
        frames: Frames,
        sizes: dict[int, Size | None],
        segments: dict[int, dict[int, list[Segment]]],
        names: dict[int, str | int],
        categories: dict[int, str],
        notes: list[Note],
    ):
        self.video, self.frames, self.sizes, self.segments = video, frames, sizes, segments
        self._names, self._categories, self._notes = names, categories, notes

    @property
    def objects(self) -> list[int]:
        return sorted(self._names)

    @property
    def numbers(self) -> list[int]:
        return sorted(self.sizes)

    @property
    def names(self) -> dict[int, str | int]:
        return self._names

    @property
    def categories(self) -> dict[int, str]:
        return self._categories

    @property
    def notes(self) -> list[Note]:
        return self._notes

    def masks(self, number: int) -> dict[int, np.ndarray]:
        """Return the union of each object's annotations; an object with only a box has none."""
        shown, size = self.shown(number), self.sizes[number] or self.frames.size
        known = [name for name in self.objects if name not in shown.unknown]
        return {name: shown.masks[name] if name in shown.masks else np.zeros(size, bool) for name in known}

    def shown(self, number: int) -> Shown:
        """Decode only what is annotated on this frame."""
        size = self.sizes[number] or self.frames.size
        masks, unknown = {}, []
        for name, segments in self.segments[number].items():
            decoded = [self._decode(segment, size) for segment in segments if segment.value is not None]
            if not decoded:  # taken as absent, it would teach that the object had left
                unknown.append(name)
            elif (mask_HW := np.logical_or.reduce(decoded)).any():
                masks[name] = mask_HW
        return Shown(masks, frozenset(unknown))

    def _decode(self, segment: Segment, size: Size) -> np.ndarray:
        try:
            return coco.decode(segment.value, *size)
        except coco.Malformed as fault:
            raise UnreadableAnnotations(self.video, fault.reason or "bad_mask", f"{segment.where}: {fault}") from fault


def segment_of(value, where: str, notes: list[Note]) -> Segment:
    """Return an annotation's mask, without what is none: `[]`, null, and polygons of one or two points."""
    if isinstance(value, list):
        parts = [part for part in value if not isinstance(part, list) or len(part) >= 6]
        if len(parts) < len(value):
            notes.append(Note("two_points", where, "a polygon of fewer than three points has no inside; left out"))
        value = parts
    if not value:
        notes.append(Note("no_mask", where, "only a box: its object counts as not annotated on this frame"))
        return Segment(where, None)
    if isinstance(value, dict) and _is_empty(value.get("counts")):
        notes.append(Note("empty_mask", where, "an RLE without a pixel: its object is absent"))
    return Segment(where, value)


def _is_empty(counts) -> bool:
    """Say whether an RLE is of background alone; what is no RLE is found when it is decoded."""
    if isinstance(counts, list):
        return not any(counts[1::2])
    # As a string, a number has six characters at most, and bit 5 of each but the last one is set.
    return isinstance(counts, str) and 0 < len(counts) <= 6 and all((ord(one) - 48) & 32 for one in counts[:-1])


def category_of(annotation: dict, known: dict[Hashable, str]) -> str | None:
    """Return the name of an annotation's category; None where the file has none."""
    key = annotation.get("category_id")
    return known.get(key) if isinstance(key, (str, int)) else None


def category_names(content: dict) -> dict[Hashable, str]:
    """Return {id: name} of a file's categories."""
    rows = [
        coco.mapping(row, "a category", ("id",)) for row in coco.listed(content.get("categories") or [], "categories")
    ]
    return {identifier(row["id"], "id of a category"): str(row["name"]) for row in rows if row.get("name") is not None}


def number_objects(keys: Iterable[Hashable]) -> dict[Hashable, int]:
    """Return an id for each key: itself if it is a whole number from 0 on, else the next above those, from 1."""
    found = list(dict.fromkeys(keys))
    whole: dict[Hashable, int] = {key: key for key in found if isinstance(key, int) and 0 <= key <= coco.MOST}
    others = [key for key in found if key not in whole]
    return whole | {key: number for number, key in enumerate(others, max(whole.values(), default=0) + 1)}


def identifier(value, name: str) -> str | int:
    """Return an id of a file. Raises coco.Malformed."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise coco.Malformed(f"{name} is {reprlib.repr(value)}; it must be a whole number or a text")
    return value


def size_of(record: dict, where: str) -> Size | None:
    """Return (height, width) that a record of a file gives; tools without the frames write 0 or null."""
    sides = [record.get("height"), record.get("width")]
    if not all(sides):
        return None
    return coco.whole(sides[0], f"height of {where}", 1), coco.whole(sides[1], f"width of {where}", 1)


def unique_names(names: dict[Hashable, str], file: Path) -> dict[Hashable, str]:
    """Return names of videos that folders can have: those given, or the keys where two videos have one name.

    Raises:
        UserError: two keys are the same as texts.
    """
    for some in (names, {key: str(key) for key in names}):
        # Benchmarks write folders of these names: none may lead out of theirs.
        found = {key: re.sub(r"[/\\]", "_", name).lstrip("._") or file.stem for key, name in some.items()}
        twice = [name for name, count in Counter(found.values()).items() if count > 1]
        if not twice:
            return found
    raise UserError(f"{file}: two videos are called {twice[0]!r}; give each a name of its own")


# ---- frames


class FrameFinder:
    """Finds the frames that a JSON names: tools put them into many places."""

    def __init__(self, file: Path):
        self.file, self.here = file, file.parent
        subset = file.stem.rpartition("_")[2]  # instances_train.json
        inner = [*FRAME_FOLDERS, file.stem, subset, f"images/{subset}", f"{subset}/JPEGImages"]
        bases = [self.here] + [self.here.parent] * (self.here.name.lower() in ANNOTATION_FOLDERS)
        folders = [base / name for base in bases for name in inner]
        self.folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
        self._taken: dict[Path, str] = {}

    @functools.cached_property
    def _video_files(self) -> list[Path]:
        files = [file for folder in self.folders for file in sorted(folder.iterdir())]
        return [file for file in files if file.suffix.lower() in VIDEO_EXTENSIONS and not file.name.startswith(".")]

    def images(self, video: str, names: Sequence[Sequence[str]]) -> list[Path] | None:
        """Return the files of a video's frames, or None if neither its first nor its last is anywhere.

        `names`: for each frame what the file calls it, the best first. The others are expected where one of these is.
        """
        if not all(names):
            return None
        # One of them shows where all are: thousands of frames are not looked for one by one.
        for frame in (0, -1):
            for place, name in enumerate(names[frame]):
                for reading in READINGS:
                    for folder in self.folders:
                        if (folder / reading(name, video)).is_file():
                            return [folder / reading(some[min(place, len(some) - 1)], video) for some in names]
        return None

    def video_file(self, names: Iterable[str], alone: bool) -> Path | None:
        """Return a video's file: one that has one of the names; of the only video, also the JSON's name or the only
        file."""
        named = [name for name in names if name] + ([self.file.stem] if alone else [])
        for name in map(PurePosixPath, named):
            for file in self._video_files:
                if file.name == name.name or file.stem == name.name:
                    return file
        return self._video_files[0] if alone and len(self._video_files) == 1 else None

    def frames(
        self, video: str, names: Sequence[Sequence[str]], numbers: Sequence[int], files: Iterable[str], alone: bool
    ) -> tuple[FrameList | VideoFile, list[int]]:
        """Return a video's frames, and the number of each of the file's images among them.

        Args:
            names: of each image, as for `images`; in order.
            numbers: which frame of a video file each image is.
            files: names that the video file may have.
            alone: there is no other video in the JSON.
        """
        images = self.images(video, names)
        for image, some in zip(images, names, strict=True) if images is not None else ():
            mine = f"{some} of video {video!r}"
            # Bare names such as 00000.jpg occur in every video: two of them must not end at one file unnoticed.
            if (other := self._taken.setdefault(image, mine)) is not mine:
                raise coco.Malformed(
                    f"{mine} and {other} both are {image}; put each video's frames into its own folder"
                )
        if images is None:
            found = self.video_file([video, *files], alone)
            if found is not None:
                return VideoFile(found), list(numbers)
            images = [
                self.here / (some[-1] if some else f"{number:05d}.jpg")
                for some, number in zip(names, numbers, strict=True)
            ]
        return FrameList(video, images), list(range(len(images)))


def note_gap(numbers: Sequence[int], video: str, notes: list[Note]) -> None:
    """Note frames that are missing from a JSON: what follows them is learned as if no time had passed."""
    for lost in itertools.islice(missing_numbers(numbers), 1000):  # one wrong number may be as far away as a date
        notes.append(Note("gap", f"video {video}, frame {lost}", "others before and after it are listed, it is not"))


def posix(value: str) -> str:
    """Return a path with slashes: tools on Windows write the other ones; Label Studio puts some into a question.

    Raises:
        coco.Malformed: no file can have it.
    """
    if "\0" in value or any(len(part) > LONGEST for part in re.split(r"[/\\]", value)):
        raise coco.Malformed(f"{reprlib.repr(value)} is no path of a file")
    return value.replace("\\", "/").rpartition("?d=")[2]


READINGS = (
    lambda name, video: name,
    lambda name, video: f"{video}/{name}",  # file names only
    lambda name, video: f"{video}/{PurePosixPath(name).name}",
    lambda name, video: PurePosixPath(name).name,  # another computer's folders
)
