# SPDX-License-Identifier: Apache-2.0
"""ONNX: a part as a file, and what onnxruntime computes with it.

The exporter fixes axes that were declared free, and frees axes that only work at one length, without an error. So a
file is believed only after it has run, at two lengths of every axis (`flow.TRACED`, `flow.SECOND`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from torch import Tensor, nn

from effsam3.errors import UserError
from effsam3.models.exporting.flow import Example
from effsam3.models.exporting.fold import share

OPSET = 20  # what PyTorch's exporter writes; antialiased Resize is from 18 on
RUNTIME_ERRORS = (Fail, InvalidArgument, RuntimeException)
SHARE = 1e-3  # of an output's range, by which a file may differ from PyTorch


class ExportError(UserError):
    """A part that cannot be exported, or a file that computes something else."""


class _Positional(nn.Module):
    """A module of any signature as one of `*inputs`, so that one form of dynamic axes serves all."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def write_onnx(example: Example, path: Path, dynamic: bool = True) -> None:
    """Write a part as ONNX, by an example of its inputs; weights above 2 GB go into a file of their own next to it.

    Args:
        dynamic: whether the axes of `DYNAMIC` may have other lengths in the file.

    Raises:
        ExportError: PyTorch's exporter does not know how.
    """
    part = example.part
    # One Dim for each word, so that axes of one name stay of one length.
    dims = {axis: torch.export.Dim(axis, min=1) for name in part.inputs for axis in part.dynamic(name).values()}
    shapes = tuple({place: dims[axis] for place, axis in part.dynamic(name).items()} for name in part.inputs)
    try:
        with quiet():
            program = torch.onnx.export(
                _Positional(part.module).eval(),
                tuple(example.inputs.values()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                dynamic_shapes=(shapes,) if dynamic else None,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = " ".join(str(error).split("## Exception summary")[-1].split())[:300]
        raise ExportError(f"{part.name}: PyTorch {torch.__version__} cannot write it as ONNX: {cause}") from error
    assert program is not None
    program.save(path)


class OnnxPart:
    """A file in onnxruntime."""

    def __init__(self, path: Path, threads: int = 0):
        self.name = path.name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only: it warns of what it optimises away
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the file; inputs that it does not have are left out.

        Raises:
            ExportError: it cannot take inputs of these lengths.
        """
        wanted = {one.name: one.type for one in self.session.get_inputs()}
        feed = {
            name: value.numpy().astype(np.float16) if wanted[name] == "tensor(float16)" else value.numpy()
            for name, value in inputs.items()
            if name in wanted
        }
        names = [one.name for one in self.session.get_outputs()]
        try:
            found = self.session.run(names, feed)
        except RUNTIME_ERRORS as error:
            sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in feed.items())
            raise ExportError(f"{self.name} does not run on {sizes}: {error}") from error
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, found, strict=True)}


def differences(example: Example, found: Mapping[str, Tensor]) -> dict[str, float]:
    """Return by how much each output differs from PyTorch's at most, as a share of that output's range.

    Raises:
        ExportError: an output has another shape, or is no number.
    """
    shares = {}
    for name, wanted in example.outputs.items():
        own = found[name]
        if own.shape != wanted.shape:
            raise ExportError(
                f"{example.part.name}: {name} is {tuple(own.shape)} in the file and {tuple(wanted.shape)} in PyTorch"
            )
        if not own.isfinite().all():
            raise ExportError(f"{example.part.name}: {name} has values in the file that are no numbers")
        shares[name] = share(wanted, own)
    return shares


def refuse_difference(part: str, shares: Mapping[str, float]) -> None:
    """Refuse a file whose outputs differ from PyTorch's by more than `SHARE`.

    Raises:
        ExportError: naming the output.
    """
    name, worst = max(shares.items(), key=lambda one: one[1])
    if worst > SHARE:
        raise ExportError(
            f"{part}: {name} differs from PyTorch's by {worst:.1e} of its range, more than {SHARE:g}; the file is not "
            "kept"
        )


@contextmanager
def quiet():
    """Keep the exporter's progress and its warnings of its own making to itself."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
