# SPDX-License-Identifier: Apache-2.0
"""Recipes of the stage prompted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from effsam3.recipe.common import AdaptingRecipe, Chassis, Merge, Optim, Sam3, Saving, Train
from effsam3.recipe.push import Push
from effsam3.recipe.rules import (
    FileName,
    NonNegativeFloat,
    PositiveInt,
    Section,
    at_least_one,
    each_once,
    share,
)
from effsam3.stages.image.facts import SOURCES, ImageData, ImageEvaluate

KINDS = ("point", "box")  # of prompts that show an object
FEATURES, MASKS = ("mse", "cosine"), ("bce", "dice", "iou")  # terms of the loss
PARTS = ("masks", "presence", "queries")  # in which the heads may agree, see losses/agreement.py
TERMS = (*FEATURES, *MASKS, "exemplar")


@dataclass(frozen=True, kw_only=True)
class PromptedTeacher(Sam3):
    """The SAM 3 whose masks are learned."""

    # stored: reads its trunk's features from `store`, and only its heads run; online: its trunk runs, too
    features: Literal["stored", "online"] = "stored"
    store: str | None = None  # made by the stage 1 recipe (`embed.to` there) of the same images; features stored only

    def check(self) -> Iterator[str]:
        if self.features == "stored" and self.store is None:
            yield "store: features are to be stored, but not where; name the store of the stage 1 run (its embed.to)"
        if self.features == "online" and self.store is not None:
            yield f"store: {self.store} is given, but features is online; set teacher.features=stored"


@dataclass(frozen=True, kw_only=True)
class PromptedModel(Section):
    """What of the model learns."""

    # Names of its submodules and parameters, such as vision_encoder.backbone (the trunk, which detector and tracker
    # read), tracker_neck or tracker_model.mask_decoder: where nothing is called so from the model on, all that ends in
    # it. All else is frozen
    trainable: Annotated[tuple[str, ...], at_least_one, each_once] = ("vision_encoder.backbone",)


@dataclass(frozen=True, kw_only=True)
class PromptedPrompts(Section):
    """What is shown on every image: objects of its annotations, or where it has none, places on a grid."""

    per_image: PositiveInt = 16  # 16 to 64; at full size each costs 4.6 GFLOP, the necks 215 an image
    point: Annotated[float, share] = 0.5  # share of them that are a point, with three masks; the others are boxes
    rounds: PositiveInt = 2  # after each one but the last, a click where the masks of student and teacher differ
    # Share of the steps in which every image is also asked for all that is like one of its objects, by that one's box:
    # through the geometry encoder and the detector, at 440 GFLOP. The trunk is the detector's, too
    exemplar: Annotated[float, share] = 0.25
    jitter: Annotated[float, share] = 0.1  # a box's corner moves by at most this share of its side ...
    jitter_px: NonNegativeFloat = 20.0  # ... and this many pixels

    def counts(self) -> dict[str, int]:
        """Return how many prompts of an image are of each kind, of those that there are."""
        points = round(self.per_image * self.point)
        found = dict(zip(KINDS, (points, self.per_image - points), strict=True))
        return {kind: count for kind, count in found.items() if count}


@dataclass(frozen=True, kw_only=True)
class PromptedLoss(Section):
    """Weights of the terms of the loss; effsam3/losses/features.py and masks.py have the formulas. All are logged."""

    mse: NonNegativeFloat = 1.0  # of the trunk's features, by standardised channels: keeps it usable for heads ...
    cosine: NonNegativeFloat = 1.0  # ... that no prompt asks
    bce: NonNegativeFloat = 5.0  # of each mask against the teacher's probabilities, less that of the teacher itself
    dice: NonNegativeFloat = 2.0  # likewise
    iou: NonNegativeFloat = 1.0  # of the IoU that both predict, by which the best of three masks is chosen

    exemplar: NonNegativeFloat = 0.2  # of all that the detector answers to an example box, see losses/answers.py

    def check(self) -> Iterator[str]:
        if self.bce == self.dice == 0:
            yield "bce: bce and dice are both 0; no mask would be learned"


@dataclass(frozen=True, kw_only=True)
class PromptedTrain(Train):
    """The loop; samples are images."""

    recompute: bool = False  # recompute activations in backward: less device memory, about a third slower


@dataclass(frozen=True, kw_only=True)
class PromptedEvaluate(ImageEvaluate):
    """What the merged model and the one that it started from are measured on, next to the teacher."""

    # fidelity: features next to the teacher's; masks: mIoU of prompted masks; concepts: cgF1
    benchmarks: Annotated[tuple[Literal["fidelity", "masks", "concepts"], ...], at_least_one, each_once] = (
        "fidelity",
        "masks",
    )
    batch_size: PositiveInt = 8  # images per forward of the benchmark `fidelity`


@dataclass(frozen=True, kw_only=True)
class PromptedRecipe(AdaptingRecipe):
    """Prompts in the loop: a student's trunk learns through SAM 3's frozen heads, until its masks are SAM 3's own."""

    starter = "concepts/prompted_es_rv_m"
    why_no_more = "it reads the store that the stage 1 recipe has made (`embed` there); continue with train"
    replaces = "trunk's weights, in place"
    metric = "val/heads"
    metrics = {
        "val/heads": "higher",
        **{f"val/heads_{name}": "higher" for name in (*PARTS, *(f"masks_{kind}" for kind in KINDS))},
        "val/loss": "lower",
        **{f"val/loss_{name}": "lower" for name in TERMS},
    }
    card_keys = AdaptingRecipe.card_keys | {
        "teacher": "teacher.checkpoint",
        "trained modules": "model.trainable",
        "prompts of an image": "prompts.per_image",
    }
    data_names = {source: row.label for source, row in SOURCES.items()}
    knobs = ("train.micro_batch_size", "train.recompute", "prompts.per_image", "hardware", "train.ema")

    stage: Literal["prompted"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the run folder, <train.runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; the learning does not depend on it
    sam3: Chassis = Chassis()  # whose trunk learns: the merged model of a student, or a release
    teacher: PromptedTeacher = PromptedTeacher(features="online")
    data: ImageData
    model: PromptedModel = PromptedModel()
    prompts: PromptedPrompts = PromptedPrompts()
    loss: PromptedLoss = PromptedLoss()
    optim: Optim
    train: PromptedTrain
    evaluate: PromptedEvaluate = PromptedEvaluate()
    merge: Merge = Merge()
    push: Push = Push()

    @property
    def student(self) -> str:  # type: ignore[override]  # a key of other stages, here it follows from others
        """What status calls it."""
        return ", ".join(self.model.trainable)

    @property
    def student_init(self) -> str:  # type: ignore[override]  # likewise
        """What it starts from."""
        return "the chassis' own"

    @classmethod
    def student_of(cls, values: Mapping[str, Any]) -> str:
        return ", ".join(values.get("model", {}).get("trainable", ()))

    @property
    def teacher_of_concepts(self) -> Chassis:
        return self.teacher

    def derived(self) -> dict[str, Callable[[], str]]:
        return {"prompts": self._prompts_line, "length": self._length_line, "learns": self.student_line}

    def _prompts_line(self) -> str:
        kinds = ", ".join(f"{count} by a {kind}" for kind, count in self.prompts.counts().items())
        exemplar = f"; {share:.0%} of the steps by an example box, too" if (share := self.prompts.exemplar) else ""
        return f"{kinds} on every image, {self.prompts.rounds} rounds{exemplar}"

    def _length_line(self) -> str:
        train = self.train
        return f"{train.steps:,} steps of {train.global_batch_size} images" if train.steps else ""

    def student_line(self) -> str:
        return ", ".join(self.model.trainable)

    def limits(self) -> list[str]:
        return [
            *super().limits(),
            f"`{self.name}` learned from points and boxes on still images; its trunk is that of phrases and videos, "
            "too, on which it was not trained.",
        ]

    def savings(self) -> dict[str, Saving]:
        found = {} if self.train.recompute else {"train.recompute": Saving(True)}
        if self.prompts.per_image > 1:
            found["prompts.per_image"] = Saving(self.prompts.per_image // 2)
        return found


RECIPE = PromptedRecipe
