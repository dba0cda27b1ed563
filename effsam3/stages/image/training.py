# SPDX-License-Identifier: Apache-2.0
"""Stage 1, image: a student trunk learns SAM 3's vision features.

Letters: B images, C channels, G grid rows and columns, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from effsam3.data.images.features import ImageFeatures, stored_features, without
from effsam3.data.images.photographs import ready_photographs
from effsam3.data.images.sa1b import load_index
from effsam3.data.loader import loader
from effsam3.data.splits import SPLITS
from effsam3.data.statistics import SAMPLE
from effsam3.data.store.reader import StoreReader
from effsam3.data.synthetic.images import make_synthetic_sa1b
from effsam3.data.transforms import normalise, valid_mask
from effsam3.errors import UserError
from effsam3.files import stamp
from effsam3.hardware.accelerator import frozen_autocast, on_main
from effsam3.losses.agreement import agreement
from effsam3.losses.features import relative_error
from effsam3.models.chassis.claims import check_weights
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.image.backbones import image_student
from effsam3.models.image.student import StudentTrunk, load_timm_weights, resize_BCHW, student_config
from effsam3.models.image.teacher import Neck, Teacher, to_map
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.rules import names_a_model
from effsam3.stages.base import FeatureStage, open_features
from effsam3.stages.image.facts import SOURCES, ImageData, ImageRecipe, ImagesRecipe, record_fields
from effsam3.stages.image.heads import Heads
from effsam3.stages.protocol import Batch, Place, Stage
from effsam3.training.report import Report

SYNTHETIC_HELD_OUT = 0.2  # of the drawn images: they are few


def ready_index(data: ImageData, accelerator: Accelerator, say: Callable[[str], object] = print) -> Path:
    """Return the index's path; for `data.source: folder` make it first, for `synthetic` the images, too, once.

    `say` prints news of a folder of photographs: what the index skipped, what has changed since.

    Raises:
        UserError: an index of something else is there already, or synthetic images of another number or size.
    """
    on_main(accelerator, partial(_make_index, data, say))
    return Path(data.index)


def _make_index(data: ImageData, say: Callable[[str], object]) -> None:
    from effsam3.data.images.index import build_index

    index = Path(data.index)
    if data.source == "folder":
        if news := ready_photographs(str(data.folder), index, data.held_out):
            say(news)
    if data.source == "synthetic":
        made = {"images": data.synthetic_images, "side_px": data.synthetic_side_px}
        stamp(index.parent / "synthetic.json", made, "synthetic images", "data.index", real=index)
        if not index.is_file():
            make_synthetic_sa1b(index.parent / "images", made["images"], side_px=made["side_px"])
            build_index([index.parent / "images"], index, SYNTHETIC_HELD_OUT, workers=1, progress=False)


def image_dataset(
    data: ImageData,
    index: Path,
    split: str,
    image_size: int,
    store: StoreReader | None = None,
    most: int | None = None,
    tied: bool = True,
) -> ImageFeatures:
    """The first `data.limit` (at most `most`) images of one split, without those that the teacher pass skipped."""
    limits = [limit for limit in (data.limit, most) if limit is not None]
    rows = load_index(index, split, min(limits, default=None))
    if store is not None and store.manifest.skipped:
        rows = without(rows, (entry["key"] for entry in store.manifest.skipped), store.manifest.ties_inputs)
    return ImageFeatures(rows, index.parent, image_size, data.resize, store, tied)


def both_datasets(
    recipe: StageRecipe, index: Path, image_size: int, store: StoreReader | None, key: str = "data.index"
) -> tuple[ImageFeatures, ImageFeatures]:
    """Return the images to learn from and those held out, of a recipe whose data have `limit` and `resize`.

    `key` names the index.

    Raises:
        UserError: there are none of either.
    """
    data: Any = recipe.data
    train_data = image_dataset(data, index, "train", image_size, store)
    # Limited, because validation runs every few minutes and its error is small after some hundred images.
    val_data = image_dataset(data, index, "val", image_size, store, most=recipe.train.eval_samples)
    if not len(train_data) or not len(val_data):
        divided_by = SOURCES[data.source].divided_by if data.source in SOURCES else "the index"
        raise UserError(
            f"{key}: {index} has {len(train_data)} training and {len(val_data)} held-out images; "
            f"both are needed ({divided_by} divides them)"
        )
    return train_data, val_data


# What a store must record of its features before a student learns from them.
FACTS = {"tap": str, "grid": int, "channels": int, "image_size": int, "resize": str}


def make_teacher(recipe: ImagesRecipe, accelerator: Accelerator) -> Teacher:
    """Load the recipe's teacher onto the accelerator's device and let the guard look at its weights."""
    sam3 = recipe.sam3
    folder = chassis_folder(sam3.checkpoint, sam3.revision)
    teacher = Teacher.from_folder(folder, recipe.embed.tap, recipe.embed.grid)
    check_weights(teacher, sam3.checkpoint, sam3.fingerprint)
    if recipe.train.compile:
        teacher.compile_layers()
    return teacher.to(accelerator.device)


def make_student(recipe: ImageRecipe, channels: int, image_size: int, patch_size: int) -> StudentTrunk:
    """Build the recipe's student for features of this width and images of this or the recipe's own size."""
    sizes = {"hidden_size": channels, "image_size": recipe.image_size or image_size, "patch_size": patch_size}
    config = student_config(recipe.student, recipe.head, recipe.student_image_size, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # every rank builds the same student
        student = StudentTrunk(config)
    if recipe.student_init != "random" and not names_a_model(recipe.student_init):
        load_timm_weights(student, recipe.student_init, image_student(recipe.student, config.seen_size).timm_name)
    return student


def untrained(recipe: ImageRecipe) -> StudentTrunk:
    """Build the recipe's student by the published sizes of its SAM 3."""
    facts = sam3_of(recipe.sam3.checkpoint).sizes
    return make_student(recipe, recipe.channels, facts.image_size, facts.patch_size)


def both_splits(recipe: StageRecipe) -> None:
    """Images to learn from and images held out; an index that is still to be made will have both."""
    data: Any = recipe.data
    if data.source == "folder" and not Path(data.index).is_file() and not Path(str(data.folder)).is_dir():
        raise UserError(f"data.folder: there is no folder {data.folder}")
    if data.source == "sa1b" or Path(data.index).is_file():
        for split in SPLITS:
            load_index(data.index, split, data.limit)


def whole_maps(recipe: ImageRecipe) -> None:
    """Features that neck and heads can read, where they are to."""
    own = sam3_of(recipe.sam3.checkpoint).sizes.grid if recipe.loss.neck or recipe.asks_heads else 0
    refuse_partial_maps(recipe, recipe.embed.tap, recipe.embed.grid or own)


NEEDS = (both_splits, whole_maps)


def refuse_partial_maps(recipe: ImageRecipe, tap: str, grid: int) -> None:
    """Refuse features that neck and heads cannot read, where the loss or validation looks at what they make of them.

    Raises:
        UserError: they are not the trunk's, or not on its own grid.
    """
    asking = {"loss.neck": recipe.loss.neck > 0, "train.monitor": recipe.asks_heads}
    keys = [key for key, asks in asking.items() if asks]
    if keys and (tap != "trunk" or grid != sam3_of(recipe.sam3.checkpoint).sizes.grid):
        off = {"loss.neck": "loss.neck=0", "train.monitor": f"train.monitor={recipe.metric}"}
        raise UserError(
            f"{keys[0]} compares what SAM 3's neck makes of whole trunk maps; these are {tap} features on a "
            f"{grid}x{grid} grid. Save features with embed.tap=trunk and without embed.grid, or set {off[keys[0]]}"
        )


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The images of a recipe, and where a trunk's features of them come from: `teacher` or `store`, the other is None.

    `facts` describe the features.
    """

    teacher: Teacher | None
    store: StoreReader | None
    facts: dict[str, Any]
    train_data: ImageFeatures
    val_data: ImageFeatures

    @classmethod
    def from_recipe(cls, recipe: ImagesRecipe, report: Report, accelerator: Accelerator) -> Taught:
        """Open them. Collective.

        Raises:
            UserError: there are none, or the store holds other features.
        """
        index = ready_index(recipe.data, accelerator, report.say)
        teacher, store = None, None
        if recipe.teacher == "online":
            teacher = make_teacher(recipe, accelerator)
            facts = {
                "tap": teacher.tap,
                "grid": teacher.grid,
                "channels": teacher.channels,
                "image_size": teacher.image_size,
                "resize": recipe.data.resize,
                "teacher": {"checkpoint": recipe.sam3.checkpoint, "fingerprint": teacher.fingerprint},
            }
        else:
            # Whichever stage embedded them: both learn from the same features.
            store = open_features(recipe.embed.to, "image", recipe.sam3, recipe.data, FACTS, "resize")
            facts = store.manifest.description
        train_data, val_data = both_datasets(recipe, index, facts["image_size"], store)
        return cls(teacher=teacher, store=store, facts=facts, train_data=train_data, val_data=val_data)


class ImagesStage(FeatureStage):
    """What stages image and vision share: images, and a teacher trunk's features of them."""

    unit = "images"
    recipe: ImagesRecipe
    teacher: Teacher | None
    train_data: ImageFeatures
    val_data: ImageFeatures

    def example(self, samples: int) -> Batch:
        """Return a micro-batch of `samples` images without contents."""
        side, grid, channels = (self.facts[name] for name in ("image_size", "grid", "channels"))
        batch = {"pixels": torch.empty(samples, 3, side, side, dtype=torch.uint8, device="meta")}
        if self.teacher is None:
            for field in record_fields(self.recipe.embed, channels, grid, side):
                shape, dtype = (samples, *field.shape), getattr(torch, field.dtype)
                batch[field.name] = torch.empty(shape, dtype=dtype, device="meta")
        return batch | {"sizes": torch.full((samples, 2), side)}

    def samples(self, batch: Batch) -> list[str]:
        return self.train_data.keys[batch["positions"].tolist()]

    def statistics_batches(self) -> DataLoader:
        """A fixed sample of the training images, in batches."""
        sample, size = self.train_data.sample(SAMPLE), self.recipe.embed.batch_size
        chunks = [sample[start : start + size] for start in range(0, len(sample), size)]
        return loader(self.train_data, chunks, self.recipe.data.workers, pin=False)

    def valid_at(self, batch: Batch, grid: int) -> Tensor:
        """Return the valid mask (B, 1, `grid`, `grid`) on the device."""
        return valid_mask(batch["sizes"], self.facts["image_size"], grid).to(self.device)

    def target(self, batch: Batch) -> Tensor:
        """Return the teacher's features (B, C, G, G), float32: read from the store or made here."""
        if self.teacher is None:
            fields = {
                name: batch[name].to(self.device, non_blocking=True) for name in ("features", "scale") if name in batch
            }
            return stored_features(fields)
        # In the same precision as a teacher pass, so that stored and online features are the same.
        with frozen_autocast(self.device, self.recipe.train.precision):
            return self.teacher(self.pixels(batch))

    def pixels(self, batch: Batch) -> Tensor:
        """Normalised pixels (B, 3, S, S) on the device, as the teacher takes them."""
        return normalise(batch["pixels"].to(self.device, non_blocking=True))

    def student_pixels(self, batch: Batch) -> Tensor:
        """The same as the student's model takes them."""
        return resize_BCHW(self.pixels(batch), (self.recipe.side,) * 2)


class ImageStage(ImagesStage):
    """A student trunk, images and their features."""

    recipe: ImageRecipe

    def __init__(
        self,
        recipe: ImageRecipe,
        place: Place,
        facts: dict[str, Any],
        student: StudentTrunk,
        teacher: Teacher | None,
        neck: Neck | None,
        heads: Heads | None,
    ):
        """`neck` is what `loss.neck` looks through, `heads` what validation does; None: neither does."""
        super().__init__(recipe, place, facts, student, teacher)
        # A store may hold a coarser grid than the student's, to save space; that of smaller images is coarser as well.
        self.grid = min(facts["grid"], recipe.side // student.config.patch_size)
        self.neck, self.heads = neck, heads
        self.max_unreadable = recipe.data.max_unreadable

    @classmethod
    def from_recipe(cls, recipe: ImageRecipe, report: Report, accelerator: Accelerator) -> ImageStage:
        taught = Taught.from_recipe(recipe, report, accelerator)
        teacher, facts, val_data = taught.teacher, taught.facts, taught.val_data
        neck, heads = None, None
        refuse_partial_maps(recipe, facts["tap"], facts["grid"])
        if recipe.asks_heads:
            heads = Heads.from_recipe(recipe, val_data)
            heads.model.to(accelerator.device)
        if recipe.loss.neck:
            neck = Neck.from_folder(chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision))
            # Only the part of SAM 3 after the trunk: the loss looks at features as the detector will see them.
            neck = neck.to(accelerator.device)
        sizes = (facts["channels"], facts["image_size"], sam3_of(recipe.sam3.checkpoint).sizes.patch_size)
        stage = cls(recipe, accelerator, facts, make_student(recipe, *sizes), teacher, neck, heads)
        stage.train_data, stage.val_data = taught.train_data, val_data
        stage.begin(taught.store, report, accelerator)
        return stage

    @classmethod
    def from_shapes(cls, recipe: ImageRecipe, place: Place) -> ImageStage:
        sizes = sam3_of(recipe.sam3.checkpoint).sizes
        facts = {
            "tap": recipe.embed.tap,
            "grid": recipe.embed.grid or sizes.grid,
            "channels": recipe.channels,
            "image_size": sizes.image_size,
        }
        teacher, neck = None, None
        if recipe.teacher == "online" or recipe.loss.neck:
            config = config_at_hand(recipe.sam3.checkpoint).detector_config.vision_config
            teacher = Teacher(config, recipe.embed.tap, recipe.embed.grid) if recipe.teacher == "online" else None
            neck = Neck(config) if recipe.loss.neck else None
        heads = Heads.from_shapes(recipe) if recipe.asks_heads else None
        return cls(recipe, place, facts, untrained(replace(recipe, student_init="random")), teacher, neck, heads)

    @property
    def frozen(self) -> list[nn.Module]:
        more = [self.neck, None if self.heads is None else self.heads.model]
        return super().frozen + [module for module in more if module is not None]

    def describe(self) -> dict[str, str]:
        seen = self.recipe.seen
        row = image_student(self.recipe.student, seen)
        replaced = sam3_of(self.recipe.sam3.checkpoint).sizes.trunk_params
        own = self.student_parameters
        grid, channels = self.facts["grid"], self.facts["channels"]
        compared = "" if self.grid == grid else f", compared at {self.grid} x {self.grid}"
        source = "next to the student" if self.teacher is not None else f"from {self.recipe.embed.to}"
        lines = {
            "student": f"{row.label} ({self.recipe.student}, head {self.recipe.head})  {own / 1e6:.2f} M parameters "
            f"instead of {replaced / 1e6:.2f} M, sees {seen} px",
            "teacher": f"{self.recipe.sam3.checkpoint} {self.facts['tap']}, {channels} x {grid} x {grid}{compared}, "
            f"{source}",
            "data": f"{self.recipe.data.index}  {len(self.train_data):,} images, {len(self.val_data):,} held out, "
            f"{self.facts['image_size']} px {self.facts['resize']}",
        }
        if self.heads is not None:
            lines["judged"] = self.heads.describe()
        return lines | self.notes

    def valid(self, batch: Batch) -> Tensor:
        return self.valid_at(batch, self.grid)

    def target(self, batch: Batch) -> Tensor:
        return resize_BCHW(super().target(batch), (self.grid,) * 2)

    def predict(self, student: nn.Module, batch: Batch) -> Tensor:
        """Return the student's features at the targets' grid, (B, C, G, G)."""
        with self.place.autocast():
            feat_BND = student(self.student_pixels(batch)).last_hidden_state
        return resize_BCHW(to_map(feat_BND), (self.grid,) * 2)

    def compare(self, batch: Batch, pred: Tensor, target: Tensor) -> dict[str, Tensor]:
        through_heads = {} if self.heads is None else self.heads.sums(batch, pred, target)
        return super().compare(batch, pred, target) | through_heads

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        if self.heads is None:
            return super().summarise(sums)
        through_heads = {name: sums.pop(name) for name in list(sums) if name.startswith("heads_")}
        judged = {f"val/{name}": value for name, value in agreement(through_heads).items()}
        return judged | super().summarise(sums)

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        weights = self.recipe.loss
        target, pred, valid = self.target(batch), self.predict(student, batch), self.valid(batch)
        terms = {}
        if self.neck is not None:
            # On raw features, because the neck has learned the teacher's own scale.
            terms["neck"] = relative_error(self.neck(pred), self.neck(target), valid)
        # Standardised, a few channels with large values no longer decide the loss; `sum` keeps upstream's behaviour.
        statistics = (self.mean_C, self.deviation_C) if weights.channels == "mean" else None
        terms |= self.feature_loss(pred, target, valid, weights.channels, statistics)
        total = sum(getattr(weights, name) * value for name, value in terms.items())
        return {"loss": total, **terms}


STAGE: type[Stage] = ImageStage  # what `train` builds
