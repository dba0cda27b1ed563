# SPDX-License-Identifier: Apache-2.0
"""Stage prompted: a student's trunk learns to give the teacher's masks of points and boxes, through frozen heads.

Letters: B images, N prompts of one kind of all images, S image side in pixels, D channels of the trunk, G side of its
grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from effsam3.data.images.features import stored_features
from effsam3.data.images.sa1b import with_masks
from effsam3.data.images.shown import ShownObjects
from effsam3.data.store.reader import StoreReader
from effsam3.data.transforms import normalise, valid_mask
from effsam3.errors import UserError
from effsam3.hardware.accelerator import frozen_autocast
from effsam3.losses.agreement import agreement, nothing_compared
from effsam3.models.chassis.claims import check_weights
from effsam3.models.chassis.classes import empty_model
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.tensors import fingerprint, read_config, read_tensors
from effsam3.models.heads.prompted_student import DETECTOR, UNUSED, PromptedStudent, Prompts, Taught
from effsam3.models.image.teacher import Teacher
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.models.trainable import count_parameters, find_trainable, outermost
from effsam3.stages.base import StageBase, keep_whole
from effsam3.stages.image.training import both_datasets, both_splits, ready_index
from effsam3.stages.prompted.facts import FEATURES, TERMS, PromptedRecipe
from effsam3.stages.prompted.prompts import asks, draw_exemplars, draw_prompts
from effsam3.stages.protocol import Batch, Place, Stage
from effsam3.stages.taught import (
    config_to_come,
    load_sam3,
    open_trunk_store,
    refuse_other_sizes,
    trunk_config,
    without_trunk,
)
from effsam3.training.report import Report, table

MASK_SIDE = 4  # side of a mask, in positions of the trunk's grid

# ---- the teacher


def stored_masks_teacher(recipe: PromptedRecipe) -> None:
    """The teacher's features, where they are to be stored."""
    open_trunk_store(recipe.teacher, recipe.data)


NEEDS = (both_splits, stored_masks_teacher)

# ---- what learns


def trainable_of(recipe: PromptedRecipe, model: nn.Module) -> dict[str, list[str]]:
    """Return what each name of `model.trainable` means in a whole SAM 3.

    Raises:
        UserError: there is no such module, or no prompt reaches it.
    """
    by = ", by the recipe's prompts on images"
    return find_trainable(model, recipe.model.trainable, unused_of(recipe), "model", by)


def unused_of(recipe: PromptedRecipe) -> tuple[str, ...]:
    """Return beginnings of the names of what no prompt of the recipe reaches."""
    return UNUSED if recipe.prompts.exemplar else (*UNUSED, *DETECTOR)


def make_student(recipe: PromptedRecipe, model: nn.Module, teacher: nn.Module) -> PromptedStudent:
    """Take out of a whole SAM 3 what the recipe trains."""
    trained = outermost([place for places in trainable_of(recipe, model).values() for place in places])
    weights = {name: getattr(recipe.loss, name) for name in TERMS}
    rounds, recompute = recipe.prompts.rounds, recipe.train.recompute
    return PromptedStudent(model, trained, teacher, weights, rounds, recompute, unused_of(recipe))


def untrained(recipe: PromptedRecipe, config: Any = None) -> PromptedStudent:
    """Build the recipe's student without the values of its tensors; `config` is that of the whole SAM 3."""
    model = empty_model(config or config_at_hand(recipe.sam3.checkpoint))
    return make_student(recipe, model, model)


class PromptedStage(StageBase):
    """A student that is prompted, images, and a teacher."""

    recipe: PromptedRecipe
    train_data: ShownObjects
    val_data: ShownObjects

    def __init__(self, recipe: PromptedRecipe, place: Place, model: Any, teacher: Any, trunk: Teacher | None):
        """`model` and `teacher` are whole SAM 3s, the teacher without its trunk, which is `trunk` or in a store."""
        super().__init__(recipe, place)
        self.max_unreadable = recipe.data.max_unreadable
        self.found = trainable_of(recipe, model)
        self.student = make_student(recipe, model, teacher)
        self.student_parameters = sum(one.numel() for one in self.student.parameters() if one.requires_grad)
        self.trunk = trunk
        config = trunk_config(model.config)
        self.image_size, self.grid = config.image_size, config.image_size // config.patch_size
        self.channels = config.hidden_size
        self.mean_D = torch.zeros(self.channels, device=self.device)
        self.deviation_D = torch.ones(self.channels, device=self.device)
        self.facts: dict[str, Any] = {"image_size": self.image_size, "trainable": self.found}
        self.tokenizer = PromptTokenizer()

    @classmethod
    def from_recipe(cls, recipe: PromptedRecipe, report: Report, accelerator: Accelerator) -> PromptedStage:
        asked = recipe.teacher
        store = open_trunk_store(asked, recipe.data)
        folder = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
        taught_by = chassis_folder(asked.checkpoint, asked.revision)
        refuse_other_sizes(read_config(folder), read_config(taught_by))
        if store is None:
            trunk = Teacher.from_folder(taught_by)
            check_weights(trunk, asked.checkpoint, asked.fingerprint)
            known = trunk.fingerprint
        else:
            trunk, known = None, store.manifest.description["teacher"].get("fingerprint")
        stage = cls(recipe, accelerator, load_sam3(folder), without_trunk(load_sam3(taught_by)), trunk)
        for part in (*stage.frozen, stage.student):
            part.to(accelerator.device)
        keep_whole(stage.student, accelerator)
        stage.set_statistics(store)
        index = ready_index(recipe.data, accelerator, report.say)
        stage.train_data, stage.val_data = (
            ShownObjects(images, recipe.prompts.per_image, MASK_SIDE * stage.grid, recipe.train.seed)
            for images in both_datasets(recipe, index, stage.image_size, store)
        )
        # What `merge` compares with the model that the changes go into: they only fit what they started from.
        own = read_tensors(folder)
        stage.facts |= {
            "teacher": {
                "checkpoint": recipe.sam3.checkpoint,
                "revision": recipe.sam3.revision,
                "fingerprint": fingerprint({name: own[name] for name in stage.student.state_dict()}),
            },
            "taught_by": {
                "checkpoint": asked.checkpoint,
                "revision": asked.revision,
                "features": asked.store or "online",
                "fingerprint": known,
            },
        }
        return stage

    @classmethod
    def from_shapes(cls, recipe: PromptedRecipe, place: Place) -> PromptedStage:
        model = empty_model(config_to_come(recipe.sam3.checkpoint))
        teacher = empty_model(config_at_hand(recipe.teacher.checkpoint))
        online = recipe.teacher.features == "online"
        trunk = Teacher(teacher.config.detector_config.vision_config) if online else None
        return cls(recipe, place, model, without_trunk(teacher), trunk)

    def set_statistics(self, store: StoreReader | None) -> None:
        """Take the teacher's mean and deviation by channel from the store, or from the trunk, which learned by them.

        Raises:
            UserError: neither has them.
        """
        trunk = self.student.model.detector_model.vision_encoder.backbone
        if store is not None and store.manifest.statistics is not None:
            known = [torch.tensor(store.manifest.statistics[name]) for name in ("mean", "deviation")]
        elif hasattr(trunk, "feature_scale") and trunk.feature_mean.any():
            known = [trunk.feature_mean, trunk.feature_scale]
        elif any(getattr(self.recipe.loss, name) for name in FEATURES):
            raise UserError(
                "loss.mse: features are compared in units of the teacher's deviations, which a store keeps, or the "
                f"trunk of a student of stage 1, and {self.recipe.sam3.checkpoint} has none; name a store "
                "(teacher.store), or set loss.mse=0 loss.cosine=0"
            )
        else:
            return
        self.mean_D, self.deviation_D = (one.detach().float().clone().to(self.device) for one in known)

    def example(self, samples: int) -> Batch:
        """Return a micro-batch of `samples` images without contents, with objects to show."""
        side, grid = self.image_size, self.grid
        masks = torch.zeros(samples, self.recipe.prompts.per_image, MASK_SIDE * grid, MASK_SIDE * grid).bool()
        masks[..., : 2 * grid, : 2 * grid] = True
        batch = {"pixels": torch.empty(samples, 3, side, side, dtype=torch.uint8, device="meta")}
        if self.trunk is None:
            shape = (samples, self.channels, grid, grid)
            batch["features"] = torch.empty(shape, dtype=torch.float16, device="meta")
        return batch | {
            "sizes": torch.full((samples, 2), side),
            "masks": masks,
            "numbers": list(range(samples)),
        }

    @property
    def frozen(self) -> list[nn.Module]:
        """What runs next to what learns; the rest of both models stays where it was loaded."""
        model, teacher = self.student.model, self.student.teacher
        parts = [part for whole in (model, teacher) for part in (whole.tracker_neck, whole.tracker_model)]
        parts += [model.detector_model.vision_encoder.backbone]
        parts += [model.detector_model, teacher.detector_model] if self.recipe.prompts.exemplar else []
        return [*parts, *([] if self.trunk is None else [self.trunk])]

    # ---- what the loop calls

    def describe(self) -> dict[str, str]:
        data, asked = self.recipe.data, self.recipe.teacher
        parameters = dict(self.student.model.named_parameters())
        learns = [
            f"{name} {count_parameters(parameters, places) / 1e6:.2f} M"
            f"{'' if places == [name] else f' ({places[0]})' if len(places) == 1 else f' ({len(places)} x)'}"
            for name, places in self.found.items()
        ]
        where = "its trunk next to the student" if asked.store is None else f"its trunk's features from {asked.store}"
        masks = with_masks(self.train_data.images.index)
        return {
            "learns": f"{', '.join(learns)} of {self.recipe.sam3.checkpoint}",
            "teacher": f"{asked.checkpoint}, {where}",
            "prompts": f"{self.recipe.derived()['prompts']()}; {masks:,} images to learn from have objects to show, "
            "the others places on a grid",
            "data": f"{data.index}  {self.train_size:,} images, {len(self.val_data):,} held out, {self.image_size} px "
            f"{data.resize}",
        }

    def train_batches(self, start: int, steps: int, micro_batch: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; what is shown depends on the image's number in the run only."""
        return self.divide(start, steps, micro_batch, numbered=True)

    def samples(self, batch: Batch) -> list[str]:
        return self.train_data.images.keys[batch["positions"].tolist()]

    def taught(self, batch: Batch, pixels_B3SS: Tensor) -> Taught:
        """Return the teacher's features, float32: read from the store or made here."""
        if self.trunk is None:
            fields = {name: batch[name].to(self.device) for name in ("features", "scale") if name in batch}
            feat_BDGG = stored_features(fields)
        else:
            # In the same precision as a teacher pass, so that stored and online features are the same.
            with torch.no_grad(), frozen_autocast(self.device, self.recipe.train.precision):
                feat_BDGG = self.trunk(pixels_B3SS)
        valid_B1GG = valid_mask(batch["sizes"], self.image_size, self.grid).to(self.device)
        return Taught(feat_BDGG, valid_B1GG, self.mean_D, self.deviation_D)

    def run(self, student: nn.Module, batch: Batch, asking: bool) -> tuple[dict[str, Tensor], dict[str, Prompts]]:
        """Return what the student makes of a batch, and the prompts; `asking`: also by example boxes."""
        pixels_B3SS = normalise(batch["pixels"].to(self.device, non_blocking=True))
        prompts = draw_prompts(self.recipe, batch, self.image_size, self.device)
        asked = draw_exemplars(self.recipe, batch, self.tokenizer, self.device) if asking else None
        taught = self.taught(batch, pixels_B3SS)
        with self.place.autocast():
            return student(pixels_B3SS, taught, prompts, asked), prompts

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.run(student, batch, asks(self.recipe, batch["numbers"][0]))[0]

    @torch.no_grad()
    def validate(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums for `summarise`; under `/NAME` what NAME is divided by: images or prompts."""
        found, prompts = self.run(student, batch, self.recipe.prompts.exemplar > 0)
        images = (batch["sizes"][:, 0] > 0).sum().double().to(self.device)
        sums = nothing_compared(self.device) | {"images": images}
        sums |= {name: value for name, value in found.items() if name.startswith("heads_")}
        for name in TERMS:
            # Means over the batch's images, of which some may be padding; those of features over the others.
            of = images if name in FEATURES else torch.full_like(images, len(batch["numbers"]))
            sums[f"loss_{name}"] = found[name].double() * of
        sums["loss"] = torch.stack([getattr(self.recipe.loss, name) * sums[f"loss_{name}"] for name in TERMS]).sum()
        for kind, one in prompts.items():
            seen_N = one.weight_N > 0
            for which in ("", "_corrected"):
                if (value_N := found.get(f"masks_{kind}{which}")) is not None:
                    sums[f"masks_{kind}{which}"] = (value_N * seen_N).sum().double()
            sums[f"/{kind}"] = seen_N.sum().double()
            sums["heads_masks"] = sums["heads_masks"] + sums[f"masks_{kind}"]
            sums["heads_objects"] = sums["heads_objects"] + sums[f"/{kind}"]
        return sums

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return how far student and teacher agree, by `losses.agreement` and by kind of prompt, and mean losses.

        Raises:
            UserError: they are sums of nothing.
        """
        if not (images := float(sums["images"])):
            raise UserError(
                f"data.index: nothing was measured: none of the {len(self.val_data):,} held-out images can be read "
                f"({self.recipe.folder}/unreadable.jsonl names them)"
            )
        found = agreement(sums)
        for name, value in sums.items():
            if name.startswith("masks_"):
                found[f"heads_{name}"] = float(value / sums[f"/{name.split('_')[1]}"])
            elif name.startswith("loss"):
                found[name] = float(value) / images
        return {f"val/{name}": value for name, value in found.items()}

    def conclude(self, start: Mapping[str, float], best: Mapping[str, float]) -> str:
        names = [name for name in best if name.startswith("val/heads")] + ["val/loss", "val/loss_cosine"]
        rows = [
            [title, *(f"{values[name]:.4f}" for name in names)]
            for title, values in (("at the start", start), (f"trained, step {best['step']}", best))
        ]
        titles = [name.removeprefix("val/").replace("heads_", "").replace("_", " ") for name in names]
        return table(rows, ["held-out images, next to the teacher", *titles])


STAGE: type[Stage] = PromptedStage  # what `train` builds
