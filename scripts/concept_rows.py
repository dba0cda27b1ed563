# SPDX-License-Identifier: Apache-2.0
"""The rows of `concept_table.py`: what is trained, from what, and which choices of it are wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from effsam3.losses.detection import Instances
from effsam3.models.heads import detector
from effsam3.models.image import student as image_student
from effsam3.stages.concepts import training as concepts
from effsam3.stages.image import training as image

Wrap = Callable[[], AbstractContextManager]


# ---- WRONG: choices that no recipe offers


@contextmanager
def imagenet_pixels() -> Iterator[None]:
    """WRONG: training sees ImageNet-normalised images, inference as SAM 3 has them; squares need no letterbox."""

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        mean_311, deviation_311 = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        )
        return (pixels.float() - mean_311) / deviation_311

    with mock.patch.object(image, "normalise", normalise), mock.patch.object(concepts, "normalise", normalise):
        yield


@contextmanager
def stride_32() -> Iterator[None]:
    """WRONG: the student's last convolution has stride 2, so that its head reads a map of stride 32 only."""
    forward = image_student.LinearHead.forward

    def coarser(self, maps, *rest):
        return forward(self, [*maps[:-1], maps[-1][..., ::2, ::2]], *rest)

    with mock.patch.object(image_student.LinearHead, "forward", coarser):
        yield


@contextmanager
def coarsest_level() -> Iterator[None]:
    """WRONG: teacher and student are compared where their detectors read the neck's coarsest level, not its third."""

    def levels(model, feat_BDGG: torch.Tensor) -> detector.Levels:
        maps, places = model.detector_model.vision_encoder.neck(feat_BDGG)
        return detector.read_levels(model.detector_model, maps, places[-1][:1])  # SAM 3 leaves out the last one

    with (
        mock.patch.object(concepts, "detector_levels", levels),
        mock.patch("effsam3.models.heads.concept_student.detector_levels", levels),
    ):
        yield


@contextmanager
def one_instance() -> Iterator[None]:
    """WRONG: of all instances of a phrase one is its object, by chance; the others are background."""
    inputs = concepts.ConceptsStage.inputs

    def of_one(self, batch):
        found = inputs(self, batch)
        boxes_RN4, masks_RNMM, valid_RN = found.instances
        chosen_R = (torch.rand(valid_RN.shape) * valid_RN).argmax(1)
        only_RN = torch.zeros_like(valid_RN).scatter_(1, chosen_R[:, None], True) & valid_RN
        return found._replace(instances=Instances(boxes_RN4, masks_RNMM, only_RN))

    with mock.patch.object(concepts.ConceptsStage, "inputs", of_one):
        yield


# ---- rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run, and the line of the table that it becomes."""

    title: str
    recipe: str  # that its overrides are of
    after: str | None = None  # the row that it goes on from
    overrides: tuple[str, ...] = ()
    wrongs: tuple[Wrap, ...] = ()  # while it learns
    model: tuple[Wrap, ...] = ()  # whenever its model is built, in rows after it, too
    as_long_as: str | None = None  # the row whose processor time decides its steps, by the time of a step of `after`


IMAGE, CONCEPTS, PROMPTED = "smoke/image", "smoke/tiny_concept_teacher", "smoke/prompted"
ANNOTATED = "loss.annotations=1", "loss.teacher=0"
TAUGHT = "loss.annotations=0", "loss.teacher=1"
BOTH = "loss.annotations=0.5", "loss.teacher=1"
ABSENT_NEVER = ("data.negatives=0",)


def features(student: str, steps: int, *more: str) -> tuple[str, ...]:
    """Return the overrides of a first training by features."""
    return f"student=tiny_separable_{student}", "student_init=random", f"train.steps={steps}", *more


def family(name: str, title: str, first: Row) -> dict[str, Row]:
    """Return the rows of one student: features alone, more of them, and everything that goes through the heads."""
    return {
        name: first,
        f"{name}-prompted": Row(title=f"{title}, then prompted", recipe=PROMPTED, after=name),
        f"{name}-annotated": Row(
            title=f"{title}, then concepts (a) annotations", recipe=CONCEPTS, after=name, overrides=ANNOTATED
        ),
        f"{name}-taught": Row(
            title=f"{title}, then concepts (b) teacher", recipe=CONCEPTS, after=name, overrides=TAUGHT
        ),
        f"{name}-both": Row(title=f"{title}, then concepts (a + b)", recipe=CONCEPTS, after=name, overrides=BOTH),
        f"{name}-control": Row(
            title=f"{title}, control: more features for as long",
            recipe=IMAGE,
            after=name,
            overrides=(first.overrides[0], "optim.lr=1e-3"),
            as_long_as=f"{name}-both",
        ),
    }


RUINED = "w16"  # the student whose training is ruined
ROWS: dict[str, Row] = {
    **family("w4", "W4", Row(title="W4, features", recipe=IMAGE, overrides=features("w4", 1000))),
    **family("w16", "W16", Row(title="W16, features", recipe=IMAGE, overrides=features("w16", 1000))),
    **family("early", "W16, early", Row(title="W16, 100 steps", recipe=IMAGE, overrides=features("w16", 100))),
    "ruined-pixels": Row(
        title="ImageNet's normalisation in training",
        recipe=IMAGE,
        overrides=features("w16", 1000, "teacher=online"),  # the store is of the right pixels
        wrongs=(imagenet_pixels,),
    ),
    "ruined-sum": Row(
        title="MSE summed over channels", recipe=IMAGE, overrides=features("w16", 1000, "loss.channels=sum")
    ),
    "ruined-stride": Row(
        title="stride 32 only", recipe=IMAGE, overrides=features("w16", 1000), model=(stride_32,)
    ),
    "ruined-negatives": Row(
        title="(a) without absent phrases", recipe=CONCEPTS, after=RUINED, overrides=ANNOTATED + ABSENT_NEVER
    ),
    "ruined-instances": Row(
        title="(a) with one instance of a phrase as its object",
        recipe=CONCEPTS,
        after=RUINED,
        overrides=ANNOTATED,
        wrongs=(one_instance,),
    ),
    "ruined-level": Row(
        title="(b) through the wrong level", recipe=CONCEPTS, after=RUINED, overrides=TAUGHT, wrongs=(coarsest_level,)
    ),
    "ruined-features": Row(
        title="pixels, sum and stride together: features",
        recipe=IMAGE,
        overrides=features("w16", 1000, "teacher=online", "loss.channels=sum"),
        wrongs=(imagenet_pixels,),
        model=(stride_32,),
    ),
    "ruined-prompted": Row(
        title="... then through the wrong level",
        recipe=CONCEPTS,
        after="ruined-features",
        overrides=TAUGHT,
        wrongs=(imagenet_pixels, coarsest_level),
    ),
    "ruined-all": Row(
        title="... then (a), no absent phrase, one instance",
        recipe=CONCEPTS,
        after="ruined-prompted",
        overrides=ANNOTATED + ABSENT_NEVER,
        wrongs=(one_instance,),
    ),
}  # fmt: skip


def model_of(row: Row) -> tuple[Wrap, ...]:
    """Return what its model is built with, its own or inherited."""
    return row.model + (model_of(ROWS[row.after]) if row.after else ())


FIRST = [name for name, row in ROWS.items() if row.after is None]
