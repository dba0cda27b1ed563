# SPDX-License-Identifier: Apache-2.0
"""Stage 1, vision: a student learns what SAM 3's two necks make of its trunk.

Letters: B images, C channels of the necks, L maps of both necks, M = L * C channels of all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from effsam3.data.statistics import FeatureStatistics
from effsam3.data.store.reader import StoreReader
from effsam3.files import atomic_file
from effsam3.hardware.accelerator import frozen_autocast, on_main
from effsam3.losses.features import agreement_sums, map_means, mean_over_images
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.sizes import at_image_size, sam3_of
from effsam3.models.chassis.tensors import fingerprint, load_part, read_tensors
from effsam3.models.image.backbones import image_student
from effsam3.models.image.student import load_timm_weights, resize_BCHW
from effsam3.models.image.teacher import Teacher
from effsam3.models.merging.slots import SLOTS
from effsam3.models.vision.slot import build_vision_student
from effsam3.models.vision.start import Components, begin_as, principal_components
from effsam3.models.vision.training import MAPS, Necks, VisionStudent
from effsam3.recipe.rules import names_a_model
from effsam3.stages.base import untied_note
from effsam3.stages.image.training import ImagesStage, Taught, both_splits
from effsam3.stages.protocol import Batch, Place, Stage
from effsam3.stages.vision.facts import VisionRecipe
from effsam3.tensor_files import read_safetensors
from effsam3.training.report import Report


def make_student(recipe: VisionRecipe, config: Any) -> VisionStudent:
    """Build the recipe's student for the SAM 3 with this config, and initialise it."""
    encoder = at_image_size(config, recipe.side).detector_config.vision_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # every rank builds the same student
        student = build_vision_student(encoder, recipe.student, recipe.widths, recipe.student_image_size)
    if recipe.student_init != "random" and not names_a_model(recipe.student_init):
        row = image_student(recipe.student, student.trunk.config.seen_size)
        load_timm_weights(student.trunk, recipe.student_init, row.timm_name)
    return student


def untrained(recipe: VisionRecipe) -> VisionStudent:
    """Build the recipe's student by the sizes of its SAM 3."""
    return make_student(recipe, config_at_hand(recipe.sam3.checkpoint))


NEEDS = (both_splits,)
FEW = 8  # images whose features show what SAM 3's trunk varies in: 41,000 positions of 1024 channels


class VisionStage(ImagesStage):
    """A student of trunk and necks; images, the teacher trunk's features of them, and the teacher's necks."""

    recipe: VisionRecipe
    student: VisionStudent

    def __init__(
        self,
        recipe: VisionRecipe,
        place: Place,
        facts: dict[str, Any],
        student: VisionStudent,
        teacher: Teacher | None,
        necks: Necks,
    ):
        """`facts` describe the trunk's features; `necks` are the teacher's."""
        self.necks = necks.eval().requires_grad_(False)
        self.components = Components(facts["channels"], recipe.widths[0])
        super().__init__(recipe, place, facts, student, teacher)
        self.max_unreadable = recipe.data.max_unreadable

    @classmethod
    def from_recipe(cls, recipe: VisionRecipe, report: Report, accelerator: Accelerator) -> VisionStage:
        taught = Taught.from_recipe(recipe, report, accelerator)
        folder = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
        owned = {
            name: tensor for name, tensor in read_tensors(folder).items() if name.startswith(SLOTS["vision"].owns)
        }
        # What `merge` compares with the chassis: trunk and necks, all that the student takes the place of.
        facts = taught.facts | {"teacher": taught.facts["teacher"] | {"fingerprint": fingerprint(owned)}}
        necks = Necks.from_folder(folder).to(accelerator.device)
        student = make_student(recipe, config_at_hand(str(folder)))
        stage = cls(recipe, accelerator, facts, student, taught.teacher, necks)
        stage.train_data, stage.val_data = taught.train_data, taught.val_data
        # A store has the trunk's statistics, not those of what the necks make of it.
        stage.begin(None, report, accelerator)
        stage.notes |= untied_note(taught.store)
        return stage

    def begin(self, store: StoreReader | None, report: Report, accelerator: Accelerator) -> None:
        self.set_statistics(self.online_statistics(report, accelerator))
        feat_BCGG, valid_B1GG = self.some_features()
        count, teacher = self.recipe.widths[0], self.facts["teacher"]["fingerprint"][:12]
        path = report.folder / f"trunk_components_{count}_{teacher}.safetensors"

        def make() -> None:
            if not path.is_file():
                values_PC = feat_BCGG.permute(0, 2, 3, 1)[valid_B1GG[:, 0] > 0]
                found = principal_components(values_PC, count).state_dict()
                with atomic_file(path) as partial:
                    save_file({name: value.cpu() for name, value in found.items()}, partial)

        # Once: components of like variance could come out otherwise on other hardware, and the run has learned these.
        on_main(accelerator, make)
        found = read_safetensors(path, "delete it and the run's checkpoints, and start again")
        load_part(self.components, found).to(accelerator.device)
        begin_as(self.student, self.necks, self.components, feat_BCGG, valid_B1GG)
        self.notes = self.initialise_from_model()

    def some_features(self) -> tuple[Tensor, Tensor]:
        """The teacher trunk's features of a few training images that can be read, and their valid masks."""
        found: list[tuple[Tensor, Tensor]] = []
        for batch in self.statistics_batches():
            readable = batch["sizes"][:, 0] > 0
            found.append((self.target(batch)[readable], self.valid_at(batch, self.facts["grid"])[readable]))
            if sum(len(feat) for feat, _ in found) >= FEW:
                break
        feats, masks = zip(*found, strict=True)
        return torch.cat(feats), torch.cat(masks)

    @classmethod
    def from_shapes(cls, recipe: VisionRecipe, place: Place) -> VisionStage:
        sizes, config = sam3_of(recipe.sam3.checkpoint).sizes, config_at_hand(recipe.sam3.checkpoint)
        facts = {"grid": sizes.grid, "channels": sizes.hidden_size, "image_size": sizes.image_size}
        encoder = config.detector_config.vision_config
        teacher = Teacher(encoder) if recipe.teacher == "online" else None
        return cls(recipe, place, facts, untrained(replace(recipe, student_init="random")), teacher, Necks(encoder))

    @property
    def channels(self) -> int:
        return len(MAPS) * self.necks.detector.config.fpn_hidden_size

    @property
    def frozen(self) -> list[nn.Module]:
        return [*super().frozen, self.necks, self.components]

    def describe(self) -> dict[str, str]:
        seen = self.recipe.seen
        row, sizes = image_student(self.recipe.student, seen), sam3_of(self.recipe.sam3.checkpoint).sizes
        replaced = sizes.trunk_params + 2 * sizes.neck_params
        source = "next to the student" if self.teacher is not None else f"from {self.recipe.embed.to}"
        grid, channels = self.facts["grid"], self.necks.detector.config.fpn_hidden_size
        lines = {
            "student": f"{row.label} ({self.recipe.student}, widths {', '.join(map(str, self.recipe.widths))})  "
            f"{self.student_parameters / 1e6:.2f} M parameters instead of {replaced / 1e6:.2f} M, sees {seen} px",
            "teacher": f"{self.recipe.sam3.checkpoint}, its trunk {source}; two necks with maps of {4 * grid}, "
            f"{2 * grid} and {grid} a side, {channels} channels",
            "data": f"{self.recipe.data.index}  {len(self.train_data):,} images, {len(self.val_data):,} held out, "
            f"{self.facts['image_size']} px {self.recipe.data.resize}",
        }
        return lines | self.notes

    def initialise_from_model(self) -> dict[str, str]:
        return {"weights": f"those of {self.recipe.student_init}"} if super().initialise_from_model() else {}

    @torch.no_grad()
    def targets(self, batch: Batch) -> list[Tensor]:
        """Return what the teacher's necks make of its trunk's features, `MAPS`, of the sizes of the student's."""
        return self.maps_of(self.target(batch))

    def maps_of(self, feat_BCGG: Tensor) -> list[Tensor]:
        """The same of features of the teacher's trunk."""
        with frozen_autocast(self.device, self.recipe.train.precision):
            maps = self.necks(feat_BCGG)
        return [self.of_students_size(feat) for feat in maps]

    def of_students_size(self, feat_BCHW: Tensor) -> Tensor:
        """A map of the teacher's, resized where the student is for smaller images."""
        return resize_BCHW(feat_BCHW, (feat_BCHW.shape[-1] * self.recipe.side // self.facts["image_size"],) * 2)

    def measured_statistics(self) -> dict[str, list[float]]:
        each = [FeatureStatistics(self.channels // len(MAPS)) for _ in MAPS]
        for batch in self.statistics_batches():
            for statistics, target in zip(each, self.targets(batch), strict=True):
                statistics.update(target, self.valid_at(batch, target.shape[-1]))
        found = [statistics.result() for statistics in each]
        return {name: [value for result in found for value in result[name]] for name in ("mean", "deviation")}

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        weights, feat_BCGG = self.recipe.loss, self.target(batch)
        with torch.no_grad():
            targets = self.maps_of(feat_BCGG)
            wanted_BDGG = self.of_students_size(self.components(feat_BCGG))
        terms: dict[str, list[Tensor]] = {"mse": [], "cosine": []}
        with self.place.autocast():
            pred_BDGG, preds = student(self.student_pixels(batch))
        statistics = zip(self.mean_C.chunk(len(MAPS)), self.deviation_C.chunk(len(MAPS)), strict=True)
        for pred, target, own in zip(preds, targets, statistics, strict=True):
            valid = self.valid_at(batch, target.shape[-1])
            for name, value in self.feature_loss(pred, target, valid, "mean", own).items():
                terms[name].append(value)
        means = {name: torch.stack(values).mean() for name, values in terms.items()}
        error_BGG = torch.einsum("bdgh,d->bgh", (pred_BDGG.float() - wanted_BDGG).square(), self.components.shares_K)
        means["trunk"] = mean_over_images(error_BGG, self.valid_at(batch, pred_BDGG.shape[-1]))
        return {"loss": sum(getattr(weights, name) * value for name, value in means.items()), **means}

    @torch.no_grad()
    def validate(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with self.place.autocast():
            _, preds = student(self.student_pixels(batch))
        statistics = zip(self.mean_C.chunk(len(MAPS)), self.deviation_C.chunk(len(MAPS)), strict=True)
        sums: dict[str, Tensor] = {}
        for name, pred, target, own in zip(MAPS, preds, self.targets(batch), statistics, strict=True):
            found = agreement_sums(pred, target, self.valid_at(batch, target.shape[-1]), *own)
            sums |= {f"{name}/{key}": value for key, value in found.items()}
        return sums

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Turn the sums of `validate` into means over the maps, and the cosine of each."""
        means, by_map = map_means(sums)
        means |= {f"cosine_{name}": own["cosine"] for name, own in by_map.items()}
        return {f"val/{name}": value for name, value in means.items()}


STAGE: type[Stage] = VisionStage  # what `train` builds
