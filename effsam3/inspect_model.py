# SPDX-License-Identifier: Apache-2.0
"""The verb `inspect`: show what a checkpoint is, who fills its slots and how big its parts are, without loading it.

effsam3 inspect runs/stage1-image-es_rv_m     a run folder and its merged model
effsam3 inspect sam3.pt --json                the same facts for programs
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from effsam3 import stages
from effsam3.checked_files import read_yaml
from effsam3.errors import UserError
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.classes import key_map
from effsam3.models.chassis.find import ACCEPTED, chassis_folder
from effsam3.models.chassis.foreign import what_foreign
from effsam3.models.chassis.pickled import open_pickled
from effsam3.models.chassis.sam3_pt import OWN, config_of, own_card, refuse_misfit
from effsam3.models.chassis.tensors import PICKLED, TRUNK, ChassisError, fingerprint, map_tensors, read_config
from effsam3.models.image.backbones import student_name
from effsam3.models.keymaps import KeyMapError
from effsam3.models.keymaps.sam3 import TRUNK as SAM3_TRUNK
from effsam3.models.keymaps.sam3 import to_transformers
from effsam3.models.keymaps.upstream import image_from_upstream, text_from_upstream
from effsam3.models.merging.efficientsam3 import UpstreamFile, divide
from effsam3.models.merging.formats import extras
from effsam3.models.merging.slots import SLOTS, read_card
from effsam3.models.registry import IMAGE_STUDENTS, TEXT_STUDENTS, is_made_up
from effsam3.models.text.student import TEXT_ENCODER, TEXT_PROJECTION
from effsam3.tensor_files import refuse_unusable
from effsam3.training.checkpoint import OPTIMIZER, WEIGHTS, complete, read_weights
from effsam3.training.report import table
from effsam3.training.resume import read_trainer

# Part -> how its tensors' names begin in a Sam3VideoModel; of several that fit, the first.
PARTS = {
    "image trunk": (TRUNK,),
    "neck, the detector's": ("detector_model.vision_encoder.neck.",),
    "neck, the tracker's": ("tracker_neck.",),
    "text encoder": (TEXT_ENCODER, TEXT_PROJECTION),
    "geometry encoder": ("detector_model.geometry_encoder.",),
    "DETR encoder": ("detector_model.detr_encoder.",),
    "DETR decoder": ("detector_model.detr_decoder.", "detector_model.dot_product_scoring."),
    "mask decoder, the detector's": ("detector_model.mask_decoder.",),
    "prompt encoder": ("tracker_model.prompt_encoder.", "tracker_model.shared_image_embedding."),
    "mask decoder, the tracker's": ("tracker_model.mask_decoder.",),
    "memory attention": ("tracker_model.memory_attention.",),
    "memory encoder": ("tracker_model.memory_encoder.",),
    "memory resampler": ("tracker_model.memory_resampler.",),
    "object pointers, embeddings": ("tracker_model.",),
}
LEFT_OVER = {"SAM 3's own ViT, next to the student": (SAM3_TRUNK,)}  # which some of EfficientSAM3's files keep
FINGERPRINTS = {
    "trunk": "as sam3.fingerprint of a recipe of stage image",
    "text": "as sam3.fingerprint of a recipe of stage text",
    "model": "of all tensors by transformers' names",
    "file": "of all tensors by the file's names",
    "student": "of all tensors",
}
# What a module keeps next to its parameters, by the end of the name: statistics and fixed encodings.
BUFFERS = re.compile(
    r"(running_mean|running_var|num_batches_tracked|feature_mean|feature_scale"
    r"|shared(_image)?_embedding\.positional_embedding)$"
)
EFFICIENTSAM3 = "EfficientSAM3's format"


class InspectError(UserError):
    """A path that is no checkpoint."""


def inspect(path: str, as_json: bool = False) -> str:
    """Describe what is at `path`, for people or as JSON.

    Args:
        path: whatever `sam3.checkpoint` accepts, a run folder, a folder of its checkpoints, or an EfficientSAM3 file.

    Raises:
        UserError: there is nothing, or nothing that is known.
    """
    facts = examine(path)
    return json.dumps(facts, indent=2) if as_json else as_text(facts)


def examine(path: str) -> dict[str, Any]:
    """Return the facts that `inspect` prints."""
    folder = Path(path)
    if folder.suffix in PICKLED and not folder.is_dir():
        return pickled_file(folder)
    if (folder / WEIGHTS).is_file():
        return training_checkpoint(folder)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        return run_folder(folder)
    if is_made_up(path):
        return model_folder(chassis_folder(path)) | {"path": path, "format": "made up, random weights"}
    is_here = any((place / "config.json").is_file() for place in (folder, folder / "merged"))
    is_hub_id = not (folder.exists() or folder.is_absolute() or path.startswith(".") or path.count("/") != 1)
    if not (is_here or is_hub_id):
        what = "is not a checkpoint" if folder.exists() else "does not exist"
        raise InspectError(f"{path} {what}; {ACCEPTED}, a training checkpoint (step-*), or an EfficientSAM3 .pt")
    return model_folder(chassis_folder(path)) | {"path": path}


# ---- what may be there


def model_folder(folder: Path) -> dict[str, Any]:
    """Return facts of a whole model in transformers' format."""
    tensors = map_tensors(folder)
    card = read_card(folder) if (folder / CARD).exists() else {"slots": {}}
    extra = extras(folder)
    return {
        "path": str(folder),
        "format": "transformers folder",
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "chassis": card.get("chassis"),
        "adapted": card.get("adapted", []),
        **_model(tensors, read_config(folder), card["slots"], extra),
    }


def pickled_file(path: Path) -> dict[str, Any]:
    """Return facts of a file that `torch.save` wrote, in SAM 3's own format or EfficientSAM3's.

    Raises:
        InspectError: it holds something else.
    """
    pickled = open_pickled(path)
    found = {
        "entry": ".".join(pickled.entry),
        "averaged": pickled.is_average,
        "other_entries": sorted(map(str, pickled.aside)),
    }
    facts = {"path": str(path), "bytes": path.stat().st_size, "found": found}
    try:
        # This project's files name their students in the card, upstream's are known by their tensors.
        if OWN not in pickled.aside and ((file := divide(pickled.tensors)).has_student or file.foreign is not None):
            told = {"problem": f"it {problem}"} if (problem := what_foreign(pickled.tensors)) else {}
            return facts | _efficientsam3(file) | told | {"fingerprints": {"file": fingerprint(pickled.tensors)}}
        config = config_of(pickled, path)
        tensors, extra = key_map(config).to_transformers(pickled.tensors)
    except KeyMapError as error:
        raise InspectError(f"{path} is neither in SAM 3's own format nor in EfficientSAM3's: {error}") from error
    said = own_card(pickled, path)
    adapted = {"adapted": said.get("adapted", [])}
    return facts | {"format": "SAM 3's own format"} | adapted | _model(tensors, config, said["slots"], extra)


def _efficientsam3(file: UpstreamFile) -> dict[str, Any]:
    """Return facts of EfficientSAM3's format, a whole model or only students, or of a foreign SAM 3's own."""
    slots = {}
    if file.image:
        timm_name, _ = image_from_upstream(file.image)
        name = student_name(timm_name)
        slots["image"] = {"student": name, "is": f"{IMAGE_STUDENTS[name].label} ({name}) with head stride32"}
    if file.text:
        name, positions, _ = text_from_upstream(file.text)
        slots["text"] = {"student": name, "is": f"{TEXT_STUDENTS[name].label} ({name}), {positions} tokens"}
    # Under the names of a whole model, so that one table of parts serves all formats.
    named = {TRUNK + key: tensor for key, tensor in file.image.items()}
    named |= {TEXT_ENCODER + key: tensor for key, tensor in file.text.items()}
    named |= to_transformers(file.rest)[0] | file.left_over
    parts = PARTS | LEFT_OVER
    if file.foreign is None:
        return {"format": EFFICIENTSAM3, "slots": slots, "parts": _parts(named, parts)}
    parts |= {file.foreign.lacks: tuple(file.without)}
    return {
        "format": f"{file.foreign.label}'s own format",
        "slots": slots,
        "parts": _parts(named | file.without, parts),
    }


def training_checkpoint(folder: Path) -> dict[str, Any]:
    """Return facts of one of a run's checkpoints: a student, with or without what resuming needs.

    Raises:
        InspectError: it was never finished.
        CheckpointError: its weights are damaged.
    """
    if not (folder / "trainer.json").is_file():
        raise InspectError(f"{folder} was never finished: it has no trainer.json; look at another of {folder.parent}")
    trainer = read_trainer(folder)
    weights = read_weights(folder)
    recipe = folder.parents[1] / "recipe.yaml"
    return {
        "path": str(folder),
        "format": "training checkpoint",
        "bytes": (folder / WEIGHTS).stat().st_size,
        "recipe": _recipe(recipe) if recipe.is_file() else None,
        "step": trainer["step"],
        "best": trainer.get("best"),
        "resumable": (folder / OPTIMIZER).is_file(),
        "parts": _parts(weights, {name.partition(".")[0]: (name.partition(".")[0],) for name in weights}),
        "fingerprints": {"student": fingerprint(weights)},
    }


def run_folder(folder: Path) -> dict[str, Any]:
    """Return facts of a run: what it trains, its checkpoints, its merged model if there is one."""
    checkpoints = folder / "checkpoints"
    merged = folder / "merged"
    return {
        "path": str(folder),
        "format": "run folder",
        "recipe": _recipe(folder / "recipe.yaml"),
        "checkpoints": [path.name for path in complete(checkpoints) + complete(checkpoints, best=True)],
        "merged": model_folder(merged) if (merged / "config.json").is_file() else None,
    }


def _recipe(path: Path) -> dict[str, Any]:
    """Read the student from a run's resolved recipe as plain YAML, so that older versions work."""
    recipe = read_yaml(path, {"name?": str, "stage?": str}, "inspect what is next to it: checkpoints, merged")
    return {key: recipe[key] for key in ("name", "stage", "student", "head", "parts") if key in recipe}


# ---- a whole model


def _model(tensors: Mapping[str, Tensor], config: PreTrainedConfig, slots: dict, extra: Mapping) -> dict:
    backbone = config.detector_config.vision_config.backbone_config
    text = {name: tensor for name, tensor in tensors.items() if name.startswith((TEXT_ENCODER, TEXT_PROJECTION))}
    problem = None
    try:
        # A broken model is described as well: whoever inspects it wants to know what is there.
        refuse_misfit(tensors, config, "not a whole SAM 3 (by transformers' names)")
        refuse_unusable(tensors, "not a model that can be used", "fetch or merge it again", ChassisError)
    except ChassisError as error:
        problem = str(error)
    return {
        "image_size": backbone.image_size,
        "patch_size": backbone.patch_size,
        "grid": backbone.image_size // backbone.patch_size,
        "slots": {
            name: stages.merging(name).describe(slot.config_of(config))
            | ({"from": slots[name]["from"]} if name in slots else {})
            for name, slot in SLOTS.items()
        },
        "parts": _parts(tensors, PARTS),
        "kept_extra": sorted(extra),
        "fingerprints": {
            "trunk": fingerprint({n.removeprefix(TRUNK): t for n, t in tensors.items() if n.startswith(TRUNK)}),
            "text": fingerprint(text),
            "model": fingerprint(tensors),
        },
        "problem": problem,
    }


def _parts(tensors: Mapping[str, Tensor], prefixes: Mapping[str, tuple[str, ...]]) -> dict[str, dict]:
    """Count tensors, parameters, other numbers (buffers) and types of every part that has any."""
    parts: dict[str, dict] = {}
    for name, tensor in tensors.items():
        title = next((title for title, begins in prefixes.items() if name.startswith(begins)), "unknown")
        part = parts.setdefault(title, {"tensors": 0, "parameters": 0, "buffers": 0, "types": []})
        part["tensors"] += 1
        part["buffers" if BUFFERS.search(name) else "parameters"] += tensor.numel()
        if (kind := str(tensor.dtype).removeprefix("torch.")) not in part["types"]:
            part["types"].append(kind)
    return {title: parts[title] for title in [*prefixes, "unknown"] if title in parts}


# ---- for people


def as_text(facts: dict[str, Any]) -> str:
    """Return the facts as aligned lines and a table."""
    about = {"format": facts["format"] + (f", {facts['bytes'] / 1e6:,.2f} MB" if "bytes" in facts else "")}
    about |= ABOUT.get(facts["format"], _about_model)(facts)
    lines = [facts["path"], *(f"{name:<12} {text}" for name, text in about.items())]
    if "parts" in facts:
        lines += ["", _parts_table(facts["parts"]), ""]
        for name, value in facts["fingerprints"].items():
            slot = {"trunk": "image"}.get(name, name)
            is_student = facts.get("slots", {}).get(slot, {}).get("student") is not None
            meaning = "of the student's tensors" if is_student else FINGERPRINTS[name]
            lines.append(f"{'fingerprint':<12} {name:<8} {value}  {meaning}")
    if facts.get("merged") is not None:
        lines += ["", as_text(facts["merged"])]
    return "\n".join(lines)


def _about_run(facts: dict[str, Any]) -> dict[str, str]:
    merged = "below" if facts["merged"] else f"not yet; effsam3 merge {facts['path']} makes it"
    checkpoints = ", ".join(facts["checkpoints"]) or "none"
    return {"recipe": _recipe_text(facts["recipe"]), "checkpoints": checkpoints, "merged": merged}


def _about_checkpoint(facts: dict[str, Any]) -> dict[str, str]:
    about = {
        "recipe": "unknown: it is not in a run folder" if facts["recipe"] is None else _recipe_text(facts["recipe"])
    }
    about["step"] = f"{facts['step']:,}"
    if (best := facts["best"]) is not None:
        measured = ", ".join(f"{name} {value:.4f}" for name, value in best.items() if name != "step")
        about["best so far"] = f"step {best['step']:,}: {measured}"
    return about | {"resumable": "yes" if facts["resumable"] else "no, only weights"}


def _about_model(facts: dict[str, Any]) -> dict[str, str]:
    about = {}
    if facts["format"] == EFFICIENTSAM3:
        about["use"] = f"effsam3 import {facts['path']} makes a model of it"
    if "grid" in facts:
        side, patch, grid = (facts[key] for key in ("image_size", "patch_size", "grid"))
        about["images"] = f"{side} px square, patches of {patch} px, grid {grid} x {grid}"
    for slot, filled in facts["slots"].items():
        about[f"slot {slot}"] = filled["is"] + (f"; from {filled['from']}" if "from" in filled else "")
    for one in facts.get("adapted", ()):
        about[f"adapted {one['name']}"] = f"{len(one['tensors']):,} tensors changed in place; from {one['from']}"
    if facts.get("chassis") is not None:
        about["chassis"] = facts["chassis"]
    if "found" in facts:
        found = facts["found"]
        about["found"] = f"under {found['entry']}" if found["entry"] else "on top"
        about["found"] += ", averaged weights" if found["averaged"] else ""
        about["found"] += f"; next to it {', '.join(found['other_entries'])}" if found["other_entries"] else ""
    if facts.get("kept_extra"):
        about["extras"] = (
            f"{len(facts['kept_extra'])} tensors of SAM 3's own format that transformers has no place for"
        )
    return about | ({"problem": facts["problem"]} if facts.get("problem") else {})


ABOUT = {"run folder": _about_run, "training checkpoint": _about_checkpoint}


def _recipe_text(recipe: dict[str, Any]) -> str:
    shown = {
        key: ", ".join(f"{slot} {part}" for slot, part in value.items() if part) if isinstance(value, dict) else value
        for key, value in recipe.items()
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def _parts_table(parts: dict[str, dict]) -> str:
    total = {key: sum(part[key] for part in parts.values()) for key in ("tensors", "parameters", "buffers")}
    types = sorted({kind for part in parts.values() for kind in part["types"]})
    rows = [
        [title, ", ".join(part["types"]), *(f"{part[key]:,}" for key in total)]
        for title, part in (parts | {"all": total | {"types": types}}).items()
    ]
    return table(rows, ["part", "type", *total], text_columns=2)
