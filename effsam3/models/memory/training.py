# SPDX-License-Identifier: Apache-2.0
"""The tracker's forward for training: frame after frame, all objects at once, differentiable through time.

transformers' own forward runs under `inference_mode`, object by object. This one calls the same submodules, and the
same `remember` and `recall` as inference, so what is trained is what will track.

Letters: B clips, T frames of a clip, F the first of them, O objects of all clips, N some of them, C channels of the
tracker, G side of its grid, L = 4 G side of its mask logits, S image side in pixels, M candidate masks, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effsam3.models.chassis.tensors import TRUNK, read_tensors
from effsam3.models.memory import NAME
from effsam3.models.memory.attention import FrameMemory
from effsam3.models.memory.prompts import FEWEST, NO_POINT, draw_clicks
from effsam3.models.memory.tracker import EfficientTracker

ABSENT_LOGIT = -1024.0  # SAM's mask logit of an object that is not in the frame
MASK_SCALE, MASK_BIAS = 20.0, -10.0  # makes logits of a given mask: nearly 0 and 1 after the sigmoid

# What can be trained -> its parameters, by the beginning of their names in the tracker.
PARTS = {
    NAME: (
        "memory_attention.",
        "memory_encoder.",
        "memory_resampler.",
        "memory_temporal_positional_encoding",
        "occlusion_spatial_embedding_parameter",
    ),
    "pointers": ("object_pointer_proj.", "temporal_positional_encoding_projection_layer.", "no_object_pointer"),
    "prompts": ("prompt_encoder.", "mask_downsample.", "no_memory_embedding"),
    "decoder": ("mask_decoder.",),
    "neck": ("vision_encoder.neck.",),
    "trunk": ("vision_encoder.backbone.",),
}
# Where a whole SAM 3 keeps what is the tracker's: beginning of a name there -> here.
PLACES = {"tracker_model.": "", "tracker_neck.": "vision_encoder.neck.", TRUNK: "vision_encoder.backbone."}


def read_tracker_tensors(folder: Path) -> dict[str, Tensor]:
    """Read a chassis folder's tracker, its neck and the trunk, by the names of a tracker on its own."""
    return {
        here + name: tensor for there, here in PLACES.items() for name, tensor in read_tensors(folder, there).items()
    }


@dataclass(frozen=True)
class Features:
    """Features of frames or objects in the tracker's neck, (N, channels, rows, columns): 4 G, 2 G and G a side."""

    fine: Tensor
    middle: Tensor
    top: Tensor

    def at(self, index_N: Tensor) -> Features:
        """Return those of these numbers."""
        return Features(self.fine[index_N], self.middle[index_N], self.top[index_N])


@dataclass(frozen=True)
class Prompts:
    """What is given on the first F frames, for O objects.

    `points_OFP2` are x, y in pixels and `labels_OFP` as in models/memory/prompts.py; where `by_mask_OF`, the true mask
    is given instead. `corrections` maps the number of a frame that clicks correct to where they go, (O, clicks): see
    `draw_clicks`.
    """

    points_OFP2: Tensor
    labels_OFP: Tensor
    by_mask_OF: Tensor
    corrections: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, drawn: Sequence[Mapping[int, tuple[Tensor, Tensor, bool]]]) -> Prompts:
        """Put together what `draw_prompt` has drawn: for each object {frame: (points, labels, whether by mask)}."""
        frames = 1 + max(frame for given in drawn for frame in given)
        most = max([FEWEST, *(len(labels) for given in drawn for _, labels, _ in given.values())])
        points, by_mask = torch.zeros(len(drawn), frames, most, 2), torch.zeros(len(drawn), frames, dtype=torch.bool)
        labels = torch.full((len(drawn), frames, most), NO_POINT, dtype=torch.int32)
        for place, given in enumerate(drawn):
            for frame, (points_P2, labels_P, by_mask[place, frame]) in given.items():
                points[place, frame, : len(points_P2)], labels[place, frame, : len(labels_P)] = points_P2, labels_P
        return cls(points, labels, by_mask)

    @cached_property
    def given_OF(self) -> Tensor:
        """Whether anything is given."""
        return self.by_mask_OF | (self.labels_OFP != NO_POINT).any(2)

    def some(self, objects_N: Tensor) -> Prompts:
        """Return those of some of the objects."""
        given = (self.points_OFP2[objects_N], self.labels_OFP[objects_N], self.by_mask_OF[objects_N])
        return Prompts(*given, {frame: chances[objects_N] for frame, chances in self.corrections.items()})

    def to(self, device: torch.device) -> Prompts:
        """Return them on a device."""
        given = (self.points_OFP2.to(device), self.labels_OFP.to(device), self.by_mask_OF.to(device))
        return Prompts(*given, {frame: chances.to(device) for frame, chances in self.corrections.items()})

    def groups(self, most: int | None) -> list[Tensor]:
        """Return the numbers of objects that can be tracked together: given on the same frames, at most `most`."""
        _, group_O = self.given_OF.unique(dim=0, return_inverse=True)
        groups = [(group_O == group).nonzero()[:, 0] for group in range(int(group_O.max()) + 1)]
        return [part for group_N in groups for part in group_N.split(most or len(group_N))]


@dataclass(frozen=True)
class Decoded:
    """What the mask decoder predicts for the objects `objects_N` on one frame; logits are not gated by presence."""

    objects_N: Tensor
    logits_NMLL: Tensor
    iou_NM: Tensor
    presence_N: Tensor
    tokens_NMC: Tensor

    def only(self, wanted_O: Tensor) -> Decoded:
        """Return those of its objects that are wanted (boolean over all objects)."""
        kept = wanted_O[self.objects_N]
        return Decoded(
            self.objects_N[kept],
            self.logits_NMLL[kept],
            self.iou_NM[kept],
            self.presence_N[kept],
            self.tokens_NMC[kept],
        )

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the logits (N, L, L) and token (N, C) of the candidate with the highest predicted IoU."""
        chosen_N = self.iou_NM.argmax(1)
        each_N = torch.arange(len(chosen_N), device=chosen_N.device)
        return self.logits_NMLL[each_N, chosen_N], self.tokens_NMC[each_N, chosen_N]


@dataclass(frozen=True)
class Tracked:
    """One frame for O objects.

    `predictions` are what can be scored: the decoder's, before and after every correction; none for a given mask.
    `logits_OSS` is the mask that entered memory, `ABSENT_LOGIT` where absent. `conditioned_OCGG` and `teacher_OCGG`
    are the features after memory of the tracker and of the teacher, None on a prompted frame.
    """

    time: int
    predictions: list[Decoded]
    logits_OSS: Tensor
    conditioned_OCGG: Tensor | None = None
    teacher_OCGG: Tensor | None = None


def encode_frames(tracker: EfficientTracker, pixels_F3SS: Tensor, chunk: int, frozen: bool) -> Features:
    """Run trunk and tracker neck over F frames in -1..1, `chunk` at a time; without gradients if frozen."""
    parts = []
    # The frozen trunk's activations would be most of the memory, for gradients that nobody reads.
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        for pixels in pixels_F3SS.split(chunk):
            flat_maps = tracker.get_image_features(pixels, return_dict=True).fpn_hidden_states
            sizes = tracker.backbone_feature_sizes
            parts.append(
                [flat.permute(1, 2, 0).unflatten(2, tuple(size)) for flat, size in zip(flat_maps, sizes, strict=True)]
            )
    return Features(*(torch.cat(level) for level in zip(*parts, strict=True)))


def track(
    tracker: EfficientTracker,
    features: Features,
    frame_OT: Tensor,
    masks_OTSS: Tensor,
    prompts: Prompts,
    teacher: EfficientTracker | None = None,
    by_truth: bool = True,
    recompute: bool = False,
) -> list[Tracked]:
    """Track O objects from the first frame on which they are prompted to the last of T.

    All must be prompted on the same frames: objects do not see each other, so that others can have a call of their own
    (`Prompts.groups`). Prompted frames come first and see no memory, as in a session that is propagated after all its
    prompts; the other frames follow in order of time and remember them, those that are still to come among them.

    Args:
        frame_OT: which frame of `features` each object sees at each time.
        masks_OTSS: boolean true masks; only those of prompted and of corrected frames reach the tracker.
        teacher: a tracker whose memory sees the same masks and pointers; its features are returned as well.
        by_truth: take from the true masks whether an object is present, as in training; else from the tracker.
        recompute: keep no activations of a frame but compute them again in the backward pass.
    """
    assert (prompts.given_OF == prompts.given_OF[:1]).all() and prompts.given_OF[0].any()
    given, length = prompts.given_OF[0].nonzero()[:, 0].tolist(), frame_OT.shape[1]
    run = _Pass(tracker, teacher, prompts, given, by_truth, recompute)
    order = [*given, *(time for time in range(given[0], length) if time not in given)]
    tracked = [run.frame(time, features.at(frame_OT[:, time]), masks_OTSS[:, time], length) for time in order]
    return sorted(tracked, key=lambda frame: frame.time)


@dataclass(frozen=True)
class _Remembered:
    """One frame in the memory bank; `given` if it was prompted or corrected, which makes it a conditioning frame."""

    given: bool
    memory: FrameMemory
    pointer_OC: Tensor
    teacher_memory: FrameMemory | None


class _Pass:
    """One pass over clips: the memory bank, and what does not change from frame to frame."""

    def __init__(self, tracker, teacher, prompts: Prompts, prompted: list[int], by_truth: bool, recompute: bool):
        self.tracker, self.teacher, self.prompts, self.prompted = tracker, teacher, prompts, prompted
        self.by_truth, self.recompute = by_truth, recompute
        self.position_1CGG = tracker.get_image_wide_positional_embeddings()
        self.bank: dict[int, _Remembered] = {}

    def run(self, function: Callable, *inputs):
        """Call a function, keeping its activations or not."""
        # Not reentrant, because reentrant checkpoints lose gradients to tensors captured from outside, such as the
        # bank.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def frame(self, time: int, seen: Features, masks_OSS: Tensor, length: int) -> Tracked:
        """Track one frame and put it into the bank."""
        prompts, conditioned, distilled = self.prompts, None, None
        everyone_O = torch.ones(len(masks_OSS), dtype=torch.bool, device=masks_OSS.device)
        by_mask_O = prompts.by_mask_OF[:, time] if time in self.prompted else ~everyone_O
        if time in self.prompted:
            # SAM 3 adds it where there is nothing to recall, but not under a given mask, which is not decoded from the
            # image.
            no_memory_1C11 = self.tracker.no_memory_embedding.reshape(1, -1, 1, 1)
            image_OCGG = seen.top + no_memory_1C11 * ~by_mask_O[:, None, None, None]
            points, labels = prompts.points_OFP2[:, time], prompts.labels_OFP[:, time]
            count_O = (labels != NO_POINT).sum(1)
            # One decoder call serves prompts of one kind only: a single click is ambiguous and wants three candidates,
            # more points or a box leave no doubt. Of one length, too, so that no object depends on another's padding.
            lengths = sorted(set(count_O[~by_mask_O].tolist()))
            groups = [by_mask_O, *(~by_mask_O & (count_O == count) for count in lengths)]
        else:
            # As it is now: computed again in the backward pass, it would hold later frames too.
            recalled = (seen.top, time, length, dict(self.bank))
            image_OCGG = conditioned = self.run(self.recall, self.tracker, *recalled, False)
            if self.teacher is not None:
                with torch.no_grad():
                    distilled = self.recall(self.teacher, *recalled, True)
            points, labels = (tensor[:, 0, :0] for tensor in (prompts.points_OFP2, prompts.labels_OFP))
            lengths, groups = [], [everyone_O]
        shown = self.mask_prompt(masks_OSS) if by_mask_O.any() else None
        decoded = []
        for group_O, count in zip(groups, (0, *lengths), strict=True):
            if group_O.any():
                width = max(count, FEWEST)
                maps = (group_O, image_OCGG, seen, points[:, :width], labels[:, :width])
                decoded.append(self.decode(*maps, None if count else shown, multimask=count <= 1))
        # What was given is not predicted: scoring it would reward copying.
        predictions = [part.only(~by_mask_O) for part in decoded]
        clicked_O = ~by_mask_O
        corrected = time in prompts.corrections and bool(clicked_O.any())
        for chance_O in prompts.corrections[time].unbind(1) if corrected else ():
            logits_OLL = self.assemble(decoded)[0]
            # Clicks are drawn from the prediction as a user would see it, without a gradient through the choice.
            pred_OSS = enlarge(logits_OLL.detach(), masks_OSS.shape[-1]) > 0
            points_O12, labels_O1 = draw_clicks(pred_OSS, masks_OSS, chance_O)
            points, labels = torch.cat([points, points_O12], 1), torch.cat([labels, labels_O1], 1)
            multimask = bool((labels != NO_POINT).sum(1).max() <= 1)
            better = self.decode(clicked_O, image_OCGG, seen, points, labels, logits_OLL[:, None], multimask)
            # The corrected mask enters memory, as in a session after a user's click.
            decoded = [*(part.only(by_mask_O) for part in decoded), better]
            predictions.append(better)
        logits_OLL, token_OC, presence_O = self.assemble(decoded)
        # The truth decides in training: an early mistake about presence would erase the object from memory for the
        # whole clip.
        present_O = masks_OSS.flatten(1).any(1)
        if not self.by_truth:
            present_O = torch.where(by_mask_O, present_O, presence_O > 0)
        given_OSS = masks_OSS * MASK_SCALE + MASK_BIAS
        logits_OSS = torch.where(by_mask_O[:, None, None], given_OSS, enlarge(logits_OLL, masks_OSS.shape[-1]))
        # SAM's convention for an absent object, which the memory encoder has learned to read.
        logits_OSS = torch.where(present_O[:, None, None], logits_OSS, ABSENT_LOGIT)
        given = time in self.prompted or corrected
        self.bank[time] = self.remember(seen.top, logits_OSS, token_OC, present_O, given)
        return Tracked(time, [part for part in predictions if len(part.objects_N)], logits_OSS, conditioned, distilled)

    def decode(
        self,
        group_O: Tensor,
        image_OCGG: Tensor,
        seen: Features,
        points_OP2: Tensor,
        labels_OP: Tensor,
        mask_O1LL: Tensor | None,
        multimask: bool,
    ) -> Decoded:
        """Run prompt encoder and mask decoder for the objects of a group."""
        objects_N = group_O.nonzero()[:, 0]
        points_N1P2, labels_N1P = points_OP2[objects_N][:, None], labels_OP[objects_N][:, None]
        if not points_N1P2.shape[2]:  # SAM's convention for no point
            points_N1P2 = points_N1P2.new_zeros(len(objects_N), 1, 1, 2)
            labels_N1P = labels_N1P.new_full((len(objects_N), 1, 1), NO_POINT)
        sparse, dense = self.tracker.prompt_encoder(
            input_points=points_N1P2,
            input_labels=labels_N1P,
            input_boxes=None,
            input_masks=None if mask_O1LL is None else mask_O1LL[objects_N],
        )

        def decoder(image, sparse, dense, fine, middle):
            return self.tracker.mask_decoder(
                image_embeddings=image,
                image_positional_embeddings=self.position_1CGG.expand(len(image), -1, -1, -1),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
                high_resolution_features=[fine, middle],
            )

        maps = (image_OCGG[objects_N], sparse, dense, seen.fine[objects_N], seen.middle[objects_N])
        logits, iou, tokens, presence = self.run(decoder, *maps)
        return Decoded(objects_N, logits[:, 0], iou[:, 0], presence[:, 0, 0], tokens[:, 0])

    def assemble(self, decoded: list[Decoded]) -> tuple[Tensor, Tensor, Tensor]:
        """Best logits (O, L, L), their tokens (O, C) and presence logits (O,) of all objects in order."""
        order = torch.cat([part.objects_N for part in decoded]).argsort()
        best = [part.best() for part in decoded]
        logits, tokens = (torch.cat(kind)[order] for kind in zip(*best, strict=True))
        return logits, tokens, torch.cat([part.presence_N for part in decoded])[order]

    def mask_prompt(self, masks_OSS: Tensor) -> Tensor:
        """A given mask as the prompt encoder takes it, (O, 1, L, L): through the tracker's own downsampling."""
        small = self.tracker.mask_downsample(masks_OSS[:, None].to(self.position_1CGG.dtype))
        size = self.tracker.prompt_encoder.mask_input_size
        return F.interpolate(small.float(), size, mode="bilinear", align_corners=False, antialias=True)

    def remember(self, top_OCGG, logits_OSS, token_OC, present_O, given: bool) -> _Remembered:
        """Encode a frame for the bank."""
        present_O1 = present_O[:, None]
        # An absent object's pointer marks it as absent, instead of pointing at whatever the decoder has found.
        pointer_OC = torch.where(
            present_O1, self.tracker.object_pointer_proj(token_OC), self.tracker.no_object_pointer
        )
        memory = self.tracker.remember(top_OCGG, logits_OSS[:, None], present_O, given)
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher.remember(top_OCGG, logits_OSS[:, None], present_O, given)
        return _Remembered(given, memory, pointer_OC, taught)

    def recall(self, tracker, top_OCGG: Tensor, time: int, length: int, bank: dict[int, _Remembered], taught: bool):
        """Condition a frame's features on the bank, by the tracker's memory or the teacher's."""
        given = sorted(frame for frame, entry in bank.items() if entry.given)
        # Same order and limits as a transformers session, so that training sees the memory that inference will see.
        most = tracker.config.max_cond_frame_num  # -1: all, as in transformers
        near = given if most == -1 else nearest(given, time, most)
        recent = [past for past in range(time - tracker.num_maskmem + 1, time) if past in bank and past not in near]
        # Offset 0 marks conditioning frames, whatever their distance; it selects the encoding that SAM 3 gives them.
        order = [(0, past) for past in sorted(near)] + [(time - past, past) for past in recent]
        frames = [(offset, bank[past].teacher_memory if taught else bank[past].memory) for offset, past in order]
        # Pointers reach further back than maps: they cost four tokens each. They only come from the past.
        reach = min(length, tracker.config.max_object_pointers_in_encoder)
        back = [past for past in range(time - 1, max(time - reach, -1), -1) if past in bank and past not in given]
        pointers = [(time - past, bank[past].pointer_OC) for past in [*(one for one in given if one < time), *back]]
        return tracker.recall(top_OCGG, frames, pointers, length)


def nearest(given: list[int], time: int, most: int) -> list[int]:
    """Return at most `most` of the given frames: the nearest before and after, then the others by their distance."""
    before, after = [one for one in given if one < time][-1:], [one for one in given if one >= time][:1]
    others = [one for one in given if one not in before + after]
    return (before + after + sorted(others, key=lambda one: abs(one - time)))[: max(most, len(before + after))]


def enlarge(logits_OLL: Tensor, side: int) -> Tensor:
    """Mask logits (O, L, L) at the image's size, (O, S, S)."""
    return F.interpolate(logits_OLL[:, None].float(), (side, side), mode="bilinear", align_corners=False)[:, 0]
