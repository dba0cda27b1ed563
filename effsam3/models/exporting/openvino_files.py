# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: a part's ONNX file turned into its format, and what its runtime computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import openvino
import torch
from torch import Tensor


def write_openvino(onnx_path: Path, path: Path, half: bool) -> None:
    """Turn an ONNX file into .xml and .bin; `half` stores the weights in half precision."""
    openvino.save_model(openvino.convert_model(onnx_path), path, compress_to_fp16=half)


class OpenVinoPart:
    """A file in OpenVINO, on the CPU.

    Args:
        exact: compute in float32. Otherwise in what the processor is fastest at: bfloat16, if it has it.
    """

    def __init__(self, path: Path, exact: bool = True, threads: int = 0):
        settings = {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
        settings |= {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
        self.compiled = openvino.compile_model(path, "CPU", settings)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the file; inputs that it does not have are left out."""
        wanted = {one.any_name for one in self.compiled.inputs}
        found = self.compiled({name: value.numpy() for name, value in inputs.items() if name in wanted})
        return {one.any_name: torch.from_numpy(found[one].copy()) for one in self.compiled.outputs}
