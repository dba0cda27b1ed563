# SPDX-License-Identifier: Apache-2.0
"""The vision student: a timm trunk with a light head, and necks that are SAM 3's own in fewer channels.

SAM 3's necks make every map from the trunk's one of 1024 channels, by 2x2 and 3x3 convolutions of up to 1024 channels:
215 GFLOP each. All but one GELU of theirs is linear. So a neck on a map of few channels, with as few inside, can begin
as the very same function of the part of the trunk's map that those channels span; start.py makes it so.

Letters: B images, S their side in pixels, D channels of the trunk's map, C the necks' channels, G side of the trunk's
grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Sam3VisionConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.sam3 import modeling_sam3
from transformers.models.sam3.modeling_sam3 import Sam3SinePositionEmbedding, Sam3VisionNeck
from transformers.models.sam3_video import modeling_sam3_video

from effsam3.models.image.backbones import image_student
from effsam3.models.image.student import LayerNorm2d, StudentBackbone, StudentTrunkConfig, resize_BCHW
from effsam3.models.registry import FUSED_MAPS, FUSED_WIDTH, HEAD_BLOCKS

SCALES = (4, 2, 1)  # positions of the fine, the middle and the top map to one of the trunk's grid, along a side


class VisionTrunkConfig(StudentTrunkConfig):
    """What a vision student's trunk is, `hidden_size` channels of its map, and how wide its necks are inside."""

    model_type = "effsam3_vision_trunk"

    head: str = "light"
    widths: list[int] | tuple[int, ...] = (32, 64, 96)  # channels inside the necks: fine, middle, top


def vision_trunk_config(
    student: str, widths: tuple[int, ...], seen: int | None, image_size: int, patch_size: int
) -> VisionTrunkConfig:
    """Return the config of a student by its name in recipes; `seen` is its `student_image_size`.

    `widths` are the channels of the trunk's map and, inside the necks, of the fine, the middle and the top level.

    Raises:
        UserError: there is no such student, or it cannot be one at this size.
    """
    row = image_student(student, seen or image_size)
    return VisionTrunkConfig(
        timm_name=row.timm_name.partition(".")[0],
        out_indices=row.out_indices,
        student_image_size=seen,
        hidden_size=widths[0],
        widths=tuple(widths[1:]),
        image_size=image_size,
        patch_size=patch_size,
    )


class SeparableBlock(nn.Module):
    """Residual block: a depthwise convolution, then two 1x1 ones, after ConvNeXt (arXiv:2201.03545)."""

    def __init__(self, width: int, side: int, hidden: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, side, padding=side // 2, groups=width)
        self.widen = nn.Conv2d(width, hidden, 1)
        self.narrow = nn.Conv2d(hidden, width, 1)

    def forward(self, feat_BCHW: Tensor) -> Tensor:
        return feat_BCHW + self.narrow(F.gelu(self.widen(self.depthwise(feat_BCHW))))


class LightHead(nn.Module):
    """A trunk's coarsest three maps, coarse to fine, to one of `width` channels on SAM 3's grid: (B, D, G, G)."""

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(own, FUSED_WIDTH, 1) for own in channels[-FUSED_MAPS:])
        self.norm = LayerNorm2d(FUSED_WIDTH)
        self.blocks = nn.Sequential(*(SeparableBlock(FUSED_WIDTH, 7, 2 * FUSED_WIDTH) for _ in range(HEAD_BLOCKS)))
        self.project = nn.Conv2d(FUSED_WIDTH, width, 1)

    def forward(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        top: Tensor | None = None
        for lateral, feat in reversed(list(zip(self.laterals, maps[-len(self.laterals) :], strict=True))):
            size = min(feat.shape[-2], grid[0]), min(feat.shape[-1], grid[1])
            # Shrunk before the 1x1, which is cheaper on fewer positions; with the rest it grows after it.
            own = lateral(resize_BCHW(feat, size))
            top = own if top is None else own + resize_BCHW(top, size)
        assert top is not None
        return self.project(self.blocks(self.norm(resize_BCHW(top, grid))))


class VisionTrunk(StudentBackbone):
    """Normalised pixels (B, 3, S, S) to features (B, N, D), row-major over the trunk's grid."""

    config_class = VisionTrunkConfig

    def __init__(self, config: VisionTrunkConfig):
        super().__init__(config)
        self.post_init()

    def make_head(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> nn.Module:
        return LightHead(channels, self.config.hidden_size)

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutput:
        """Return `last_hidden_state` (B, N, D) for pixels in -1..1; N = (S / patch_size) squared."""
        return BaseModelOutput(last_hidden_state=self.feature_map(pixel_values).flatten(2).transpose(1, 2))


# ---- necks


class WithOnes(nn.Module):
    """A map and one more channel, of ones, by which a convolution can treat the border as SAM 3's does.

    There zeros are padded where the mean is not zero; it also has a bias of its own for each place that a transposed
    convolution makes.
    """

    def forward(self, feat_BCHW: Tensor) -> Tensor:
        return F.pad(feat_BCHW, (0, 0, 0, 0, 0, 1), value=1.0)


class SlimLevel(nn.Module):
    """The trunk's map to a map of the neck's, in place of SAM 3's layer for it.

    `feature_scale` and `feature_mean` are the deviation and mean of the teacher's map per channel, so that the layer
    learns in standardised units, whatever the size of the teacher's channels.
    """

    def __init__(self, inputs: int, width: int, scale: int, channels: int):
        """From `inputs` channels through `width` to `channels`, on a grid `scale` times as fine."""
        super().__init__()
        if scale == 4:
            units = 2 * width
            first = nn.ConvTranspose2d(inputs + 1, units, 2, stride=2)
            inputs, before = units, [WithOnes(), first, nn.GELU()]
        else:
            before = []
        last = (
            nn.Conv2d(inputs + 1, width, 3, padding=1)
            if scale == 1
            else nn.ConvTranspose2d(inputs + 1, width, 4, stride=2, padding=1)
        )
        self.inner = nn.Sequential(*before, WithOnes(), last)
        self.widen = nn.Conv2d(width, channels, 1)
        self.feature_mean: Tensor
        self.feature_scale: Tensor
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_scale", torch.ones(channels))

    def forward(self, feat_BDGG: Tensor) -> Tensor:
        # The statistics go into the weights: a map of 256 x 288 x 288 takes longer to scale than to make.
        bias: Any = self.widen.bias
        weight = self.widen.weight * self.feature_scale.view(-1, 1, 1, 1)
        return F.conv2d(self.inner(feat_BDGG), weight, bias * self.feature_scale + self.feature_mean)


class Unread(nn.Module):
    """In place of the layer for SAM 3's coarsest map, which nothing reads: some map of half the trunk's grid."""

    def forward(self, feat_BDGG: Tensor) -> Tensor:
        return feat_BDGG[:, :1, ::2, ::2]


class SlimNeck(Sam3VisionNeck):
    """A neck on a vision student's trunk: maps of `fpn_hidden_size` channels, positions as SAM 3's."""

    def __init__(self, config: Sam3VisionConfig):
        nn.Module.__init__(self)  # SAM 3's layers are not built
        self.config = config
        channels: int = config.fpn_hidden_size
        self.position_encoding = Sam3SinePositionEmbedding(num_position_features=channels // 2, normalize=True)
        trunk: Any = config.backbone_config
        levels = zip(trunk.widths, SCALES, strict=True)
        self.fpn_layers = nn.ModuleList(
            [*(SlimLevel(trunk.hidden_size, width, scale, channels) for width, scale in levels), Unread()]
        )


def vision_neck(config: Sam3VisionConfig) -> Sam3VisionNeck:
    """Build the neck for the trunk that the config of a vision encoder names: a vision student's, or SAM 3's own."""
    student = isinstance(config.backbone_config, VisionTrunkConfig)
    return SlimNeck(config) if student else Sam3VisionNeck(config)


# On import, so that a release's config finds its classes. transformers builds necks by the class's name, not by a
# config, in these two modules; this is the one place where a release needs more than a registered class.
AutoConfig.register(VisionTrunkConfig.model_type, VisionTrunkConfig)
AutoModel.register(VisionTrunkConfig, VisionTrunk)
for _module in (modeling_sam3, modeling_sam3_video):
    setattr(_module, Sam3VisionNeck.__name__, vision_neck)
