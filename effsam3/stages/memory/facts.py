# SPDX-License-Identifier: Apache-2.0
"""Recipes of stage 2, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from effsam3.models.chassis.sizes import first_of, sam3_of
from effsam3.models.flops import memory_attention_gflop
from effsam3.models.memory.token_counts import CHANNELS, count_tokens
from effsam3.recipe.clips import CLIP_KNOBS, ClipTrain, clip_savings
from effsam3.recipe.common import Data, Merge, Optim, Sam3, Saving, StageRecipe
from effsam3.recipe.derived import index_counts
from effsam3.recipe.push import Push
from effsam3.recipe.rules import (
    FileName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    at_least_one,
    each_once,
    parquet,
    share,
)

Mode = Literal["hybrid", "latents", "pooled", "dense"]
TrackerPart = Literal["memory", "pointers", "prompts", "decoder", "neck", "trunk"]


@dataclass(frozen=True, kw_only=True)
class MemoryData(Data):
    """The videos, and how clips are drawn from them."""

    source: Literal["sav", "synthetic"]  # synthetic: drawn shapes, never used unless asked for here
    index: Annotated[str, parquet]  # made by `effsam3 index sav`; `synthetic` makes its own
    frames: Annotated[int, lambda value: "" if value > 1 else f"must be 2 or more, got {value}"] = 8  # of a clip
    objects: PositiveInt = 3  # objects of a clip, at most; they cost as much as frames do
    reverse: Annotated[float, share] = 0.5  # share of the clips that run backwards
    augment: bool = True  # flip, small affine and colour changes, the same over a clip
    synthetic_videos: NonNegativeInt = 0  # how many to draw, both splits together; source synthetic only
    synthetic_frames: PositiveInt = 48  # frames of a drawn video, at 24 per second
    synthetic_side_px: PositiveInt = 128  # side of a drawn video
    limit: PositiveInt | None = None  # use only the first N videos of each split; null: all
    workers: NonNegativeInt = 8  # data loader processes per rank; 0: load in the main process
    max_unreadable: NonNegativeInt = 100  # stop after more unreadable videos than this in one run

    def check(self) -> Iterator[str]:
        yield from self.made_up("synthetic_videos")


@dataclass(frozen=True, kw_only=True)
class MemoryModel(Section):
    """What the memory is made of. One set of weights serves every mode."""

    mode: Mode = "hybrid"  # hybrid: pooled maps of the newest and the prompted frames, latents of the others
    global_latents: PositiveInt = 64  # latents of a frame that read all of it
    # latents of a frame that read a window each; a square number whose root divides the grid
    window_latents: PositiveInt = 64
    depth: PositiveInt = 2  # layers of the resampler
    pool: PositiveInt = 2  # pooled maps keep the mean of N by N cells
    hot_frames: NonNegativeInt = 1  # hybrid: most recent frames that keep their map
    attention_layers: PositiveInt | None = None  # layers of the memory attention; null: as many as SAM 3's (4)
    fuser_layers: PositiveInt | None = None  # layers of the memory encoder; null: as many as SAM 3's (2)
    trains: Annotated[tuple[TrackerPart, ...], at_least_one, each_once] = ("memory",)  # all else is frozen


@dataclass(frozen=True, kw_only=True)
class Prompting(Section):
    """How objects are prompted in a clip's first frame, and corrected later."""

    mask: Annotated[float, share] = 0.5  # share of the objects that are given as masks
    point: Annotated[float, share] = 0.25  # ... as one click inside
    box: Annotated[float, share] = 0.25  # ... as a box whose corners are a little off
    corrected_frames: NonNegativeInt = 0  # frames of a clip, the first among them, where clicks correct the prediction
    clicks: PositiveInt = 7  # on each corrected frame

    def check(self) -> Iterator[str]:
        if abs(self.mask + self.point + self.box - 1) > 1e-6:
            yield f"mask: mask, point and box are shares and add up to {self.mask + self.point + self.box:g}, not 1"


@dataclass(frozen=True, kw_only=True)
class MemoryLoss(Section):
    """Weights of the terms of the loss; see effsam3/losses/masks.py for the formulas."""

    focal: NonNegativeFloat = 20.0  # focal loss of the masks, SAM 2's published weight
    dice: NonNegativeFloat = 1.0  # dice loss of the masks
    iou: NonNegativeFloat = 1.0  # error of the predicted IoU
    iou_error: Literal["absolute", "squared"] = "absolute"  # SAM 2's; squared, SAM's, lets an untrained head begin
    presence: NonNegativeFloat = 1.0  # whether the object is in the frame
    memory: NonNegativeFloat = 1.0  # squared error of the features after memory against the dense teacher's; 0: none
    side_px: PositiveInt | None = None  # masks are compared at this size; null: the model's image size

    def check(self) -> Iterator[str]:
        if self.focal == self.dice == self.memory == 0:
            yield "focal: focal, dice and memory are all 0; no mask would be learned"


@dataclass(frozen=True, kw_only=True)
class MemoryOptim(Optim):
    """AdamW; pretrained parts move more slowly than the resampler, which starts from nothing."""

    pretrained_scale: PositiveFloat = 1.0  # learning rate of all but the resampler, as a multiple of `lr`


VideoBenchmark = Literal["sav", "davis"]


@dataclass(frozen=True, kw_only=True)
class MemoryEvaluate(Section):
    """What the merged tracker is measured on: masks given in the first frame, tracked through the rest."""

    videos: str | None = None  # a folder as SA-V, DAVIS, MOSE or YouTube-VOS has it; null: data's held-out videos
    split: str | None = None  # a list of `videos`, such as val: SA-V's <split>.txt, DAVIS' ImageSets/2017; null: all
    evaluator: VideoBenchmark = "sav"  # whose definition of J and F; they differ
    modes: tuple[Mode, ...] = ()  # memory modes to measure in addition to the recipe's own
    untrained: bool = False  # also measure the memory as it was before training
    max_videos: PositiveInt = 50  # videos, at most
    appearing_later: bool = False  # also prompt objects that first appear later, on that frame
    predictions: bool = False  # write all masks to eval/predictions, as the official evaluators read them
    pictures: NonNegativeInt = 4  # videos to draw

    def check(self) -> Iterator[str]:
        if self.split is not None and self.videos is None:
            yield f"split: {self.split!r} is a list in evaluate.videos, which is null; give that folder, or no split"
        if self.evaluator == "davis" and self.appearing_later:
            yield "appearing_later: DAVIS only scores the objects of the first frame; use evaluator: sav, or false"


@dataclass(frozen=True, kw_only=True)
class MemoryRecipe(StageRecipe):
    """Stage 2, memory: the tracker learns to remember in far fewer tokens; all else stays as it is."""

    starter = "stage2/memory"
    why_no_more = "its frozen trunk runs next to the student, because clips differ in every step; continue with train"
    replaces = "video memory"
    metric = "val/j"
    draws = True
    metrics = {"val/j": "higher"}
    card_keys = StageRecipe.card_keys | {"parts of the tracker": "memory.trains"}
    data_names = {"sav": "SA-V"}
    knobs = CLIP_KNOBS
    samples_are_separate = True  # clips are tracked side by side and share next to nothing

    stage: Literal["memory"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    sam3: Sam3 = Sam3()  # the frozen chassis: SAM 3, or the merged model of a stage 1 student or release
    data: MemoryData
    memory: MemoryModel = MemoryModel()
    prompts: Prompting = Prompting()
    loss: MemoryLoss = MemoryLoss()
    optim: MemoryOptim
    train: ClipTrain
    evaluate: MemoryEvaluate = MemoryEvaluate()
    merge: Merge = Merge()
    push: Push = Push()

    @property
    def student(self) -> str:  # type: ignore[override]  # a key of other stages, here it follows from others
        """What the merged model calls the part."""
        return f"{self.memory.mode} memory"

    @property
    def student_init(self) -> str:  # type: ignore[override]  # likewise
        """What it starts from."""
        return "the chassis' memory"

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.prompts.corrected_frames > self.data.frames:
            yield f"prompts.corrected_frames: {self.prompts.corrected_frames} of clips of {self.data.frames} frames"
        if "memory" not in self.memory.trains:
            yield f"memory.trains: {', '.join(self.memory.trains)} without memory, which the merged slot needs; add it"
        if self.memory.mode == "dense" and self.memory.trains == ("memory",) and self.memory.attention_layers is None:
            yield "memory.mode: dense with every layer is SAM 3's own memory; choose hybrid, latents or pooled"

    @classmethod
    def student_of(cls, values: Mapping[str, Any]) -> str:
        return f"{values.get('memory', {}).get('mode')} memory"

    def derived(self) -> dict[str, Callable[[], str]]:
        return {"videos": self._videos_line, "length": self._length_line, "memory": self.student_line}

    def _videos_line(self) -> str:
        data = self.data
        clip = f"clips of {data.frames} frames, at most {data.objects} objects"
        remedies = {
            "synthetic": f"{data.synthetic_videos} videos will be drawn by train; {clip}",
            "sav": f"make it with: effsam3 index sav FOLDER --out {data.index}",
        }
        counts = index_counts(data.index, "videos", remedies[data.source])
        return f"{counts['train']:,} to learn from, {counts['val']:,} held out; {clip}"

    def _length_line(self) -> str:
        return f"{self.train.steps:,} steps of {self.train.global_batch_size} clips" if self.train.steps else ""

    def student_line(self) -> str:
        # A student may be in the trunk's place; the tracker is that of the SAM 3 that it was put into.
        asked, sam3 = self.memory, sam3_of(first_of(self.sam3.checkpoint))
        count = partial(
            count_tokens,
            grid=sam3.sizes.grid,
            pool=asked.pool,
            latents=asked.global_latents + asked.window_latents,
            hot_frames=asked.hot_frames,
            pointer_tokens=sam3.sizes.fpn_hidden_size // CHANNELS,
            frames=sam3.memory_frames,
            pointers=sam3.memory_pointers,
        )
        read = f"{count(asked.mode):,} tokens of {sam3.memory_frames} frames and {sam3.memory_pointers} pointers"
        text = f"{asked.mode}: {read}, {count('dense'):,} when dense"
        if not sam3.gflop:
            return text
        gflop = memory_attention_gflop(count(asked.mode), sam3, asked.attention_layers)
        return f"{text}; {gflop:,.1f} GFLOP per object and frame instead of {sam3.gflop['memory_attention']:,.1f}"

    def savings(self) -> dict[str, Saving]:
        return clip_savings(self.train, self.data)


RECIPE = MemoryRecipe
