# SPDX-License-Identifier: Apache-2.0
"""The reader of safetensors files, and the check of all weights that are read from a file, of whatever kind.

Weights are real numbers: of a type that torch computes with, finite, and no variance below zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from effsam3.errors import UserError

WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Whole numbers and marks that a module keeps next to its weights, by the end of the name.
INDEX_TYPES = (torch.int64, torch.int32, torch.bool)
INDICES = ("num_batches_tracked", "position_ids", "attention_bias_idxs", "relative_position_index")
VARIANCE = "running_var"


class TensorFileError(UserError):
    """A file of tensors that cannot be read, or tensors that cannot be a model's."""


def open_safetensors(path: Path, remedy: str, error: type[UserError] = TensorFileError):
    """Open a safetensors file, memory-mapped.

    Raises:
        UserError: as `error`: it is not there, cut short or something else.
    """
    if path.is_dir():
        raise error(f"{path} cannot be read (it is a folder, expected a file); {remedy}")
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem


def read_safetensors(path: Path, remedy: str, error: type[UserError] = TensorFileError) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, memory-mapped, in the types of the file.

    Raises:
        UserError: as `error`: it cannot be read, or its tensors cannot be weights.
    """
    with open_safetensors(path, remedy, error) as file:
        tensors = {name: tensor_of(file, name, path, remedy, error) for name in file.keys()}
    refuse_unusable(tensors, str(path), remedy, error)
    return tensors


def tensor_of(file, name: str, path: Path, remedy: str, error: type[UserError] = TensorFileError) -> Tensor:
    """Return one tensor of an open file.

    Raises:
        UserError: as `error`: it is not in the file, or of a type that torch does not have.
    """
    try:
        return file.get_tensor(name)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise error(f"{path}: its tensor {name} cannot be read ({problem}); {remedy}") from problem


def refuse_unusable(
    tensors: Mapping[str, Tensor], where: str, remedy: str, error: type[UserError] = TensorFileError
) -> None:
    """Refuse tensors that cannot be a model's weights; `where` is what messages call their file.

    Raises:
        UserError: as `error`: quantised, sparse or without numbers; whole or complex numbers where real ones are
            expected; not finite; a variance below zero. The message names the first such tensor.
    """
    for name, tensor in tensors.items():
        if problem := unusable(name, tensor):
            raise error(f"{where}: the tensor {name} {problem}; {remedy}")


def unusable(name: str, tensor: Tensor) -> str:
    """Say why a tensor cannot be a weight, empty if it can."""
    if problem := not_plain(tensor):
        return problem
    # By name as well: a weight that was rounded to whole numbers must not pass as an index.
    if tensor.dtype in INDEX_TYPES and name.endswith(INDICES):
        return ""
    if tensor.dtype not in WEIGHT_TYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"is {kind}, expected a weight in float32, float16, bfloat16 or float64"
    if not tensor.numel():
        return ""
    # One pass over the numbers: NaN and infinity both come through as an extreme.
    low, high = (float(value) for value in torch.aminmax(tensor.detach()))
    if low != low:  # NaN, which minimum and maximum hand on
        return f"has NaN in {int(tensor.isnan().sum()):,} of {tensor.numel():,} numbers: its training went wrong"
    if max(abs(low), abs(high)) == float("inf"):
        return f"is infinite in {int(tensor.isinf().sum()):,} of {tensor.numel():,} numbers: its training went wrong"
    if name.endswith(VARIANCE) and low < 0:
        return f"is a variance and goes down to {low:g}, below zero"
    return ""


def not_plain(tensor: Tensor) -> str:
    """Say why a tensor has no numbers of its own in order, empty if it has."""
    if tensor.is_quantized:
        return "is quantised; save the weights before quantisation"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "is sparse or nested; save it as .to_dense()"
    if tensor.device.type == "meta":
        return "has a shape but no numbers (device meta); save the model once its weights are loaded"
    if tensor.numel() > tensor.untyped_storage().nbytes() // tensor.element_size():
        return "repeats numbers instead of having its own (expand); save it as .contiguous()"
    return ""
