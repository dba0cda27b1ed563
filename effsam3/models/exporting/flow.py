# SPDX-License-Identifier: Apache-2.0
"""The parts of a model in a row on drawn inputs: what PyTorch computes, which an exported file has to match."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effsam3.models.exporting.parts import Part
from effsam3.models.text.tokens import PromptTokenizer

# Lengths of the dynamic axes. No two that meet in one file are equal in the first, by which files are traced: an
# exporter would take equal ones for one and the same. The second has what tracing likes to take for a constant.
TRACED = {
    "images": 2, "texts": 2, "prompts": 2, "boxes": 3, "objects": 4, "points": 5, "frames": 3, "old_frames": 2,
    "pointers": 5,
}  # fmt: skip
SECOND = dict.fromkeys(TRACED, 1) | {"old_frames": 0}
TEXTS = ("a dog", "the red car on the left", "zebra")


class Example(NamedTuple):
    """A part's inputs and what PyTorch makes of them, by their names."""

    part: Part
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def flow(
    parts: Sequence[Part], lengths: Mapping[str, int], seed: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Example]:
    """Run the parts one after the other; a part gets what earlier ones have put out, and drawn numbers for the rest.

    Args:
        lengths: of the dynamic axes, as `TRACED`.
        device: of the parts' weights; meta ones compute shapes only.
    """
    draw = torch.Generator().manual_seed(seed)
    known: dict[str, Tensor] = {}
    for part in parts:
        inputs = {}
        for name, axes in part.inputs.items():
            shape = [lengths[axis] if axis in lengths else int(axis) for axis in axes.split()]
            value = known.get(name)
            if value is None:
                value = _drawn(name, shape, draw).to(device)
            elif list(value.shape) != shape:
                value = _repeated(value, shape)
            inputs[name] = value
        outputs = dict(zip(part.outputs, run_part(part, list(inputs.values())), strict=True))
        known |= outputs
        yield Example(part, inputs, outputs)


@torch.no_grad()
def run_part(part: Part, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a part in PyTorch."""
    found = part.module(*inputs)
    return found if isinstance(found, tuple) else (found,)


def _repeated(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Give a part's output another batch: that of objects where it was that of images."""
    return value[torch.arange(shape[0]) % len(value)]


def _drawn(name: str, shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Draw what a user gives, or what is remembered: numbers as that input may have them."""
    if name == "pixels":  # neither noise nor flat: SAM 3 has seen neither
        coarse = torch.rand(shape[0], 3, 9, 9, generator=draw) * 2 - 1
        return F.interpolate(coarse, shape[2:], mode="bicubic").clamp(-1, 1)
    if name in ("input_ids", "attention_mask"):
        texts = [TEXTS[place % len(TEXTS)] for place in range(shape[0])]
        return PromptTokenizer()(texts, return_tensors="pt")[name]
    if name == "boxes":  # whole ones, cx, cy, w, h
        return 0.3 + 0.4 * torch.rand(shape, generator=draw)
    if name == "points":
        return 200 * torch.rand(shape, generator=draw)
    if name == "mask":
        coarse = 4 * torch.randn(*shape[:2], 5, 5, generator=draw)
        return F.interpolate(coarse, shape[2:], mode="bicubic")
    whole = {"box_labels": (0, 1), "labels": (0, 3), "map_offsets": (0, 6), "latent_offsets": (1, 6)}
    if name in whole:
        lowest, highest = whole[name]
        # From the highest down, so that a single one is that of an object that is shown.
        return highest - torch.arange(torch.Size(shape).numel()).reshape(shape) % (highest - lowest + 1)
    if name == "prompted":
        return torch.tensor([True])
    if name == "pointer_distances":
        return torch.rand(shape, generator=draw)
    return torch.randn(shape, generator=draw)
