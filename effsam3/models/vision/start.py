# SPDX-License-Identifier: Apache-2.0
"""A vision student's necks begin as SAM 3's own, for the part of its trunk's map that few channels span.

Which channels: the principal components of the trunk's map, and inside a neck those of its map, every channel
standardised first (SAM 3's trunk has a few with large values, which would decide alone). SAM 3's layers are linear but
for the GELU of the fine level; what they do is read off their answers to single positions.

Letters: B images, P positions, C channels, K components, R channels inside a neck, G side of the trunk's grid, s how
much finer than its input a layer's map is, along a side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effsam3.models.vision.student import SCALES, SlimLevel
from effsam3.models.vision.training import Necks, VisionStudent

SIDE = 5  # of the maps on which a layer is read: its answer to the centre position fits in


class Components(nn.Module):
    """Maps (B, C, G, G) to K numbers a position, of mean 0 and deviation 1, which tell most of what varies in them.

    A map is `mean_C` plus, for each component, its number times its column, as far as K components reach.
    """

    def __init__(self, channels: int, count: int):
        """Make them without contents."""
        super().__init__()
        self.mean_C: Tensor
        self.columns_CK: Tensor
        self.rows_KC: Tensor
        self.shares_K: Tensor
        self.register_buffer("mean_C", torch.zeros(channels))
        self.register_buffer("columns_CK", torch.zeros(channels, count))
        self.register_buffer("rows_KC", torch.zeros(count, channels))  # by which the numbers are found
        self.register_buffer("shares_K", torch.zeros(count))  # of the variance of all, in standardised channels

    def forward(self, feat_BCGG: Tensor) -> Tensor:
        return F.conv2d(feat_BCGG - self.mean_C[:, None, None], self.rows_KC[:, :, None, None])


def principal_components(values_PC: Tensor, count: int) -> Components:
    """Return the first `count` principal components of standardised channels; components of 0 if there are fewer."""
    values = values_PC.double()
    mean_C, deviation_C = values.mean(0), values.std(0, correction=0)
    deviation_C = deviation_C.clamp(min=1e-3 * float(deviation_C.mean()) + 1e-12)  # a channel that hardly varies
    standard = (values - mean_C) / deviation_C
    variances, vectors = torch.linalg.eigh(standard.T @ standard / len(values))  # the largest come last
    variances, vectors = variances.flip(0)[:count].clamp(min=1e-12), vectors.flip(1)[:, :count]
    found, there = Components(len(mean_C), count).to(values_PC.device), len(variances)
    found.mean_C.copy_(mean_C)
    found.columns_CK[:, :there] = deviation_C[:, None] * vectors * variances.sqrt()
    found.rows_KC[:there] = (vectors / (deviation_C[:, None] * variances.sqrt())).T
    found.shares_K[:there] = variances / variances.sum()
    return found


def answers(first: Callable[[Tensor], Tensor], last: nn.Conv2d, columns_CK: Tensor, mean_C: Tensor, s: int) -> Tensor:
    """Read two linear layers, `first` for each position by itself, then a 3x3 convolution, as a transposed one.

    It takes the K numbers of which `columns_CK` and `mean_C` make their input, and ones, for the mean and the biases
    of `first`; the bias of `last` is its own. Returns its weights (K + 1, C', s + 2, s + 2), of stride s, padding 1.
    """
    single = columns_CK.new_zeros(columns_CK.shape[1], len(mean_C), SIDE, SIDE)
    single[:, :, SIDE // 2, SIDE // 2] = columns_CK.T
    constant, centre = first(mean_C[None, :, None, None].expand(1, -1, SIDE, SIDE)), slice(2 * s, 3 * s)
    ones = torch.zeros_like(constant)
    ones[:, :, centre, centre] = constant[:, :, centre, centre]
    middle = torch.cat([first(single) - first(torch.zeros_like(single[:1])), ones])
    around = slice(centre.start - 1, centre.stop + 1)
    return F.conv2d(middle, last.weight, padding=1)[:, :, around, around]


@torch.no_grad()
def begin_as(student: VisionStudent, necks: Necks, trunk: Components, feat_BCGG: Tensor, valid_B1GG: Tensor) -> None:
    """Let a student's necks do what SAM 3's `necks` do, as far as their channels allow.

    `trunk` are the components of SAM 3's trunk, of as many numbers as the student's has channels, which they then are;
    `feat_BCGG` is what SAM 3's makes of a few images, `valid_B1GG` is 0 on padding. The student's statistics must be
    set.
    """
    used = valid_B1GG[:, 0] > 0
    for place, (level, layer) in enumerate(zip(student.necks.layers, necks.layers, strict=True)):
        scale = SCALES[place % len(SCALES)]
        mean_C, deviation_C = (value.to(feat_BCGG) for value in (level.feature_mean, level.feature_scale))
        # One position of each cell of the trunk's grid is sample enough of a finer map.
        sample = layer(feat_BCGG)[:, :, scale // 2 :: scale, scale // 2 :: scale].permute(0, 2, 3, 1)[used]
        standard_PC = ((sample - mean_C) / deviation_C).double()
        basis_CR = torch.linalg.eigh(standard_PC.T @ standard_PC).eigenvectors.flip(1).to(feat_BCGG)
        basis_CR = F.pad(basis_CR[:, : level.widen.in_channels], (0, max(0, level.widen.in_channels - len(mean_C))))
        if scale == 4:
            weight = begin_fine(level, layer, trunk, feat_BCGG, deviation_C)
        else:
            before = nn.Sequential(*layer.scale_layers, layer.proj1)
            weight = answers(before, layer.proj2, trunk.columns_CK, trunk.mean_C, scale)
        weight = torch.einsum("kcij,cr->krij", weight / deviation_C[:, None, None], basis_CR)
        # A neck may have room for more units than SAM 3's has.
        weight = torch.cat([F.pad(weight[:-1], (0,) * 7 + (level.inner[-1].in_channels - len(weight),)), weight[-1:]])
        # A plain convolution has its inputs second and is turned round.
        level.inner[-1].weight.copy_(weight if scale > 1 else weight.transpose(0, 1).flip(2, 3))
        level.inner[-1].bias.copy_(((layer.proj2.bias - mean_C) / deviation_C) @ basis_CR)
        level.widen.weight.copy_(basis_CR[:, :, None, None])
        level.widen.bias.zero_()


def begin_fine(level: SlimLevel, layer: Any, trunk: Components, feat_BCGG: Tensor, deviation_C: Tensor) -> Tensor:
    """Give the fine level the units before SAM 3's GELU that matter most for its map; return what follows them.

    That is as from `answers`. The units that are left out stay at their mean.
    """
    grow, activation, grow_again = layer.scale_layers
    units_BHGG = activation(grow(feat_BCGG))
    mean_H, spread_H = units_BHGG.mean((0, 2, 3)), units_BHGG.std((0, 2, 3))
    each = torch.eye(len(mean_H)).to(mean_H)
    weight = answers(nn.Sequential(grow_again, layer.proj1), layer.proj2, each, mean_H, 2)
    strength_H = (weight[:-1] / deviation_C[:, None, None]).square().sum((1, 2, 3)).sqrt()
    own: Any = level.inner[1]
    best = (spread_H * strength_H).argsort(descending=True)[: own.out_channels]
    columns = torch.cat([trunk.columns_CK, trunk.mean_C[:, None]], 1)
    own.weight[:, : len(best)] = torch.einsum("ck,chij->khij", columns, grow.weight[:, best]).to(own.weight)
    own.bias[: len(best)] = grow.bias[best].to(own.bias)
    return torch.cat([weight[best], weight[-1:] - torch.einsum("hcij,h->cij", weight[best], mean_H[best])])
