# SPDX-License-Identifier: Apache-2.0
"""Track the annotated objects of a video with several trackers at once, frame by frame.

Letters: O objects, L low-resolution mask side (4 per trunk position), S image side, H W rows and columns of the video.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam3TrackerVideoModel
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession

from effsam3.data.splits import split_code
from effsam3.data.transforms import normalise, resize_image
from effsam3.data.videos.vos_video import VosVideo
from effsam3.errors import UserError
from effsam3.models.inference.prompted import prompt_processor
from effsam3.models.memory.attention import MemoryTokens
from effsam3.models.memory.prompts import NO_POINT, PromptStyle, draw_prompt

Masks = dict[int, np.ndarray]  # {object: bool (H, W)}


class TrackingError(UserError):
    """A video whose objects cannot be tracked."""


@dataclass(frozen=True)
class TrackedFrame:
    """A frame and what the trackers find on it."""

    index: int
    image_HWC: np.ndarray  # uint8 RGB
    truths: Masks | None  # None: the frame is not annotated
    masks: dict[str, Masks]  # {tracker: masks of the objects shown to it so far}
    prompted: frozenset[int]  # objects shown on this frame; if by their masks, those are the masks here


@dataclass(frozen=True)
class Showing:
    """How objects are shown to a tracker, each on one frame: a kind of `models.memory.prompts.KINDS` and its style.

    What is drawn depends on the video's name, the frame, the object and the seed.
    """

    kind: str = "mask"
    style: PromptStyle = PromptStyle()
    seed: int = 0


BY_MASK = Showing()


class TrackerRun:
    """One tracker on one video.

    Objects first shown on the same frame share a session, and all sessions share the frame's features. They are not
    put into one session, since transformers (5.23) then encodes a frame's memories of all objects as it does those of
    prompted ones, when one of them is prompted.
    """

    def __init__(
        self,
        tracker: Sam3TrackerVideoModel,
        frames: int,
        size: tuple[int, int],
        overlap: bool,
        showing: Showing = BY_MASK,
        video: str = "",
    ):
        """`overlap`: whether two objects may have the same pixel; otherwise it goes to the one of higher logit.

        `video` is its name."""
        self.tracker, self.size, self.overlap = tracker, size, overlap
        self.showing, self.video, self.frames = showing, video, _FrameWindow(frames)
        self.processor = prompt_processor(tracker)
        self.sessions: list[Sam3TrackerVideoInferenceSession] = []
        self.seconds: list[float] = []  # of every frame without prompts
        self.most_tokens = 0  # of memory that one object attended to on one frame
        self.object_frames = 0

    def step(self, index: int, pixels_3SS: Tensor, prompts: Masks) -> Masks:
        """Track onto the next frame, normalised pixels of the model's size; return all masks.

        `prompts` are the masks of new objects, which are shown as `Showing` has it.
        """
        device = self.tracker.device
        self.frames.hold(index, pixels_3SS.to(device, self.tracker.dtype))
        if prompts:
            self._prompt(index, prompts)
        attention: nn.Module = self.tracker.memory_attention
        with attention.register_forward_pre_hook(lambda _, args, named: self._count(*args, **named), with_kwargs=True):
            started = _now(device)
            outputs = [self.tracker(session, frame_idx=index) for session in self.sessions]
            seconds = _now(device) - started
        if not prompts:
            self.seconds.append(seconds)
        numbers = [number for output in outputs for number in output.object_ids]
        self.object_frames += len(numbers)
        logits_O1LL = torch.cat([output.pred_masks for output in outputs])
        masks_OHW = self._at_full_size(logits_O1LL).cpu().numpy()
        return dict(zip(numbers, masks_OHW, strict=True))

    def _prompt(self, index: int, prompts: Masks) -> None:
        session = self.processor.init_video_session(inference_device=self.tracker.device, dtype=self.tracker.dtype)
        session.processed_frames = self.frames
        if self.sessions:
            session.cache = self.sessions[0].cache
        if self.showing.kind == "mask":
            self.processor.add_inputs_to_inference_session(
                session, index, list(prompts), input_masks=[torch.from_numpy(mask) for mask in prompts.values()]
            )
        else:
            for number, mask in prompts.items():
                session.add_point_inputs(session.obj_id_to_idx(number), index, self._points(index, number, mask))
            session.obj_with_new_inputs = list(prompts)
        self.sessions.append(session)

    def _points(self, index: int, number: int, mask_HW: np.ndarray) -> dict[str, Tensor]:
        """Draw an object's points and box, in pixels of the model's image, as a session keeps them."""
        side, showing = self.tracker.config.image_size, self.showing
        soft_SS = F.interpolate(torch.from_numpy(mask_HW)[None, None].float(), (side, side), mode="area")[0, 0]
        # As in training: what covers half of a pixel. Of an object too thin for that, whatever it touches.
        mask_SS = soft_SS >= 0.5 if (soft_SS >= 0.5).any() else soft_SS > 0
        rng = np.random.default_rng([showing.seed, split_code(self.video), index, number])
        points_P2, labels_P = draw_prompt(mask_SS, showing.kind, rng, showing.style)
        used_P = labels_P != NO_POINT
        device, dtype = self.tracker.device, self.tracker.dtype
        return {
            "point_coords": points_P2[used_P][None, None].to(device, dtype),
            "point_labels": labels_P[used_P][None, None].to(device),
        }

    def _count(self, current_vision_features=None, memory=None, *_, **__) -> None:
        """Count the tokens of what a memory attention is called with, by position or by name."""
        tokens = memory.values_ONM.shape[1] if isinstance(memory, MemoryTokens) else len(memory)
        self.most_tokens = max(self.most_tokens, tokens)

    def _at_full_size(self, logits_O1LL: Tensor) -> Tensor:
        logits_OHW = F.interpolate(logits_O1LL.float(), self.size, mode="bilinear", align_corners=False)[:, 0]
        masks_OHW = logits_OHW > 0
        if not self.overlap:
            masks_OHW &= logits_OHW.argmax(0) == torch.arange(len(logits_OHW), device=logits_OHW.device)[:, None, None]
        return masks_OHW

    def stored_bytes(self) -> int:
        """Bytes of all tensors that the sessions hold now, but for frames and the current frame's features."""
        # Frames and features are in objects of their own classes, which `_tensors` does not look into.
        held = [vars(session) for session in self.sessions]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(held)}
        return sum(storage.nbytes() for storage in storages.values())


class _FrameWindow:
    """Stands for a session's frames and holds only the current one, so that a long video takes no more memory."""

    def __init__(self, count: int):
        self.count, self.index = count, -1
        self.pixels: Tensor | None = None

    def hold(self, index: int, pixels_3SS: Tensor) -> None:
        self.index, self.pixels = index, pixels_3SS

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        assert index == self.index and self.pixels is not None, f"frame {index} is asked for on frame {self.index}"
        return self.pixels


def _tensors(value) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def track(runs: dict[str, TrackerRun], video: VosVideo, appearing_later: bool) -> Iterator[TrackedFrame]:
    """Yield every frame from the first annotated one on; each object is shown on the first frame that has its mask.

    If not `appearing_later`, only objects of the first annotated frame are tracked.

    Raises:
        TrackingError: the video has no annotated object to start with.
    """
    annotated = set(video.annotated)
    first = min(annotated, default=0)
    known: set[int] = set()
    sides = {name: run.tracker.config.image_size for name, run in runs.items()}
    for index in range(first, video.frames):
        image_HWC = np.ascontiguousarray(video.read([index])[0].transpose(1, 2, 0))
        truths = video.masks(index) if index in annotated else None
        prompts = {}
        if truths is not None and (appearing_later or index == first):
            prompts = {number: mask for number, mask in truths.items() if number not in known and mask.any()}
        known |= prompts.keys()
        if not known and not appearing_later:
            raise TrackingError(
                f"{video.name}: no object is annotated on frame {first}, where tracking starts; track objects that "
                "appear later, or leave the video out"
            )
        masks: dict[str, Masks] = {name: {} for name in runs}
        if known:
            # Once for all trackers of a size: on a GPU it takes longer than scoring them.
            pixels = {side: normalise(resize_image(image_HWC, side, "square")[0]) for side in set(sides.values())}
            masks = {name: run.step(index, pixels[sides[name]], prompts) for name, run in runs.items()}
        yield TrackedFrame(index, image_HWC, truths, masks, frozenset(prompts))
