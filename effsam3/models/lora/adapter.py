# SPDX-License-Identifier: Apache-2.0
"""Adapters by themselves: put into a model, read and written in peft's own layout, turned into changes of weights.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as peft writes them, and next to them
`effsam3.json`, what the adapters were trained on, and `views.safetensors` where images have views.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from effsam3.checked_files import read_json
from effsam3.errors import UserError
from effsam3.files import atomic_folder, write_json
from effsam3.models.chassis.tensors import fingerprint
from effsam3.tensor_files import read_safetensors

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PREFIX = "base_model.model."  # with which peft begins the names of an adapter's tensors
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ABOUT, VIEWS = "effsam3.json", "views.safetensors"
ABOUT_FORM = {"chassis": str, "revision": (str, None), "fingerprint": str, "modules": [str], "views": [str]}
REMEDY = "train again, or fetch the folder again"


class AdapterError(UserError):
    """An adapter that cannot be read, or does not fit the model that it is put on."""


def lora_config(modules: list[str], rank: int, alpha: int, dropout: float) -> LoraConfig:
    """Return peft's config of adapters on these layers; without a task, because SAM 3 is none of peft's."""
    from peft import LoraConfig

    # Sorted, and not a set: its order would be another one in every process.
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(modules))


def inject(model: nn.Module, config: LoraConfig) -> dict[str, nn.Parameter]:
    """Put new adapters into a model, whose own weights are frozen; return their tensors by peft's names in files."""
    from copy import deepcopy

    from peft import inject_adapter_in_model

    inject_adapter_in_model(deepcopy(config), model)  # peft shortens the names of the layers in what it is given
    return {
        PREFIX + name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def updates(weights: Mapping[str, Tensor], alpha: int, rank: int) -> dict[str, Tensor]:
    """Return what adapters add to the weights of a model, {name in the model: change}, float32: alpha / r x B A."""
    changes = {}
    for name, down in weights.items():
        if not name.endswith(DOWN):
            continue
        layer = name.removeprefix(PREFIX).removesuffix(DOWN)
        up = weights[name.removesuffix(DOWN) + UP]
        change = (alpha / rank) * up.flatten(1).float() @ down.flatten(1).float()
        # Those of 1x1 convolutions have two more axes.
        changes[f"{layer}.weight"] = change.reshape(*change.shape, *down.shape[2:])
    return changes


def share_kept(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> float:
    """Return which share of the changes survives in weights that are kept in bfloat16, 0 to 1.

    1 - |applied - meant| / |meant|, norms over all weights: small changes mostly round to none, and now and then to a
    whole step.
    """
    lost = whole = 0.0
    for name, change in changes.items():
        own = weights[name].bfloat16().float()
        applied = (own + change).bfloat16().float() - own
        lost += float((applied - change).square().sum())
        whole += float(change.square().sum())
    return max(0.0, 1 - (lost / whole) ** 0.5) if whole else 1.0


def fold(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], alpha: int, rank: int) -> tuple[dict, float]:
    """Return the tensors of a model, whose own are `own`, that adapters change, and `share_kept` of it."""
    changes = updates(weights, alpha, rank)
    return {name: own[name] + change for name, change in changes.items()}, share_kept(own, changes)


def kept_line(kept: float) -> str:
    """Say what `share_kept` means."""
    return f"  merged in float32; a copy in bfloat16 would keep {kept:.1%} of what the adapters change"


# ---- folders


def write_adapter(
    folder: Path, weights: Mapping[str, Tensor], config: LoraConfig, about: dict[str, Any], views: Tensor | None
) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads, whole or not at all.

    Args:
        about: what ABOUT_FORM describes.
        views: the embedding of each of `about["views"]`, (V, C).
    """
    plain: dict[str, Any] = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    with atomic_folder(folder) as partial:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / WEIGHTS)
        write_json(partial / CONFIG, plain | {"inference_mode": True})
        write_json(partial / ABOUT, about)
        if views is not None:
            save_file({"weight": views.contiguous()}, partial / VIEWS)


def load_adapter(model: nn.Module, folder: Path | str) -> PeftModel:
    """Put the adapters of a folder onto the model that they were trained on, as peft's `from_pretrained` does.

    peft itself loads what fits and only warns of the rest.

    Raises:
        AdapterError: the folder is incomplete, its tensors have no place in this model, or the model's weights are
            others than those that the adapters were trained on.
    """
    from peft import PeftModel

    folder = Path(folder)
    about = read_json(folder / ABOUT, ABOUT_FORM, REMEDY, AdapterError)
    held = read_safetensors(folder / WEIGHTS, REMEDY, AdapterError)
    wanted = {PREFIX + name + end for name in about["modules"] for end in (DOWN, UP)}
    if wrong := sorted(held.keys() ^ wanted):
        raise AdapterError(f"{folder / WEIGHTS} and {ABOUT} do not agree about {len(wrong)} tensors ({wrong[0]})")
    own = model.state_dict()
    if absent := [name for name in about["modules"] if f"{name}.weight" not in own]:
        raise AdapterError(
            f"{folder}: {len(absent)} of {len(about['modules'])} adapted layers are not in this model (first: "
            f"{absent[0]}); they are those of a whole {about['chassis']}, with detector and tracker"
        )
    found = fingerprint({f"{name}.weight": own[f"{name}.weight"] for name in about["modules"]})
    if found != about["fingerprint"]:
        raise AdapterError(
            f"{folder}: the adapters were trained on other weights (fingerprint {about['fingerprint']}) than this "
            f"model's ({found}); load {about['chassis']}, on which they were trained"
        )
    return PeftModel.from_pretrained(model, str(folder))
