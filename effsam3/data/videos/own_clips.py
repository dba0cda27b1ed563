# SPDX-License-Identifier: Apache-2.0
"""Training clips of people's own videos, in any format that `open_vos` reads.

A clip is T annotated frames in a row, or every few of them; an object may come later in it, leave, or be hidden for a
while. Which frames, direction, objects and augmentation is a pure function of the seed and the clip's number.

Letters: T frames, N object slots, H W rows and columns of the video.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from effsam3.data.videos.clips import Clip, Clips, NoClip
from effsam3.data.videos.mask_cache import MaskCache, PackedFrame, PackedMask
from effsam3.data.videos.vos_video import VosVideo
from effsam3.errors import UserError

STARTS = 8  # drawn before a frame that shows an object is looked for one by one
TRIED = 8  # videos, before none of them is said to be readable
CACHE_BYTES = 256 * 2**20  # of packed masks in every data worker: 1,000 masks of 1080p


class OwnClips(Clips):
    """Clips of videos with masks.

    Args:
        videos: that clips are drawn from.
        frames: T. A video with fewer annotated frames gives a clip whose last frame is repeated, `inside` False.
        objects: N, the most objects of a clip, drawn from those visible anywhere in it. Objects that are not annotated
            on every frame of a clip are not drawn.
        stride: how many annotated frames one frame of a clip is after the other.
        cache_bytes: the most that decoded masks may hold, in every data worker.
        image_size, reverse, augment, seed: as for `Clips`.

    Raises:
        UserError: there is no video.
    """

    def __init__(
        self,
        videos: Sequence[VosVideo],
        image_size: int,
        frames: int = 8,
        objects: int = 3,
        reverse: float = 0.0,
        augment: bool = True,
        seed: int = 0,
        stride: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ):
        super().__init__(image_size, frames, objects, reverse, augment, seed)
        if not videos:
            raise UserError("there is no video to draw clips from")
        self.videos, self.stride, self.cache = list(videos), stride, MaskCache(cache_bytes)

    def __len__(self) -> int:
        return len(self.videos)

    def refuse_unreadable(self, what: str, key: str, path: str) -> None:
        """Refuse videos, called `what`, of which none of the first few gives a clip; one that does is enough.

        Args:
            key: of the recipe, that names `path`, where they are from.

        Raises:
            UserError: none of them can be read.
        """
        tried = min(len(self), TRIED)
        unreadable: list[tuple[str, str]] = []
        for position in range(tried):
            batch = self.__getitems__([position])
            if batch["keys"] != [""]:
                return
            unreadable += batch["unreadable"]
        name, reason = unreadable[0]
        first = "" if tried == len(self) else "first "
        raise UserError(
            f"{key}: none of the {first}{tried} {what} videos can be read (first: {name}: {reason}); run "
            f"effsam3 data check {path}"
        )

    def _key(self, position: int) -> str:
        return self.videos[position].name

    def _clip(self, position: int, rng: np.random.Generator) -> Clip:
        video = self.videos[position]
        # Masks before pixels: whether there is an object is known without decoding the video.
        indexes, shown, drawn = self._draw(position, rng)
        masks_TNHW = torch.zeros(len(indexes), len(drawn), *video.size, dtype=torch.bool)
        for time, frame in enumerate(shown):
            for place, name in enumerate(drawn):
                if name in frame.masks:
                    masks_TNHW[time, place] = torch.from_numpy(frame.masks[name].mask())
        frames_T3HW = video.read(indexes)
        video.close()  # thousands of open video files would be too many
        # The last frame again and again, so that all clips of a batch have one length.
        padded = [min(time, len(indexes) - 1) for time in range(self.frames)]
        numbers = [indexes[time] for time in padded]
        return self._finish(
            frames_T3HW[padded], masks_TNHW[padded], list(drawn.values()), numbers, video.name, rng, len(indexes)
        )

    def _draw(self, position: int, rng: np.random.Generator) -> tuple[list[int], list[PackedFrame], dict[int, int]]:
        """Return the frames of a clip, what they show, and {object: the first of them that shows it} of N objects."""
        video = self.videos[position]
        count = len(video.annotated)
        backwards = rng.random() < self.reverse
        last = max(count - 1 - (self.frames - 1) * self.stride, 0)  # where the last clip starts
        for attempt in range(STARTS + 1):
            if attempt < STARTS:
                start = int(rng.integers(last + 1))
            else:  # objects are rare: a clip around some frame that shows one
                place = self._frame_with_objects(position, int(rng.integers(max(count, 1))))
                start = min(max(place - self.stride * int(rng.integers(self.frames)), 0), last)
            places = range(start, count, self.stride)[: self.frames]
            indexes = [video.annotated[place] for place in (reversed(places) if backwards else places)]
            shown = [self.cache.read(position, video, index) for index in indexes]
            drawn = self._draw_objects(shown, rng)
            if drawn:
                return indexes, shown, drawn
        raise NoClip(video.name, "no_object", f"no object is visible at {self.image_size} px in {STARTS} clips of it")

    def _frame_with_objects(self, position: int, start: int) -> int:
        """Return the first place from `start` on, all around, whose frame shows an object."""
        video = self.videos[position]
        count = len(video.annotated)
        for place in (*range(start, count), *range(start)):
            frame = self.cache.read(position, video, video.annotated[place])
            if any(self._visible(mask) for mask in frame.masks.values()):
                return place
        raise NoClip(video.name, "no_object", f"no object is visible at {self.image_size} px")

    def _draw_objects(self, shown: list[PackedFrame], rng: np.random.Generator) -> dict[int, int]:
        """Draw at most N objects that some frame of a clip shows; return the first such frame of each."""
        seen = {name for frame in shown for name in frame.masks}
        # On a frame where an object is not annotated, nobody knows whether it is there.
        known = sorted(seen.difference(*(frame.unknown for frame in shown)))
        drawn: dict[int, int] = {}
        for name in rng.permutation(np.array(known, int)).tolist():
            times = (time for time, frame in enumerate(shown) if name in frame.masks)
            first = next((time for time in times if self._visible(shown[time].masks[name])), None)
            if first is not None:
                drawn[name] = first
            if len(drawn) == self.objects:
                break
        return drawn

    def _visible(self, mask: PackedMask) -> bool:
        """Say whether anything of a mask is left at the clip's size."""
        return bool(self._resized(torch.from_numpy(mask.mask())[None]).any())
