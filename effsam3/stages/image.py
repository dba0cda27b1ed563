# SPDX-License-Identifier: Apache-2.0
"""Stage 1, image: a student trunk learns SAM 3's vision features.

Letters: B images, C channels, G grid rows and columns, S image side in pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from effsam3.accelerator import teacher_autocast
from effsam3.data.image_features import ImageFeatures, stored_features
from effsam3.data.loader import loader
from effsam3.data.sa1b import SPLITS, load_index
from effsam3.data.statistics import FeatureStatistics, statistics_sample
from effsam3.data.store import Field, StoreError, StoreReader
from effsam3.data.synthetic import make_synthetic_sa1b
from effsam3.data.transforms import normalise, valid_mask
from effsam3.errors import UserError
from effsam3.losses import agreement_sums, feature_loss, relative_error, standardise
from effsam3.models.registry import IMAGE_STUDENTS, chassis_facts
from effsam3.models.sam3 import chassis_folder
from effsam3.models.teacher import Neck, Teacher, check_features, check_weights, load_neck, parameter_count, to_map
from effsam3.models.vision import StudentTrunk, StudentTrunkConfig, load_timm_weights, resize_BCHW
from effsam3.report import table

SYNTHETIC_HELD_OUT = 0.2  # of the drawn images: they are few


def ready_index(recipe, accelerator) -> Path:
    """Return the index's path; for `data.source: synthetic` make images and index first, once.

    Raises:
        UserError: synthetic images and index of another number or size stand there already.
    """
    from effsam3.data.index_sa1b import build_index

    index = Path(recipe.data.index)
    if recipe.data.source == "synthetic" and accelerator.is_main_process:
        made = {"images": recipe.data.synthetic_images, "side_px": recipe.data.synthetic_side_px}
        stamp = index.parent / "synthetic.json"
        if not (index.is_file() and stamp.is_file()):
            make_synthetic_sa1b(index.parent / "images", made["images"], side_px=made["side_px"])
            build_index([index.parent / "images"], index, SYNTHETIC_HELD_OUT, workers=1, progress=False)
            stamp.write_text(json.dumps(made))
        elif (found := json.loads(stamp.read_text())) != made:
            raise UserError(
                f"{index.parent} holds synthetic images made as {found}, the recipe asks for {made}; give data.index "
                "another folder, or delete this one"
            )
    accelerator.wait_for_everyone()
    return index


def image_dataset(
    recipe, index: Path, split: str, image_size: int, store: StoreReader | None = None, most: int | None = None
) -> ImageFeatures:
    """The images of one split, the first `data.limit` and at most `most` of them, less those that export skipped."""
    limits = [limit for limit in (recipe.data.limit, most) if limit is not None]
    rows = load_index(index, split, min(limits, default=None))
    if store is not None and store.manifest.skipped:
        skipped = {entry["key"] for entry in store.manifest.skipped}
        rows = rows.select([position for position, key in enumerate(rows["key"]) if key not in skipped])
    return ImageFeatures(rows, index.parent, image_size, recipe.data.resize, store)


class ImageTeacherPass:
    """What `export` runs: the teacher over every image of the index, and what a record of the store is made of."""

    def __init__(self, recipe, accelerator):
        self.recipe, self.device = recipe, accelerator.device
        self.teacher = make_teacher(recipe, accelerator)
        index = ready_index(recipe, accelerator)
        # Features may be wanted of photographs that are all in one split; training will ask for both.
        present = set(load_index(index)["split"])
        self.datasets = [
            image_dataset(recipe, index, split, self.teacher.image_size) for split in SPLITS if split in present
        ]
        self.accelerator = accelerator

    def fields(self) -> list[Field]:
        """The record's fields: features, for int8 their scales, and on request the pixels they were made of."""
        side, grid, channels = self.teacher.image_size, self.teacher.grid, self.teacher.channels
        fields = [Field("features", self.recipe.export.dtype, (channels, grid, grid))]
        if self.recipe.export.dtype == "int8":
            fields.append(Field("scale", "float32", (channels,)))
        if self.recipe.export.pixels:
            fields += [Field("pixels", "uint8", (3, side, side)), Field("sizes", "int32", (2,))]
        return fields

    def description(self) -> dict:
        """What the manifest says about the features: they belong to this teacher and this preprocessing alone."""
        teacher = self.teacher
        return {
            "kind": "image",
            "tap": teacher.tap,
            "grid": teacher.grid,
            "channels": teacher.channels,
            "payload": self.recipe.export.dtype,
            "image_size": teacher.image_size,
            "resize": self.recipe.data.resize,
            "normalisation": "x / 255, mean 0.5, std 0.5",
            "precision": self.recipe.train.precision,
            "teacher": {
                "checkpoint": self.recipe.sam3.checkpoint,
                "revision": self.recipe.sam3.revision,
                "fingerprint": teacher.fingerprint,
                "trunk_parameters": parameter_count(teacher.trunk),
            },
        }

    def features(self, batch: dict, check: bool = False) -> Tensor:
        """Run the teacher on a batch; `check` also asks the guard whether these can be SAM 3's features."""
        pixels = normalise(batch["pixels"].to(self.device))
        with teacher_autocast(self.accelerator, self.recipe.train.precision):
            feat_BCGG = self.teacher(pixels)
        if check:
            check_features(feat_BCGG, pixels)
        return feat_BCGG

    def valid(self, batch: dict) -> Tensor:
        """The valid mask (B, 1, G, G) of a batch."""
        return valid_mask(batch["sizes"], self.teacher.image_size, self.teacher.grid)


def make_teacher(recipe, accelerator) -> Teacher:
    """Load the recipe's teacher onto the accelerator's device and let the guard look at its weights."""
    sam3 = recipe.sam3
    teacher = Teacher(chassis_folder(sam3.checkpoint, sam3.revision), recipe.export.tap, recipe.export.grid)
    check_weights(teacher, sam3.checkpoint, sam3.fingerprint)
    return teacher.to(accelerator.device)


def make_student(recipe, channels: int, image_size: int, patch_size: int) -> StudentTrunk:
    """Build the recipe's student for features of this width and images of this size, initialised as it says."""
    config = StudentTrunkConfig(
        timm_name=IMAGE_STUDENTS[recipe.student].timm_name,
        head=recipe.head,
        hidden_size=channels,
        image_size=image_size,
        patch_size=patch_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # every rank builds the same student
        student = StudentTrunk(config)
    if recipe.student_init != "random":
        load_timm_weights(student, recipe.student_init)
    return student


class ImageStage:
    """The training side: student, data, loss and validation."""

    metric = "val/cosine"

    def __init__(self, recipe, report, accelerator):
        self.recipe, self.report, self.accelerator = recipe, report, accelerator
        self.device = accelerator.device
        index = ready_index(recipe, accelerator)
        facts = chassis_facts(recipe.sam3.checkpoint)
        self.teacher: Teacher | None = None
        if recipe.teacher == "online":
            self.teacher = make_teacher(recipe, accelerator)
            self.facts = {
                "tap": recipe.export.tap,
                "grid": self.teacher.grid,
                "channels": self.teacher.channels,
                "image_size": self.teacher.image_size,
                "resize": recipe.data.resize,
            }
            store = None
        else:
            store = self._open_store()
            self.facts = store.manifest.description
        side = self.facts["image_size"]
        self.train_data = image_dataset(recipe, index, "train", side, store)
        self.val_data = image_dataset(recipe, index, "val", side, store, most=recipe.train.eval_samples)
        if not len(self.train_data) or not len(self.val_data):
            raise UserError(
                f"data.index: {index} has {len(self.train_data)} training and {len(self.val_data)} held-out images; "
                "both are needed (scripts/index_sa1b.py --val-fraction divides them)"
            )
        statistics = self._online_statistics() if store is None else store.manifest.statistics
        self.mean_C, self.deviation_C = (
            torch.tensor(statistics[name], dtype=torch.float32, device=self.device) for name in ("mean", "deviation")
        )
        self.student = make_student(recipe, self.facts["channels"], self.facts["image_size"], facts.patch_size)
        self.student.set_feature_statistics(self.mean_C, self.deviation_C)
        self.neck = self._load_neck() if recipe.loss.neck else None

    def _open_store(self) -> StoreReader:
        recipe = self.recipe
        store = StoreReader(recipe.export.to)
        facts = store.manifest.description
        if recipe.data.resize != facts["resize"]:
            raise StoreError(
                f"the store at {recipe.export.to} was made with resize={facts['resize']}, the recipe says data.resize="
                f"{recipe.data.resize}; change data.resize, or export again to another export.to"
            )
        return store

    def _load_neck(self) -> Neck:
        own_grid = chassis_facts(self.recipe.sam3.checkpoint).grid
        if self.facts["tap"] != "trunk" or self.facts["grid"] != own_grid:
            raise UserError(
                f"loss.neck compares what SAM 3's neck makes of whole trunk maps; these are {self.facts['tap']} "
                f"features on a {self.facts['grid']}x{self.facts['grid']} grid. Export with export.tap=trunk and "
                "without export.grid, or set loss.neck=0"
            )
        return load_neck(chassis_folder(self.recipe.sam3.checkpoint, self.recipe.sam3.revision)).to(self.device)

    def _online_statistics(self) -> dict:
        """The teacher's statistics when there is no store: made once per run by rank 0, kept in the run folder."""
        path = self.report.folder / "feature_statistics.json"
        if self.accelerator.is_main_process and not path.is_file():
            statistics = FeatureStatistics(self.teacher.channels)
            sample = statistics_sample(self.train_data.keys)
            size = self.recipe.export.batch_size
            chunks = [sample[start : start + size] for start in range(0, len(sample), size)]
            for batch in loader(self.train_data, chunks, self.recipe.data.workers, pin=False):
                statistics.update(self.target(batch), self.valid(batch))
            self.report.write_json(path.name, statistics.result())
        self.accelerator.wait_for_everyone()
        return json.loads(path.read_text())

    def describe(self) -> dict[str, str]:
        """Lines for the run's header: what is learned, from what."""
        row = IMAGE_STUDENTS[self.recipe.student]
        replaced = chassis_facts(self.recipe.sam3.checkpoint).trunk_params
        own = parameter_count(self.student)
        grid, channels = self.facts["grid"], self.facts["channels"]
        source = "beside the student" if self.teacher is not None else f"from {self.recipe.export.to}"
        return {
            "student": f"{row.label} ({self.recipe.student}, head {self.recipe.head})  {own / 1e6:.2f} M parameters "
            f"instead of {replaced / 1e6:.2f} M",
            "teacher": f"{self.recipe.sam3.checkpoint} {self.facts['tap']}, {channels} x {grid} x {grid}, {source}",
            "data": f"{self.recipe.data.index}  {len(self.train_data):,} images, {len(self.val_data):,} held out, "
            f"{self.facts['image_size']} px {self.facts['resize']}",
        }

    def valid(self, batch: dict) -> Tensor:
        """Valid mask (B, 1, G, G) on the device."""
        return valid_mask(batch["sizes"], self.facts["image_size"], self.facts["grid"]).to(self.device)

    def target(self, batch: dict) -> Tensor:
        """The teacher's features (B, C, G, G), float32: read from the store or made here."""
        if self.teacher is None:
            fields = {
                name: batch[name].to(self.device, non_blocking=True) for name in ("features", "scale") if name in batch
            }
            return stored_features(fields)
        with teacher_autocast(self.accelerator, self.recipe.train.precision):
            return self.teacher(self.pixels(batch))

    def pixels(self, batch: dict) -> Tensor:
        """Normalised pixels (B, 3, S, S) on the device."""
        return normalise(batch["pixels"].to(self.device, non_blocking=True))

    def predict(self, student, batch: dict) -> Tensor:
        """The student's features at the targets' grid, (B, C, G, G)."""
        with self.accelerator.autocast():
            feat_BND = student(self.pixels(batch)).last_hidden_state
        return resize_BCHW(to_map(feat_BND), (self.facts["grid"],) * 2)

    def loss(self, student, batch: dict) -> dict[str, Tensor]:
        """The weighted loss of a micro-batch and its named parts, all scalars."""
        weights = self.recipe.loss
        target, pred, valid = self.target(batch), self.predict(student, batch), self.valid(batch)
        parts = {}
        if self.neck is not None:
            parts["neck"] = relative_error(self.neck(pred), self.neck(target), valid)
        if weights.channels == "mean":
            pred, target = (standardise(feat, self.mean_C, self.deviation_C) for feat in (pred, target))
        parts |= feature_loss(pred, target, valid, weights.channels)
        total = sum(getattr(weights, name) * value for name, value in parts.items())
        return {"loss": total, **parts}

    @torch.no_grad()
    def validate(self, student, batch: dict) -> dict[str, Tensor]:
        """Sums of a batch for `summarise`: what `losses.agreement_sums` counts."""
        target, pred, valid = self.target(batch), self.predict(student, batch), self.valid(batch)
        return agreement_sums(pred, target, valid, self.mean_C, self.deviation_C)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Turn the sums of `validate` into means."""
        positions = max(float(sums.pop("positions")), 1.0)
        return {f"val/{name}": float(value) / positions for name, value in sums.items()}

    def conclude(self, untrained: dict[str, float], best: dict[str, float]) -> str:
        """A table: the student beside its untrained self and beside the predictor of the mean."""
        names = ("val/cosine", "val/cosine_centred", "val/mse")
        rows = [
            ["untrained student", *(f"{untrained[name]:.4f}" for name in names)],
            ["mean of the features", f"{best['val/cosine_of_mean']:.4f}", "0.0000", "1.0000"],
            [f"student, step {best['step']}", *(f"{best[name]:.4f}" for name in names)],
        ]
        return table(rows, ["held-out images", "cosine", "centred cosine", "mse"])
