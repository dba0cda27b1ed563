# SPDX-License-Identifier: Apache-2.0
"""Masks of a video as PNGs: one for every frame that holds ids, or a folder of binary ones for every object.

Letters: H W rows and columns.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from effsam3.data.images.decoding import PILLOW_FAULTS
from effsam3.data.problems import Note
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.frame_folder import FrameFolder
from effsam3.data.videos.frame_numbers import UnclearNames, match_names
from effsam3.data.videos.vos_video import Annotations, Shown

VOID = 255  # in a palette or 8-bit grey PNG: neither object nor background; scored as background
IGNORED = 10_000  # the same in a 16-bit one, as MOTS writes it, where ids are 1000 x class + object
HIGHEST_ID = VOID - 1  # that such a PNG can hold
MASK_TYPES = {"P": np.uint8, "L": np.uint8, "1": np.uint8, "I;16": np.int32, "I;16B": np.int32, "I": np.int32}


class ObjectFolders(Annotations):
    """A folder for every object, a binary PNG for every frame on which this object is annotated.

    PNGs belong to the images in the folder `frames` by their names, or by the numbers in them. Objects have the
    numbers that are their folders' names; if some name is no number, all are numbered from 1 by their names.
    """

    def __init__(self, name: str, path: Path, frames: Path):
        self.name, self.path, self.frames = name, path, frames

    @functools.cached_property
    def _folders(self) -> dict[int, Path]:
        paths = folders_in(self.path)
        if all(path.name.isdecimal() for path in paths):
            return _by_number(paths, self.name)
        return dict(enumerate(paths, 1))

    @functools.cached_property
    def _files(self) -> dict[int, dict[int, Path]]:
        pngs = {number: pngs_in(folder) for number, folder in self._folders.items()}
        if not any(pngs.values()):
            raise UnreadableAnnotations(self.name, "missing", f"no <object>/<frame>.png in {self.path}")
        frames = _frames_of([file for files in pngs.values() for file in files], self.frames, self.name)
        return {number: {frames[file]: file for file in files} for number, files in pngs.items()}

    @property
    def objects(self) -> list[int]:
        return sorted(self._files)

    @property
    def names(self) -> dict[int, str | int]:
        return {number: number if path.name.isdecimal() else path.name for number, path in self._folders.items()}

    @functools.cached_property
    def numbers(self) -> list[int]:
        return sorted(set().union(*self._files.values()))

    def masks(self, number: int) -> dict[int, np.ndarray]:
        """Return the masks of the objects that have one."""
        return {
            name: read_png(self._files[name][number], self.name) > 0
            for name in self.objects
            if number in self._files[name]
        }


class PaletteFrames(Annotations):
    """One PNG for every annotated frame, whose values are the objects' ids; 0 is background, see VOID and IGNORED.

    PNGs belong to the images in the folder `frames` by their names, or by the numbers in them.

    Args:
        binary: PNGs of 0 and 255 only show one object, with id 1. Without it they are refused: where 255 is void by
            convention, they show none.
    """

    def __init__(self, name: str, path: Path, frames: Path, binary: bool = False):
        self.name, self.path, self.frames, self.binary = name, path, frames, binary
        # Each PNG must be read before its masks are known, and most readers then ask for each frame once, in turn.
        self._read: dict[int, Runs] = {}

    @functools.cached_property
    def _files(self) -> dict[int, Path]:
        files = pngs_in(self.path)
        if not files:
            raise UnreadableAnnotations(self.name, "missing", f"no <frame>.png in {self.path}")
        return {number: file for file, number in _frames_of(files, self.frames, self.name).items()}

    @functools.cached_property
    def _found(self) -> tuple[set[int], list[Path]]:
        """The ids in the PNGs, and those PNGs that have void."""
        ids: set[int] = set()
        void, faults = [], []
        for number, file in self._files.items():
            try:
                runs = self._read[number] = Runs.of(read_png(file, self.name))
            except UnreadableAnnotations as fault:
                faults.append(fault)
                continue
            found = set(runs.values.tolist()) - {0}
            own_void = VOID if runs.values.dtype == np.uint8 else IGNORED
            void += [file] if own_void in found else []
            ids |= found - {own_void}
        if faults:  # all of them, so that they can be mended at once
            raise UnreadableAnnotations(self.name, faults[0].reason, faults[0].detail, faults[1:])
        return ids, void

    @functools.cached_property
    def _values(self) -> dict[int, int]:
        """The value of each object in the PNGs."""
        ids, void = self._found
        if void and not ids:
            if self.binary:
                return {1: VOID}
            detail = f"the masks of {self.path} have the values 0 and 255 only; an object needs an id from 1 to 254"
            raise UnreadableAnnotations(self.name, "no_ids", detail)
        return {number: number for number in sorted(ids)}

    @property
    def objects(self) -> list[int]:
        return list(self._values)

    @property
    def notes(self) -> list[Note]:
        if "_found" not in self.__dict__:
            return []  # nothing is known before the PNGs are read, and training does not read all of them at its start
        if self._values == {1: VOID}:
            return [Note("binary", str(self.path), "masks of 0 and 255 only are taken for one object")]
        void = sorted(self._found[1])
        return [Note("void", f"{self.name}, {file.name}", "void counts as background") for file in void]

    @functools.cached_property
    def numbers(self) -> list[int]:
        return sorted(self._files)

    def masks(self, number: int) -> dict[int, np.ndarray]:
        """Return every object's mask."""
        values = self._values
        runs = self._read.pop(number, None)
        ids_HW = read_png(self._files[number], self.name) if runs is None else runs.ids()
        return {name: ids_HW == value for name, value in values.items()}

    def shown(self, number: int) -> Shown:
        """Return the masks of the ids in one PNG."""
        ids_HW = read_png(self._files[number], self.name)
        void = VOID if ids_HW.dtype == np.uint8 else IGNORED
        found = _values_in(ids_HW) - {0}
        if self.binary and found == {void}:  # an object, if no other PNG has ids
            shown = super().shown(number)
            self._read.clear()  # training asks for frames in any order and keeps all videos
            return shown
        return Shown({name: ids_HW == name for name in sorted(found - {void})}, frozenset())


class Runs(NamedTuple):
    """The values of a PNG (H, W), run by run through its rows: about 10 kB of 480 x 854 pixels with three objects."""

    values: np.ndarray
    lengths: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def of(cls, ids_HW: np.ndarray) -> Runs:
        ids = ids_HW.reshape(-1)
        starts = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
        return cls(ids[starts], np.diff(starts, append=len(ids)).astype(np.int32), ids_HW.shape)

    def ids(self) -> np.ndarray:
        """Return the values (H, W)."""
        return np.repeat(self.values, self.lengths).reshape(self.shape)


def folders_in(path: Path) -> list[Path]:
    """Return the folders in a folder, by name; hidden ones are left out."""
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def pngs_in(folder: Path) -> list[Path]:
    """Return the PNGs in a folder; hidden ones are left out."""
    return [file for file in folder.iterdir() if file.suffix.lower() == ".png" and not file.name.startswith(".")]


def _frames_of(files: list[Path], frames: Path, video: str) -> dict[Path, int]:
    """Return the number of the frame that each mask belongs to; several objects' masks may be of one frame."""
    by_name: dict[str, int] = {}  # those of a video file are only known once it is decoded
    if not frames.is_file():
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
    for path in paths:
        other = found.setdefault(int(path.name), path)
        if other != path:
            raise UnreadableAnnotations(video, "names", f"{other} and {path.name} have one number; remove one of them")
    return dict(sorted(found.items()))


def _values_in(ids_HW: np.ndarray) -> set[int]:
    """Return the values that there are, 0 among them."""
    if ids_HW.dtype == np.uint8:  # counted, eight times faster than sorted
        return {value for value, count in enumerate(Image.fromarray(ids_HW).histogram()) if count}
    return set(np.unique(ids_HW).tolist())


def read_png(path: Path, video: str) -> np.ndarray:
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
