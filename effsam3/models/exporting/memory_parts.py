# SPDX-License-Identifier: Apache-2.0
"""The parts that a video takes on top: what a frame's masks become in memory, and how a new frame reads it.

Letters: O objects, C channels of the tracker, G side of its grid, M channels of the memory, F frames, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effsam3.models.exporting.parts import Part, each
from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.tracker import EfficientTracker, efficient_tracker_tensors

ABSENT = -1024.0  # the mask logit that SAM 3 gives an object that is not there
CERTAIN = 1e4  # a logit whose sigmoid is 0 or 1 exactly


def memory_parts(model: Any) -> list[Part]:
    """Return the parts of a whole model that remember and recall, on top of those of an image."""
    tracker = model.tracker_model
    if not isinstance(tracker, EfficientTracker):
        tracker = dense_tracker(tracker)
    config, channels = tracker.config, tracker.hidden_dim
    grid, masks = (f"{side} {side}" for side in (config.grid, tracker.prompt_encoder.mask_input_size[0]))
    width = config.memory_encoder_output_channels
    latents = config.memory_global_latents + config.memory_window_latents
    kept: dict[str, str] = {}
    if config.keeps_map:
        kept |= {"memory_map": f"{config.map_tokens} {width}"}
    if config.keeps_latents:
        kept |= {"memory_latents": f"{latents} {width}"}
    bank: dict[str, str] = {}
    if config.keeps_map:
        bank |= {"maps": f"objects frames {kept['memory_map']}", "map_offsets": "frames"}
    if config.keeps_latents:
        bank |= {"latents": f"objects old_frames {kept['memory_latents']}", "latent_offsets": "old_frames"}
    top = {"top": f"{channels} {grid}"}
    return [
        Part(
            "memory_encoder",
            MemoryEncoder(tracker),
            each("objects", top | {"mask": f"1 {masks}"}) | {"object_logit": "objects", "prompted": "1"},
            each("objects", kept),
        ),
        Part(
            "memory_attention",
            MemoryAttention(tracker),
            each("objects", top)
            | bank
            | {"pointers": f"objects pointers {channels}", "pointer_distances": "pointers"},
            each("objects", {"conditioned": top["top"]}),
        ),
    ]


def dense_tracker(tracker: Any) -> EfficientTracker:
    """Return SAM 3's own tracker as an `EfficientTracker` that keeps all: the same function, of any number of frames.

    Each cell of each frame is a token of its own, as in SAM 3.
    """
    own = {name: value for name, value in tracker.config.to_dict().items() if name != "model_type"}
    # The resampler is part of the class; in this mode nobody asks it.
    config = EfficientTrackerConfig(**own, memory_mode="dense", memory_global_latents=1, memory_window_latents=1)
    config.memory_pool = 1
    dense = EfficientTracker(config, remove_vision_encoder=True)
    tensors = efficient_tracker_tensors(tracker.state_dict(), config)
    dense.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("vision_encoder.")})
    return dense.eval().requires_grad_(False)


class MemoryEncoder(nn.Module):
    """The top map, a mask's logits (O, 1, 4G, 4G) and its object's logit to what is kept of a frame.

    `prompted` (bool, one number) tells that the mask was shown by a user: it is then taken as hard.
    """

    def __init__(self, tracker: EfficientTracker):
        super().__init__()
        self.tracker = tracker

    def forward(self, top: Tensor, mask: Tensor, object_logit: Tensor, prompted: Tensor) -> tuple[Tensor, ...]:
        present_O = object_logit > 0
        logits = torch.where(present_O[:, None, None, None], mask, ABSENT)
        # As a session does: to the image's size, then to that of the memory's mask.
        side = self.tracker.config.image_size
        logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
        full = 4 * self.tracker.prompt_encoder.mask_input_size[0]
        # It grows: antialiasing would change nothing, and some runtimes do not know it.
        logits = F.interpolate(logits, (full, full), mode="bilinear", align_corners=False)
        logits = torch.where(prompted, torch.where(logits > 0, CERTAIN, -CERTAIN), logits)
        kept = self.tracker.remember(top, logits, present_O, is_prompted=False)
        return tuple(tokens for tokens in (kept.map_ONM, kept.latents_OLM) if tokens is not None)


class MemoryAttention(nn.Module):
    """The top map and what is remembered to the map that the mask decoder takes as `image_embedding`.

    Offsets tell how many frames back a frame lies, 0 for one that was prompted. A pointer's distance is how many
    frames back it lies by one less than the most pointers that are read (or the video's frames, if they are fewer).
    """

    def __init__(self, tracker: EfficientTracker):
        super().__init__()
        self.tracker = tracker

    def forward(self, top: Tensor, *memory: Tensor) -> Tensor:
        *frames, pointers, distances = memory
        pairs = [(frames[place], frames[place + 1]) for place in range(0, len(frames), 2)]
        maps = pairs.pop(0) if self.tracker.config.keeps_map else None
        latents = pairs.pop(0) if self.tracker.config.keeps_latents else None
        return self.tracker.memory_attention(top, self.tracker.tokens(maps, latents, (pointers, distances)))
