# SPDX-License-Identifier: Apache-2.0
"""Videos of discs in memory, and a tracker that finds something in them."""

from dataclasses import dataclass, field

import numpy as np
from transformers import Sam3TrackerVideoModel

from effsam3.errors import UserError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.inference.prompted import load_tracker

SIZE = (90, 120)
FRAMES = 5


@dataclass
class Video:
    """A `VosVideo` in memory: discs that move over noise, object 2 only from frame `later` on."""

    name: str = "discs"
    later: int = 0
    frames: int = FRAMES
    fps: float | None = None
    size: tuple = SIZE
    objects: tuple = (1, 2)
    annotated: list = field(default_factory=lambda: [0, 1, 2, 4])
    broken: int | None = None
    frame_names: tuple = tuple(f"{index:05d}" for index in range(FRAMES))

    def read(self, indexes):
        noise = np.random.default_rng(0).integers(0, 255, (3, *SIZE), dtype=np.uint8)
        frames = []
        for index in indexes:
            if index == self.broken:
                raise UserError(f"frame {index} of {self.name} is not there")
            frame = noise.copy()
            for number in self.objects:
                frame[:, self.disc(index, number)] = 60 * number
            frames.append(frame)
        return np.stack(frames)

    def disc(self, index, number):
        y, x = np.mgrid[: SIZE[0], : SIZE[1]]
        return (y - 30 * number) ** 2 + (x - 30 - 8 * index) ** 2 < 200

    def masks(self, index):
        assert index in self.annotated
        return {
            n: self.disc(index, n) if n == 1 or index >= self.later else np.zeros(SIZE, bool) for n in self.objects
        }


def sure_tracker() -> Sam3TrackerVideoModel:
    """The tiny tracker, made to believe that objects are there, so that its masks are not empty."""
    model = load_tracker(chassis_folder("tiny"))
    model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(10.0)
    return model
