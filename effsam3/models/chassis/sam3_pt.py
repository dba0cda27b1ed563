# SPDX-License-Identifier: Apache-2.0
"""SAM 3's own format (`sam3.pt`) as a chassis: converted once into a folder in transformers' format.

A file that this project has written carries its config; without one, the sizes must be those of the published SAM 3.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from effsam3.checked_files import parse_json
from effsam3.files import write_json
from effsam3.models import keymaps
from effsam3.models.chassis.cache import kept_in_cache
from effsam3.models.chassis.card import CARD, CARD_FORM
from effsam3.models.chassis.classes import empty_tensors, key_map
from effsam3.models.chassis.config import config_from
from effsam3.models.chassis.foreign import refuse_foreign
from effsam3.models.chassis.pickled import Pickled, open_pickled
from effsam3.models.chassis.processor import processor
from effsam3.models.chassis.tensors import (
    EXTRAS_FILE,
    INDEX,
    ChassisError,
    misfits,
    quiet_transformers,
    refuse_partial,
)
from effsam3.models.chassis.torch_file import content_key
from effsam3.models.keymaps import KeyMapError
from effsam3.models.registry import SAM3, of_type
from effsam3.tensor_files import refuse_unusable

OWN = "effsam3"  # the entry next to the model that holds the config in this project's files, as JSON
WRITE_AGAIN = "write the file again with `effsam3 merge --format sam3`"
SHARD_BYTES = 2**27  # a shard is in memory at once, next to the pages of the file that have been read
EFFICIENTSAM3 = ".trunk.model.backbone.model."  # in the names of EfficientSAM3's image students


def converted(path: Path) -> Path:
    """Return the cache's folder for a file in SAM 3's own format, written if it is not there yet.

    The folder is named by the content of the file and of the tables that convert it, so neither goes stale.

    Raises:
        PickledError: a file that is damaged, or holds no model.
        ChassisError: a model that is not a whole SAM 3, or the cache cannot be written.
    """
    # By content, not by name or time: a file that is copied or touched is not converted again.
    digest = xxhash.xxh3_64((content_key(path) + transformers.__version__).encode())
    for source in [Path(__file__), *sorted(Path(keymaps.__file__).parent.glob("*.py"))]:
        digest.update(source.read_bytes())
    return kept_in_cache(f"sam3-{digest.hexdigest()}", lambda folder: _write(path, folder))


def _write(path: Path, folder: Path) -> None:
    pickled = open_pickled(path)
    refuse_foreign(pickled.tensors, f"sam3.checkpoint: {path}")
    config = config_of(pickled, path)
    try:
        tensors, extra = key_map(config).to_transformers(pickled.tensors)
    except KeyMapError as error:
        raise ChassisError(f"sam3.checkpoint: {path} is not in SAM 3's own format: {error}") from error
    sizes = "" if OWN in pickled.aside else " of the published sizes, which it must have as it names no others"
    refuse_unusable(
        tensors | extra, f"sam3.checkpoint: {path}", "take another checkpoint, or fetch it again", ChassisError
    )
    refuse_misfit(tensors, config, f"sam3.checkpoint: {path} is not a whole SAM 3{sizes} (by transformers' names)")
    averaged = " (its averaged weights)" if pickled.is_average else ""
    print(f"{path}{averaged}: to transformers' format, once, in {folder.parent}", file=sys.stderr, flush=True)
    _save(tensors, folder)
    if extra:
        save_file({name: _for_file(tensor) for name, tensor in extra.items()}, folder / EXTRAS_FILE, {"format": "pt"})
    config.architectures, config.dtype = [of_type(config.model_type).model_class], torch.float32
    config.save_pretrained(folder)
    with quiet_transformers():
        processor(config).save_pretrained(folder)
    if OWN in pickled.aside:  # who fills the slots
        write_json(folder / CARD, {key: value for key, value in own_card(pickled, path).items() if key != "config"})


def config_of(pickled: Pickled, path: Path) -> PreTrainedConfig:
    """Return the config that a file carries, else that of the published SAM 3.

    Raises:
        ChassisError: the file is EfficientSAM3's, or its config cannot be read.
    """
    if OWN in pickled.aside:
        return config_from(own_card(pickled, path)["config"], f"sam3.checkpoint: {path}", WRITE_AGAIN)
    if any(EFFICIENTSAM3 in name for name in pickled.tensors):
        raise ChassisError(
            f"sam3.checkpoint: {path} is a checkpoint of EfficientSAM3, a student already; `effsam3 import {path}` "
            "makes a folder of it that can be evaluated, trained on and released"
        )
    return SAM3.config()


def own_card(pickled: Pickled, path: Path) -> dict[str, Any]:
    """Read how a file of this project describes itself: its `config`, who fills its `slots`; others fill none.

    Raises:
        ChassisError: it cannot be read.
    """
    if OWN not in pickled.aside:
        return {"slots": {}}
    said, where = pickled.aside[OWN], f"sam3.checkpoint: the description of {path} under {OWN!r}"
    if not isinstance(said, str):
        raise ChassisError(f"{where} is damaged: it is of type {type(said).__name__}, expected text; {WRITE_AGAIN}")
    return parse_json(said, CARD_FORM | {"config": dict}, where, WRITE_AGAIN, ChassisError)


def refuse_misfit(tensors: Mapping[str, Tensor], config: PreTrainedConfig, problem: str) -> None:
    """Refuse tensors, by transformers' names, that are not exactly those of the model that `config` describes.

    Raises:
        ChassisError: a tensor is missing, left over or of another shape; the message begins with `problem` and names
            the first ones.
    """
    refuse_partial(misfits(empty_tensors(config), tensors), problem)


def _save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors as float32 in shards with transformers' index, one shard in memory at a time."""
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        save_file({name: _for_file(tensors[name]) for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        size = sum((folder / file).stat().st_size for file in split.filename_to_tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename})


def _for_file(tensor: Tensor) -> Tensor:
    """A copy: of names for one tensor, safetensors takes only one."""
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(kind, copy=True, memory_format=torch.contiguous_format)
