# SPDX-License-Identifier: Apache-2.0
"""The optimizer and its learning rate as a pure function of the step, so that no layout can change it."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW

# Tables of positions and scales of layers, which only look like matrices.
NO_DECAY_NAMES = ("attention_biases", "position_embedding", "layer_scale")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trainable parameters: matrices and kernels decay; biases, norms and position biases do not."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(NO_DECAY_NAMES)
            (decay if decays else rest).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> AdamW:
    """AdamW over `parameter_groups`."""
    return AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps)


def lr_at(step: int, steps: int, warmup_steps: int, lr: float, min_lr: float, warmup_lr: float) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`.

    Linear from `warmup_lr` to `lr` over the warm-up, then half a cosine down to `min_lr` at the last step.
    """
    if step < warmup_steps:
        return warmup_lr + (lr - warmup_lr) * step / warmup_steps
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
