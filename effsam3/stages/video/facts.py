# SPDX-License-Identifier: Apache-2.0
"""Recipes of one's own videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from effsam3.recipe.clips import CLIP_KNOBS, ClipTrain, clip_savings
from effsam3.recipe.common import AdaptingRecipe, Data, Merge, Optim, Sam3, Saving
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
    share,
)

TERMS = ("focal", "dice", "bce", "soft_iou", "temporal", "iou", "presence")  # of the loss
PromptKind = Literal["mask", "point", "box", "mixed"]


def inner_share(value: float) -> str:
    return "" if 0 < value < 1 else f"must be above 0 and below 1, got {value}"


@dataclass(frozen=True, kw_only=True)
class VideoData(Data):
    """The videos, which of them are held out, and how clips are drawn from them."""

    source: Literal["videos", "synthetic"] = "videos"  # synthetic: drawn shapes, never used unless asked for here
    # A JSON (COCO-video, YouTube-VIS), or a folder of frames and masks; `effsam3 data check` recognises it. The source
    # synthetic draws its videos here
    path: str
    split: str | None = None  # a list of `path`, such as train: <split>.txt, or DAVIS' ImageSets/2017; null: all
    val_path: str | None = None  # held-out videos: those of another place ...
    val_split: str | None = None  # ... or list, of `val_path` or of `path` ...
    # ... or else this share of `path`, by their names; of a single video, its last frames
    held_out: Annotated[float, inner_share] = 0.1
    masks: Literal["given", "synthetic"] = "given"  # synthetic: shapes drawn over frames that nobody has annotated
    frames: PositiveInt = 8  # annotated frames of a clip; where a video has fewer, the last one fills up, unscored
    stride: PositiveInt = 1  # every how many annotated frames a clip takes one
    objects: PositiveInt = 3  # objects of a clip, at most, of those that it shows; they cost as much as frames do
    reverse: Annotated[float, share] = 0.5  # share of the clips that run backwards
    augment: bool = True  # flip, small affine and colour changes, the same over a clip
    mask_cache_mib: PositiveInt = 256  # decoded masks that each data worker keeps, at most
    synthetic_videos: NonNegativeInt = 0  # how many to draw, both splits together; source synthetic only
    synthetic_frames: PositiveInt = 48  # frames of a drawn video, at 24 per second, of which every fourth has masks
    synthetic_side_px: PositiveInt = 128  # side of a drawn video
    look: Literal["textures", "outlines"] = "textures"  # of drawn videos; outlines: another domain
    limit: PositiveInt | None = None  # use only the first N videos of each split; null: all
    workers: NonNegativeInt = 8  # data loader processes per rank; 0: load in the main process
    max_unreadable: NonNegativeInt = 100  # stop after more unreadable videos than this in one run

    def check(self) -> Iterator[str]:
        yield from self.made_up("synthetic_videos")
        if self.source == "synthetic" and (self.val_path or self.val_split or self.split):
            yield "source: synthetic draws its own held-out videos; leave split, val_path and val_split null"
        if self.masks == "synthetic" and (self.val_split or self.split):
            yield "masks: synthetic ones are drawn over all videos of a path; leave split and val_split null"
        if self.source != "synthetic" and self.look != "textures":
            yield f"look: {self.look} is one of drawn videos; set data.source=synthetic, or leave it"


@dataclass(frozen=True, kw_only=True)
class VideoModel(Section):
    """What of the tracker learns."""

    # Names of its submodules and parameters, such as memory_attention, mask_decoder.transformer or linear1: where
    # nothing is called so from the tracker on, all that ends in it. All else is frozen
    trainable: Annotated[tuple[str, ...], at_least_one, each_once] = ("memory_attention", "memory_encoder")


@dataclass(frozen=True, kw_only=True)
class VideoPrompts(Section):
    """How objects are prompted."""

    mask: Annotated[float, share] = 0.5  # share of the prompts that are the mask
    point: Annotated[float, share] = 0.25  # ... points inside, see `points`
    box: Annotated[float, share] = 0.25  # ... a box whose corners are a little off
    mixed: Annotated[float, share] = 0.0  # ... box and points
    # Frames of a clip on which the objects that they show are prompted, from 0. An object that none of them shows is
    # prompted where it first appears
    frames: Annotated[tuple[NonNegativeInt, ...], at_least_one] = (0,)
    points: PositiveInt = 1  # inside the object, none twice; fewer where it has fewer pixels
    centre: bool = False  # the first of them is the centre of the mask, where that is inside
    negatives: NonNegativeInt = 0  # points outside the object, in addition
    jitter: Annotated[float, share] = 0.1  # a box's corner moves by at most this share of its side ...
    jitter_px: NonNegativeFloat = 20.0  # ... and this many pixels

    def check(self) -> Iterator[str]:
        total = sum(self.shares().values())
        if abs(total - 1) > 1e-6:
            yield f"mask: mask, point, box and mixed are shares and add up to {total:g}, not 1"
        if len(set(self.frames)) < len(self.frames):
            yield f"frames: a frame is listed twice in {list(self.frames)}"

    def shares(self) -> dict[str, float]:
        """Return the share of each kind of prompt."""
        return {"mask": self.mask, "point": self.point, "box": self.box, "mixed": self.mixed}


@dataclass(frozen=True, kw_only=True)
class VideoLoss(Section):
    """Weights of the terms of the loss; see effsam3/losses/masks.py for the formulas. All are logged."""

    focal: NonNegativeFloat = 20.0  # focal loss of the masks, SAM 2's published weight
    dice: NonNegativeFloat = 1.0  # dice loss of the masks
    bce: NonNegativeFloat = 0.0  # binary cross entropy of the masks
    soft_iou: NonNegativeFloat = 0.0  # 1 - intersection over union, of probabilities
    temporal: NonNegativeFloat = 0.0  # what changes from frame to frame, against what should
    temporal_of: Literal["probabilities", "logits"] = "probabilities"  # logits have no upper limit
    iou: NonNegativeFloat = 1.0  # error of the predicted IoU
    iou_error: Literal["absolute", "squared"] = "absolute"  # SAM 2's; squared, SAM's, lets an untrained head begin
    presence: NonNegativeFloat = 1.0  # whether the object is in the frame
    smooth: PositiveFloat = 1.0  # added to both sides of the fraction in `dice` and `soft_iou`
    side_px: PositiveInt | None = None  # masks are compared at this size; null: the model's image size

    def check(self) -> Iterator[str]:
        if not (self.focal or self.dice or self.bce or self.soft_iou):
            yield "focal: focal, dice, bce and soft_iou are all 0; no mask would be learned"


@dataclass(frozen=True, kw_only=True)
class VideoOptim(Optim):
    """AdamW; the vision encoder, where it learns, moves more slowly."""

    vision_scale: PositiveFloat = 1.0  # learning rate of `vision_encoder`, as a multiple of `lr`; SAM 2: 0.6


@dataclass(frozen=True, kw_only=True)
class VideoEvaluate(Section):
    """What the merged tracker is measured on, next to the one that it started from."""

    videos: str | None = None  # as `data.path`; null: data's held-out videos
    split: str | None = None  # a list of `videos`, such as val; null: all
    evaluator: Literal["sav", "davis"] = "sav"  # whose definition of J and F; they differ
    prompt: PromptKind = "mask"  # what shows each object, on the first frame that has it; points as in `prompts`
    max_videos: PositiveInt = 50  # videos, at most
    appearing_later: bool = True  # also prompt objects that first appear later, on that frame
    predictions: bool = False  # write all masks to eval/predictions, as the official evaluators read them
    pictures: NonNegativeInt = 4  # videos to draw

    def check(self) -> Iterator[str]:
        if self.split is not None and self.videos is None:
            yield f"split: {self.split!r} is a list in evaluate.videos, which is null; give that folder, or no split"
        if self.evaluator == "davis" and self.appearing_later:
            yield "appearing_later: DAVIS only scores the objects of the first frame; use evaluator: sav, or false"


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(AdaptingRecipe):
    """Own videos: chosen modules of SAM 3's tracker learn to track in them; the merged model keeps its kind."""

    starter = "adapt/video_coco"
    why_no_more = "its frozen trunk runs next to the student, because clips differ in every step; continue with train"
    replaces = "tracker's weights, in place"
    metric = "val/j"
    draws = True
    metrics = {"val/j": "higher", "val/loss": "lower", **{f"val/loss_{name}": "lower" for name in TERMS}}
    card_keys = AdaptingRecipe.card_keys | {"trained modules": "model.trainable"}
    data_names = {"videos": "own videos"}
    knobs = CLIP_KNOBS
    samples_are_separate = True  # clips are tracked side by side and share next to nothing

    stage: Literal["video"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    sam3: Sam3 = Sam3()  # whose tracker learns: SAM 3, or a merged model or release, whatever its memory and trunk
    data: VideoData
    model: VideoModel = VideoModel()
    prompts: VideoPrompts = VideoPrompts()
    loss: VideoLoss = VideoLoss()
    optim: VideoOptim
    train: ClipTrain
    evaluate: VideoEvaluate = VideoEvaluate()
    merge: Merge = Merge()
    push: Push = Push()

    @property
    def student(self) -> str:  # type: ignore[override]  # a key of other stages, here it follows from others
        """What status calls it."""
        return f"tracker ({', '.join(self.model.trainable)})"

    @property
    def student_init(self) -> str:  # type: ignore[override]  # likewise
        """What it starts from."""
        return "the chassis' tracker"

    def check(self) -> Iterator[str]:
        yield from super().check()
        if (last := max(self.prompts.frames)) >= self.data.frames:
            yield f"prompts.frames: frame {last} of clips of {self.data.frames} frames, the first of which is 0"
        if self.data.frames == 1 and self.prompts.mask == 1:
            yield "prompts.mask: clips of one frame whose mask is given leave nothing to predict; ask for points"

    @classmethod
    def student_of(cls, values: Mapping[str, Any]) -> str:
        return f"tracker ({', '.join(values.get('model', {}).get('trainable', ()))})"

    def derived(self) -> dict[str, Callable[[], str]]:
        return {"videos": self._videos_line, "length": self._length_line, "learns": self.student_line}

    def _videos_line(self) -> str:
        data = self.data
        where = f"{data.synthetic_videos} drawn ones in" if data.source == "synthetic" else "those of"
        clip = f"clips of {data.frames} frames, at most {data.objects} objects"
        return f"{where} {data.path}; {clip}{', with synthetic masks' if data.masks == 'synthetic' else ''}"

    def _length_line(self) -> str:
        return f"{self.train.steps:,} steps of {self.train.global_batch_size} clips" if self.train.steps else ""

    def student_line(self) -> str:
        return ", ".join(self.model.trainable)

    def savings(self) -> dict[str, Saving]:
        return clip_savings(self.train, self.data)


RECIPE = VideoRecipe
