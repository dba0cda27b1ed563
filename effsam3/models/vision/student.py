# SPDX-License-Identifier: Apache-2.0
"""The vision student: a timm trunk with a light pyramid, and necks that are one 1x1 convolution a level.

SAM 3's necks make their fine maps from 1024 coarse channels, with 3x3 convolutions of 256 channels at 288 x 288: 215
GFLOP each. A trunk with strides 4, 8, 16 and 32 has fine maps of its own. The pyramid brings them to SAM 3's grids in
few channels, which both necks read.

The three maps travel as one, *packed*: a position of the trunk's grid holds its own channels, those of the 2 x 2
middle positions and of the 4 x 4 fine ones. So trunk and necks stand where SAM 3's stand, and what is built around
them (video, prompts, training through heads, exports) sees one feature map and two necks, as ever.

Letters: B images, S their side in pixels, D packed channels, C the necks' channels, G side of the trunk's grid.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from effsam3.models.registry import FUSED_MAPS

SCALES = (4, 2, 1)  # positions of the fine, the middle and the top map to one of the trunk's grid, along a side


def packed_channels(widths: Iterable[int]) -> int:
    """Return the channels of maps with these `widths` (fine, middle, top) when they are packed."""
    return sum(width * scale**2 for width, scale in zip(widths, SCALES, strict=True))


class VisionTrunkConfig(StudentTrunkConfig):
    """What a vision student's trunk is; `hidden_size` is `packed_channels(widths)`."""

    model_type = "effsam3_vision_trunk"

    head: str = "pyramid"
    widths: list[int] | tuple[int, ...] = (32, 64, 256)  # channels of the maps: fine, middle, top


def vision_trunk_config(
    student: str, widths: tuple[int, ...], seen: int | None, image_size: int, patch_size: int
) -> VisionTrunkConfig:
    """Return the config of a student by its name in recipes; `seen` is its `student_image_size`.

    Raises:
        UserError: there is no such student, or it cannot be one at this size.
    """
    row = image_student(student, seen or image_size)
    return VisionTrunkConfig(
        timm_name=row.timm_name.partition(".")[0],
        out_indices=row.out_indices,
        student_image_size=seen,
        widths=tuple(widths),
        hidden_size=packed_channels(widths),
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


class Finer(nn.Module):
    """A map of twice the side: the coarser one unfolded, and the trunk's own of about that side, where it has one."""

    def __init__(self, coarser: int, own: int | None, width: int):
        super().__init__()
        self.unfold = nn.Conv2d(coarser, 4 * width, 1)
        self.lateral = None if own is None else nn.Conv2d(own, width, 1)
        self.block = SeparableBlock(width, 3, width)

    def forward(self, coarser_BCHW: Tensor, own_BCHW: Tensor | None) -> Tensor:
        feat_BCHW = F.pixel_shuffle(self.unfold(coarser_BCHW), 2)
        if self.lateral is not None and own_BCHW is not None:
            feat_BCHW = feat_BCHW + resize_BCHW(self.lateral(own_BCHW), (feat_BCHW.shape[-2], feat_BCHW.shape[-1]))
        return self.block(feat_BCHW)


class PyramidHead(nn.Module):
    """A trunk's maps to the three of `widths` on SAM 3's grids (4 G, 2 G and G a side), packed: (B, D, G, G).

    The coarsest three make the top map, coarse to fine; those of strides 8 and 4 are each read once more, at their
    own detail.
    """

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], widths: tuple[int, ...]):
        super().__init__()
        fine, middle, top = widths
        places = {stride: place for place, stride in enumerate(strides)}
        self.places = [places.get(8), places.get(4)]  # which maps the finer levels read
        self.laterals = nn.ModuleList(nn.Conv2d(width, top, 1) for width in channels[-FUSED_MAPS:])
        self.norm = LayerNorm2d(top)
        self.block = SeparableBlock(top, 7, 2 * top)
        own = [None if place is None else channels[place] for place in self.places]
        self.finer = nn.ModuleList([Finer(top, own[0], middle), Finer(middle, own[1], fine)])

    def forward(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        top: Tensor | None = None
        for lateral, feat in reversed(list(zip(self.laterals, maps[-len(self.laterals) :], strict=True))):
            size = min(feat.shape[-2], grid[0]), min(feat.shape[-1], grid[1])
            # Shrunk before the 1x1, which is cheaper on fewer positions; with the rest it grows after it.
            own = lateral(resize_BCHW(feat, size))
            top = own if top is None else own + resize_BCHW(top, size)
        assert top is not None
        level = self.block(self.norm(resize_BCHW(top, grid)))
        packed = [level]
        for scale, place, finer in zip((2, 4), self.places, self.finer, strict=True):
            level = finer(level, None if place is None else maps[place])
            packed.append(F.pixel_unshuffle(level, scale))
        return torch.cat(packed, 1)


class VisionTrunk(StudentBackbone):
    """Normalised pixels (B, 3, S, S) to packed maps (B, N, D), row-major over the trunk's grid."""

    config_class = VisionTrunkConfig

    def __init__(self, config: VisionTrunkConfig):
        super().__init__(config)
        self.post_init()

    def make_head(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> nn.Module:
        return PyramidHead(channels, strides, tuple(self.config.widths))

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutput:
        """Return `last_hidden_state` (B, N, D) for pixels in -1..1; N = (S / patch_size) squared."""
        return BaseModelOutput(last_hidden_state=self.feature_map(pixel_values).flatten(2).transpose(1, 2))


# ---- necks


class PyramidLevel(nn.Conv2d):
    """One of the packed maps to a map of the neck's, in place of SAM 3's layer for it.

    `feature_scale` and `feature_mean` are the deviation and mean of the teacher's map per channel, so that the layer
    learns in standardised units, whatever the size of the teacher's channels.
    """

    def __init__(self, start: int, width: int, scale: int, channels: int):
        """`start` is the first of its channels among the packed ones."""
        super().__init__(width, channels, 1)
        self.packed, self.scale = slice(start, start + width * scale**2), scale
        self.feature_mean: Tensor
        self.feature_scale: Tensor
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_scale", torch.ones(channels))

    def forward(self, feat_BDGG: Tensor) -> Tensor:
        own = F.pixel_shuffle(feat_BDGG[:, self.packed], self.scale) if self.scale > 1 else feat_BDGG[:, self.packed]
        # The statistics go into the weights: a map of 256 x 288 x 288 takes longer to scale than to make.
        bias: Any = self.bias
        weight = self.weight * self.feature_scale.view(-1, 1, 1, 1)
        return F.conv2d(own, weight, bias * self.feature_scale + self.feature_mean)


class Unread(nn.Module):
    """In place of the layer for SAM 3's coarsest map, which nothing reads: some map of half the trunk's grid."""

    def forward(self, feat_BDGG: Tensor) -> Tensor:
        return feat_BDGG[:, :1, ::2, ::2]


class PyramidNeck(Sam3VisionNeck):
    """A neck on a vision student's trunk: maps of `fpn_hidden_size` channels, positions as SAM 3's."""

    def __init__(self, config: Sam3VisionConfig):
        nn.Module.__init__(self)  # SAM 3's layers are not built
        self.config = config
        half: int = config.fpn_hidden_size // 2
        self.position_encoding = Sam3SinePositionEmbedding(num_position_features=half, normalize=True)
        trunk: Any = config.backbone_config
        layers: list[nn.Module] = [Unread()]
        start = 0
        for width, scale in reversed(list(zip(trunk.widths, SCALES, strict=True))):
            layers.insert(0, PyramidLevel(start, width, scale, config.fpn_hidden_size))
            start += width * scale**2
        self.fpn_layers = nn.ModuleList(layers)


def vision_neck(config: Sam3VisionConfig) -> Sam3VisionNeck:
    """Build the neck for the trunk that the config of a vision encoder names: a vision student's, or SAM 3's own."""
    student = isinstance(config.backbone_config, VisionTrunkConfig)
    return PyramidNeck(config) if student else Sam3VisionNeck(config)


# On import, so that a release's config finds its classes. transformers builds necks by the class's name, not by a
# config, in these two modules; this is the one place where a release needs more than a registered class.
AutoConfig.register(VisionTrunkConfig.model_type, VisionTrunkConfig)
AutoModel.register(VisionTrunkConfig, VisionTrunk)
for _module in (modeling_sam3, modeling_sam3_video):
    setattr(_module, Sam3VisionNeck.__name__, vision_neck)
