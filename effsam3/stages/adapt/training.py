# SPDX-License-Identifier: Apache-2.0
"""Stage adapt: adapters learn to segment a domain's images, next to the frozen SAM 3 whose features they change.

Letters: B images, N object slots of an image, O objects of all images, R images with a phrase, I instances, S image
side in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from effsam3.data.images.pair_batches import PairBatches, solid
from effsam3.data.transforms import normalise
from effsam3.errors import UserError
from effsam3.losses.masks import object_weights
from effsam3.models.chassis.classes import empty_model, model_class
from effsam3.models.chassis.find import chassis_folder, config_at_hand
from effsam3.models.chassis.tensors import fingerprint, load_whole, read_config, read_tensors
from effsam3.models.heads.detector import PADDING, Asked, ask
from effsam3.models.heads.tracker import Shown
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.image.teacher import check_features
from effsam3.models.lora.adapter import write_adapter
from effsam3.models.lora.student import Adapters, AdapterStudent, Targets, boxes_of, to_centres
from effsam3.models.lora.targets import view_biases
from effsam3.models.memory.prompts import NO_POINT, PromptStyle, draw_kind, draw_prompt
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.stages.adapt.facts import SHOWN, TERMS, AdaptRecipe
from effsam3.stages.adapt.images import (
    OwnImages,
    images_that_can_be_read,
    images_to_adapt_to,
    readable,
    ready_images,
)
from effsam3.stages.base import StageBase, keep_whole
from effsam3.stages.protocol import Batch, Place, Stage
from effsam3.training.checkpoint import chosen, read_weights
from effsam3.training.report import Report, table

ADAPTER = "adapter"  # folder of a run: its adapters alone
VIEWS = "views.weight"  # of what learns, the one tensor that is no adapter's
LOOKED_AT = 4  # images whose features the guard sees


NEEDS = (images_to_adapt_to, images_that_can_be_read)


def make_student(recipe: AdaptRecipe, model: nn.Module, views: int) -> AdapterStudent:
    """Put the recipe's adapters on a whole SAM 3."""
    asked: Any = recipe.adapters
    adapters = Adapters(parts=asked.parts, rank=asked.rank, alpha=asked.alpha, dropout=asked.dropout)
    config: Any = model.config
    channels = config.detector_config.vision_config.fpn_hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # every rank builds the same adapters
        return AdapterStudent(model, adapters, views, channels, recipe.terms, recipe.train.recompute)


def untrained(recipe: AdaptRecipe) -> AdapterStudent:
    """Build the recipe's student without the values of its tensors; of views, it has two."""
    model = empty_model(config_at_hand(recipe.sam3.checkpoint))
    with torch.device("meta"):
        return make_student(recipe, model, views=2 if recipe.data.view is not None else 0)


def changed_tensors(recipe: AdaptRecipe, modules: list[str], views: bool) -> list[str]:
    """Return the names of the tensors of the whole model that a merge changes."""
    biases = view_biases(tracker=recipe.shows_objects, detector=recipe.asks_phrases) if views else ()
    return sorted({f"{name}.weight" for name in modules} | set(biases))


class Inputs(NamedTuple):
    """What the student's forward takes, on the device; and the kind of prompt of each object."""

    pixels_B3SS: Tensor
    view_B: Tensor
    shown: Shown | None
    asked: Asked | None
    targets: Targets
    kinds_O: list[str]

    @property
    def arguments(self) -> tuple:
        """All but the kinds."""
        return self[:5]


class AdaptStage(StageBase):
    """Adapters on a frozen SAM 3, images, masks and prompts."""

    recipe: AdaptRecipe
    train_data: PairBatches
    val_data: PairBatches
    image_size: int

    def __init__(self, recipe: AdaptRecipe, place: Place, model: nn.Module, views: list[str]):
        super().__init__(recipe, place)
        self.max_unreadable = recipe.data.max_unreadable
        self.model: Any = model
        self.views = views
        self.student = make_student(recipe, model, len(views))
        self.student_parameters = sum(parameter.numel() for parameter in self.student.parameters())
        config: Any = model.config
        self.image_size = config.detector_config.vision_config.backbone_config.image_size
        self.facts: dict[str, Any] = {"image_size": self.image_size, "views": views}
        self.tokenizer = PromptTokenizer()
        self.notes: dict[str, str] = {}  # lines for the header

    @classmethod
    def from_recipe(cls, recipe: AdaptRecipe, report: Report, accelerator: Accelerator) -> AdaptStage:
        folder = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
        images = ready_images(recipe, accelerator)
        model = load_whole(model_class(read_config(folder).model_type), folder)
        stage = cls(recipe, accelerator, model, images.views)
        for part in stage.frozen:
            part.to(accelerator.device)
        stage.student.to(accelerator.device)
        keep_whole(stage.student, accelerator)
        stage.train_data = images.batches(recipe, "train", stage.image_size)
        stage.val_data = images.batches(recipe, "val", stage.image_size)
        stage.val_data.pairs = images.val[: recipe.train.eval_samples]
        stage.refuse_other_features()
        stage.refuse_unreached(images)
        changed = changed_tensors(recipe, stage.student.modules_adapted, bool(images.views))
        own = read_tensors(folder)
        # What `merge` compares with the chassis: adapters only mean something on the weights that they learned on.
        stage.facts["teacher"] = {
            "checkpoint": recipe.sam3.checkpoint,
            "revision": recipe.sam3.revision,
            "fingerprint": fingerprint({name: own[name] for name in changed}),
        }
        adapted = {f"{name}.weight": own[f"{name}.weight"] for name in stage.student.modules_adapted}
        stage.facts["adapted"] = fingerprint(adapted)
        counts = Counter(note.reason for note in images.notes)
        if counts:
            told = ", ".join(f"{count:,} x {reason}" for reason, count in counts.most_common())
            stage.notes["left out"] = f"{told}; effsam3 data check {recipe.data.path} names them"
        return stage

    @classmethod
    def from_shapes(cls, recipe: AdaptRecipe, place: Place) -> AdaptStage:
        views = ["one", "other"] if recipe.data.view is not None else []
        return cls(recipe, place, empty_model(config_at_hand(recipe.sam3.checkpoint)), views)

    def example(self, samples: int) -> Batch:
        """Return a micro-batch of `samples` images with as many objects as allowed, in turn shown and asked for."""
        asked, side = self.recipe, self.image_size
        masks = torch.zeros(samples, asked.data.objects, side, side, dtype=torch.uint8)
        masks[..., : side // 2, : side // 2] = 255
        by_text = [asked.asks_phrases and not (asked.shows_objects and place % 2) for place in range(samples)]
        return {
            "pixels": torch.empty(samples, 3, side, side, dtype=torch.uint8, device="meta"),
            "masks": masks,
            "valid": torch.ones(samples, asked.data.objects, dtype=torch.bool),
            "views": torch.zeros(samples, dtype=torch.int64),
            "texts": ["x" if asks else None for asks in by_text],
            "numbers": list(range(samples)),
        }

    @property
    def frozen(self) -> list[nn.Module]:
        """What runs next to the adapters; the rest of the model stays where it was loaded."""
        parts = [self.model.tracker_neck, self.model.tracker_model] if self.recipe.shows_objects else []
        # The whole detector, text encoder and all, only where phrases are asked for.
        detector = self.model.detector_model
        return [*parts, detector if self.recipe.asks_phrases else detector.vision_encoder.backbone]

    # ---- guards

    @torch.no_grad()
    def refuse_other_features(self) -> None:
        """Refuse a trunk that does not look at the images: all that is learned would rest on it.

        Raises:
            ChassisError: its features are a resized picture, not finite, or the same for every image.
            UserError: no image can be read; blank ones would have the same features.
        """
        batch = self.train_data.__getitems__(readable(self.train_data.pairs, LOOKED_AT, self.recipe.data.path))
        pixels_B3SS = normalise(batch["pixels"].to(self.device))
        check_features(trunk_features(self.model, pixels_B3SS), pixels_B3SS)

    def refuse_unreached(self, images: OwnImages) -> None:
        """Refuse adapters that no loss of this recipe reaches: they would never learn, and DDP would wait for them.

        Raises:
            UserError: there are some, or no image has an object to prompt.
        """
        shares = [0.0] * self.recipe.shows_objects + [1.0] * self.recipe.asks_phrases
        missing: set[str] | None = None
        for text in shares:
            data = images.batches(self.recipe, "train", self.image_size, text)
            for position in range(len(data)):
                batch = data.__getitems__([position])
                if batch["valid"].any() and (batch["texts"][0] is None) == (text == 0):
                    break
            else:
                raise UserError(f"data.path: no image of {self.recipe.data.path} has an object that can be prompted")
            with self.place.autocast():
                idle = set(self.student.train().unreached(*self.inputs(batch).arguments))
            missing = idle if missing is None else missing & idle
        if missing:
            raise UserError(
                f"adapters.parts: {len(missing)} tensors would never get a gradient (first: {min(missing)}); leave "
                "their part out"
            )

    # ---- what the loop calls

    def saved(self, run: Path) -> None:
        """Write the best adapters so far as peft reads them."""
        weights = read_weights(chosen(run / "checkpoints", "best"))
        made_on = self.facts["teacher"]
        about = {
            "chassis": made_on["checkpoint"],
            "revision": made_on["revision"],
            "fingerprint": self.facts["adapted"],
            "modules": self.student.modules_adapted,
            "views": self.views,
        }
        adapters = {name: tensor for name, tensor in weights.items() if name != VIEWS}
        write_adapter(run / ADAPTER, adapters, self.student.config, about, weights.get(VIEWS))

    def describe(self) -> dict[str, str]:
        data, asked = self.recipe.data, self.recipe.adapters
        frozen = sum(p.numel() for part in self.frozen for p in part.parameters() if not p.requires_grad)
        lines = {
            "adapters": f"r {asked.rank}, alpha {asked.alpha:g}, dropout {asked.dropout:g} on "
            f"{len(self.student.modules_adapted)} layers of {', '.join(asked.parts)}  "
            f"{self.student_parameters / 1e6:.3f} M parameters learn, {frozen / 1e6:.2f} M are frozen",
            "model": f"{self.recipe.sam3.checkpoint}, its trunk runs in every step",
            "data": f"{data.path}  {len(self.train_data):,} images, {len(self.val_data):,} held out, at most "
            f"{data.objects} objects, {self.image_size} px",
        }
        if "trunk" in asked.parts:
            idle = [] if self.recipe.asks_phrases else ["text prompts (prompts.text)"]
            idle += [] if self.recipe.shows_objects else ["points, boxes and videos (prompts.box, prompts.point)"]
            unseen = f"; {' and '.join(idle)} are not trained along: measure them, too" if idle else ""
            lines["note"] = f"adapters of the trunk change what detector and tracker both read{unseen}"
        if self.views:
            lines["views"] = f"{', '.join(self.views)}; a merge takes one of them (merge.view)"
        return lines | self.notes

    def train_batches(self, start: int, steps: int, micro_batch: int) -> Iterable[Batch]:
        """Yield this rank's micro-batches; what is drawn at random depends on the image's number in the run only."""
        return self.divide(start, steps, micro_batch, numbered=True)

    def samples(self, batch: Batch) -> list[str]:
        return list(batch["keys"])

    def inputs(self, batch: Batch) -> Inputs:
        """Return what the student's forward takes, with prompts drawn by the images' numbers."""
        masks, valid_BN, texts = batch["masks"], batch["valid"], batch["texts"]
        by_text_B = torch.tensor([text is not None for text in texts])
        pixels = normalise(batch["pixels"].to(self.device, non_blocking=True))
        image_O, slot_O = (valid_BN & ~by_text_B[:, None]).nonzero(as_tuple=True)
        prompts = self.recipe.prompts
        shares = {kind: getattr(prompts, kind) for kind in SHOWN}
        style = PromptStyle(
            prompts.points, prompts.centre, prompts.negatives, jitter=prompts.jitter, jitter_px=prompts.jitter_px
        )
        drawn, kinds_O = [], []
        for image, slot in zip(image_O.tolist(), slot_O.tolist(), strict=True):
            rng = self._prompt_rng(batch["numbers"][image], slot)
            kinds_O.append(draw_kind(shares, rng))
            drawn.append(draw_prompt(solid(masks[image, slot]), kinds_O[-1], rng, style))
        shown = None
        if drawn:
            points_OP2 = pad_sequence([points for points, _ in drawn], batch_first=True)
            labels_OP = pad_sequence([labels for _, labels in drawn], batch_first=True, padding_value=NO_POINT)
            shown = Shown(image_O.to(self.device), points_OP2.to(self.device), labels_OP.to(self.device))
        targets = Targets(
            _shares(masks[image_O, slot_O]).to(self.device),
            object_weights(image_O, len(texts)).to(self.device),
            _shares(masks[by_text_B]).to(self.device),
            valid_BN[by_text_B].to(self.device),
            torch.full((int(by_text_B.sum()),), 1 / len(texts), device=self.device),
        )
        asked = self._asked(batch, by_text_B, targets) if by_text_B.any() else None
        return Inputs(pixels, batch["views"].to(self.device), shown, asked, targets, kinds_O)

    def _prompt_rng(self, number: int, slot: int = 0) -> np.random.Generator:
        """By the image's number, so that prompts are the same on any number of ranks and after resuming."""
        # The last number tells it from the generator of the image's sample: numpy takes a missing one for 0, and what
        # has decided between a phrase and objects would also decide which kind of prompt shows the first of these.
        return np.random.default_rng([self.recipe.train.seed, number, slot, 1])

    def _asked(self, batch: Batch, by_text_B: Tensor, targets: Targets) -> Asked:
        """Return the phrases, some of them with an example: the box of one of the true instances."""
        image_R = by_text_B.nonzero()[:, 0]
        asked = ask([batch["texts"][image] for image in image_R.tolist()], image_R, self.tokenizer)
        boxes_RI4 = boxes_of(targets.masks_RISS).cpu()
        boxes_R14, labels_R1 = torch.zeros(len(image_R), 1, 4), torch.full((len(image_R), 1), PADDING)
        for row, image in enumerate(image_R.tolist()):
            there_N = batch["valid"][image].nonzero()[:, 0]
            rng = self._prompt_rng(batch["numbers"][image])
            if len(there_N) and rng.random() < self.recipe.prompts.exemplar:
                boxes_R14[row, 0] = to_centres(boxes_RI4[row, there_N[rng.integers(len(there_N))]])
                labels_R1[row] = 1
        if (labels_R1 != PADDING).any():
            asked = asked._replace(boxes_RN4=boxes_R14, box_labels_RN=labels_R1)
        return asked.each(lambda own: own.to(self.device))

    def loss(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        arguments = self.inputs(batch).arguments
        with self.place.autocast():
            return student(*arguments)

    @torch.no_grad()
    def validate(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums for `summarise`, and under `/NAME` what NAME is divided by: images, or what was prompted."""
        inputs = self.inputs(batch)
        with self.place.autocast():
            found = student(*inputs.arguments)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        shown, asked = inputs.targets.weight_O.double().sum(), inputs.targets.weight_R.double().sum()
        counts = {"loss": shown + asked} | {
            f"loss_{name}": shown * bool(set(TERMS[name]) & set(SHOWN)) + asked * ("text" in TERMS[name])
            for name in self.recipe.terms
        }
        # Each term is a mean over the batch's images, of which some may be padding.
        sums = {name: found.get(name.removeprefix("loss_"), zero).double() for name in counts}
        sums |= {f"/{name}": count for name, count in counts.items()}
        for name in ("iou", "dice"):
            of_kind = {"text": found.get(f"{name}_R", zero[None][:0])}
            fits_O = found.get(f"{name}_O", zero[None][:0])
            for kind in SHOWN:
                of_kind[kind] = fits_O[torch.tensor([own == kind for own in inputs.kinds_O], dtype=torch.bool)]
            for kind in self.recipe.kinds:
                sums[f"{name}_{kind}"] = of_kind[kind].double().sum()
                sums[f"/{name}_{kind}"] = zero + of_kind[kind].numel()
        return sums

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return means: of the loss and its terms over images, of IoU and Dice over all that was prompted."""
        for name in ("iou", "dice"):
            for slash in ("", "/"):
                sums[slash + name] = sum(
                    (sums[f"{slash}{name}_{kind}"] for kind in self.recipe.kinds), torch.zeros(())
                )
        names = sorted(name for name in sums if not name.startswith("/"))
        return {f"val/{name}": float(sums[name] / sums[f"/{name}"]) for name in names if sums[f"/{name}"] > 0}

    def conclude(self, start: Mapping[str, float], best: Mapping[str, float]) -> str:
        names = ["loss", "iou", "dice", *(f"iou_{kind}" for kind in self.recipe.kinds)]
        rows = [
            [title, *(f"{values[f'val/{name}']:.4f}" if f"val/{name}" in values else "-" for name in names)]
            for title, values in (("at the start", start), (f"adapted, step {best['step']}", best))
        ]
        return table(rows, ["held-out images", *(name.replace("_", ", ") for name in names)])


def _shares(masks_NSS: Tensor) -> Tensor:
    return masks_NSS.float() / 255


STAGE: type[Stage] = AdaptStage  # what `train` builds
