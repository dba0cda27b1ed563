# SPDX-License-Identifier: Apache-2.0
"""The part of a tracker that learns, as one module: what is optimised, saved and merged, and nothing else.

Letters: B clips, T frames of a clip, O objects of all clips, N some of them, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from effsam3.losses.masks import at_side, iou, mask_losses
from effsam3.losses.memory import memory_loss
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.memory.training import PARTS, UNUSED, Prompts, Tracked, encode_frames, track


class TrackerStudent(nn.Module):
    """The trained parts of a tracker, under the tracker's own names; the frozen rest is next to it, not inside.

    So checkpoints, optimizer and ZeRO only see the trained parts, though the forward runs the whole tracker. Frozen
    parts stay in eval mode whatever mode the student is in.
    """

    tracker: EfficientTracker
    teacher: EfficientTracker

    def __init__(
        self,
        tracker: EfficientTracker,
        parts: tuple[str, ...],
        teacher: EfficientTracker,
        weights: Mapping[str, float],
        side_px: int,
        squared_iou: bool,
        trunk_batch: int,
        objects_at_once: int | None,
        recompute: bool,
    ):
        """`parts` are keys of `PARTS`; `weights` those of the terms `focal dice iou presence memory`; `side_px` is
        the size at which masks are compared, `squared_iou` as in `mask_losses`."""
        super().__init__()
        tracker.eval().requires_grad_(False)
        prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
        # Without latents the resampler is never called; training it would only decay its weights.
        unused = UNUSED if tracker.config.keeps_latents else (*UNUSED, "memory_resampler.")
        for prefix in prefixes:
            _adopt(self, tracker, prefix.removesuffix("."))
        for name, parameter in self.named_parameters():
            # A copy: tracker and teacher may share the same memory, that of a mapped file.
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(not name.startswith(unused))
        # Not attributes as torch knows them: these must not be optimised, saved or moved with the student.
        self.__dict__["tracker"] = tracker
        self.__dict__["teacher"] = teacher
        self.weights, self.side_px, self.squared_iou = dict(weights), side_px, squared_iou
        self.trunk_batch, self.objects_at_once, self.recompute = trunk_batch, objects_at_once, recompute
        self.trunk_frozen = not {"trunk", "neck", "decoder"} & set(parts)  # the decoder's first convolutions are there

    def __deepcopy__(self, memo: dict) -> TrackerStudent:
        """Copy what is trained, for averaged weights; what is frozen is shared."""
        # `deepcopy` finds these tensors in `memo` and does not copy them: an average of frozen weights is the weights.
        for module in (self.tracker, self.teacher):
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.requires_grad:
                    memo[id(tensor)] = tensor
        memo[id(self)] = copied = TrackerStudent.__new__(TrackerStudent)
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def train(self, mode: bool = True) -> TrackerStudent:
        """Set the trained parts to train or eval mode, and the flag of tracker and teacher, but not of their modules.

        The flag decides whether given masks are remembered soft, as in training, or sharp."""
        super().train(mode)
        self.tracker.training = self.teacher.training = mode
        return self

    def forward(
        self, pixels_BT3SS: Tensor, masks_OTSS: Tensor, clip_O: Tensor, weight_O: Tensor, prompts: Prompts
    ) -> dict[str, Tensor]:
        """Track every object through its clip.

        Returns:
            In train mode `loss` and its named terms, scalars, each a sum over frames and a mean by `weight_O`. In eval
            mode `j` (O, T-1), the mask's intersection over union in every frame but the first, 1 where both are empty.
        """
        # Every parameter has a gradient in every step, on every rank, whatever the prompts were. Made first, so that
        # the backward pass comes to it last and all gradients are ready in the same order on every rank: ZeRO-1 and 2
        # put them side by side in that order and add the ranks' rows.
        touched = sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
        frames = pixels_BT3SS.shape[1]
        # Once for all objects: the trunk is most of the cost and does not depend on the prompts.
        features = encode_frames(self.tracker, pixels_BT3SS.flatten(0, 1), self.trunk_batch, self.trunk_frozen)
        frame_OT = clip_O[:, None] * frames + torch.arange(frames, device=clip_O.device)
        results = []
        # Activations grow with objects times frames; in groups only one group's are alive with `recompute`.
        for objects_N in torch.arange(len(clip_O), device=clip_O.device).split(self.objects_at_once or len(clip_O)):
            tracked = track(
                self.tracker,
                features,
                frame_OT[objects_N],
                masks_OTSS[objects_N],
                prompts.some(objects_N),
                # The teacher's memory is the expensive one: it only runs where its term has a weight.
                teacher=self.teacher if self.training and self.weights["memory"] else None,
                by_truth=self.training,
                recompute=self.recompute,
            )
            masks_NTSS = masks_OTSS[objects_N]
            if self.training:
                # Sums, not means: the weights of all objects add up to 1, so groups add up to the whole.
                results.append(self.losses(tracked, masks_NTSS, weight_O[objects_N]))
            else:
                results.append({"j": overlap(tracked, masks_NTSS)})
        if not self.training:
            return {"j": torch.cat([result["j"] for result in results])}
        zero = weight_O.new_zeros(())
        terms = {name: sum((result[name] for result in results), zero) for name in results[0]}
        total = sum((self.weights[name] * value for name, value in terms.items()), zero)
        # Times zero: gradients exist without changing their value.
        return {"loss": total + 0 * touched, **terms}

    def losses(self, tracked: list[Tracked], masks_NTSS: Tensor, weight_N: Tensor) -> dict[str, Tensor]:
        """Return the named terms, summed over frames and over predictions, weighted over objects."""
        zero = weight_N.new_zeros(())
        terms = {name: zero for name, weight in self.weights.items() if name != "memory" or weight}
        for time, frame in enumerate(tracked):
            # Each correction is scored as well, so that the first answer and the corrected one both improve.
            for part in frame.predictions:
                logits, target = at_side(part.logits_NMLL, masks_NTSS[part.objects_N, time], self.side_px)
                scores = (logits, part.iou_NM, part.presence_N, target, self.weights, self.squared_iou)
                for name, value_N in mask_losses(*scores).items():
                    terms[name] = terms[name] + (value_N * weight_N[part.objects_N]).sum()
            if frame.teacher_OCGG is not None and frame.conditioned_OCGG is not None:
                value_O = memory_loss(frame.conditioned_OCGG, frame.teacher_OCGG)
                terms["memory"] = terms["memory"] + (value_O * weight_N).sum()
        return terms


def overlap(tracked: list[Tracked], masks_NTSS: Tensor) -> Tensor:
    """J of every frame but the first, (N, T-1): intersection over union, 1 where both are empty."""
    values = []
    for time, frame in enumerate(tracked[1:], start=1):
        target_NSS = masks_NTSS[:, time].float()
        j_N = iou(frame.logits_OSS[:, None], target_NSS)[:, 0]
        empty_N = ~((frame.logits_OSS > 0) | masks_NTSS[:, time]).flatten(1).any(1)
        values.append(torch.where(empty_N, 1.0, j_N.float()))
    return torch.stack(values, 1)


def _adopt(student: nn.Module, tracker: nn.Module, name: str) -> None:
    """Make a submodule or parameter of the tracker the student's own, under the same name."""
    path, _, last = name.rpartition(".")
    home, source = student, tracker
    for step in path.split(".") if path else ():
        source = source.get_submodule(step)
        if step not in home._modules:
            home.add_module(step, nn.Module())
        home = home.get_submodule(step)
    if last in source._modules:
        home.add_module(last, source.get_submodule(last))
    else:
        home.register_parameter(last, source.get_parameter(last))
