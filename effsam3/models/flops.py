# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a model's parts by tables and arithmetic: no torch, so that `show` answers at once.

Two operations for every multiplication and its addition, in matrix products and convolutions; all else is not counted.
`benchmarks/flops.py` counts any model, and tests count what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping

from effsam3.errors import UserError
from effsam3.models.memory.token_counts import CHANNELS
from effsam3.models.registry import FUSED_MAPS, FUSED_WIDTH, HEAD_BLOCKS, SAM3, ImageStudent, Sam3, TextStudent

# What a model is used for, and the parts that this takes.
USES = {
    "an image": ("trunk", "detector_neck", "tracker_neck"),
    "a phrase": ("text_encoder", "detector"),
    "a point or box": ("mask_decoder",),
    "an object in a frame": ("memory_attention", "mask_decoder", "memory_encoder"),
}
PARTS = tuple(dict.fromkeys(part for parts in USES.values() for part in parts))
COUNT = "`effsam3 show RECIPE --flops` counts every part"
MEMORY_MLP = 2048  # width of the MLPs of SAM 3's memory attention
MEMORY_LAYERS = 4


def title(part: str) -> str:
    """Return a part's name for people."""
    return part.replace("_neck", "'s neck").replace("_", " ")


def flops_line(sam3: Sam3, replaced: Mapping[str, float]) -> str:
    """Say what each use of a model takes in GFLOP, next to SAM 3, and the parts of it.

    Args:
        replaced: GFLOP of the parts that are not SAM 3's own.

    Raises:
        UserError: this SAM 3 has not been counted.
    """
    if not sam3.gflop:
        raise UserError(f"{sam3.label} has not been counted; {COUNT}")
    model = {**sam3.gflop, **replaced}
    uses = []
    for use, parts in USES.items():
        ours, theirs = (sum(of[part] for part in parts) for of in (model, sam3.gflop))
        listed = ", ".join(f"{title(part)} {model[part]:,.1f}" for part in parts) if len(parts) > 1 else ""
        than = f" instead of {theirs:,.1f}" if set(parts) & replaced.keys() else ""
        uses.append(f"{use} {ours:,.1f}{than}" + (f" ({listed})" if listed else ""))
    return "GFLOP: " + "; ".join(uses)


def trunk_gflop(student: ImageStudent, seen: int) -> float:
    """Return the GFLOP of a student's trunk, of an image of which it sees `seen` pixels a side.

    Raises:
        UserError: it has not been counted at this size.
    """
    if student.trunk_gflop is None or seen != SAM3.sizes.image_size:
        raise UserError(f"{student.label} has not been counted at {seen} px; {COUNT}")
    return student.trunk_gflop


def image_gflop(student: ImageStudent, head: str, seen: int, sam3: Sam3) -> float:
    """Return the GFLOP of an image student with its head, as `trunk_gflop`."""
    return trunk_gflop(student, seen) + head_flops(head, student, seen, sam3.sizes.grid, sam3.sizes.hidden_size) / 1e9


def head_flops(head: str, student: ImageStudent, seen: int, grid: int, width: int) -> int:
    """Count the operations of a head, which puts out `width` channels on `grid` x `grid` positions."""
    W, cells = FUSED_WIDTH, [(-(-seen // stride)) ** 2 for stride in student.strides]  # sides are rounded up
    coarsest = student.channels[-1]
    if head == "linear":
        return 2 * cells[-1] * coarsest * width
    if head == "stride32":
        return 2 * cells[-1] * (coarsest * width + 9 * width**2)
    assert head == "fused", head
    used = list(zip(cells, student.channels, strict=True))[-FUSED_MAPS:]
    laterals = sum(count * channels * W for count, channels in used)
    fuse16 = used[-2][0] * 9 * W**2 if len(used) == FUSED_MAPS else 0
    return 2 * (laterals + fuse16 + grid**2 * (9 * W**2 + W * width))


def vision_gflop(student: ImageStudent, widths: tuple[int, ...], seen: int, sam3: Sam3) -> dict[str, float]:
    """Return the GFLOP of a vision student, as `trunk_gflop`: {part: GFLOP}; its head belongs to the trunk.

    `widths` are those of its recipe. What the mask decoder makes of the fine and the middle map, once an image, counts
    with the tracker's neck.
    """
    grid, channels = sam3.sizes.grid, sam3.sizes.fpn_hidden_size
    narrowed = (4 * grid) ** 2 * channels * channels // 8 + (2 * grid) ** 2 * channels * channels // 4
    own, fine, middle, top = widths
    units = 2 * fine
    neck = grid**2 * (own + 1) * (9 * top + 16 * middle + 4 * units) + (2 * grid) ** 2 * (units + 1) * 16 * fine
    for width, scale in ((fine, 4), (middle, 2), (top, 1)):
        neck += (scale * grid) ** 2 * width * channels
    W, sides = FUSED_WIDTH, [-(-seen // stride) for stride in student.strides]  # rounded up
    head = grid**2 * W * (HEAD_BLOCKS * (7 * 7 + 4 * W) + own)
    for side, width in list(zip(sides, student.channels, strict=True))[-FUSED_MAPS:]:
        head += min(side, grid) ** 2 * width * W
    trunk = trunk_gflop(student, seen) + 2 * head / 1e9
    return {"trunk": trunk, "detector_neck": 2 * neck / 1e9, "tracker_neck": 2 * (neck + narrowed) / 1e9}


def text_gflop(student: TextStudent, tokens: int, channels: int) -> float:
    """Return the GFLOP of a text student with its projector to `channels`, of a text of so many tokens."""
    D, kernel = student.hidden_size, 11
    mixers = 2 if student.use_repmixer_blocks else 0
    mlp = 8 * D**2
    attention = 4 * D**2 + 2 * tokens * D
    layers = student.num_hidden_layers * mlp + (student.num_hidden_layers - mixers) * attention
    layers += mixers * 2 * kernel * D
    pooled = D**2  # the projection of the pooled text, which SAM 3 never reads
    return 2 * (tokens * (layers + D * channels) + pooled) / 1e9


def memory_attention_gflop(tokens: int, sam3: Sam3, layers: int | None = None) -> float:
    """Return the GFLOP of SAM 3's memory attention, or of so many layers of it, for one object and frame."""
    cells, W, M = sam3.sizes.grid**2, sam3.sizes.fpn_hidden_size, CHANNELS
    own = cells * (4 * W**2 + 2 * cells * W)
    memory = cells * (2 * W**2 + 2 * tokens * W) + 2 * tokens * M * W
    mlp = cells * 2 * W * MEMORY_MLP
    return 2 * (layers or MEMORY_LAYERS) * (own + memory + mlp) / 1e9
