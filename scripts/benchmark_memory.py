# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of trackers and their memory, for scripts/benchmark.py: a step of training, a frame of a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import (
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    PreTrainedModel,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam3TrackerVideoInferenceSession,
    Sam3TrackerVideoModel,
)

from effsam3.losses.masks import object_weights
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config
from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.prompts import draw_prompt
from effsam3.models.memory.slot import tracker_config
from effsam3.models.memory.student import Scoring, TrackerStudent
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.memory.training import Prompts, encode_frames
from effsam3.models.registry import SAM3S
from effsam3.recipe.reader import load_recipe

TRUNK_LAYERS = 75  # times the tiny chassis', see `clip_step`
POINTERS = 16  # that a frame reads, the last seven of them with their frame's memory
Sides = dict[str, Callable[[], object]]


def clip_step(taught: bool, device: torch.device, tiny: bool) -> Sides:
    """One training step of a tracker with a hybrid memory on a clip of 8 frames with 3 objects, and object by object.

    SAM 3's trunk takes 5.4 TFLOP a frame; an object on it 0.8, its backward pass among them, and 1.7 with a dense
    teacher (`taught`, as in stage memory): seven and three to one. The tiny chassis has next to no trunk, so on a CPU
    it gets as many layers as make it three and two to one in time.
    """
    frames, objects = (2, 2) if tiny else (8, 3)
    own = read_config(chassis_folder("random" if device.type == "cuda" else "tiny")).tracker_config.to_dict()
    own.pop("model_type")
    if device.type == "cpu" and not tiny:
        own["vision_config"]["backbone_config"]["num_hidden_layers"] *= TRUNK_LAYERS
    tracker = EfficientTracker(EfficientTrackerConfig(**own, memory_mode="hybrid")).to(device)  # random weights
    weights = {"focal": 20.0, "dice": 1.0, "iou": 1.0, "presence": 1.0}
    trained, teacher = ["memory_attention", "memory_encoder", "mask_decoder"], None
    if taught:
        dense = EfficientTrackerConfig(**own, memory_mode="dense")
        teacher = EfficientTracker(dense, remove_vision_encoder=True).to(device).eval().requires_grad_(False)
        trained, weights = ["memory_attention", "memory_encoder", "memory_resampler"], weights | {"memory": 1.0}
    student = TrackerStudent(
        tracker, trained, teacher, Scoring(weights, tracker.image_size),
        trunk_batch=8, objects_at_once=None, recompute=False,
    ).train()  # fmt: skip
    side = tracker.image_size
    pixels = torch.randn(1, frames, 3, side, side, device=device)
    masks = torch.zeros(objects, frames, side, side, dtype=torch.bool, device=device)
    for index in range(objects):
        masks[index, :, index * side // 8 : (index + 2) * side // 8, side // 4 : side // 2] = True
    clip = torch.zeros(objects, dtype=torch.long, device=device)
    prompts = Prompts.of([{0: (*draw_prompt(masks[0, 0], "mask", np.random.default_rng(0)), True)}] * objects).to(
        device
    )

    def step(objects_N: torch.Tensor, trunks: int = 1) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for _ in range(trunks - 1):
                encode_frames(tracker, pixels[0], student.trunk_batch, frozen=True)
            weight_NT = object_weights(clip[objects_N], 1)[:, None].expand(-1, frames)
            given = (masks[objects_N], clip[objects_N], weight_NT, prompts.some(objects_N))
            student(pixels, *given)["loss"].backward()

    every = torch.arange(objects, device=device)
    sides: Sides = {
        "all objects at once": lambda: step(every),
        "object by object": lambda: [step(one) for one in every[:, None]],
    }
    if taught:
        sides["object by object, a trunk for the teacher"] = lambda: [step(one, trunks=2) for one in every[:, None]]
    return sides


def frame_memory(device: torch.device, tiny: bool) -> Sides:
    """Memory of one frame of one object: reading 7 frames and 16 pointers, and encoding the frame for later ones.

    Counted is what a session calls for both, with what lays the memory out as tokens and resamples it; not the mask
    decoder, nor bringing its mask to the size that the memory encoder reads. All have random weights and a grid of
    72 x 72 cells unless a name says otherwise. EdgeTAM's windows have 4 x 4 cells as on its own grid of 64 x 64, so
    there are 324 of them, not 256.
    """
    sam3 = SAM3S["tiny" if tiny else "random"]
    own, grid = sam3.config().tracker_config, sam3.sizes.grid

    def ours(recipe: str) -> PreTrainedModel:
        return EfficientTracker(
            tracker_config(own, load_recipe(f"stage2/{recipe}").memory), remove_vision_encoder=True
        )

    def edgetam(grid: int) -> PreTrainedModel:
        across = grid // 4
        windows = dict(memory_attention_rope_k_sizes=[across] * 2, perceiver_resampler_num_latents_2d=across**2)
        return EdgeTamVideoModel(EdgeTamVideoConfig(**_sizes(grid), **windows))

    trackers = {
        "hybrid, two layers": ours("memory_two_layers"),
        "EdgeTAM": edgetam(grid),
        "EdgeTAM, 64 x 64": edgetam(grid * 8 // 9 // 4 * 4),
        "hybrid": ours("memory"),
        "SAM 3": Sam3TrackerVideoModel(own, remove_vision_encoder=True),
        "SAM 2.1": Sam2VideoModel(Sam2VideoConfig(**_sizes(grid))),
    }
    return {side: _frame_of(tracker, device) for side, tracker in trackers.items()}


def _sizes(grid: int) -> dict[str, Any]:
    """Keys of a config of SAM 2's family for a grid; its trunk, which is not run, is as small as it can be."""
    sides = [[scale * grid] * 2 for scale in (4, 2, 1)]
    trunk = dict(
        model_type="sam2_hiera_det_model",
        blocks_per_stage=[1] * 4,
        embed_dim_per_stage=[8] * 4,
        num_attention_heads_per_stage=[1] * 4,
    )
    vision = dict(
        model_type="sam2_vision_model",
        backbone_config=trunk,
        backbone_channel_list=[8] * 4,
        backbone_feature_sizes=sides,
    )
    pixels = 16 * grid
    return dict(
        image_size=pixels,
        vision_config=vision,
        prompt_encoder_config={"image_size": pixels},
        memory_attention_rope_feat_sizes=[grid] * 2,
    )


def _frame_of(tracker: Any, device: torch.device) -> Callable[[], object]:
    """What a session calls for the memory of one frame, on a session that is full."""
    tracker = tracker.eval().to(device)
    grid, width = tracker.backbone_feature_sizes[-1][0], tracker.hidden_dim
    flat, encoding = torch.randn(2, grid**2, 1, width, device=device).unbind(0)
    mask, score = torch.randn(1, 1, 16 * grid, 16 * grid, device=device), torch.ones(1, 1, device=device)

    def remember() -> tuple[torch.Tensor, torch.Tensor]:
        return tracker._encode_new_memory(flat, mask, score, is_mask_from_pts=False)

    session = Sam3TrackerVideoInferenceSession(inference_device=device, dtype=torch.float32)
    with torch.inference_mode():
        features, positions = remember()
    pointer = torch.randn(1, width, device=device)
    kept = {"maskmem_features": features, "maskmem_pos_enc": positions, "object_pointer": pointer}
    outputs = {"cond_frame_outputs": {0: kept}, "non_cond_frame_outputs": dict.fromkeys(range(1, POINTERS), kept)}
    session.output_dict_per_obj[0] = outputs

    @torch.inference_mode()
    def frame() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tracker._prepare_memory_conditioned_features(session, POINTERS, 0, False, flat, encoding, POINTERS + 1)
            remember()

    return frame
