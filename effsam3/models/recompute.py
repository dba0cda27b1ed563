# SPDX-License-Identifier: Apache-2.0
"""Recomputation: the layers of a SAM 3 keep no activations for the backward pass, but compute them again."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models._features import FeatureDictNet
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from effsam3.errors import UserError


def recomputing(model: nn.Module, trunk: Any) -> list[nn.Module]:
    """Let the layers of a SAM 3, or of a part of it, keep no activations, but compute them again in the backward pass.

    transformers refuses to (by `gradient_checkpointing_enable`, SAM 3's classes cannot), though their layers can.

    Args:
        trunk: of the model.

    Returns:
        The layers: they compute again where their flag `training` is set.

    Raises:
        UserError: the trunk has no such layers.
    """
    layers: list[nn.Module] = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            # Not reentrant: reentrant checkpoints give no gradients where their inputs need none, as pixels.
            layer.__dict__["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
            layers.append(layer)
    if not any(isinstance(layer, GradientCheckpointingLayer) for layer in trunk.modules()):
        if not isinstance(trunk.trunk, FeatureDictNet):
            raise UserError(
                "train.recompute: the layers of this student's trunk cannot be recomputed; set it to false"
            )
        trunk.trunk.set_grad_checkpointing(True)
    return layers
