# SPDX-License-Identifier: Apache-2.0
"""What learns in a SAM 3 that is prompted by points and boxes until its masks are a teacher's, as one module: it is
optimised, saved and merged, and nothing else.

Letters: B images, N prompts of all images, P points of a prompt, M candidate masks, S image side in pixels, D channels
of the trunk, G side of its grid, L = 4 G side of the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from effsam3.losses.agreement import answer_sums
from effsam3.losses.answers import teacher_loss
from effsam3.losses.features import feature_loss
from effsam3.losses.masks import distilled
from effsam3.models.heads.detector import Asked, answer, detector_levels
from effsam3.models.heads.tracker import Shown, decode_alike, tracker_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.lora.student import overlaps
from effsam3.models.memory.prompts import draw_clicks, rescale
from effsam3.models.recompute import recomputing
from effsam3.models.trainable import TrainedParts

FEWEST_DIFFERING = 10  # pixels of a mask, EdgeSAM's: fewer are no mistake that a click would show
# Weights of `losses.answers.teacher_loss` in the term `exemplar`.
ANSWERS = {"presence": 2.0, "score": 1.0, "box": 5.0, "giou": 2.0, "bce": 5.0, "dice": 2.0, "semantic": 1.0}
# What boxes and points on still images do not reach: the necks' coarsest level, and all that remembers frames ...
UNUSED = (
    "detector_model.vision_encoder.neck.fpn_layers.3.",
    # CLIP's own projection or a text student's, after which SAM 3 has another.
    "detector_model.text_encoder.text_projection.",
    "detector_model.text_encoder.projection.",
    "tracker_neck.fpn_layers.3.",
    "tracker_model.prompt_encoder.mask_embed.",
    "tracker_model.mask_decoder.pred_obj_score_head.",
    "tracker_model.mask_downsample.",
    "tracker_model.memory_attention.",
    "tracker_model.memory_encoder.",
    "tracker_model.memory_resampler.",
    "tracker_model.memory_temporal_positional_encoding",
    "tracker_model.no_memory_positional_encoding",
    "tracker_model.object_pointer_proj.",
    "tracker_model.temporal_positional_encoding_projection_layer.",
    "tracker_model.no_object_pointer",
    "tracker_model.occlusion_spatial_embedding_parameter",
)
# ... and, without example boxes, the detector but for its trunk.
DETECTOR = tuple(
    f"detector_model.{part}."
    for part in (
        "vision_encoder.neck",
        "text_encoder",
        "text_projection",
        "geometry_encoder",
        "detr_encoder",
        "detr_decoder",
        "mask_decoder",
        "dot_product_scoring",
    )
)


class Taught(NamedTuple):
    """What the teacher's trunk makes of the images, and by what the student's is compared with it."""

    feat_BDGG: Tensor
    valid_B1GG: Tensor  # where a position sees image
    mean_D: Tensor  # of the teacher's features
    deviation_D: Tensor


class Prompts(NamedTuple):
    """Prompts that are all of one kind, a point each or a box each, and what decides where they are corrected."""

    shown: Shown
    weight_N: Tensor  # in the loss; all weights of a batch add up to at most 1
    chance_NR: Tensor  # 0..1, of the correcting click of every further round


class PromptedStudent(TrainedParts):
    """The trained parts of a whole SAM 3, under its own names; next to it, itself and the teacher, both frozen.

    BatchNorm stays in eval mode where it is trained, too: a micro-batch has few images, and statistics of so few would
    move features away from what the heads know.
    """

    model: Any
    teacher: Any

    def __init__(
        self,
        model: nn.Module,
        trained: Iterable[str],
        teacher: nn.Module,
        weights: Mapping[str, float],
        rounds: int,
        recompute: bool,
        unused: tuple[str, ...] = UNUSED,
    ):
        """`weights` are those of the terms of the loss: `mse` and `cosine` of features, `bce`, `dice` and `iou` of
        masks, `exemplar`; `unused` are beginnings of the names of what no prompt reaches."""
        super().__init__(model, trained, unused)
        self.keep_beside(model=model, teacher=teacher.eval().requires_grad_(False))
        self.weights, self.rounds, self.recompute = dict(weights), rounds, recompute
        self.recomputed = recomputing(model, self.model.detector_model.vision_encoder.backbone) if recompute else []

    def train(self, mode: bool = True) -> PromptedStudent:
        """Set the mode of what learns, without BatchNorm, and whether activations are computed again."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        for layer in self.recomputed:
            layer.training = mode  # of the layer only: what is inside of it goes by its own
        for whole in (self.model, self.teacher):
            # SAM 3 swaps a single mask that is not stable for the best of the three. While they learn, both are held
            # to their masks of the same place; how they are measured is how they will be used.
            swaps = whole.config.tracker_config.mask_decoder_config.dynamic_multimask_via_stability
            whole.tracker_model.mask_decoder.dynamic_multimask_via_stability = swaps and not mode
        return self

    def forward(
        self, pixels_B3SS: Tensor, taught: Taught, prompts: Mapping[str, Prompts], asked: Asked | None = None
    ) -> dict[str, Tensor]:
        """Segment what is shown on images as the teacher does, from its own features.

        Args:
            prompts: by their kind.
            asked: example boxes, through the detector: all that is like what is in them is to be found.

        Returns:
            `loss` and its named terms, scalars, weighted over prompts, means over rounds; `exemplar` is 0 where
            nothing is asked. In eval mode also how far both agree: `masks_<kind>` (N,) is the intersection over union
            of the masks that they would give, 1 where both are empty, in the first round, `masks_<kind>_corrected` in
            the last; of example boxes, the sums of `losses.agreement.answer_sums`.
        """
        # Every parameter has a gradient in every step, on every rank, whatever was shown. Made first, so that all
        # gradients are ready in the same order on every rank: ZeRO-1 and 2 add the ranks' rows in that order.
        touched = sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
        feat_BDGG = trunk_features(self.model, pixels_B3SS)
        terms = self.of_features(feat_BDGG, taught)
        levels = tracker_levels(self.model, feat_BDGG)
        with torch.no_grad():
            taught_levels = tracker_levels(self.teacher, taught.feat_BDGG)
        found: dict[str, Tensor] = {}
        side = pixels_B3SS.shape[-1]
        for kind, one in prompts.items():
            more, values = self.of_prompts(levels, taught_levels, one, side)
            found |= {f"masks_{kind}{which}": value_N for which, value_N in more.items()}
            for name, value in values.items():
                terms[name] = terms[name] + value if name in terms else value
        terms["exemplar"] = terms["mse"].new_zeros(())
        if asked is not None:
            more, terms["exemplar"] = self.of_exemplars(feat_BDGG, taught, asked)
            found |= more
        total = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        return {"loss": total + 0 * touched, **terms, **({} if self.training else found)}

    def of_features(self, feat_BDGG: Tensor, taught: Taught) -> dict[str, Tensor]:
        """Return the terms of the trunk's features, by channels standardised as the teacher's are."""
        maps = (feat_BDGG, taught.feat_BDGG, taught.valid_B1GG)
        return feature_loss(*maps, "mean", (taught.mean_D, taught.deviation_D))

    def of_prompts(
        self, levels: tuple[Tensor, ...], taught_levels: tuple[Tensor, ...], prompts: Prompts, side: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return how far both models' masks agree, and the terms, of prompts of one kind through all rounds."""
        shown, weight_N = prompts.shown, prompts.weight_N
        found: dict[str, Tensor] = {}
        terms: dict[str, list[Tensor]] = {}
        for place in range(self.rounds):
            with torch.no_grad():
                target, target_iou = decode_alike(self.teacher, taught_levels, shown)
            logits, iou = self.run(partial(decode_alike, self.model), levels, shown)
            each_N = distilled(logits, target) | {"iou": (iou.float() - target_iou.float()).square().mean(1)}
            for name, value_N in each_N.items():
                terms.setdefault(name, []).append((value_N * weight_N).sum() / self.rounds)
            if not self.training:
                which = "" if place == 0 else "_corrected"
                found[which] = masks_agree(logits, iou, target, target_iou)
            if place + 1 < self.rounds:
                shown, differs_N = with_click(shown, logits, target, target_iou, prompts.chance_NR[:, place], side)
                weight_N = weight_N * differs_N
        return found, {name: torch.stack(values).sum() for name, values in terms.items()}

    def of_exemplars(self, feat_BDGG: Tensor, taught: Taught, asked: Asked) -> tuple[dict[str, Tensor], Tensor]:
        """Return how far both models' answers to example boxes agree, as sums, and their term."""
        with torch.no_grad():
            target = answer(self.teacher, detector_levels(self.teacher, taught.feat_BDGG), asked)
        levels = detector_levels(self.model, feat_BDGG)
        own = answer(self.model, levels, asked, self.recompute and torch.is_grad_enabled())
        seen_R = taught.valid_B1GG.flatten(1).any(1)[asked.image_R]
        terms = teacher_loss(own, target, seen_R)
        total = torch.stack([weight * terms[name] for name, weight in ANSWERS.items()]).sum()
        return {} if self.training else answer_sums(own, target, seen_R), total

    def run(self, function: Callable, *inputs: Any) -> Any:
        """Call a function, keeping its activations or not."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


@torch.no_grad()
def with_click(
    shown: Shown, logits_NMLL: Tensor, target_NMLL: Tensor, target_iou_NM: Tensor, chance_N: Tensor, side: int
) -> tuple[Shown, Tensor]:
    """Correct each prompt by a click where the student's mask is not the teacher's, of the teacher's label.

    Compared are the masks of the place that the teacher prefers. The click is any pixel of those that differ, after
    EdgeSAM (Zhou et al. 2023, arXiv:2312.06660). Where fewer than `FEWEST_DIFFERING` do there is nothing to correct:
    the prompt gets a click all the same, so that every rank runs the same, but should not count.

    Args:
        side: of the model's image, in pixels.

    Returns:
        The prompts, longer by a point; and which of them count (N,), boolean.
    """
    each_N, place_N = torch.arange(len(chance_N), device=chance_N.device), target_iou_NM.argmax(1)
    own_NLL, target_NLL = (logits[each_N, place_N] > 0 for logits in (logits_NMLL, target_NMLL))
    points_N12, labels_N1 = draw_clicks(own_NLL, target_NLL, chance_N)
    points_N12 = rescale(points_N12, own_NLL.shape[-1], side)
    counts_N = (own_NLL != target_NLL).flatten(1).sum(1) >= FEWEST_DIFFERING
    points = torch.cat([shown.points_OP2, points_N12], 1), torch.cat([shown.labels_OP, labels_N1], 1)
    return Shown(shown.image_O, *points), counts_N


@torch.no_grad()
def masks_agree(logits_NMLL: Tensor, iou_NM: Tensor, target_NMLL: Tensor, target_iou_NM: Tensor) -> Tensor:
    """Return the intersection over union (N,) of the masks that both models would give, each by its own choice."""
    each_N = torch.arange(len(iou_NM), device=iou_NM.device)
    pairs = ((logits_NMLL, iou_NM), (target_NMLL, target_iou_NM))
    own_NLL, target_NLL = (logits[each_N, iou.argmax(1)] > 0 for logits, iou in pairs)
    return overlaps(own_NLL, target_NLL)["iou"]
