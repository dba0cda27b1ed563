# SPDX-License-Identifier: Apache-2.0
"""The part of a tracker that learns, as one module: what is optimised, saved and merged, and nothing else.

Letters: B clips, T frames of a clip, O objects of all clips, N some of them, S image side in pixels, L side of a loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from effsam3.losses.masks import SMOOTH, at_side, iou, mask_losses, temporal
from effsam3.losses.memory import memory_loss
from effsam3.models.memory import NAME
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.memory.trainable import unused_of
from effsam3.models.memory.training import ABSENT_LOGIT, MASK_BIAS, Prompts, Tracked, encode_frames, track
from effsam3.models.trainable import TrainedParts

VISION = ("vision_encoder.", "mask_decoder.conv_s0.", "mask_decoder.conv_s1.")  # what `encode_frames` runs


@dataclass(frozen=True)
class Scoring:
    """How predicted masks are held against true ones."""

    weights: Mapping[str, float]  # of the terms: `iou`, `presence`, `memory`, `temporal` and those of `MASK_TERMS`
    side_px: int  # masks are compared at this size
    squared_iou: bool = False  # as in `mask_losses`
    smooth: float = SMOOTH  # likewise
    of_logits: bool = False  # as in `temporal`
    held_out: bool = False  # in eval mode, too


class TrackerStudent(TrainedParts):
    """The trained parts of a tracker, under the tracker's own names; the frozen rest is next to it, not inside."""

    tracker: EfficientTracker
    teacher: EfficientTracker | None

    def __init__(
        self,
        tracker: EfficientTracker,
        trained: Iterable[str],
        teacher: EfficientTracker | None,
        scoring: Scoring,
        trunk_batch: int,
        objects_at_once: int | None,
        recompute: bool,
    ):
        """`trained` are names of submodules and parameters of the tracker; `teacher` is one whose memory the term
        `memory` compares with, if there is that term."""
        super().__init__(tracker, trained, unused_of(tracker))
        self.keep_beside(tracker=tracker, teacher=teacher)
        self.scoring = scoring
        self.trunk_batch, self.objects_at_once, self.recompute = trunk_batch, objects_at_once, recompute
        self.trunk_frozen = not any(
            parameter.requires_grad for name, parameter in self.named_parameters() if name.startswith(VISION)
        )

    def train(self, mode: bool = True) -> TrackerStudent:
        """Set the trained parts to train or eval mode, and the flag of tracker and teacher, but not of their modules.

        The flag decides whether given masks are remembered soft, as in training, or sharp."""
        super().train(mode)
        for whole in filter(None, (self.tracker, self.teacher)):
            whole.training = mode
        return self

    def forward(
        self,
        pixels_BT3SS: Tensor,
        masks_OTSS: Tensor,
        clip_O: Tensor,
        weight_OT: Tensor,
        prompts: Prompts,
        drawn: bool = False,
    ) -> dict[str, Tensor]:
        """Track every object through its clip, from where it is first prompted; `weight_OT` are its frames' in the
        loss.

        Returns:
            `loss` and its named terms, scalars; in eval mode only where `scoring` asks for them. In eval mode `j`
            (O, T), the mask's intersection over union, 1 where both are empty, and 0 before the first prompt; with
            `drawn` the masks themselves, too, `masks` (O, T, S, S), boolean.
        """
        # Every parameter has a gradient in every step, on every rank, whatever the prompts were. Made first, so that
        # the backward pass comes to it last and all gradients are ready in the same order on every rank: ZeRO-1 and 2
        # put them side by side in that order and add the ranks' rows.
        touched = sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
        frames = pixels_BT3SS.shape[1]
        # Once for all objects: the trunk is most of the cost and does not depend on the prompts.
        features = encode_frames(self.tracker, pixels_BT3SS.flatten(0, 1), self.trunk_batch, self.trunk_frozen)
        frame_OT = clip_O[:, None] * frames + torch.arange(frames, device=clip_O.device)
        results, j_OT = [], weight_OT.new_zeros(weight_OT.shape)
        scores = {"masks": torch.zeros_like(masks_OTSS)} if drawn else {}
        # Activations grow with objects times frames; in groups only one group's are alive with `recompute`.
        for objects_N in prompts.groups(self.objects_at_once):
            masks_NTSS = masks_OTSS[objects_N]
            tracked = track(
                self.tracker,
                features,
                frame_OT[objects_N],
                masks_NTSS,
                prompts.some(objects_N),
                # The teacher's memory is the expensive one: it only runs where its term has a weight.
                teacher=self.teacher if self.training and self.scoring.weights.get(NAME) else None,
                by_truth=self.training,
                recompute=self.recompute,
            )
            if self.training or self.scoring.held_out:
                # Sums, not means: the weights of all objects add up to 1, so groups add up to the whole.
                results.append(self.losses(tracked, masks_NTSS, weight_OT[objects_N]))
            if not self.training:
                j_OT[objects_N, tracked[0].time :] = overlap(tracked, masks_NTSS)
            for frame in tracked if drawn else ():
                scores["masks"][objects_N, frame.time] = frame.logits_OSS > 0
        zero = weight_OT.new_zeros(())
        terms = {name: sum((result[name] for result in results), zero) for name in (results[0] if results else ())}
        total = sum((self.scoring.weights[name] * value for name, value in terms.items()), zero)
        # Times zero: gradients exist without changing their value.
        scores |= {"loss": total + 0 * touched, **terms} if results else {}
        return scores if self.training else {"j": j_OT, **scores}

    def losses(self, tracked: list[Tracked], masks_NTSS: Tensor, weight_NT: Tensor) -> dict[str, Tensor]:
        """Return the named terms, weighted and summed over objects, frames and predictions."""
        scoring, zero = self.scoring, weight_NT.new_zeros(())
        terms = {name: zero for name, weight in scoring.weights.items() if name != NAME or weight}
        for frame in tracked:
            # Each correction is scored as well, so that the first answer and the corrected one both improve.
            for part in frame.predictions:
                logits, target = at_side(part.logits_NMLL, masks_NTSS[part.objects_N, frame.time], scoring.side_px)
                scores = (logits, part.iou_NM, part.presence_N, target, scoring.weights)
                for name, value_N in mask_losses(*scores, scoring.squared_iou, scoring.smooth).items():
                    terms[name] = terms[name] + (value_N * weight_NT[part.objects_N, frame.time]).sum()
            if frame.teacher_OCGG is not None and frame.conditioned_OCGG is not None:
                value_O = memory_loss(frame.conditioned_OCGG, frame.teacher_OCGG)
                terms[NAME] = terms[NAME] + (value_O * weight_NT[:, frame.time]).sum()
        if "temporal" in terms:
            terms["temporal"] = self.agreement(tracked, masks_NTSS, weight_NT)
        return terms

    def agreement(self, tracked: list[Tracked], masks_NTSS: Tensor, weight_NT: Tensor) -> Tensor:
        """Return the term `temporal` of the masks that entered memory, given ones among them."""
        first, scoring = tracked[0].time, self.scoring
        seen = [at_side(frame.logits_OSS[:, None], masks_NTSS[:, frame.time], scoring.side_px) for frame in tracked]
        logits_NTLL = torch.cat([logits for logits, _ in seen], 1)
        # An absent object's logit only says that there is no mask; as a number it would be all of the loss.
        logits_NTLL = logits_NTLL.masked_fill(logits_NTLL == ABSENT_LOGIT, MASK_BIAS)
        target_NTLL = torch.stack([target for _, target in seen], 1)
        value_N = temporal(logits_NTLL, target_NTLL, weight_NT[:, first:] > 0, scoring.of_logits)
        return (value_N * weight_NT.sum(1)).sum()


def overlap(tracked: list[Tracked], masks_NTSS: Tensor) -> Tensor:
    """J of every tracked frame, (N, frames): intersection over union, 1 where both are empty."""
    values = []
    for frame in tracked:
        target_NSS = masks_NTSS[:, frame.time].float()
        j_N = iou(frame.logits_OSS[:, None], target_NSS)[:, 0]
        empty_N = ~((frame.logits_OSS > 0) | masks_NTSS[:, frame.time]).flatten(1).any(1)
        values.append(torch.where(empty_N, 1.0, j_N.float()))
    return torch.stack(values, 1)
