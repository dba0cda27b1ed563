# SPDX-License-Identifier: Apache-2.0
"""Small trackers whose random weights make masks, presence and memory depend on everything, and frames for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

from effsam3.models.chassis.tiny import WIDTH, tiny_config
from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.tracker import EfficientTracker, efficient_tracker_tensors

GRID = 8
SIDE = 14 * GRID
MASKED = 4 * GRID  # side of low-resolution masks
LATENTS = dict(memory_global_latents=4, memory_window_latents=16)


def options(grid=GRID, **changes):
    """The tiny chassis' tracker on a smaller image, with one layer of vision."""
    values = tiny_config().tracker_config.to_dict()
    del values["model_type"]
    values["vision_config"]["backbone_config"] |= dict(
        image_size=14 * grid, num_hidden_layers=1, global_attn_indexes=[]
    )
    return values | {"image_size": 14 * grid} | changes


def lively_tracker(grid=GRID, seed=0, **changes):
    """transformers' tracker with weights that make masks, presence and memory depend on everything."""
    torch.manual_seed(seed)
    model = Sam3TrackerVideoModel(Sam3TrackerVideoConfig(**options(grid, **changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.5)
            elif parameter.ndim >= 2 and min(parameter.shape) > 1:
                gain = 1.0 if name.startswith("vision_encoder") else 2.0
                parameter.normal_(std=gain * parameter[0].numel() ** -0.5)
            elif not parameter.any():
                parameter.normal_(std=0.3)
        # Present on most frames and absent on some, with a margin.
        model.mask_decoder.pred_obj_score_head.proj_out.weight.mul_(10)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(4.0)
    return model.requires_grad_(False)


def efficient(reference, grid=GRID, **changes):
    """An efficient tracker that starts from the reference's weights."""
    config = EfficientTrackerConfig(**options(grid, **(LATENTS | changes)))
    model = EfficientTracker(config).eval().requires_grad_(False)
    model.load_state_dict(efficient_tracker_tensors(reference.state_dict(), config))
    return model


def trained(model):
    """The same with a resampler that is no longer average pooling."""
    torch.manual_seed(5)
    for parameter in model.memory_resampler.layers.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def moving_video(frames, side=SIDE):
    """Smooth noise, seen through a moving window; normalised pixels (T, 3, S, S)."""
    generator = torch.Generator().manual_seed(1)
    canvas = F.interpolate(torch.rand(1, 3, 20, 20, generator=generator), (3 * side, 3 * side), mode="bilinear")[0]
    corners = [((3 * t) % side, (2 * t) % side) for t in range(frames)]
    return torch.stack([canvas[:, y : y + side, x : x + side] for y, x in corners]) * 2 - 1


def random_steps(tracker, objects, frames, seed=0):
    """Arguments of `remember` for some frames, and a new frame's features with pointers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    steps = [
        (draw(objects, WIDTH, GRID, GRID), 4 * draw(objects, 1, MASKED, MASKED), torch.arange(objects) % 2 == t % 2)
        for t in range(frames)
    ]
    pointers = [(5, draw(objects, WIDTH)), (-2, draw(objects, WIDTH)), (1, draw(objects, WIDTH))]
    return steps, draw(objects, WIDTH, GRID, GRID), pointers


def run_steps(tracker, steps, top, pointers):
    memories = [tracker.remember(*step, is_prompted=i == 0) for i, step in enumerate(steps)]
    offsets = [0, *range(len(steps) - 1, 0, -1)]
    return tracker.recall(top, list(zip(offsets, memories, strict=True)), pointers)
