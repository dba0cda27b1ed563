# SPDX-License-Identifier: Apache-2.0
"""A video with masks of objects, whatever format it was read from.

Letters: T frames, H W rows and columns.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from effsam3.data.problems import Note
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.data.videos.files import UnreadableVideo, VideoFile, open_video
from effsam3.data.videos.frame_list import FrameList
from effsam3.data.videos.frame_numbers import missing_numbers


class Frames(Protocol):
    """What `VideoFile`, `FrameFolder` and `FrameList` have in common."""

    @property
    def frames(self) -> int: ...

    @property
    def numbers(self) -> Sequence[int]: ...

    @property
    def names(self) -> list[str]: ...

    @property
    def size(self) -> tuple[int, int]: ...

    def read(self, indexes: Iterable[int]) -> np.ndarray: ...

    def close(self) -> None: ...


class Shown(NamedTuple):
    """What a frame shows: masks bool (H, W) that are not empty, by object, and the objects not annotated on it.

    All other objects are absent.
    """

    masks: dict[int, np.ndarray]
    unknown: frozenset[int]


class Annotations(ABC):
    """The masks of a video in some format; objects are known by whole numbers from 0 on."""

    @property
    @abstractmethod
    def objects(self) -> list[int]:
        """Ids of all objects."""

    @property
    @abstractmethod
    def numbers(self) -> list[int]:
        """Numbers of the annotated frames, ascending."""

    @abstractmethod
    def masks(self, number: int) -> dict[int, np.ndarray]:
        """Return the masks of an annotated frame by object."""

    def shown(self, number: int) -> Shown:
        """Return what an annotated frame shows, without a look at other frames where the format allows it."""
        masks = self.masks(number)
        return Shown({name: mask for name, mask in masks.items() if mask.any()}, frozenset(self.objects) - set(masks))

    @property
    def names(self) -> dict[int, str | int]:
        """What the format calls its objects."""
        return {number: number for number in self.objects}

    @property
    def categories(self) -> dict[int, str]:
        """What the objects are, where the format says so."""
        return {}

    @property
    def notes(self) -> list[Note]:
        """What was repaired or taken for granted, as far as it is known: asking for `objects` reads all PNGs."""
        return []


class VosVideo:
    """A video and masks for some of its frames. Frames count from 0, whatever the names of their files.

    Attributes:
        name: of the video.
        frames: how many there are.
        frame_names: the frames' file names without their endings; their masks have the same names. For a video file,
            the frames' numbers in five digits.
        size: (rows, columns) in pixels.
        objects: ids of all objects, those that appear later included.
        object_names: {id: what the object is called where it was read from}.
        categories: {id: what the object is}, where the format says so.
        annotated: the frames that have masks, ascending.
        notes: what the reader repaired or took for granted.
        image_files, video_file: where the frames are: one of them, or neither for frames that are made.
    """

    def __init__(self, name: str, frames: Path | Frames, annotations: Annotations, gaps: bool = False):
        """`frames`: a video file, a folder of images, or whatever else has frames; `gaps`: see `with_gaps`."""
        self.name = name
        self._frames, self._annotations, self._gaps = frames, annotations, gaps

    def numbered_from_one(self) -> VosVideo:
        """The same video with objects 1, 2 ..., those of the first annotated frame first, as DAVIS numbers them."""
        return VosVideo(self.name, self._frames, FromOne(self._annotations))

    def with_gaps(self) -> VosVideo:
        """The same video without what is `missing`, to look at the rest: its frames do not follow each other."""
        return VosVideo(self.name, self._frames, self._annotations, gaps=True)

    @functools.cached_property
    def _video(self) -> Frames:
        video = open_video(self._frames) if isinstance(self._frames, Path) else self._frames
        lost = None if self._gaps else next(missing_numbers(video.numbers), None)
        if lost is not None:  # whatever follows it would be tracked as if no time had passed
            detail = f"frame {lost} is not in {self._frames}, which has others before and after it; put it back"
            raise UnreadableVideo(self.name, "missing_frame", detail)
        return video

    @property
    def missing(self) -> list[int]:
        """Numbers of the frames that are not there, although frames around them are, or their masks.

        Of each kind the first 1,000: one wrong number may be as far away as a date.
        """
        numbers = self._video.numbers
        unseen = sorted(set(self._annotations.numbers).difference(numbers))
        return sorted({*itertools.islice(missing_numbers(numbers), 1000), *unseen[:1000]})

    @property
    def image_files(self) -> list[Path]:
        return self._video.files if isinstance(self._video, FrameList) else []

    @property
    def video_file(self) -> Path | None:
        return self._video.path if isinstance(self._video, VideoFile) else None

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

    @property
    def object_names(self) -> dict[int, str | int]:
        return self._annotations.names

    @property
    def categories(self) -> dict[int, str]:
        return self._annotations.categories

    @property
    def notes(self) -> list[Note]:
        return self._annotations.notes

    @functools.cached_property
    def _annotated(self) -> dict[int, int]:
        """{annotated frame: its number}."""
        place = {number: index for index, number in enumerate(self._video.numbers)}
        missing = [number for number in self._annotations.numbers if number not in place]
        if missing and not self._gaps:
            detail = f"frame {missing[0]} has masks but is not in {self._frames} ({self.frames} frames)"
            raise UnreadableVideo(self.name, "missing_frame", detail)
        return {place[number]: number for number in self._annotations.numbers if number in place}

    @functools.cached_property
    def annotated(self) -> list[int]:
        return list(self._annotated)

    def read(self, indexes: Iterable[int]) -> np.ndarray:
        """Return frames as uint8 RGB (T, 3, H, W). Raises UnreadableVideo."""
        return self._video.read(indexes)

    def close(self) -> None:
        """Let go of an open video file. It is opened again when asked."""
        self._video.close()

    def masks(self, index: int) -> dict[int, np.ndarray]:
        """Return the masks of an annotated frame by object, bool (H, W), all False where an object is absent.

        An object that is not annotated on this frame has no mask: without a PNG in the folder tree `sav`, with only a
        box in a JSON.

        Raises:
            UnreadableAnnotations: damaged, of another size than the frames, or not masks of this folder tree.
        """
        masks = self._annotations.masks(self._annotated[index])
        self._check_sizes(masks, index)
        return masks

    def shown(self, index: int) -> Shown:
        """Return what an annotated frame shows, often without a look at the others. Raises as `masks`."""
        shown = self._annotations.shown(self._annotated[index])
        self._check_sizes(shown.masks, index)
        return shown

    def _check_sizes(self, masks: dict[int, np.ndarray], index: int) -> None:
        other = {mask.shape for mask in masks.values()} - {self.size}
        if other:
            detail = f"frame {index}: masks of {other.pop()}, frames of {self.size}"
            raise UnreadableAnnotations(self.name, "size_mismatch", detail)


class NoMasks(Annotations):
    """Of a video that nobody has annotated."""

    @property
    def objects(self) -> list[int]:
        return []

    @property
    def numbers(self) -> list[int]:
        return []

    def masks(self, number: int) -> dict[int, np.ndarray]:
        raise AssertionError(f"frame {number} is not annotated")


class FromOne(Annotations):
    """Annotations whose objects are numbered from 1, those of the first annotated frame first."""

    def __init__(self, annotations: Annotations):
        self._annotations = annotations

    @functools.cached_property
    def _place(self) -> dict[int, int]:
        given = self._annotations
        shown = {name for number in given.numbers[:1] for name, mask in given.masks(number).items() if mask.any()}
        ordered = sorted(given.objects, key=lambda name: (name not in shown, name))
        return {name: place for place, name in enumerate(ordered, 1)}

    @property
    def objects(self) -> list[int]:
        return list(self._place.values())

    @property
    def numbers(self) -> list[int]:
        return self._annotations.numbers

    @property
    def names(self) -> dict[int, str | int]:
        return {self._place[number]: name for number, name in self._annotations.names.items()}

    @property
    def categories(self) -> dict[int, str]:
        return {self._place[number]: name for number, name in self._annotations.categories.items()}

    @property
    def notes(self) -> list[Note]:
        return self._annotations.notes

    def masks(self, number: int) -> dict[int, np.ndarray]:
        return {self._place[name]: mask for name, mask in self._annotations.masks(number).items()}
