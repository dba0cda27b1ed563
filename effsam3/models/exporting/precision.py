# SPDX-License-Identifier: Apache-2.0
"""ONNX files in fewer bits, and how far their masks are from PyTorch's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_convert

from effsam3.models.exporting.flow import run_part
from effsam3.models.exporting.onnx_files import quiet
from effsam3.models.exporting.parts import Part

# Networks of convolutions. The others are small, or attention, which int8 harms most and speeds up least.
QUANTISED = ("trunk", "detector_neck", "tracker_neck")
GRID = 3  # boxes along either side, for the agreement
Run = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]  # (part, inputs) -> outputs


def to_fp16(path: Path) -> None:
    """Turn a file's weights and computations to half precision; what goes in and comes out stays float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        half = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    onnx.save(half, path)


def to_int8(part: Part, path: Path, inputs: Sequence[Mapping[str, Tensor]]) -> None:
    """Quantise a file's convolutions statically, weights by channel, activations by the range that `inputs` show."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(inputs)

        def get_next(self):
            given = next(self.left, None)
            return given and {name: value.numpy() for name, value in given.items()}

    with quiet(), tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / path.name
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            path,
            Reader(),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def inputs_of(part: Part, parts: Sequence[Part], images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return what a part of `QUANTISED` is given of images (1, 3, S, S): pixels, or the trunk's features."""
    trunk = next(one for one in parts if one.name == "trunk")
    if part.name == "trunk":
        return [{"pixels": pixels} for pixels in images]
    return [{"features": run_part(trunk, [pixels])[0]} for pixels in images]


def masks_by_box(run: Run, pixels_13SS: Tensor) -> Tensor:
    """Segment an image by a grid of boxes; returns bool masks (O, L, L)."""
    side = pixels_13SS.shape[-1]
    steps = (torch.arange(GRID) + 0.5) * side / GRID
    centers_O2 = torch.cartesian_prod(steps, steps)
    boxes_O4 = box_convert(torch.cat([centers_O2, torch.full_like(centers_O2, side / GRID)], 1), "cxcywh", "xyxy")
    corners = {"points": boxes_O4.reshape(1, -1, 2, 2), "labels": torch.tensor([2, 3]).expand(1, len(boxes_O4), 2)}
    known = dict(run("tracker_neck", run("trunk", {"pixels": pixels_13SS})))
    found = run("mask_decoder", known | corners)
    best = found["best"][0, :, None, None, None].expand(-1, 1, *found["masks"].shape[-2:])
    return found["masks"][0].gather(1, best)[:, 0] > 0


def in_pytorch(parts: Sequence[Part]) -> Run:
    """Return what runs parts in PyTorch, for `masks_by_box`."""
    by_name = {part.name: part for part in parts}

    def run(name: str, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        part = by_name[name]
        return dict(zip(part.outputs, run_part(part, [known[one] for one in part.inputs]), strict=True))

    return run


def agreement(own: Run, other: Run, images: Sequence[Tensor]) -> dict[str, float]:
    """Compare two runtimes on the masks of boxes on images (1, 3, S, S): mean and lowest IoU, and how many masks."""
    ious = []
    for pixels_13SS in images:
        one, two = masks_by_box(own, pixels_13SS), masks_by_box(other, pixels_13SS)
        both, either = (one & two).sum((1, 2)), (one | two).sum((1, 2))
        ious.append(torch.where(either > 0, both / either.clamp(min=1), 1.0))  # both empty: they agree
    all_ious = torch.cat(ious)
    return {"mean_iou": float(all_ious.mean()), "lowest_iou": float(all_ious.min()), "masks": len(all_ious)}
