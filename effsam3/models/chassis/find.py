# SPDX-License-Identifier: Apache-2.0
"""Finds a SAM 3: turns whatever a recipe's `sam3.checkpoint` names into a local folder in transformers' format.

A Hub id is downloaded, a sam3.pt converted; `tiny`, `tiny_concepts` and `random` are made from a fixed seed.
Everything after this file reads one kind of folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedConfig

from effsam3.errors import ChassisError
from effsam3.hub import hub_errors
from effsam3.models.chassis.cache import kept_in_cache
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.foreign import refuse_foreign, refuse_foreign_id
from effsam3.models.chassis.processor import processor
from effsam3.models.chassis.sam3_pt import converted
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.tensors import AGAIN, EXTRAS_FILE, PICKLED, quiet_transformers, read_config
from effsam3.models.registry import SAM3, SAM3S, is_made_up, named
from effsam3.tensor_files import open_safetensors
from effsam3.training.checkpoint import WEIGHTS

MADE_AS = "2"  # bump when `_make`, or the `initialise` of a row, changes, to invalidate caches
ACCEPTED = (
    "expected a folder in transformers' format, a run folder that has been merged, a sam3.pt (.pt or .pth), a Hub id "
    f"such as {SAM3.hub_id}, `tiny`, `tiny_concepts` or `random`"
)


def chassis_folder(checkpoint: str, revision: str | None = None) -> Path:
    """Return a local folder with the checkpoint in transformers' format.

    Made-up ones are made once, from a fixed seed, under the cache folder; a `.pt` or `.pth` file in SAM 3's
    own format is converted there once. A Hub id is downloaded. Of a run folder it is the merged model.

    Raises:
        ChassisError: no such folder or file, something else in it, or the Hub refuses it or is out of reach.
        PickledError: a file that is damaged, or holds no model.
    """
    if is_made_up(checkpoint):
        return _make(checkpoint)
    path = Path(checkpoint)
    if path.is_dir():
        return _model_folder(path)
    if path.suffix in PICKLED:
        return converted(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            with open_safetensors(path, AGAIN, ChassisError) as file:
                refuse_foreign(file.keys(), f"sam3.checkpoint: {path}")
        meant = f"name its folder, {path.parent}" if (path.parent / "config.json").is_file() else ACCEPTED
        raise ChassisError(f"sam3.checkpoint: {path} is a single file of another kind; {meant}")
    # What looks like a path is never asked for on the Hub: a typo would end in a login error.
    if path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") != 1:
        raise ChassisError(f"sam3.checkpoint: there is no folder or file {checkpoint}; {ACCEPTED}")
    if path.parts[0] == "runs":  # a run folder's usual place, and no name of the Hub's
        raise ChassisError(
            f"sam3.checkpoint: there is no run folder {checkpoint} here yet; `effsam3 launch` the recipe whose name "
            f"is {path.name} first; {ACCEPTED}"
        )
    return _download(checkpoint, revision)


def _model_folder(folder: Path) -> Path:
    """Return the folder in transformers' format that a local folder is or holds.

    Raises:
        ChassisError: it is something else; the message names it, if that is known.
    """
    # A run folder stands for its merged model, so that verbs take what `launch` printed.
    for model in (folder, folder / "merged"):
        if (model / "config.json").is_file():
            return model
    files = sorted(path.name for path in folder.iterdir())
    if EXTRAS_FILE not in files:
        for name in (name for name in files if name.startswith("sam3") and name.endswith(".safetensors")):
            with open_safetensors(folder / name, AGAIN, ChassisError) as file:
                refuse_foreign(file.keys(), f"sam3.checkpoint: {folder / name}")
    if WEIGHTS in files:
        found = (
            "is a training checkpoint: a student without the rest. Name its run folder, once `effsam3 merge` has run"
        )
    elif "recipe.yaml" in files:
        found = "is a run folder without a merged model; run `effsam3 merge` on its recipe first"
    elif any(name.startswith("random_states_") for name in files):
        found = f"is accelerate's training state, which no model can be taken from; {ACCEPTED}"
    elif pickled := [name for name in files if Path(name).suffix in PICKLED]:
        found = f"has no config.json; if {folder / pickled[0]} is meant, name that file"
    else:
        found = f"has no config.json; {ACCEPTED}"
    raise ChassisError(f"sam3.checkpoint: {folder} {found}")


def _download(repo_id: str, revision: str | None) -> Path:
    refuse_foreign_id(repo_id)
    from huggingface_hub import snapshot_download

    what = f"sam3.checkpoint: {repo_id} is not a folder here and cannot be downloaded from the Hub"
    remedy = (
        f"{named(repo_id).hub_id} is gated: ask for access on its page, then `hf auth login`; or name a local folder, "
        "or `tiny` for a trial"
    )
    with hub_errors(what, remedy, ChassisError):
        files = ["*.safetensors", "*.json", "merges.txt", "LICENSE*"]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))


def _make(name: str) -> Path:
    """Write the made-up chassis `name` under the cache folder, once; several processes may ask at the same time."""
    import transformers

    row = SAM3S[name]
    config = row.config()
    made_from = config.to_json_string() + transformers.__version__ + torch.__version__ + MADE_AS
    key = xxhash.xxh3_64_hexdigest(made_from.encode())

    def write(folder: Path) -> None:
        # The caller's random numbers must be the same whether the chassis was in the cache or not.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = model_class(config.model_type)(config)
            row.initialise(model)
            # Zero or uninitialised parameters would make whatever they multiply invisible to every comparison.
            for parameter in model.parameters():
                if not parameter.any() or not parameter.isfinite().all():
                    torch.nn.init.normal_(parameter, std=0.02)
            # One tensor in SAM 3's own format; transformers draws it twice.
            shared = model.tracker_model.shared_image_embedding.positional_embedding
            model.tracker_model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
        with quiet_transformers():
            model.save_pretrained(folder, save_original_format=False)
            processor(config).save_pretrained(folder)

    return kept_in_cache(f"{name}-{key}", write)


def config_at_hand(checkpoint: str) -> PreTrainedConfig:
    """Return the config of a SAM 3 without its weights or a download: a local folder's own, else by published sizes.

    Raises:
        UserError: the sizes are not known.
    """
    for folder in (Path(checkpoint) / "merged", Path(checkpoint)):
        if (folder / "config.json").is_file():
            return read_config(folder)
    return sam3_of(checkpoint).config()
