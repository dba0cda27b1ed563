# SPDX-License-Identifier: Apache-2.0
"""What learns in a SAM 3 with adapters, as one module: it is optimised, saved and merged, and nothing else.

Letters: B images, O objects of all images, N some of them, R images with a phrase, I instances of a phrase at most, Q
queries, S image side in pixels, L side of the predicted masks, C channels of the necks, V views.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from effsam3.losses.detection import box_distance, match, mean_of, of_queries, score_loss, union_of
from effsam3.losses.masks import at_side, bce, dice, iou, shrink
from effsam3.models.heads.detector import Asked, answer, detector_levels
from effsam3.models.heads.tracker import Shown, decode_shown, tracker_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.lora.adapter import inject, lora_config
from effsam3.models.lora.targets import target_modules
from effsam3.models.recompute import recomputing
from effsam3.models.trainable import register

FOUND = 0.5  # probability from which an instance counts as found


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which layers get adapters, and of what size."""

    parts: tuple[str, ...]
    rank: int
    alpha: int
    dropout: float


class Targets(NamedTuple):
    """True masks, 0..1, (n, S, S) each, and their weight in the loss: all weights of a batch add up to at most 1."""

    masks_OSS: Tensor
    weight_O: Tensor
    masks_RISS: Tensor
    valid_RI: Tensor
    weight_R: Tensor


class AdapterStudent(nn.Module):
    """The adapters of a model, by peft's names in files, and an embedding of each view; the frozen rest is next to it.

    So checkpoints, optimizer and ZeRO only see what learns, though the forward runs the whole model, with its own
    trunk. What is frozen stays in eval mode: no dropout but the adapters', and BatchNorm keeps its statistics.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        adapters: Adapters,
        views: int,
        channels: int,
        weights: dict[str, float],
        recompute: bool,
    ):
        """`weights` are those of the terms of the loss, whatever a batch has of them; `views` counts the embeddings,
        of `channels` numbers; 0: none."""
        super().__init__()
        model.eval().requires_grad_(False)
        self.modules_adapted = target_modules(model, adapters.parts)
        self.config = lora_config(self.modules_adapted, adapters.rank, adapters.alpha, adapters.dropout)
        for name, parameter in inject(model, self.config).items():
            register(self, name, parameter)
        # Zeros: before the first step all views are the model itself.
        self.views = nn.Embedding(views, channels, _weight=torch.zeros(views, channels)) if views else None
        # Not an attribute as torch knows it: the model must not be optimised, saved or moved with the student.
        self.__dict__["model"] = model
        self.weights = dict(weights)
        self.trunk_learns = "trunk" in adapters.parts
        self.dropouts = [layer for name, layer in model.named_modules() if ".lora_dropout." in name]
        self.recomputed = recomputing(model, self.model.detector_model.vision_encoder.backbone) if recompute else []

    def __deepcopy__(self, memo: dict) -> AdapterStudent:
        """Copy what learns, for averaged weights; what is frozen is shared."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not tensor.requires_grad:
                memo[id(tensor)] = tensor
        memo[id(self)] = copied = AdapterStudent.__new__(AdapterStudent)
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def train(self, mode: bool = True) -> AdapterStudent:
        """Set the adapters' dropout, and whether activations are computed again; the frozen modules stay in eval."""
        super().train(mode)
        for layer in self.dropouts:
            layer.train(mode)
        for layer in self.recomputed:
            layer.training = mode  # of the layer only: what is inside of it goes by its own
        return self

    def forward(
        self, pixels_B3SS: Tensor, view_B: Tensor, shown: Shown | None, asked: Asked | None, targets: Targets
    ) -> dict[str, Tensor]:
        """Segment what is shown or asked for; at least one of the two is given.

        Returns:
            `loss` and its named terms, scalars, weighted over objects and phrases; in eval mode also the
            intersection over union and Dice of the masks at the predicted size, `iou_O`, `dice_O`, `iou_R`, `dice_R`.
        """
        # Every parameter has a gradient in every step, on every rank, whatever the prompts were. Made first, so that
        # all gradients are ready in the same order on every rank: ZeRO-1 and 2 add the ranks' rows in that order.
        touched = sum(parameter.sum() for parameter in self.parameters())
        found, terms = self.segment(pixels_B3SS, view_B, shown, asked, targets)
        total = sum((self.weights[name] * value for name, value in terms.items()), targets.weight_O.new_zeros(()))
        return {"loss": total + 0 * touched, **terms, **({} if self.training else found)}

    def segment(
        self, pixels_B3SS: Tensor, view_B: Tensor, shown: Shown | None, asked: Asked | None, targets: Targets
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return how well each mask fits, and the unweighted terms."""
        # Activations of a frozen trunk would be most of the memory, for gradients that nobody reads.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trunk_learns):
            feat_BDGG = trunk_features(self.model, pixels_B3SS)
        view_BC = None if self.views is None else self.views(view_B)
        found: dict[str, Tensor] = {}
        # All of them on every rank, which add them up by their places.
        terms = dict.fromkeys(self.weights, targets.weight_O.new_zeros(()))
        parts = [] if shown is None else [self.of_shown(feat_BDGG, view_BC, shown, targets)]
        parts += [] if asked is None else [self.of_asked(feat_BDGG, view_BC, asked, targets)]
        for more, values in parts:
            found |= more
            terms |= {name: terms[name] + value for name, value in values.items()}
        return found, terms

    def of_shown(
        self, feat_BDGG: Tensor, view_BC: Tensor | None, shown: Shown, targets: Targets
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return fits and terms of the objects that points and boxes show."""
        zero = targets.weight_O.new_zeros(())
        terms = {name: zero for name in ("bce", "dice", "iou")}
        fits = {name: torch.zeros_like(targets.weight_O) for name in ("iou_O", "dice_O")}
        for part in decode_shown(self.model, tracker_levels(self.model, feat_BDGG, view_BC), shown):
            weight_N = targets.weight_O[part.objects_N]
            logits, target = at_side(part.logits_NMLL, targets.masks_OSS[part.objects_N], part.logits_NMLL.shape[-1])
            bce_NM, dice_NM = bce(logits, target), dice(logits, target)
            # Only the best candidate learns, so that the three can differ.
            best_N1 = (self.weights["bce"] * bce_NM + self.weights["dice"] * dice_NM).argmin(1, keepdim=True)
            terms["bce"] = terms["bce"] + (bce_NM.gather(1, best_N1)[:, 0] * weight_N).sum()
            terms["dice"] = terms["dice"] + (dice_NM.gather(1, best_N1)[:, 0] * weight_N).sum()
            # Every candidate's: the choice between them is made by it.
            error_NM = (part.iou_NM.float() - iou(logits, target)).abs()
            terms["iou"] = terms["iou"] + (error_NM.mean(1) * weight_N).sum()
            if not self.training:
                mask_NLL = part.best() > 0
                for name, value in overlaps(mask_NLL, target > 0.5).items():
                    fits[f"{name}_O"][part.objects_N] = value
        return fits, terms

    def of_asked(
        self, feat_BDGG: Tensor, view_BC: Tensor | None, asked: Asked, targets: Targets
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return fits and terms of the instances of phrases."""
        # The detector's neck need not see the images on which objects are only shown.
        image_N, place_R = asked.image_R.unique(return_inverse=True)
        levels = detector_levels(self.model, feat_BDGG[image_N], None if view_BC is None else view_BC[image_N])
        recompute = self.training and bool(self.recomputed)
        found = answer(self.model, levels, asked._replace(image_R=place_R), recompute)
        logits_RQ, presence_R, boxes_RQ4 = found.logits_LRQ[-1], found.presence_LR[-1], found.boxes_LRQ4[-1]
        valid_RI, boxes_RI4 = targets.valid_RI, boxes_of(targets.masks_RISS)
        query_RI = match(logits_RQ, boxes_RQ4, boxes_RI4, valid_RI)
        logits_RILL = found.masks_of(query_RI).float()
        target_RILL = shrink(targets.masks_RISS, logits_RILL.shape[-1])
        pair = logits_RILL.flatten(0, 1)[:, None], target_RILL.flatten(0, 1)
        masks = {name: loss(*pair)[:, 0].unflatten(0, valid_RI.shape) for name, loss in (("bce", bce), ("dice", dice))}
        there_R = valid_RI.any(1)
        each = {
            **{name: mean_of(value_RI, query_RI) for name, value_RI in masks.items()},
            # Of an image without the concept SAM 3 only learns that it is absent: its score is a product of both.
            "score": score_loss(logits_RQ, query_RI) * there_R,
            "box": mean_of(box_distance(of_queries(boxes_RQ4, query_RI), boxes_RI4), query_RI),
            "semantic": bce(found.semantic_RMM.float()[:, None], union_of(target_RILL, valid_RI))[:, 0] * there_R,
            "presence": F.binary_cross_entropy_with_logits(presence_R.float(), there_R.float(), reduction="none"),
        }
        terms = {name: (value_R * targets.weight_R).sum() for name, value_R in each.items()}
        if self.training:
            return {}, terms
        mask_RLL = ((found.masks_RQMM > 0) & (found.scores_RQ > FOUND)[..., None, None]).any(1)
        true_RLL = ((target_RILL > 0.5) & valid_RI[..., None, None]).any(1)
        return {f"{name}_R": value for name, value in overlaps(mask_RLL, true_RLL).items()}, terms

    def unreached(self, *inputs: Any) -> list[str]:
        """Return the names of what learns that the loss of these inputs of `segment` does not depend on."""
        _, terms = self.segment(*inputs)
        names, parameters = zip(*self.named_parameters(), strict=True)
        total = torch.stack([value for name, value in terms.items() if self.weights[name]]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


def boxes_of(masks_RISS: Tensor) -> Tensor:
    """Return the boxes of masks (0..1) as x1, y1, x2, y2 in 0..1, (R, I, 4); zeros of an empty one."""
    side = masks_RISS.shape[-1]
    place_S = torch.arange(side, device=masks_RISS.device)
    edges = []
    for axis in (-2, -1):  # columns, then rows
        inside_RIS = masks_RISS.amax(axis) > 0
        low = torch.where(inside_RIS, place_S, side).amin(-1)
        edges.append((low.clamp(max=side - 1), torch.where(inside_RIS, place_S + 1, 0).amax(-1)))
    (left, right), (top, bottom) = edges
    boxes_RI4 = torch.stack([left, top, right, bottom], -1).float() / side
    return torch.where((right > 0)[..., None], boxes_RI4, 0.0)


def to_centres(boxes_R4: Tensor) -> Tensor:
    """Return boxes x1, y1, x2, y2 as the centre's x and y, width and height."""
    return box_convert(boxes_R4, "xyxy", "cxcywh")


def overlaps(mask_NLL: Tensor, target_NLL: Tensor) -> dict[str, Tensor]:
    """Return `iou` and `dice` of boolean masks, (N,) each; 1 where both are empty."""
    both, sizes = (mask_NLL & target_NLL).sum((-2, -1)), mask_NLL.sum((-2, -1)) + target_NLL.sum((-2, -1))
    alike = sizes == 0
    return {
        "iou": torch.where(alike, 1.0, both / (sizes - both).clamp(min=1)),
        "dice": torch.where(alike, 1.0, 2 * both / sizes.clamp(min=1)),
    }
