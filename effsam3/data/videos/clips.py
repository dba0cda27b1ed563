# SPDX-License-Identifier: Apache-2.0
"""Training clips: a few consecutive annotated frames of a video and the masks of a few objects in all of them.

Which frames, direction, objects and augmentation is a pure function of a seed, so that a resumed run draws the same.

Letters: B clips, T frames, N object slots, S side of the square frames, H W rows and columns of the video.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from effsam3.data.sampler import PADDING
from effsam3.data.unreadable import Unreadable
from effsam3.data.videos.augmentation import Augmentation
from effsam3.data.videos.sav import FRAME_STRIDE, SavAnnotations, read_annotated_frames, read_sav
from effsam3.errors import UserError

OTHERS = 8  # videos tried in place of one that cannot be read


class NoClip(Unreadable):
    """Reasons: too_small, all masks of the clip's first frame are empty at the clip's size; no_object."""

    what = "clip of"


@dataclass(frozen=True)
class Clip:
    """One entry of a batch, see `Clips.__getitems__`."""

    pixels: Tensor
    masks: Tensor
    valid: Tensor
    frames: Tensor
    inside: Tensor
    key: str


class Clips(Dataset, ABC):
    """Map-style dataset that builds a whole batch of clips at a time; what a clip is drawn from is up to its kinds.

    Args:
        image_size: S; the whole frame is resized to S x S, whatever its shape.
        frames: T, of a clip.
        objects: N, the most objects of a clip.
        reverse: share of the clips that run backwards.
        augment: mirror, turn, shear and recolour clips, each alike in all its frames but for a little colour.
        seed: of everything that is drawn.
    """

    def __init__(self, image_size: int, frames: int, objects: int, reverse: float, augment: bool, seed: int):
        self.image_size, self.frames, self.objects = image_size, frames, objects
        self.reverse, self.augment, self.seed = reverse, augment, seed

    @abstractmethod
    def __len__(self) -> int:
        """Count the videos."""

    @abstractmethod
    def _key(self, position: int) -> str:
        """Return what reports call a video."""

    @abstractmethod
    def _clip(self, position: int, rng: np.random.Generator) -> Clip:
        """Draw a clip of a video. Raises Unreadable."""

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        """Return one clip without the batch axis, see `__getitems__`."""
        batch = self.__getitems__([item])
        return {name: value if name == "unreadable" else value[0] for name, value in batch.items()}

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict:
        """Return the clips of `items`, each a (position, number) or only a position, which is its own number.

        The number seeds what is drawn. Where a video cannot be read, a numbered item takes a clip of another video,
        found by the number. A position without a number asks for this very video (validation) and gives an empty clip,
        as does `PADDING`.

        Keys of the batch: `pixels` uint8 (B, T, 3, S, S); `masks` bool (B, T, N, S, S), empty where an object is
        absent; `valid` bool (B, N), which slots hold an object, and all False for an empty clip; `frames` int64
        (B, T), numbers of the video's frames; `inside` bool (B, T), False where a video has no more frames; lists
        `keys` ("" for an empty clip) and `numbers` (0 for padding); `unreadable`, pairs (key, reason), of
        all videos that could not be read.
        """
        clips = []
        unreadable: list[tuple[str, str]] = []
        pairs = [item if isinstance(item, tuple) else (item, item) for item in items]
        for item, (position, number) in zip(items, pairs, strict=True):
            if position == PADDING:
                clips.append(self._empty())
            elif isinstance(item, tuple):
                clips.append(self._clip_of_any(position, number, unreadable))
            else:
                clips.append(self._clip_of_any(position, number, unreadable, others=0))
        return {
            "pixels": torch.stack([clip.pixels for clip in clips]),
            "masks": torch.stack([clip.masks for clip in clips]),
            "valid": torch.stack([clip.valid for clip in clips]),
            "frames": torch.stack([clip.frames for clip in clips]),
            "inside": torch.stack([clip.inside for clip in clips]),
            "keys": [clip.key for clip in clips],
            "numbers": [max(number, 0) for _, number in pairs],
            "unreadable": unreadable,
        }

    def _clip_of_any(self, position: int, number: int, unreadable: list, others: int = OTHERS) -> Clip:
        """Return the clip of the position's video, else of one of `others` drawn by the number, else an empty one."""
        for attempt in range(1 + others):
            # The attempt seeds too: a broken video is replaced by another one that is as random, and the same after
            # resuming.
            rng = np.random.default_rng([self.seed, number, attempt])
            position = int(rng.integers(len(self)) if attempt else position)
            try:
                return self._clip(position, rng)
            except Unreadable as error:
                unreadable.append((self._key(position), f"{error.reason}: {error.detail}"))
        return self._empty()

    def _finish(
        self,
        frames_T3HW: np.ndarray,
        masks_TNHW: Tensor,
        first: list[int],
        numbers: list[int],
        key: str,
        rng: np.random.Generator,
        count: int | None = None,
    ) -> Clip:
        """Augment and resize a clip of at most N objects.

        Args:
            first: for each object a frame that shows it; none is moved out of it.
            numbers: of the frames.
            count: how many of the frames are of the video; None: all.
        """
        objects = masks_TNHW.shape[1]
        frames = torch.from_numpy(frames_T3HW)
        if self.augment:
            augmentation = Augmentation.draw(rng)
            shown_NHW = masks_TNHW[first, range(objects)]
            if not self._resized(augmentation.move_masks(shown_NHW)).flatten(1).any(1).all():
                augmentation = augmentation.unturned()  # it moves an object out of the frame that shows it
            # Masks move like the frames; colours only concern the frames.
            masks_TNHW = augmentation.move_masks(masks_TNHW.flatten(0, 1)).view_as(masks_TNHW)
            frames = augmentation.move_frames(frames)
        pixels = functional.resize(frames, [self.image_size, self.image_size], antialias=True)
        if self.augment:
            pixels = augmentation.recolour(pixels)
        masks = torch.zeros(self.frames, self.objects, *pixels.shape[2:], dtype=torch.bool)
        masks[:, :objects] = self._resized(masks_TNHW.flatten(0, 1)).unflatten(0, (self.frames, objects))
        valid = torch.arange(self.objects) < objects
        inside = torch.arange(self.frames) < (self.frames if count is None else count)
        return Clip(pixels, masks, valid, torch.tensor(numbers), inside, key)

    def _resized(self, masks_MHW: Tensor) -> Tensor:
        """Resize bool masks to S x S: True where the object covers half of a pixel or more."""
        # By area: the nearest pixel would lose thin objects, or keep them by chance.
        soft = masks_MHW[:, None].to(torch.uint8) * 255
        return functional.resize(soft, [self.image_size, self.image_size], antialias=True)[:, 0] >= 128

    def _empty(self) -> Clip:
        side = self.image_size
        return Clip(
            torch.zeros(self.frames, 3, side, side, dtype=torch.uint8),
            torch.zeros(self.frames, self.objects, side, side, dtype=torch.bool),
            torch.zeros(self.objects, dtype=torch.bool),
            torch.zeros(self.frames, dtype=torch.int64),
            torch.zeros(self.frames, dtype=torch.bool),
            "",
        )


class VideoClips(Clips):
    """Clips of SA-V, of consecutive annotated frames.

    Args:
        index: rows of an SA-V index, `sav.load_index`. Rows without any clip are left out of the dataset.
        folder: what the rows' files are relative to.
        frames: T, consecutive annotated frames (6 per second).
        objects: N, the most objects of a clip, drawn from those visible in its first frame.
        image_size, reverse, augment, seed: as for `Clips`.

    Attributes:
        left_out: {key: reason} of the rows that have no clip: too short, or no object where a clip could begin.
        unseekable: how many of the other rows have a video file that must be decoded whole before a clip of it.

    Raises:
        UserError: no row has a clip.
    """

    def __init__(
        self,
        index,
        folder: str | Path,
        image_size: int,
        frames: int = 8,
        objects: int = 3,
        reverse: float = 0.5,
        augment: bool = True,
        seed: int = 0,
    ):
        super().__init__(image_size, frames, objects, reverse, augment, seed)
        self.folder = Path(folder)
        self.left_out: dict[str, str] = {}
        usable = []
        for position, (key, annotated, gaps, visible) in enumerate(
            zip(*(index[name] for name in ("key", "annotated", "gaps", "visible")), strict=True)
        ):
            if any(len(starts) for starts in self._starts(annotated, gaps, visible)):
                usable.append(position)
            elif annotated < frames:
                self.left_out[key] = f"{annotated} annotated frames, clips have {frames}"
            else:
                self.left_out[key] = f"no object is visible where a clip of {frames} annotated frames could begin"
        if not usable:
            first = next((f"; {key}: {reason}" for key, reason in self.left_out.items()), "")
            raise UserError(f"none of {len(index)} videos has a clip of {frames} annotated frames{first}")
        self.index = index.select(usable)
        kinds = zip(self.index["seekable"], self.index["video_file"], strict=True)
        self.unseekable = sum(not seekable and file.endswith(".mp4") for seekable, file in kinds)

    def __len__(self) -> int:
        return len(self.index)

    def _key(self, position: int) -> str:
        return self.index[position]["key"]

    def _clip(self, position: int, rng: np.random.Generator) -> Clip:
        row = self.index[position]
        forward, backward = self._starts(row["annotated"], row["gaps"], row["visible"])
        backwards = rng.random() < self.reverse
        # Some objects are only visible at one end of their video; the other direction still gives a clip.
        if not len(backward if backwards else forward):
            backwards = not backwards
        start = int(rng.choice(backward if backwards else forward))
        annotated = list(range(start, start + self.frames))[:: -1 if backwards else 1]
        # Masks before pixels: whether there is an object is known without decoding the video.
        annotations = read_sav(row, self.folder)
        masks_TNHW = self._draw_objects(annotations, row, annotated, rng)
        size = masks_TNHW.shape[2], masks_TNHW.shape[3]
        file = self.folder / row["video_file"]
        frames_T3HW = read_annotated_frames(file, annotated, size, row["seekable"], row["video_bytes"])
        numbers = [FRAME_STRIDE * frame for frame in annotated]
        return self._finish(frames_T3HW, masks_TNHW, [0] * masks_TNHW.shape[1], numbers, row["key"], rng)

    def _draw_objects(
        self, annotations: SavAnnotations, row: dict, annotated: list[int], rng: np.random.Generator
    ) -> Tensor:
        """Draw objects that the first frame shows; only theirs are decoded. Returns bool (T, objects drawn, H, W)."""
        first = annotated[0]
        visible = [position for position, runs in enumerate(row["visible"]) if _within(first, runs)]
        drawn = []
        for position in rng.permutation(visible).tolist():
            if self._resized(torch.from_numpy(annotations.mask(first, position))[None]).any():
                drawn.append(position)
            if len(drawn) == self.objects:
                break
        if not drawn:
            raise NoClip(row["key"], "too_small", f"at {self.image_size} px, on annotated frame {first}")
        return torch.from_numpy(
            np.stack([[annotations.mask(frame, position) for position in drawn] for frame in annotated])
        )

    def _starts(self, annotated: int, gaps: list[int], visible: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest annotated frames of all forward and of all backward clips of a row."""
        shown_A = np.zeros(annotated, bool)
        for runs in visible:
            for start, stop in zip(runs[::2], runs[1::2], strict=True):
                shown_A[start:stop] = True
        missing_A = np.zeros(annotated + 1, int)
        missing_A[np.array(gaps, int) + 1] = 1
        # Differences of running counts answer for all starts at once whether a frame in between lacks its masks.
        missing_A = missing_A.cumsum()  # before each frame
        count = max(annotated - self.frames + 1, 0)
        whole = missing_A[:count] == missing_A[self.frames : self.frames + count]
        last = self.frames - 1
        forward = np.flatnonzero(whole & shown_A[:count]) if self.reverse < 1 else np.empty(0, int)
        backward = np.flatnonzero(whole & shown_A[last : last + count]) if self.reverse > 0 else np.empty(0, int)
        return forward, backward


def _within(frame: int, runs: list[int]) -> bool:
    return any(start <= frame < stop for start, stop in zip(runs[::2], runs[1::2], strict=True))
