# SPDX-License-Identifier: Apache-2.0
"""The optimizer and its learning rate as a pure function of the step, so that no hardware can change it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn
from torch.optim import AdamW

# Tables of positions, scales of layers, latents and single vectors, which only look like matrices.
NO_DECAY_NAMES = (
    "attention_biases",
    "position_embedding",
    "layer_scale",
    "global_offset",
    "window_offset",
    "memory_temporal_positional_encoding",
    "occlusion_spatial_embedding_parameter",
    "no_memory_embedding",
    "no_object_pointer",
)


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict]:
    """Split the trainable parameters: matrices and kernels decay; biases, norms and position biases do not.

    `lr_scales` maps the beginning of a name to the multiple of the learning rate that it takes (`lr_scale` of the
    group); the longest beginning wins, and without one it is 1.
    """
    scales = {"": 1.0} | dict(lr_scales or {})
    groups: dict[tuple[bool, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Decay keeps weights small where scale does not matter; norms, biases and positions have their own
            # meaning.
            decays = parameter.ndim > 1 and not name.endswith(NO_DECAY_NAMES)
            scale = scales[max((start for start in scales if name.startswith(start)), key=len)]
            groups.setdefault((decays, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for (decays, scale), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    lr_scales: Mapping[str, float] | None = None,
) -> AdamW:
    """AdamW over `parameter_groups`."""
    # Fused: one kernel for all parameters, which also skips a step that has overflowed without asking the device.
    return AdamW(parameter_groups(model, weight_decay, lr_scales), lr=lr, betas=betas, eps=eps, fused=True)


def lr_at(step: int, steps: int, warmup_steps: int, lr: float, min_lr: float, warmup_lr: float) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`.

    Linear from `warmup_lr` to `lr` over the warm-up, then half a cosine down to `min_lr` at the last step.
    """
    if step < warmup_steps:
        return warmup_lr + (lr - warmup_lr) * step / warmup_steps
    # Ends exactly at `min_lr` on the last step, however long the warm-up was.
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
