# SPDX-License-Identifier: Apache-2.0
"""What stages whose student is a tracker have in common: clips, objects and prompts as it takes them.

Letters: B clips, T frames of a clip, N object slots of a clip, O objects of all clips, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from effsam3.benchmarks.pictures.drawing import compare
from effsam3.data.transforms import normalise
from effsam3.data.videos.clips import Clips
from effsam3.errors import UserError
from effsam3.models.image.teacher import parameter_count
from effsam3.models.memory.student import TrackerStudent
from effsam3.models.memory.training import Prompts
from effsam3.recipe.common import StageRecipe
from effsam3.stages.base import StageBase
from effsam3.stages.protocol import Batch, Place, TitledPicture


class ClipInputs(NamedTuple):
    """What the student's forward takes, on the device."""

    pixels_BT3SS: Tensor
    masks_OTSS: Tensor
    clip_O: Tensor  # the clip of each object
    weight_OT: Tensor  # of each object's frames in the loss; 0 for the empty slot of a batch without any
    prompts: Prompts


class Objects(NamedTuple):
    """The objects of a batch."""

    clip_O: Tensor  # the clip of each
    masks_OTSS: Tensor
    none: bool  # there is none: the only one stands for it, without a mask
    generators: list[np.random.Generator]  # of each object's prompts


class TrackerStage(StageBase):
    """A tracker that learns from clips."""

    files = "videos"
    recipe: Any
    student: TrackerStudent
    facts: dict[str, Any]  # `image_size` among them
    train_data: Clips
    val_data: Clips

    def __init__(self, recipe: StageRecipe, place: Place, student: TrackerStudent):
        super().__init__(recipe, place)
        self.student, self.max_unreadable = student, self.recipe.data.max_unreadable
        self.student_parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)
        self.frozen_parameters = parameter_count(student.tracker) - self.student_parameters

    def example(self, samples: int) -> Batch:
        """Return a micro-batch of `samples` clips with as many objects as allowed, each visible in every frame."""
        data, side = self.recipe.data, self.facts["image_size"]
        # Masks and prompts decide what is run.
        masks = torch.zeros(samples, data.frames, data.objects, side, side, dtype=torch.bool)
        masks[..., : side // 2, : side // 2] = True
        return {
            "pixels": torch.empty(samples, data.frames, 3, side, side, dtype=torch.uint8, device="meta"),
            "masks": masks,
            "valid": torch.ones(samples, data.objects, dtype=torch.bool),
            "inside": torch.ones(samples, data.frames, dtype=torch.bool),
            "numbers": list(range(samples)),
        }

    def train_batches(self, start: int, steps: int, micro_batch: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches of steps `start` to `steps` - 1; what is drawn at random depends on the
        clip's number in the run only."""
        return self.divide(start, steps, micro_batch, numbered=True)

    def samples(self, batch: Batch) -> list[str]:
        """Videos of a batch's clips, each with the number that the clip was drawn by."""
        return [f"{key}, clip {number}" for key, number in zip(batch["keys"], batch["numbers"], strict=True)]

    def held_out_inputs(self, batch: Batch) -> ClipInputs:
        """Return what the student's forward takes of a held-out batch."""
        raise NotImplementedError

    @torch.no_grad()
    def pictures(self, student: nn.Module, batch: Batch) -> list[list[TitledPicture]]:
        """Draw each clip of a held-out batch: the annotated objects, and next to them what is tracked."""
        inputs = self.held_out_inputs(batch)
        with self.place.autocast():
            found_OTSS = student(*inputs, drawn=True)["masks"].cpu().numpy()
        truth_OTSS, images_BTSS3 = inputs.masks_OTSS.cpu().numpy(), batch["pixels"].movedim(2, -1).numpy()
        clips = []
        for clip, key in enumerate(batch["keys"]):
            own = {number: place for number, place in enumerate((inputs.clip_O == clip).nonzero()[:, 0].tolist(), 1)}
            pictures = []
            for time in batch["inside"][clip].nonzero()[:, 0].tolist() if key else ():  # none of what fills a batch up
                truths, found = (
                    {number: masks_OTSS[place, time] for number, place in own.items()}
                    for masks_OTSS in (truth_OTSS, found_OTSS)
                )
                title = f"{key}, frame {int(batch['frames'][clip][time])}"
                pictures.append((title, compare(images_BTSS3[clip, time], truths, found)))
            clips += [pictures] if pictures else []
        return clips

    def objects(self, batch: Batch) -> Objects:
        """Return a batch's objects in one row.

        A batch without any (padding of the last one) keeps one empty slot: every rank takes part in every forward.
        """
        valid_BN = batch["valid"].clone()
        none = not valid_BN.any()
        # An object without a mask: it costs a forward, but no rank is missing in a collective.
        valid_BN[0, 0] |= none
        clip_O, slot_O = valid_BN.nonzero(as_tuple=True)
        # By the clip's number, so that prompts are the same on any number of ranks and after resuming.
        keys = ((batch["numbers"][clip], slot) for clip, slot in zip(clip_O.tolist(), slot_O.tolist(), strict=True))
        # The last number tells them from the generators of clips: numpy takes a missing one for 0, and the number that
        # decides whether a clip runs backwards would also decide the kind of its first object's prompt.
        generators = [np.random.default_rng([self.recipe.train.seed, *key, 1]) for key in keys]
        return Objects(clip_O, batch["masks"][clip_O, :, slot_O], none, generators)

    def inputs_of(self, batch: Batch, objects: Objects, weight_OT: Tensor, prompts: Prompts) -> ClipInputs:
        """Bring what the student's forward takes to the device."""
        pixels = normalise(batch["pixels"].to(self.device, non_blocking=True))
        masks_OTSS, clip_O = objects.masks_OTSS.to(self.device), objects.clip_O.to(self.device)
        return ClipInputs(pixels, masks_OTSS, clip_O, weight_OT.to(self.device), prompts.to(self.device))


def refuse_zero3(accelerator: Accelerator, what: str, key: str) -> None:
    """Refuse ZeRO-3 for modules that run as often as a rank's own prompts and objects need.

    DeepSpeed compares the order of a step's modules between ranks.

    Raises:
        UserError: the hardware is ZeRO-3.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise UserError(
            f"hardware: ZeRO-3 needs the same modules in the same order on every rank, and {what} ({key}) run as each "
            "rank's prompts and objects need them; choose zero2: what learns of a tracker is small"
        )
