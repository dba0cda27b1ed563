# SPDX-License-Identifier: Apache-2.0
"""The smallest image students: stacks of depthwise-separable convolutions down to stride 16, made of timm's blocks.

timm has none of so few parameters. They are for the chassis `tiny_concepts`, next to whose trunk timm's smallest is
large.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

WIDTHS = {f"tiny_separable_w{width}": width for width in (4, 16)}  # channels of the stem


def architectures() -> dict[str, tuple[Callable[..., nn.Module], Any]]:
    """Return what timm's modules have of each of their models: the function that builds it, and its `DefaultCfg`."""
    from timm.models._registry import generate_default_cfgs

    config = {"input_size": (3, 160, 160), "first_conv": "conv_stem", "classifier": "classifier"}
    configs = generate_default_cfgs({f"{name}.untrained": config for name in WIDTHS})
    return {name: (partial(_build, name), configs[name]) for name in WIDTHS}


def _build(name: str, **options) -> nn.Module:
    """Build a stem and five blocks; `options` are what timm's models take.

    They are those of MobileNetV1 (arXiv:1704.04861) without the activation after the depthwise convolution.
    """
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.efficientnet import _create_effnet
    from torch import nn

    width = WIDTHS[name]
    blocks = [  # in timm's notation: dsa has an activation after its last convolution, too, and no shortcut
        [f"dsa_r1_k3_s2_c{2 * width}"],
        [f"dsa_r1_k3_s2_c{4 * width}", f"dsa_r1_k3_s1_c{4 * width}"],
        [f"dsa_r1_k3_s2_c{4 * width}", f"dsa_r1_k3_s1_c{4 * width}"],
    ]
    model = _create_effnet(
        name,
        block_args=decode_arch_def(blocks),
        stem_size=width,
        fix_stem=True,
        round_chs_fn=partial(round_channels, divisor=1),  # timm itself rounds to multiples of 8
        act_layer=nn.ReLU,
        **options,
    )
    for module in model.modules():
        if isinstance(module, DepthwiseSeparableConv):
            # Of so few channels, an activation between both convolutions loses what SAM 3's heads read (LOG.md).
            module.bn1.act = nn.Identity()
    return model
