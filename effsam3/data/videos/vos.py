# SPDX-License-Identifier: Apache-2.0
"""Videos with masks of objects, as benchmarks of video object segmentation keep them.

| folder tree | frames | masks |
|---|---|---|
| `sav` (SA-V val and test) | JPEGImages_24fps/<video>/00000.jpg | Annotations_6fps/<video>/<object>/00000.png |
| `davis` (also MOSE, YouTube-VOS) | JPEGImages/[480p/]<video>/00000.jpg | Annotations/[480p/]<video>/00000.png |
| `sav_train` (SA-V train) | <video>.mp4, or a folder <video> of frames | <video>_manual.json, else _auto.json |

Opening lists folders only; whatever is wrong with a video shows when it is read, as an error that names it.

Letters: T frames, H W rows and columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from effsam3.data.images.decoding import PILLOW_FAULTS
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.files import UnreadableVideo, VideoFile, open_video
from effsam3.data.videos.frame_folder import FrameFolder
from effsam3.data.videos.frame_numbers import UnclearNames, match_names, missing_number
from effsam3.data.videos.sav import FRAME_STRIDE, KINDS, SavAnnotations, parse_sav
from effsam3.errors import UserError

VOID = 255  # in a palette or 8-bit grey PNG: neither object nor background; scored as background
IGNORED = 10_000  # the same in a 16-bit one, as MOTS writes it, where ids are 1000 x class + object
HIGHEST_ID = VOID - 1  # that such a PNG can hold
MASK_TYPES = {"P": np.uint8, "L": np.uint8, "1": np.uint8, "I;16": np.int32, "I;16B": np.int32, "I": np.int32}
RESOLUTIONS = ("480p", "Full-Resolution")  # DAVIS' folders between JPEGImages and its videos; the first that is there


class Annotations(Protocol):
    """The masks of a video: `objects` are ids, `numbers` those of the annotated frames, `masks` by number."""

    @property
    def objects(self) -> list[int]: ...

    @property
    def numbers(self) -> list[int]: ...

    def masks(self, number: int) -> dict[int, np.ndarray]: ...


class VosVideo:
    """A video and masks for some of its frames. Frames count from 0, whatever the names of their files.

    Attributes:
        name: of the video.
        frames: how many there are.
        frame_names: the frames' file names without their endings; their masks have the same names. For a video file,
            the frames' numbers in five digits.
        size: (rows, columns) in pixels.
        objects: ids of all objects, those that appear later included.
        annotated: the frames that have masks, ascending.
    """

    def __init__(self, name: str, frames: Path, annotations: Annotations):
        self.name = name
        self._frames, self._annotations = frames, annotations

    def numbered_from_one(self) -> VosVideo:
        """The same video with objects 1, 2 ..., those of the first annotated frame first, as DAVIS numbers them."""
        return VosVideo(self.name, self._frames, FromOne(self._annotations))

    @functools.cached_property
    def _video(self) -> VideoFile | FrameFolder:
        video = open_video(self._frames)
        lost = missing_number(video.numbers)
        if lost is not None:  # whatever follows it would be tracked as if no time had passed
            detail = f"frame {lost} is not in {self._frames}, which has others before and after it; put it back"
            raise UnreadableVideo(self.name, "missing_frame", detail)
        return video

    @property
    def frames(self) -> int:
        return self._video.frames

    @property
    def frame_names(self) -> list[str]:
        return self._video.names

    @property
    def size(self) -> tuple[int, int]:
        return self._video.size

    @property
    def objects(self) -> list[int]:
        return self._annotations.objects

    @functools.cached_property
    def annotated(self) -> list[int]:
        place = {number: index for index, number in enumerate(self._video.numbers)}
        missing = [number for number in self._annotations.numbers if number not in place]
        if missing:
            detail = f"frame {missing[0]} has masks but is not in {self._frames} ({self.frames} frames)"
            raise UnreadableVideo(self.name, "missing_frame", detail)
        return [place[number] for number in self._annotations.numbers]

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        """Return frames as uint8 RGB (T, 3, H, W). Raises UnreadableVideo."""
        return self._video.read(indexes)

    def masks(self, index: int) -> dict[int, np.ndarray]:
        """Return the masks of an annotated frame by object, bool (H, W), all False where an object is absent.

        In the folder tree `sav`, an object without a PNG for this frame is not annotated on it and has no mask.

        Raises:
            UnreadableAnnotations: damaged, of another size than the frames, or not masks of this folder tree.
        """
        masks = self._annotations.masks(self._annotations.numbers[self.annotated.index(index)])
        other = {mask.shape for mask in masks.values()} - {self.size}
        if other:
            detail = f"frame {index}: masks of {other.pop()}, frames of {self.size}"
            raise UnreadableAnnotations(self.name, "size_mismatch", detail)
        return masks


def open_vos(root: str | Path, split: str | None = None) -> list[VosVideo]:
    """Return the videos of a folder in order of their names.

    Args:
        split: a list of videos: <root>/<split>.txt, or DAVIS' ImageSets/2017/<split>.txt; None: all videos.

    Raises:
        UserError: no such folder or list, no known folder tree, or no video.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    tree = _tree_of(root)
    videos: dict[str, tuple[Path, Annotations]] = {}
    if tree == "sav":
        frames, masks = root / "JPEGImages_24fps", root / "Annotations_6fps"
        videos = {path.name: (frames / path.name, ObjectFolders(path, frames / path.name)) for path in _folders(masks)}
    elif tree == "davis":
        frames, masks = _resolution(root / "JPEGImages"), _resolution(root / "Annotations")
        videos = {path.name: (frames / path.name, PaletteFrames(path, frames / path.name)) for path in _folders(masks)}
    else:
        for kind in reversed(KINDS):  # manual ones replace automatic ones
            found: dict[str, Path] = {}
            for path in sorted(root.rglob(f"*_{kind}.json")):
                name = path.stem.removesuffix(f"_{kind}")
                if (other := found.setdefault(name, path)) != path:
                    raise UserError(f"{other} and {path} are of one video; give the folder of one of them")
                folder = path.with_name(name)
                videos[name] = (folder if folder.is_dir() else path.with_name(f"{name}.mp4"), SavFile(path))
    if split is not None:
        videos = {name: videos[name] for name in _names(root, split, videos)}
    if not videos:
        raise UserError(f"no video with masks in {root}, folder tree {tree}")
    return [VosVideo(name, *videos[name]) for name in sorted(videos)]


def _tree_of(root: Path) -> str:
    if (root / "Annotations_6fps").is_dir():
        return "sav"
    if (root / "Annotations").is_dir():
        return "davis"
    if any(next(root.rglob(f"*_{kind}.json"), None) for kind in KINDS):
        return "sav_train"
    raise UserError(
        f"{root} has no known folder tree: Annotations_6fps (SA-V val and test), Annotations (DAVIS, MOSE, "
        "YouTube-VOS: the folder of one split), or files *_manual.json (SA-V train)"
    )


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    return [folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")]


def _resolution(path: Path) -> Path:
    return next((path / name for name in RESOLUTIONS if (path / name).is_dir()), path)


def _names(root: Path, split: str, videos: dict) -> list[str]:
    lists = [root / f"{split}.txt", *root.glob(f"ImageSets/*/{split}.txt"), root / "ImageSets" / f"{split}.txt"]
    file = next((path for path in lists if path.is_file()), None)
    if file is None:
        raise UserError(f"split {split!r}: there is no {split}.txt in {root} or its ImageSets")
    try:
        names = file.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text in UTF-8 ({error}); write one name of a video in each line") from error
    missing = [name for name in names if name not in videos]
    if missing:
        raise UserError(f"{file} names {len(missing)} videos without masks, such as {missing[0]}")
    return names


# ---- kinds of annotations


class ObjectFolders:
    """A folder for every object, a binary PNG for every frame on which this object is annotated.

    PNGs belong to the images in the folder `frames` by their names, or by the numbers in them.
    """

    def __init__(self, path: Path, frames: Path):
        self.path, self.frames = path, frames

    @functools.cached_property
    def _files(self) -> dict[int, dict[int, Path]]:
        folders = _by_number(_folders(self.path), self.path.name)
        pngs = {name: _pngs(folder) for name, folder in folders.items()}
        if not any(pngs.values()):
            raise UnreadableAnnotations(self.path.name, "missing", f"no <object>/<frame>.png in {self.path}")
        frames = _frames_of([file for files in pngs.values() for file in files], self.frames, self.path.name)
        return {name: {frames[file]: file for file in files} for name, files in pngs.items()}

    @property
    def objects(self) -> list[int]:
        return sorted(self._files)

    @functools.cached_property
    def numbers(self) -> list[int]:
        return sorted(set().union(*self._files.values()))

    def masks(self, number: int) -> dict[int, np.ndarray]:
        """Return the masks of the objects that have one."""
        return {
            name: _read_png(self._files[name][number], self.path.name) > 0
            for name in self.objects
            if number in self._files[name]
        }


class PaletteFrames:
    """One PNG for every annotated frame, whose values are the objects' ids; 0 is background, see VOID and IGNORED.

    PNGs belong to the images in the folder `frames` by their names, or by the numbers in them.
    """

    def __init__(self, path: Path, frames: Path):
        self.path, self.frames = path, frames

    @functools.cached_property
    def _files(self) -> dict[int, Path]:
        files = _pngs(self.path)
        if not files:
            raise UnreadableAnnotations(self.path.name, "missing", f"no <frame>.png in {self.path}")
        return {number: file for file, number in _frames_of(files, self.frames, self.path.name).items()}

    @functools.cached_property
    def objects(self) -> list[int]:
        ids, void = set(), False
        for file in self._files.values():
            ids_HW = _read_png(file, self.path.name)
            found = set(np.unique(ids_HW).tolist()) - {0}
            void |= found == {VOID}
            ids |= found - {VOID if ids_HW.dtype == np.uint8 else IGNORED}
        if void and not ids:
            detail = f"the masks of {self.path} have the values 0 and 255 only; an object needs an id from 1 to 254"
            raise UnreadableAnnotations(self.path.name, "no_ids", detail)
        return sorted(ids)

    @functools.cached_property
    def numbers(self) -> list[int]:
        return sorted(self._files)

    def masks(self, number: int) -> dict[int, np.ndarray]:
        """Return every object's mask."""
        ids_HW = _read_png(self._files[number], self.path.name)
        return {name: ids_HW == name for name in self.objects}


class SavFile:
    """SA-V's JSON; objects have the ids of its `masklet_id`."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _content(self) -> SavAnnotations:
        content = parse_sav(self.path.read_bytes(), self.path.stem)
        content.check_masks()  # before any of them is tracked
        return content

    @property
    def objects(self) -> list[int]:
        return self._content.objects

    @property
    def numbers(self) -> list[int]:
        return [FRAME_STRIDE * index for index, rles in enumerate(self._content.masklet) if rles is not None]

    def masks(self, number: int) -> dict[int, np.ndarray]:
        """Return every object's mask."""
        content = self._content
        return {name: content.mask(number // FRAME_STRIDE, place) for place, name in enumerate(content.objects)}


class FromOne:
    """Annotations whose objects are numbered from 1, those of the first annotated frame first."""

    def __init__(self, annotations: Annotations):
        self._annotations, self.numbers = annotations, annotations.numbers
        first = self.numbers[:1]
        shown = {name for number in first for name, mask in annotations.masks(number).items() if mask.any()}
        ordered = sorted(annotations.objects, key=lambda name: (name not in shown, name))
        self._place = {name: place for place, name in enumerate(ordered, 1)}
        self.objects = list(self._place.values())

    def masks(self, number: int) -> dict[int, np.ndarray]:
        return {self._place[name]: mask for name, mask in self._annotations.masks(number).items()}


def _pngs(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix.lower() == ".png" and not file.name.startswith(".")]


def _frames_of(files: list[Path], frames: Path, video: str) -> dict[Path, int]:
    """Return the number of the frame that each mask belongs to; several objects' masks may be of one frame."""
    folder = FrameFolder(frames)
    by_name = dict(zip(folder.names, folder.numbers, strict=True))
    try:
        numbers = match_names(sorted({file.stem for file in files}), by_name)
    except UnclearNames as fault:
        detail = f"{files[0].parent}: {fault}; give masks the names of their frames"
        raise UnreadableAnnotations(video, "names", detail) from fault
    return {file: numbers[file.stem] for file in files}


def _by_number(paths: list[Path], video: str) -> dict[int, Path]:
    """Return folders by the numbers that are their names, ascending."""
    found: dict[int, Path] = {}
    for path in sorted(paths):
        if not path.stem.isdecimal():
            raise UnreadableAnnotations(video, "names", f"{path} must have a number for a name, such as 002")
        other = found.setdefault(int(path.stem), path)
        if other != path:
            raise UnreadableAnnotations(video, "names", f"{other} and {path.name} have one number; remove one of them")
    return dict(sorted(found.items()))


def _read_png(path: Path, video: str) -> np.ndarray:
    """Return the values of a mask (H, W): of a palette image its indexes, not its colours.

    uint8, or int32 if the PNG has 16 bits.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:  # whatever its name, a JPEG has no exact values
            if image.mode not in MASK_TYPES:
                wanted = "palette or grey PNG, whose values are the objects' ids"
                detail = f"{path} is {image.mode}; save masks as {wanted}"
                raise UnreadableAnnotations(video, "colour_mask", detail)
            return np.array(image).astype(MASK_TYPES[image.mode])
    except UnreadableAnnotations:
        raise
    except Image.DecompressionBombError as fault:
        raise UnreadableAnnotations(video, "huge", f"{path}: {fault}") from fault
    except PILLOW_FAULTS as fault:
        raise UnreadableAnnotations(video, "corrupt", f"{path}: {fault}") from fault
