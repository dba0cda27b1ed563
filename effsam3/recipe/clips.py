# SPDX-License-Identifier: Apache-2.0
"""What recipes have in common whose student is a tracker that learns from clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from effsam3.recipe.common import Saving, Train
from effsam3.recipe.rules import PositiveInt

# Keys that decide the device memory, the cheapest to change first.
CLIP_KNOBS = (
    "train.micro_batch_size",
    "train.recompute",
    "hardware",
    "train.ema",
    "train.objects_at_once",
    "train.trunk_batch",
    "loss.side_px",
    "data.objects",
    "data.frames",
)


@dataclass(frozen=True, kw_only=True)
class ClipTrain(Train):
    """The loop; samples are clips, an epoch takes one of each video."""

    trunk_batch: PositiveInt = 8  # frames per forward of the trunk
    objects_at_once: PositiveInt | None = None  # objects tracked together (with `recompute`); null: all
    recompute: bool = False  # recompute activations in backward: less device memory, about a third slower


class ClipSize(Protocol):
    """What decides how large a clip is."""

    @property
    def frames(self) -> int: ...

    @property
    def objects(self) -> int: ...


def clip_savings(train: ClipTrain, data: ClipSize) -> dict[str, Saving]:
    """Return values of the knobs by which a micro-batch of clips takes less memory than now."""
    found = {}
    if not train.recompute:
        found["train.recompute"] = Saving(True)
    elif train.objects_at_once != 1 and train.micro_batch_size * data.objects > 1:
        found["train.objects_at_once"] = Saving(1)
    if train.trunk_batch > 1:
        found["train.trunk_batch"] = Saving(1)
    if data.objects > 1:
        found["data.objects"] = Saving(data.objects - 1, proportional=True)
    if data.frames > 3:
        found["data.frames"] = Saving(data.frames // 2, proportional=True)
    return found
