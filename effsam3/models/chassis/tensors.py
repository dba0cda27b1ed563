# SPDX-License-Identifier: Apache-2.0
"""The tensors of a chassis: a SAM 3 as a local folder in transformers' format, read part by part.

Half-precision weights become float32 when they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import xxhash

from effsam3.checked_files import can_be_path, read_json
from effsam3.errors import ChassisError
from effsam3.models.chassis.foreign import refuse_foreign
from effsam3.models.registry import SAM3, of_type
from effsam3.tensor_files import open_safetensors, refuse_unusable, tensor_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = TypeVar("Part", bound=torch.nn.Module)
Model = TypeVar("Model", bound="PreTrainedModel")
TRUNK = "detector_model.vision_encoder.backbone."  # the slot `image`
NECK = "detector_model.vision_encoder.neck."  # the detector's FPN ...
TRACKER_NECK = "tracker_neck."  # ... and the tracker's, on the same trunk
PICKLED = (".pt", ".pth")  # files that torch.save wrote
# Next to model.safetensors: what SAM 3's own format has and transformers has no place for, under SAM 3's names.
EXTRAS_FILE = "sam3_original.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "fetch or merge it again"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' load reports and bars off the console: whoever calls checks the loading info and raises."""
    from transformers.utils import logging

    # Saving imports DeepSpeed, which else warns on every machine without a GPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Put back afterwards: the caller's own messages are not ours to silence.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def read_config(folder: Path):
    """Read the `PreTrainedConfig` of a chassis folder.

    Raises:
        ChassisError: it cannot be read, or is another model's.
    """
    from effsam3.models.chassis.config import config_from

    path = folder / "config.json"
    content = read_json(path, {"model_type": str}, AGAIN, ChassisError)
    try:
        of_type(content["model_type"])
    except LookupError as error:
        raise ChassisError(
            f"sam3.checkpoint: {folder} holds {error.args[0]}, the full SAM 3 with detector and tracker "
            f"({SAM3.hub_id} is one)"
        ) from error
    return config_from(content, str(path), AGAIN)


def shard_of(folder: Path) -> dict[str, Path]:
    """Return which safetensors file holds each tensor of a folder: {tensor name: file}.

    Raises:
        ChassisError: no safetensors, or two models of them; a file that the index names is not there, or does not
            hold what the index lists.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise ChassisError(
            f"sam3.checkpoint: {folder} holds two models, {SINGLE} and the shards of {INDEX}; delete the one that is "
            "not meant"
        )
    if single.exists():
        with open_safetensors(single, AGAIN, ChassisError) as file:
            names = list(file.keys())
        refuse_foreign(names, f"sam3.checkpoint: {single}")
        return dict.fromkeys(names, single)
    if not index.exists():
        raise ChassisError(f"sam3.checkpoint: {folder} has neither {SINGLE} nor {INDEX}")
    listed = read_json(index, {"weight_map": {str: str}}, AGAIN, ChassisError)["weight_map"]
    refuse_foreign(listed, f"sam3.checkpoint: {folder}")
    if outside := [file for file in listed.values() if not can_be_path(file) or Path(file).name != file]:
        raise ChassisError(f"sam3.checkpoint: {index} names {outside[0][:80]!r}, no file of its folder; {AGAIN}")
    shards = {name: folder / file for name, file in listed.items()}
    absent = sorted({path.name for path in shards.values() if not path.exists()})
    if absent:
        raise ChassisError(f"sam3.checkpoint: {folder} lacks {', '.join(absent)}, which its index names")
    # An index can be older than its shards, or the other way round, after an interrupted copy.
    held = set()
    for path in set(shards.values()):
        with open_safetensors(path, AGAIN, ChassisError) as file:
            held |= {(name, path) for name in file.keys()}
    if differing := sorted(name for name, _ in held ^ set(shards.items())):
        raise ChassisError(
            f"sam3.checkpoint: {index} and the shards that it names do not agree about {len(set(differing))} tensors "
            f"(first: {differing[0]}); {AGAIN}"
        )
    return shards


def read_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read the tensors whose names start with `prefix`, memory-mapped, with the prefix taken off.

    Numbers of another precision become float32: everything that learns, compares or merges sees one type.

    Raises:
        ChassisError: none has the prefix, or one cannot be a weight: it is not of real numbers, or not finite.
    """
    tensors = map_tensors(folder, prefix)
    refuse_unusable({prefix + name: tensor for name, tensor in tensors.items()}, str(folder), AGAIN, ChassisError)
    return {name: to_float32(tensor) for name, tensor in tensors.items()}


def map_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Like read_tensors, in stored dtypes, so nothing is read yet.

    Raises:
        ChassisError: none has the prefix.
    """
    # By file, so that each is opened once and not once a tensor.
    files: dict[Path, list[str]] = {}
    for name, path in shard_of(folder).items():
        if name.startswith(prefix):
            files.setdefault(path, []).append(name)
    if not files:
        raise ChassisError(
            f"sam3.checkpoint: no tensor of {folder} starts with {prefix!r}; expected the names of transformers' "
            "Sam3VideoModel"
        )
    tensors = {}
    for path, names in files.items():
        with open_safetensors(path, AGAIN, ChassisError) as file:
            for name in names:
                tensors[name.removeprefix(prefix)] = tensor_of(file, name, path, AGAIN, ChassisError)
    return tensors


def load_whole(model_class: type[Model], folder: Path, config: Any = None) -> Model:
    """Load a model by transformers' `from_pretrained`: float32, frozen, in eval mode.

    `config` takes the place of the folder's own.

    Raises:
        ChassisError: the folder lacks tensors or holds others, or some that are not finite.
    """
    refuse_unusable(map_tensors(folder), str(folder), AGAIN, ChassisError)  # transformers reads whatever there is
    with quiet_transformers():
        loaded: Any = model_class.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, info = loaded  # transformers declares the model only
    refuse_partial(info, f"{folder} is not a whole {model_class.__name__}")
    return model.eval().requires_grad_(False)


def to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of real numbers as float32 and any other, or one that is float32 already, as it is."""
    return tensor.float() if tensor.is_floating_point() else tensor


def elements(folder: Path) -> int:
    """Return the number of elements of all tensors of a folder, without reading them."""
    return sum(tensor.numel() for tensor in map_tensors(folder).values())


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a 128-bit hash (hex) over names, types, shapes and bytes, independent of the order.

    Half-precision tensors count as the float32 that `read_tensors` makes of them. One tensor is in memory at a time.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = to_float32(tensors[name].detach()).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_part(model: Part, tensors: dict[str, torch.Tensor]) -> Part:
    """Give a model exactly these weights and return it, in eval mode and frozen.

    Raises:
        ChassisError: a tensor is missing, left over or of another shape; the message names the first ones.
    """
    info = misfits(model.state_dict(), tensors)
    refuse_partial(info, f"the checkpoint's tensors do not fit {type(model).__name__} as its config.json describes it")
    # Not `from_pretrained`, which under ZeRO-3 divides a frozen model among the ranks; assigned, so that the tensors
    # keep their types and stay where they are mapped.
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def misfits(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Say in which tensors `found` differs from what a model wants: by kind, what `refuse_partial` takes."""
    both = {name: (tensor, wanted[name]) for name, tensor in found.items() if name in wanted}
    return {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(tensor.shape)} for {tuple(own.shape)}"
            for name, (tensor, own) in both.items()
            if tensor.shape != own.shape
        ],
        "not floating point": [
            f"{name} {tensor.dtype}"
            for name, (tensor, own) in both.items()
            if own.is_floating_point() and not tensor.is_floating_point()
        ],
    }


def refuse_partial(info: dict, problem: str) -> None:
    """Raise unless every tensor found its place by transformers' loading info.

    Raises:
        ChassisError: it does not; the message begins with `problem` and names the first tensors of each kind.
    """
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        listed = "; ".join(f"{kind}: {len(names)} ({', '.join(names[:3])})" for kind, names in wrong.items())
        raise ChassisError(f"{problem}: {listed}")
