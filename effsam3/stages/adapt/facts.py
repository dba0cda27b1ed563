# SPDX-License-Identifier: Apache-2.0
"""Recipes of the stage adapt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from effsam3.models.lora.parts import BY_POINT, BY_TEXT
from effsam3.recipe.common import AdaptingRecipe, Data, Merge, Optim, Sam3, Saving, Train
from effsam3.recipe.push import Push
from effsam3.recipe.rules import (
    FileName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    at_least_one,
    below_one,
    each_once,
    share,
)

AdaptedPart = Literal["trunk", "text", "detr", "detector_mask_decoder", "tracker_mask_decoder"]
SHOWN = ("box", "point", "mixed")  # kinds of prompts that show an object
KINDS = (*SHOWN, "text")
# Terms of the loss -> kinds of prompts that have them.
TERMS = {"bce": KINDS, "dice": KINDS, "iou": SHOWN} | dict.fromkeys(
    ("score", "box", "semantic", "presence"), ("text",)
)


@dataclass(frozen=True, kw_only=True)
class AdaptData(Data):
    """Images and masks of their objects."""

    source: Literal["own", "synthetic"]  # synthetic: drawn shapes, never used unless asked for here
    path: str  # a COCO JSON, or a folder with images/ and masks/; `synthetic` makes its own there
    images: str | None = None  # COCO JSON only: folder of its images; null: the JSON's own, or images/ next to it
    held_out: Annotated[float, below_one] = 0.2  # share held out, by a hash of the images' names
    val_path: str | None = None  # other images to hold out, as `path`; null: `held_out` of these
    # Column with the view of each image, a key of the JSON's images[] or a column of images.csv in the folder: each
    # view gets a learned embedding, added to the features that the heads read; null: none
    view: str | None = None
    phrase: str | None = None  # text for prompts, meaning all objects; null: the categories' names
    objects: PositiveInt = 8  # objects that are shown on an image, at most
    synthetic_images: NonNegativeInt = 0  # how many to draw, both splits together; source synthetic only
    synthetic_side_px: PositiveInt = 192  # longest side of a drawn image
    limit: PositiveInt | None = None  # use only the first N images of each split; null: all
    workers: NonNegativeInt = 8  # data loader processes per rank; 0: load in the main process
    max_unreadable: NonNegativeInt = 10  # stop after more unreadable images than this in one run

    def check(self) -> Iterator[str]:
        yield from self.made_up("synthetic_images")
        if self.val_path is None and self.held_out == 0:
            yield "held_out: 0 leaves nothing to validate on; set it above 0, or name other images with data.val_path"


@dataclass(frozen=True, kw_only=True)
class AdapterModel(Section):
    """The adapters: an update of low rank, alpha / rank x B A, next to each layer of these parts."""

    # trunk: SAM 3's or a student's, read by detector and tracker; detr: DETR and the encoder of example boxes
    parts: Annotated[tuple[AdaptedPart, ...], at_least_one, each_once] = ("trunk", "tracker_mask_decoder")
    rank: PositiveInt = 16  # r: numbers that an update passes through
    alpha: PositiveInt = 32  # scales the update by alpha / rank
    dropout: Annotated[float, below_one] = 0.05  # of what the adapters read


@dataclass(frozen=True, kw_only=True)
class AdaptPrompts(Section):
    """Shares of the images by how their objects are prompted."""

    box: Annotated[float, share] = 0.5  # a box around each object whose corners are a little off
    point: Annotated[float, share] = 0.5  # clicks inside of each object, and perhaps next to it
    mixed: Annotated[float, share] = 0.0  # a box and clicks
    text: Annotated[float, share] = 0.0  # a phrase, for all its instances: through the detector
    exemplar: Annotated[float, share] = 0.0  # share of the phrases that an example box goes with
    absent: Annotated[float, share] = 0.1  # share of the phrases that name a category which is not on the image

    points: PositiveInt = 1  # clicks inside, at most
    centre: bool = False  # the first of them in the middle of the object, where that is inside
    negatives: NonNegativeInt = 0  # clicks next to the object
    jitter: NonNegativeFloat = 0.1  # a box's corner moves by at most this share of its side ...
    jitter_px: NonNegativeFloat = 20.0  # ... and this many pixels

    def check(self) -> Iterator[str]:
        total = sum(getattr(self, kind) for kind in KINDS)
        if abs(total - 1) > 1e-6:
            yield f"box: {', '.join(KINDS)} are shares and add up to {total:g}, not 1"


@dataclass(frozen=True, kw_only=True)
class AdaptLoss(Section):
    """Weights of the terms of the loss; the last four are of phrases, see effsam3/losses/detection.py."""

    bce: NonNegativeFloat = 1.0  # binary cross entropy of the masks
    dice: NonNegativeFloat = 1.0  # dice loss of the masks
    iou: NonNegativeFloat = 1.0  # error of the predicted IoU, by which the best of three masks of a point is chosen
    score: NonNegativeFloat = 1.0  # binary cross entropy of the instances' scores
    box: NonNegativeFloat = 5.0  # L1 of the instances' boxes
    semantic: NonNegativeFloat = 1.0  # binary cross entropy of the mask of all instances together
    presence: NonNegativeFloat = 1.0  # binary cross entropy of the concept being on the image at all

    def check(self) -> Iterator[str]:
        if self.bce == self.dice == 0:
            yield "bce: bce and dice are both 0; no mask would be learned"


@dataclass(frozen=True, kw_only=True)
class AdaptTrain(Train):
    """The loop; samples are images."""

    recompute: bool = False  # recompute activations in backward: less device memory, about a third slower


@dataclass(frozen=True, kw_only=True)
class AdaptEvaluate(Section):
    """What the merged model is measured on: Dice and IoU of the held-out images, by each kind of prompt."""

    max_images: PositiveInt = 200  # held-out images
    pictures: NonNegativeInt = 8  # images to draw


@dataclass(frozen=True, kw_only=True)
class AdaptMerge(Merge):
    """The adapters become part of the weights."""

    view: str | None = None  # with data.view: which view's embedding is folded in; SAM 3 has a place for one


@dataclass(frozen=True, kw_only=True)
class AdaptRecipe(AdaptingRecipe):
    """Adaptation to a domain: adapters of SAM 3, or of a release, learn from images with masks."""

    why_no_more = "it has no features to store: the trunk itself learns; continue with train"
    replaces = "weights of adapted layers, in place"
    starter = "adapt/lora"
    metric = "val/iou"
    metrics = {"val/iou": "higher", "val/dice": "higher", "val/loss": "lower"}
    packages = {"peft": "lora"}
    card_keys = AdaptingRecipe.card_keys | {"adapters of": "adapters.parts", "rank": "adapters.rank"}
    data_names = {"own": "own images with masks"}
    knobs = (
        "train.micro_batch_size",
        "train.recompute",
        "hardware",
        "train.ema",
        "data.objects",
    )

    stage: Literal["adapt"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    sam3: Sam3 = Sam3()  # what is adapted: SAM 3, or the merged model of a student, release or other adaptation
    data: AdaptData
    adapters: AdapterModel = AdapterModel()
    prompts: AdaptPrompts = AdaptPrompts()
    loss: AdaptLoss = AdaptLoss()
    optim: Optim
    train: AdaptTrain
    evaluate: AdaptEvaluate = AdaptEvaluate()
    merge: AdaptMerge = AdaptMerge()
    push: Push = Push()

    @property
    def student(self) -> str:  # type: ignore[override]  # a key of other stages, here it follows from others
        """What learns."""
        return f"LoRA r {self.adapters.rank}"

    @property
    def student_init(self) -> str:  # type: ignore[override]  # likewise
        """What it starts from."""
        return "zero"

    @property
    def kinds(self) -> list[str]:
        """Kinds of prompts that are drawn."""
        return [kind for kind in KINDS if getattr(self.prompts, kind) > 0]

    @property
    def terms(self) -> dict[str, float]:
        """Terms of the loss that these have, with their weights."""
        return {name: getattr(self.loss, name) for name, kinds in TERMS.items() if set(kinds) & set(self.kinds)}

    @property
    def shows_objects(self) -> bool:
        """Whether points or boxes are drawn, which the tracker's mask decoder answers."""
        return self.prompts.text < 1

    @property
    def asks_phrases(self) -> bool:
        """Whether phrases are drawn, which the detector answers."""
        return self.prompts.text > 0

    def check(self) -> Iterator[str]:
        yield from super().check()
        for parts, runs, needed in (
            (BY_TEXT, self.asks_phrases, "prompts.text above 0"),
            (BY_POINT, self.shows_objects, "prompts.text below 1"),
        ):
            if idle := [part for part in self.adapters.parts if part in parts and not runs]:
                yield f"adapters.parts: {', '.join(idle)} would learn nothing by these prompts; it takes {needed}"
        if self.merge.view is not None and self.data.view is None:
            yield f"merge.view: {self.merge.view!r} is a view, but data.view is null; name the column of views there"

    def derived(self) -> dict[str, Callable[[], str]]:
        return {"adapters": self.student_line}

    def student_line(self) -> str:
        asked = self.adapters
        also = "; trunk features change for detector and tracker alike" if "trunk" in asked.parts else ""
        return f"r {asked.rank}, alpha {asked.alpha:g}, on {', '.join(asked.parts)}{also}"

    def limits(self) -> list[str]:
        if "trunk" not in self.adapters.parts:
            return super().limits()
        learned = "phrases" if not self.shows_objects else "points and boxes" if not self.asks_phrases else "both"
        return [
            *super().limits(),
            f"`{self.name}` changed the trunk, which detector and tracker both read, by prompts of {learned} on still "
            "images; on videos it was not measured.",
        ]

    def savings(self) -> dict[str, Saving]:
        found = {} if self.train.recompute else {"train.recompute": Saving(True)}
        if self.data.objects > 1 and self.shows_objects:
            found["data.objects"] = Saving(self.data.objects // 2)
        return found


RECIPE = AdaptRecipe
