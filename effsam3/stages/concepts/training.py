# SPDX-License-Identifier: Apache-2.0
"""Stage concepts: parts of a SAM 3's detector learn through its heads, from annotated phrases, a teacher's answers, or
both. All phrases of an image share one pass of the trunk.

Letters: B images, K phrases of an image, R = B K phrases, N instances of a phrase, S image side in pixels, D channels
of the trunk, G side of its grid, M side of the masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from effsam3.benchmarks.concepts.answered import answered_row
from effsam3.benchmarks.concepts.cgf1 import SCORE, metrics
from effsam3.data.concepts.training import ConceptPhrases
from effsam3.data.images.features import stored_features
from effsam3.data.transforms import normalise, valid_mask
from effsam3.errors import ChassisError, UserError
from effsam3.hardware.accelerator import on_main
from effsam3.losses.answers import teacher_loss
from effsam3.losses.detection import Instances, annotated_loss
from effsam3.losses.features import feature_loss
from effsam3.models.chassis.classes import empty_model
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.slim import slim_config, slim_model, slim_tensors
from effsam3.models.chassis.tensors import TRUNK, fingerprint, read_config, read_tensors
from effsam3.models.heads.concept_student import DETECTOR, ConceptStudent, adapted_layers, unused_of
from effsam3.models.heads.detector import Answers, Asked, answer, ask, detector_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.lora.adapter import PREFIX
from effsam3.models.lora.student import Adapters
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.models.trainable import count_parameters, find_trainable, outermost
from effsam3.recipe.rules import Section
from effsam3.stages.base import StageBase, keep_whole
from effsam3.stages.concepts.facts import SOURCES, ConceptsRecipe
from effsam3.stages.concepts.phrases import draw_concepts, pairs_to_learn_from, phrases_of
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

SHOWN = 3  # places of a module in the header; the others are counted
MASK_SIDE = 4  # of the answers' masks, times the grid's


NEEDS = (pairs_to_learn_from,)

# ---- what learns


def load_teacher(recipe: ConceptsRecipe) -> Any:
    """Load the teacher, without its trunk where a store has what that makes of the images.

    Raises:
        ChassisError: its trunk is another one than the recipe asks for.
        UserError: it takes other images than the SAM 3 that learns.
    """
    asked = recipe.teacher
    folder = chassis_folder(asked.checkpoint, asked.revision)
    refuse_other_sizes(config_at_hand(recipe.sam3.checkpoint), config_at_hand(str(folder)))
    if asked.fingerprint is not None and (found := fingerprint(read_tensors(folder, TRUNK))) != asked.fingerprint:
        raise ChassisError(
            f"teacher.fingerprint: the trunk of {asked.checkpoint} has the fingerprint {found}, the recipe asks for "
            f"{asked.fingerprint}; check teacher.checkpoint and teacher.revision, or correct it"
        )
    teacher = load_sam3(folder)
    return teacher if asked.store is None else without_trunk(teacher)


def make_student(recipe: ConceptsRecipe, model: nn.Module) -> ConceptStudent:
    """Take out of a whole SAM 3 what the recipe trains.

    Raises:
        UserError: its detector has no such module, its trunk cannot be recomputed, or adapters are asked for in what
            is trained.
    """
    found = trainable_of(recipe, model)
    trained = outermost([place for places in found.values() for place in places])
    asked, adapters = recipe.adapters, None
    if asked.parts:
        adapters = Adapters(parts=asked.parts, rank=asked.rank, alpha=asked.alpha, dropout=asked.dropout)
        starts = tuple(f"{DETECTOR}{place}." for place in trained)
        if twice := [name for name in adapted_layers(model, asked.parts) if name.startswith(starts)]:
            raise UserError(
                f"adapters.parts: {len(twice)} layers, such as {twice[0]}, are trained themselves (model.trainable: "
                f"{', '.join(recipe.model.trainable)}); leave them out of one of both"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # every rank builds the same adapters
        return ConceptStudent(model, trained, recipe.train.recompute, adapters)


def changed_tensors(student: ConceptStudent) -> list[str]:
    """Return the names of the tensors of the whole model that a merge changes."""
    plain = [DETECTOR + name for name in student.state_dict() if not name.startswith(PREFIX)]
    return [*plain, *(f"{name}.weight" for name in student.modules_adapted)]


def trainable_of(recipe: ConceptsRecipe, model: Any) -> dict[str, list[str]]:
    """Return what each name of `model.trainable` means in the detector of a whole SAM 3."""
    detector = model.detector_model
    return find_trainable(detector, recipe.model.trainable, unused_of(detector), "detector", ", by phrases")


def untrained(recipe: ConceptsRecipe, config: Any = None) -> ConceptStudent:
    """Build the recipe's student without the values of its tensors; `config` is that of the whole SAM 3."""
    config = config or config_at_hand(recipe.sam3.checkpoint)
    return make_student(recipe, empty_model(slim_config(config, recipe.encoder_layers)))


class Inputs(NamedTuple):
    """A micro-batch on the device."""

    pixels_B3SS: Tensor
    asked: Asked
    instances: Instances
    annotated_R: Tensor  # bool: its instances are known
    seen_R: Tensor  # bool: it is asked, and its image could be read
    valid_B1GG: Tensor  # 1 on images that could be read
    stored_BDGG: Tensor | None  # the teacher's trunk features, where a store has them


class Taught(NamedTuple):
    """What the teacher makes of a micro-batch."""

    feat_BDGG: Tensor
    answers: Answers | None  # None where only features are learned


class ConceptsStage(StageBase):
    """Parts of a detector, images and phrases, and a teacher if there is one."""

    recipe: ConceptsRecipe
    train_data: ConceptPhrases
    val_data: ConceptPhrases

    def __init__(self, recipe: ConceptsRecipe, place: Place, model: Any, teacher: Any | None):
        """`model` and `teacher` are whole SAM 3s."""
        super().__init__(recipe, place)
        self.max_unreadable = recipe.data.max_unreadable
        self.found = trainable_of(recipe, model)
        detector, unused = model.detector_model, unused_of(model.detector_model)
        used = {name: one for name, one in detector.named_parameters() if not name.startswith(unused)}
        self.whole = sum(one.numel() for one in used.values())
        self.counts = {name: count_parameters(used, places) for name, places in self.found.items()}
        self.student = make_student(recipe, model)
        self.student_parameters = sum(one.numel() for one in self.student.parameters() if one.requires_grad)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        scales = recipe.optim
        self.lr_scales = {
            "vision_encoder.": scales.vision_scale,
            "text_encoder.": scales.text_scale,
            "text_projection.": scales.text_scale,
        }
        backbone = trunk_config(model.config)
        self.image_size, self.grid = backbone.image_size, backbone.image_size // backbone.patch_size
        self.channels = backbone.hidden_size
        self.facts: dict[str, Any] = {"image_size": self.image_size, "trainable": self.found}
        self.tokenizer = PromptTokenizer()
        if recipe.loss.features:
            self.trunk_statistics()  # refused before anything is read

    @classmethod
    def from_recipe(cls, recipe: ConceptsRecipe, report: Report, accelerator: Accelerator) -> ConceptsStage:
        folder = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
        # Before anything is made: a module that is not there fails here.
        store = open_trunk_store(recipe.teacher, recipe.data)
        teacher = load_teacher(recipe) if recipe.is_taught else None
        stage = cls(recipe, accelerator, slim_model(load_sam3(folder), recipe.encoder_layers), teacher)
        for part in stage.frozen:
            part.to(accelerator.device)
        stage.student.to(accelerator.device)
        keep_whole(stage.student, accelerator)
        if recipe.data.source == "synthetic":
            on_main(accelerator, partial(draw_concepts, recipe.data))
        stage.train_data, stage.val_data = phrases_of(recipe, stage.image_size, MASK_SIDE * stage.grid, store)
        # What `merge` compares with the model that the changes go into: they only fit what they started from.
        own = slim_tensors(read_config(folder), read_tensors(folder), recipe.encoder_layers)
        stage.facts["teacher"] = {
            "checkpoint": recipe.sam3.checkpoint,
            "revision": recipe.sam3.revision,
            "fingerprint": fingerprint({name: own[name] for name in changed_tensors(stage.student)}),
        }
        return stage

    @classmethod
    def from_shapes(cls, recipe: ConceptsRecipe, place: Place) -> ConceptsStage:
        teacher = empty_model(config_at_hand(recipe.teacher.checkpoint)) if recipe.is_taught else None
        if recipe.teacher.store is not None:
            teacher = without_trunk(teacher)
        config = slim_config(config_to_come(recipe.sam3.checkpoint), recipe.encoder_layers)
        return cls(recipe, place, empty_model(config), teacher)

    def example(self, samples: int) -> Batch:
        """Return a micro-batch of `samples` images with all phrases, each with as many instances as allowed."""
        data, side, masks = self.recipe.data, self.image_size, MASK_SIDE * self.grid
        rows, most = samples * data.phrases, data.objects
        batch: Batch = {}
        if self.recipe.teacher.store is not None:
            shape = (samples, self.channels, self.grid, self.grid)
            batch["features"] = torch.empty(shape, dtype=torch.float16, device="meta")
        return batch | {
            "positions": torch.arange(samples),
            "pixels": torch.empty(samples, 3, side, side, dtype=torch.uint8, device="meta"),
            "sizes": torch.full((samples, 2), side),
            "phrases": ["x"] * rows,
            "counted": torch.ones(rows, dtype=torch.bool),
            "image_R": torch.arange(samples).repeat_interleave(data.phrases),
            "boxes": torch.empty(rows, most, 4, device="meta"),
            "masks": torch.empty(rows, most, masks, masks, dtype=torch.uint8, device="meta"),
            "valid": torch.ones(rows, most, dtype=torch.bool),
            "annotated": torch.ones(rows, dtype=torch.bool),
        }

    @property
    def frozen(self) -> list[nn.Module]:
        return [model.detector_model for model in (self.student.model, self.teacher) if model is not None]

    def trunk_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation of the teacher's features by channel, which a student's trunk keeps.

        Raises:
            UserError: the trunk is no student's.
        """
        trunk = self.student.model.detector_model.vision_encoder.backbone
        if not hasattr(trunk, "feature_scale"):
            raise UserError(
                "loss.features: features are compared in units of their deviations, which only a student's trunk "
                f"keeps, and {self.recipe.sam3.checkpoint} has SAM 3's own; set loss.features=0"
            )
        return trunk.feature_mean, trunk.feature_scale

    # ---- what the loop calls

    def describe(self) -> dict[str, str]:
        data, loss = self.recipe.data, self.recipe.loss
        share = self.student_parameters / self.whole
        learns = [f"{self.student_parameters / 1e6:.2f} M of {self.whole / 1e6:.2f} M parameters ({share:.1%})"]
        for name, places in self.found.items():
            where = "" if places == [name] else f": {len(places)} x, {', '.join(places[:SHOWN])}"
            where += " ..." if len(places) > SHOWN else ""
            learns.append(f"{name} {self.counts[name] / 1e6:.2f} M ({self.counts[name] / self.whole:.1%}){where}")
        if adapters := self.student.modules_adapted:
            asked = self.recipe.adapters
            learns.append(f"LoRA r {asked.rank} on {len(adapters)} layers of {', '.join(asked.parts)}")
        sources = [f"{name} x {weight:g}" for name in SOURCES if (weight := getattr(loss, name))]
        lines = [
            f"{data.path}; {len(self.train_data):,} images, {len(self.val_data):,} held out, {data.phrases} phrases "
            f"each, {data.negatives:.0%} of them absent, {self.image_size} px"
        ]
        noted = Counter(note.reason for note in (*self.train_data.notes, *self.val_data.notes))
        lines += [f"{count:,} x {reason}" for reason, count in noted.items()]
        trunk = any("vision_encoder.backbone." in name for name, _ in self.student.named_parameters())
        note = {
            "note": "the trunk is the tracker's, too, which is not trained along: measure it, or set loss.features"
        }
        break_ = "\n         "
        return (note if trunk and not loss.features else {}) | {
            "learns": break_.join(learns),
            "truth": ", ".join(sources) + (f"; teacher {self.recipe.teacher.checkpoint}" if self.teacher else ""),
            "data": break_.join(lines),
        }

    def train_batches(self, start: int, steps: int, micro_batch: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; an image's phrases depend on its number in the run only."""
        return self.divide(start, steps, micro_batch, numbered=True)

    def samples(self, batch: Batch) -> list[str]:
        return [self.train_data.keys[position] for position in batch["positions"].tolist()]

    def inputs(self, batch: Batch) -> Inputs:
        """Bring a micro-batch to the device."""
        to = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        image_R, sizes_B2 = to(batch["image_R"]), to(batch["sizes"])
        seen_R = (sizes_B2[:, 0] > 0)[image_R] & to(batch["counted"])
        return Inputs(
            normalise(to(batch["pixels"])),
            ask(batch["phrases"], image_R, self.tokenizer),
            Instances(to(batch["boxes"]), to(batch["masks"]).float() / 255, to(batch["valid"])),
            to(batch["annotated"]) & seen_R,
            seen_R,
            valid_mask(sizes_B2, self.image_size, self.grid),
            stored_features({name: to(batch[name]) for name in ("features", "scale") if name in batch})
            if "features" in batch
            else None,
        )

    @torch.no_grad()
    def taught(self, inputs: Inputs) -> Taught | None:
        """Return what the teacher makes of a micro-batch: one pass of its trunk, whatever is asked."""
        if self.teacher is None:
            return None
        with self.place.autocast():
            feat_BDGG = inputs.stored_BDGG
            if feat_BDGG is None:
                feat_BDGG = trunk_features(self.teacher, inputs.pixels_B3SS)
            answers = None
            if self.recipe.loss.teacher:
                answers = answer(self.teacher, detector_levels(self.teacher, feat_BDGG), inputs.asked)
        return Taught(feat_BDGG, answers)

    def terms(self, inputs: Inputs, taught: Taught | None, feat_BDGG: Tensor, answers: Answers) -> dict[str, Tensor]:
        """Return the weighted `loss`, each source's share of it, and the terms of each source, scalars."""
        weights, each, sums = self.recipe.loss, {}, {}
        if weights.annotations:
            each["annotations"] = annotated_loss(answers, inputs.instances, inputs.annotated_R)
            sums["annotations"] = weighted(each["annotations"], weights.annotated)
        if weights.teacher and taught is not None and taught.answers is not None:
            each["teacher"] = teacher_loss(answers, taught.answers, inputs.seen_R)
            sums["teacher"] = weighted(each["teacher"], weights.taught)
        if weights.features and taught is not None:
            maps = (feat_BDGG, taught.feat_BDGG, inputs.valid_B1GG)
            each["features"] = feature_loss(*maps, "mean", self.trunk_statistics())
            sums["features"] = torch.stack(list(each["features"].values())).sum()
        total = torch.stack([getattr(weights, source) * value for source, value in sums.items()]).sum()
        named = {f"{source}_{name}": value for source, own in each.items() for name, value in own.items()}
        return {"loss": total, **sums, **named}

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs = self.inputs(batch)
        terms = partial(self.terms, inputs, self.taught(inputs))
        with self.place.autocast():
            return student(inputs.pixels_B3SS, inputs.asked, terms)

    @torch.no_grad()
    def validate(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums for `summarise`: of the losses over phrases, and of what cgF1 counts."""
        inputs = self.inputs(batch)
        taught = self.taught(inputs)

        def judged(feat_BDGG: Tensor, answers: Answers) -> dict[str, Tensor]:
            truth, known_R = inputs.instances, inputs.annotated_R
            masks_RNMM, valid_RN = truth.masks_RNMM > 0.5, truth.valid_RN
            if self.recipe.data.source == "images":
                # Nobody has marked them: what the teacher finds counts as true.
                assert taught is not None and taught.answers is not None
                masks_RNMM, valid_RN = taught.answers.masks_RQMM > 0, taught.answers.scores_RQ >= SCORE
                known_R = inputs.seen_R
            row_S = answered_row(answers, masks_RNMM, valid_RN, known_R)
            right_R = (answers.presence_LR[-1] > 0) == valid_RN.any(1)
            found = self.terms(inputs, taught, feat_BDGG, answers)
            # The losses are means over the batch's phrases, of which some may be padding.
            sums = {name: value.double() * len(right_R) for name, value in found.items()}
            return sums | {
                "counts": row_S,
                "presence": (right_R & known_R).sum().double(),
                "annotated": known_R.sum().double(),
                "phrases": inputs.seen_R.sum().double(),
            }

        with self.place.autocast():
            return student(inputs.pixels_B3SS, inputs.asked, judged)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return cgF1 and its parts (0..1), how often presence is right, and means of the losses."""
        row_S, annotated = sums.pop("counts").cpu().numpy(), float(sums.pop("annotated"))
        right, phrases = float(sums.pop("presence")), max(float(sums.pop("phrases")), 1.0)
        found = {f"val/{name if name == 'loss' else f'loss_{name}'}": float(value) / phrases
                 for name, value in sums.items()}  # fmt: skip
        if annotated:
            found |= {f"val/{name}": float(metrics(row_S)[name]) for name in ("cgF1", "pmF1", "IL_MCC")}
            found["val/presence"] = right / annotated
        return found

    def conclude(self, start: Mapping[str, float], best: Mapping[str, float]) -> str:
        names = ("cgF1", "pmF1", "IL_MCC", "presence", "loss")
        rows = [
            [title, *(f"{values[f'val/{name}']:.4f}" if f"val/{name}" in values else "-" for name in names)]
            for title, values in (("at the start", start), (f"trained, step {best['step']}", best))
        ]
        return table(rows, ["held-out pairs, at the size of the answers", *names])


def weighted(terms: Mapping[str, Tensor], weights: Section) -> Tensor:
    """Return the sum of a source's terms by their weights in the recipe."""
    return torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()


STAGE: type[Stage] = ConceptsStage  # what `train` builds
