# SPDX-License-Identifier: Apache-2.0
"""Stage 2, memory: a tracker learns to remember in few tokens, next to a frozen one that remembers everything.

Letters: T frames of a clip, O objects of all clips, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from effsam3.data.synthetic.videos import make_synthetic_sav
from effsam3.data.videos.clips import VideoClips
from effsam3.data.videos.index import build_index
from effsam3.data.videos.sav import load_index
from effsam3.errors import UserError
from effsam3.files import stamp
from effsam3.hardware.accelerator import on_main
from effsam3.losses.masks import object_weights
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.tensors import fingerprint, load_part, read_config, read_tensors
from effsam3.models.memory.attention import memory_tokens
from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.prompts import draw_kind, draw_prompt
from effsam3.models.memory.slot import MEMORY, tracker_config
from effsam3.models.memory.student import Scoring, TrackerStudent
from effsam3.models.memory.tracker import EfficientTracker, efficient_tracker_tensors
from effsam3.models.memory.training import PARTS, Prompts, read_tracker_tensors
from effsam3.models.vision.student import VisionTrunkConfig
from effsam3.stages.base import keep_whole
from effsam3.stages.memory.facts import MemoryData, MemoryRecipe
from effsam3.stages.protocol import Batch, Place, Stage
from effsam3.stages.tracking import ClipInputs, TrackerStage, refuse_zero3
from effsam3.training.report import Report, table

SYNTHETIC_HELD_OUT = 0.2  # of the drawn videos: they are few
LOSSES = ("focal", "dice", "iou", "presence", "memory")


def ready_index(recipe: MemoryRecipe, accelerator: Accelerator) -> Path:
    """Return the index's path; for `data.source: synthetic` draw videos and index them first, once.

    Raises:
        UserError: synthetic videos of another number or size are there already, or an index of real ones.
    """
    if recipe.data.source == "synthetic":
        on_main(accelerator, partial(_draw_videos, recipe.data))
    return Path(recipe.data.index)


def _draw_videos(data: MemoryData) -> None:
    index = Path(data.index)
    videos, frames, side_px = data.synthetic_videos, data.synthetic_frames, data.synthetic_side_px
    made = {"videos": videos, "frames": frames, "side_px": side_px}
    stamp(index.parent / "synthetic.json", made, "synthetic videos", "data.index", real=index)
    if not index.is_file():
        make_synthetic_sav(index.parent / "videos", videos, frames, side_px)
        build_index([index.parent / "videos"], index, SYNTHETIC_HELD_OUT, workers=1, progress=False)


def make_trackers(recipe: MemoryRecipe, own: PreTrainedConfig) -> tuple[EfficientTracker, EfficientTracker]:
    """Build the tracker that learns and the dense one that teaches, which sees the other's vision features.

    `own` is the config of the chassis' tracker.

    Raises:
        MemoryConfigError: the memory does not fit the tracker.
    """
    dense = replace(recipe.memory, mode="dense", attention_layers=None, fuser_layers=None)
    tracker = EfficientTracker(tracker_config(own, recipe.memory))
    teacher = EfficientTracker(tracker_config(own, dense), remove_vision_encoder=True)
    return tracker, teacher.eval().requires_grad_(False)


def load_trackers(recipe: MemoryRecipe, folder: Path) -> tuple[EfficientTracker, EfficientTracker]:
    """Build them with the weights of one chassis folder.

    Raises:
        UserError: the chassis' tracker has an efficient memory already, or a student's trunk and necks, of which the
            recipe trains a part.
    """
    own = read_config(folder).tracker_config
    if isinstance(own, EfficientTrackerConfig):
        raise UserError(
            f"sam3.checkpoint: {folder} has an efficient memory already ({own.memory_mode}); the teacher must be a "
            "SAM 3, or a stage 1 release, with SAM 3's own memory"
        )
    inside = {"neck", "trunk"}.intersection(recipe.memory.trains)
    if inside and isinstance(own.vision_config.backbone_config, VisionTrunkConfig):
        raise UserError(
            f"memory.trains: {', '.join(sorted(inside))}: in {folder} one student is trunk and both necks, of which "
            "`merge` could not replace a part; leave it out"
        )
    tensors = read_tracker_tensors(folder)
    # The teacher shares the student's vision features: a second frozen trunk would cost 1.8 GB.
    without_vision = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_encoder.")}
    tracker, teacher = make_trackers(recipe, own)
    for built, known in ((tracker, tensors), (teacher, without_vision)):
        load_part(built, efficient_tracker_tensors(known, built.config, seed=recipe.train.seed)).float()
    return tracker, teacher


def make_student(recipe: MemoryRecipe, tracker: EfficientTracker, teacher: EfficientTracker) -> TrackerStudent:
    """Take out of a tracker what the recipe trains."""
    train, loss = recipe.train, recipe.loss
    weights = {name: getattr(loss, name) for name in LOSSES}
    return TrackerStudent(
        tracker,
        [prefix.removesuffix(".") for part in recipe.memory.trains for prefix in PARTS[part]],
        teacher,
        Scoring(weights, loss.side_px or tracker.image_size, loss.iou_error == "squared"),
        train.trunk_batch,
        train.objects_at_once,
        train.recompute,
    )


def untrained(recipe: MemoryRecipe, own: PreTrainedConfig | None = None) -> TrackerStudent:
    """Build the recipe's student without the values of its tensors; `own` is the config of the chassis' tracker."""
    own = own or config_at_hand(recipe.sam3.checkpoint).tracker_config
    with torch.device("meta"):
        return make_student(recipe, *make_trackers(recipe, own))


NEEDS = ()  # nothing beyond what every training needs


class MemoryStage(TrackerStage):
    """A student tracker, the teacher's, clips and prompts."""

    recipe: MemoryRecipe
    train_data: VideoClips
    val_data: VideoClips

    def __init__(self, recipe: MemoryRecipe, place: Place, tracker: EfficientTracker, teacher: EfficientTracker):
        super().__init__(recipe, place, make_student(recipe, tracker, teacher))
        self.teacher = teacher
        self.lr_scales = {"": recipe.optim.pretrained_scale, "memory_resampler.": 1.0}
        self.config = tracker.config
        self.facts = {
            "image_size": tracker.image_size,
            "grid": tracker.config.grid,
            "trains": list(recipe.memory.trains),
        }

    @classmethod
    def from_recipe(cls, recipe: MemoryRecipe, report: Report, accelerator: Accelerator) -> MemoryStage:
        data, train = recipe.data, recipe.train
        if varying := {"decoder", "prompts"} & set(recipe.memory.trains):
            refuse_zero3(accelerator, f"{' and '.join(sorted(varying))} of the tracker", "memory.trains")
        if train.objects_at_once is not None:
            refuse_zero3(accelerator, "objects in turns", "train.objects_at_once")
        folder = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
        # Before anything is made: a memory that does not fit fails here.
        tracker, teacher = load_trackers(recipe, folder)
        index = ready_index(recipe, accelerator)
        rows = {split: load_index(index, split, data.limit) for split in ("train", "val")}
        if not len(rows["train"]) or not len(rows["val"]):
            raise UserError(
                f"data.index: {index} has {len(rows['train'])} training and {len(rows['val'])} held-out videos; both "
                "are needed (effsam3 index sav --val-fraction divides them)"
            )
        stage = cls(recipe, accelerator, tracker.to(accelerator.device), teacher.to(accelerator.device))
        keep_whole(stage.student, accelerator)
        shape = dict(image_size=tracker.image_size, frames=data.frames, objects=data.objects, seed=train.seed)
        stage.train_data = VideoClips(rows["train"], index.parent, **shape, reverse=data.reverse, augment=data.augment)
        held_out = rows["val"].select(range(min(train.eval_samples, len(rows["val"]))))
        stage.val_data = VideoClips(held_out, index.parent, **shape, reverse=0.0, augment=False)
        # What `merge` compares with the chassis: this run only fits the memory that it started from.
        memory = {name: tensor for name, tensor in read_tensors(folder).items() if name.startswith(MEMORY)}
        stage.facts["teacher"] = {
            "checkpoint": recipe.sam3.checkpoint,
            "revision": recipe.sam3.revision,
            "fingerprint": fingerprint(memory),
        }
        return stage

    @classmethod
    def from_shapes(cls, recipe: MemoryRecipe, place: Place) -> MemoryStage:
        return cls(recipe, place, *make_trackers(recipe, config_at_hand(recipe.sam3.checkpoint).tracker_config))

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.student.tracker, self.teacher]

    def describe(self) -> dict[str, str]:
        data, config = self.recipe.data, self.config
        dense = memory_tokens(self.teacher.config)
        left_out = len(self.train_data.left_out) + len(self.val_data.left_out)
        short = f", {left_out:,} left out (no clip of {data.frames} annotated frames)" if left_out else ""
        slow = self.train_data.unseekable + self.val_data.unseekable
        if slow:
            short += (
                f"; {slow:,} are decoded whole before a clip (the index does not know that seeks find their frames)"
            )
        return {
            "student": f"{config.memory_mode} memory, {', '.join(self.recipe.memory.trains)}  "
            f"{self.student_parameters / 1e6:.2f} M parameters learn, {self.frozen_parameters / 1e6:.2f} M are frozen",
            "memory": f"{memory_tokens(config):,} tokens for a frame to read, {dense:,} when dense",
            "teacher": f"{self.recipe.sam3.checkpoint}, dense memory",
            "data": f"{data.index}  {len(self.train_data):,} videos, {len(self.val_data):,} held out{short}; clips of "
            f"{data.frames} frames, at most {data.objects} objects, {self.facts['image_size']} px",
        }

    def inputs(self, batch: Batch, shares: dict[str, float], corrected: tuple[int, ...] = ()) -> ClipInputs:
        """Return what the student's forward takes; prompts are drawn by `shares` of their kinds."""
        objects = self.objects(batch)
        drawn, chances = [], []
        for mask_TSS, rng in zip(objects.masks_OTSS, objects.generators, strict=True):
            kind = "mask" if objects.none else draw_kind(shares, rng)
            drawn.append({0: (*draw_prompt(mask_TSS[0], kind, rng), kind == "mask")})
            chances.append(torch.from_numpy(rng.random((len(corrected), self.recipe.prompts.clicks))).float())
        clicks = dict(zip(corrected, torch.stack(chances, 1), strict=True))
        weight_O = object_weights(objects.clip_O, len(batch["valid"])) * (0.0 if objects.none else 1.0)
        # A frame of an object counts as much as another: the loss is a sum over frames.
        weight_OT = weight_O[:, None].expand(objects.masks_OTSS.shape[:2])
        return self.inputs_of(batch, objects, weight_OT, replace(Prompts.of(drawn), corrections=clicks))

    def corrected_frames(self, batch: Batch) -> tuple[int, ...]:
        """Which frames of a step's clips are corrected by clicks: the first, and others at random.

        All clips of a step share them, because they are tracked together.
        """
        asked, data = self.recipe.prompts, self.recipe.data
        if not asked.corrected_frames:
            return ()
        # By the step, because all ranks must correct the same frames: they run the same modules in the same order.
        step = batch["numbers"][0] // self.recipe.train.global_batch_size
        rng = np.random.default_rng([self.recipe.train.seed, step])
        later = rng.choice(np.arange(1, data.frames), asked.corrected_frames - 1, replace=False)
        return (0, *later.tolist())

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        asked = self.recipe.prompts
        shares = {"mask": asked.mask, "point": asked.point, "box": asked.box}
        inputs = self.inputs(batch, shares, self.corrected_frames(batch))
        with self.place.autocast():
            return student(*inputs)

    def held_out_inputs(self, batch: Batch) -> ClipInputs:
        return self.inputs(batch, {"mask": 1.0, "point": 0.0, "box": 0.0})

    @torch.no_grad()
    def validate(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums of a batch for `summarise`: J of objects given by their mask in the first frame."""
        inputs = self.held_out_inputs(batch)
        counts_O = inputs.weight_OT[:, 0] > 0
        with self.place.autocast():
            j_OT = student(*inputs)["j"][:, 1:].double()
        return {"j": j_OT[counts_O].sum(), "positions": counts_O.sum().double() * j_OT.shape[1]}

    def conclude(self, start: Mapping[str, float], best: Mapping[str, float]) -> str:
        rows = [
            ["memory at the start", f"{start['val/j']:.4f}"],
            [f"trained, step {best['step']}", f"{best['val/j']:.4f}"],
        ]
        return table(rows, ["held-out clips, masks given in the first frame", "J"])


STAGE: type[Stage] = MemoryStage  # what `train` builds
