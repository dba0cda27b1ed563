# SPDX-License-Identifier: Apache-2.0
"""The formats in which a merged model is written: a transformers folder and, on request, single files in it.

model.safetensors    transformers' names; the master copy, always written
sam3.pt              SAM 3's own names, a student's parts under theirs
efficientsam3.pt     what EfficientSAM3's model builder loads
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from effsam3.files import atomic_folder, write_json
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.classes import empty_model, key_map
from effsam3.models.chassis.processor import PROCESSOR_FILES, processor, resize_processor
from effsam3.models.chassis.tensors import (
    AGAIN,
    EXTRAS_FILE,
    TRUNK,
    ChassisError,
    fingerprint,
    quiet_transformers,
    read_tensors,
)
from effsam3.models.image.backbones import student_name
from effsam3.models.keymaps.sam3 import CLASS_ROW, absent_from_transformers
from effsam3.models.keymaps.upstream import image_to_upstream, text_to_upstream
from effsam3.models.merging.combine import Merged
from effsam3.models.merging.slots import SLOTS, MergeError
from effsam3.models.registry import TEXT_STUDENTS, of_type
from effsam3.models.text.padding import padding_of
from effsam3.models.text.student import DETECTOR
from effsam3.tensor_files import read_safetensors, refuse_unusable

BUILDER = "build_efficientsam3_image_model"  # EfficientSAM3's


def extras(chassis: Path) -> dict[str, Tensor]:
    """What a chassis brings that transformers cannot hold, by SAM 3's own names; only a sam3.pt brings anything."""
    path = chassis / EXTRAS_FILE
    return read_safetensors(path, AGAIN, ChassisError) if path.exists() else {}


def write_model(
    merged: Merged,
    folder: Path,
    card: dict,
    chassis: Path | None,
    extra: dict[str, Tensor],
    formats: Sequence[str] = ("transformers",),
    allow_padding_mismatch: bool = False,
) -> list[str]:
    """Write a whole model, readable at once or not there at all; return lines worth telling.

    Args:
        card: the content of effsam3.json.
        chassis: whose processor files go along; None: new ones.
        extra: what transformers cannot hold, by SAM 3's own names.
        formats: `sam3` and `efficientsam3` add a file each; see the top of this file.
        allow_padding_mismatch: write EfficientSAM3's file of a text student that masks its padding, too.

    Raises:
        MergeError: a tensor cannot be a weight, a format cannot hold this model, or what was written does not read
            back bit for bit.
    """
    # Convert first: fail before anything is written.
    refuse_unusable(merged.tensors | extra, str(folder), "nothing was written; merge another checkpoint", MergeError)
    refuse_fewer_layers(card, formats)
    if "efficientsam3" in formats and not allow_padding_mismatch:
        refuse_other_padding(merged, card["slots"])
    files = {name: FORMATS[name](merged, extra, card["slots"]) for name in formats if name in FORMATS}
    notes = []
    with atomic_folder(folder) as partial:
        model = empty_model(merged.config)  # only to be written: nothing is initialised that the tensors replace
        # Assigned, not copied: the tensors may be memory-mapped and larger than RAM would hold twice.
        model.load_state_dict(merged.tensors, assign=True)
        with quiet_transformers():
            model.save_pretrained(partial, save_original_format=False)
            if chassis is None:
                processor(merged.config).save_pretrained(partial)
        # Copied as they are: processors of other versions would resize or tokenise differently.
        for name in PROCESSOR_FILES:
            if chassis is not None and (chassis / name).is_file():
                shutil.copyfile(chassis / name, partial / name)
        resize_processor(partial, SLOTS["image"].config_of(merged.config).image_size)
        if extra:
            save_file(extra, partial / EXTRAS_FILE, {"format": "pt"})
        card = card | {"weights": fingerprint(merged.tensors)}  # what an evaluation is tied to
        write_json(partial / CARD, card)
        # Before the folder gets its name, so that a bad disk or a library's bug never yields a model.
        verify(folder.name, read_tensors(partial), merged.tensors)
        for name, (tensors, lines) in files.items():
            path = partial / f"{name}.pt"
            # EfficientSAM3's file does not describe itself, so its builder must be told everything.
            about = {"effsam3": json.dumps(card | {"config": merged.config.to_dict()})} if name == "sam3" else {}
            save_pickled(path, tensors, about)
            verify(path.name, torch.load(path, mmap=True, weights_only=True)["model"], tensors)
            notes += [f"{folder / path.name}: {path.stat().st_size / 1e6:,.1f} MB", *lines]
    return notes


def save_pickled(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write `{"model": tensors, **about}`, each tensor with its own bytes and no others."""
    # torch saves whole storages: of a part of one (a memory-mapped file, a slice) it would write everything around it.
    own = {
        name: tensor
        if tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        else tensor.clone()
        for name, tensor in tensors.items()
    }
    torch.save({"model": own, **about}, path)


def verify(where: str, written: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Compare what was read back with what was to be written.

    Raises:
        MergeError: a tensor differs in name, type or a single bit.
    """
    wrong = sorted(set(written) ^ set(tensors)) or [
        name
        for name, tensor in tensors.items()
        # Bit for bit, not close: a merge must not change weights that nobody trained.
        if written[name].dtype != tensor.dtype or not torch.equal(written[name], tensor)
    ]
    if wrong:
        raise MergeError(f"{where} does not read back as written: {len(wrong)} tensors differ (first: {wrong[0]})")


# ---- SAM 3's own format


def own_trunk(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the config of SAM 3's own ViT, None when a student replaces it."""
    # The config decides, not the tensors: a student may use any names below the trunk.
    backbone = SLOTS["image"].config_of(config)
    return backbone if backbone.model_type == of_type(config.model_type).trunk_type else None


def refuse_vision(slots: dict, name: str) -> None:
    """Refuse a format that has SAM 3's own necks by name, for a model whose student takes their place.

    Raises:
        MergeError: it does.
    """
    if "vision" in slots:
        raise MergeError(
            f"merge.formats: {name}.pt has the layers of SAM 3's own necks, whose place the student "
            f"{slots['vision']['student']} in the slot vision has taken; write the transformers folder alone "
            "(merge.formats=[transformers])"
        )


def refuse_fewer_layers(card: dict, formats: Sequence[str]) -> None:
    """Refuse formats whose readers build all layers of SAM 3's fusion encoder, for a model that has fewer.

    Raises:
        MergeError: it has.
    """
    if "encoder_layers" in card and (other := [name for name in formats if name in FORMATS]):
        raise MergeError(
            f"merge.formats: who reads {other[0]}.pt builds all layers of SAM 3's fusion encoder, and this model has "
            f"{card['encoder_layers']} (model.encoder_layers); write the transformers folder alone "
            "(merge.formats=[transformers])"
        )


def sam3_file(merged: Merged, extra: dict[str, Tensor], slots: dict) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of sam3.pt, and lines worth telling.

    Raises:
        MergeError: a student has taken the place of the necks.
    """
    refuse_vision(slots, "sam3")
    tensors = key_map(merged.config).to_original(merged.tensors, extra, own_trunk(merged.config))
    has_class_row = own_trunk(merged.config) is not None  # it goes with SAM 3's trunk
    absent = [name for name in absent_from_transformers(extra) if name != CLASS_ROW or has_class_row]
    if not absent:
        return tensors, []
    note = (
        f"  zeros in {len(absent)} tensors that transformers has no use for and the chassis no copy of (from "
        f"{absent[0]} on); name the original sam3.pt as sam3.checkpoint to keep them"
    )
    return tensors, [note]


# ---- EfficientSAM3's format

IMAGE_PREFIX = "detector.backbone.vision_backbone.trunk.model."
TEXT_PREFIX = "detector.backbone.language_backbone."
# student -> backbone_type and model_name of EfficientSAM3's builder
BUILDER_NAMES = {
    "repvit_m0_9": ("repvit", "m0.9"),
    "repvit_m1_1": ("repvit", "m1.1"),
    "repvit_m2_3": ("repvit", "m2.3"),
    "tiny_vit_5m": ("tinyvit", "5m"),
    "tiny_vit_11m": ("tinyvit", "11m"),
    "tiny_vit_21m": ("tinyvit", "21m"),
    "efficientvit_b0": ("efficientvit", "b0"),
    "efficientvit_b1": ("efficientvit", "b1"),
    "efficientvit_b2": ("efficientvit", "b2"),
}


def text_tensors(merged: Merged) -> dict[str, Tensor]:
    """Return the text student's tensors by its own names, `text_encoder.*` and `text_projection.*`."""
    owns = SLOTS["text"].owns
    return {name.removeprefix(DETECTOR): merged.tensors[name] for name in merged.tensors if name.startswith(owns)}


def padding_mismatch(merged: Merged, slots: dict) -> str | None:
    """What EfficientSAM3, which lets texts attend to padding, makes of a student that masks it; None: the same."""
    config = SLOTS["text"].config_of(merged.config)
    if "text" not in slots or padding_of(config) == "attended":
        return None
    return (
        f"the text student {slots['text']['student']} masks padding, EfficientSAM3 lets texts attend to it: there it "
        f"has other features for every text of less than {config.max_position_embeddings} tokens"
    )


def refuse_other_padding(merged: Merged, slots: dict) -> None:
    """Refuse to write EfficientSAM3's file of a text student that computes other features there.

    Raises:
        MergeError: it does.
    """
    if mismatch := padding_mismatch(merged, slots):
        raise MergeError(
            f"merge.formats: {mismatch}. Train it for that (student_padding=attended), leave efficientsam3 out, or "
            "write it nevertheless with merge.allow_padding_mismatch=true"
        )


def efficientsam3_file(merged: Merged, extra: dict[str, Tensor], slots: dict) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of efficientsam3.pt, and the call of EfficientSAM3's builder that loads them.

    Raises:
        MergeError: a slot is filled that EfficientSAM3 does not know.
        KeyMapError: EfficientSAM3's names cannot hold a student, such as one with our fused head.
    """
    refuse_vision(slots, "efficientsam3")
    if other := slots.keys() - {"image", "text"}:
        raise MergeError(
            "merge.formats: EfficientSAM3's builder only knows students for image and text, not for "
            f"{', '.join(other)}; leave efficientsam3 out (merge.formats=[transformers,sam3])"
        )
    tensors: dict[str, Tensor] = {}
    rest = dict(merged.tensors)
    trunk, text = (SLOTS[slot].config_of(merged.config) for slot in ("image", "text"))
    arguments = {"checkpoint_path": "efficientsam3.pt", "backbone_type": "sam3"}
    if "image" in slots:
        own = {"image_size": slots["image"].get("image_size"), "student_image_size": trunk.student_image_size}
        for key, side in own.items():
            if side is not None:
                raise MergeError(
                    f"merge.formats: this image student sees {side} px, EfficientSAM3's builder gives its students "
                    "SAM 3's own size; leave efficientsam3 out (merge.formats=[transformers,sam3]), or train with "
                    f"{key}=null"
                )
        own = {name.removeprefix(TRUNK): rest.pop(name) for name in merged.tensors if name.startswith(TRUNK)}
        tensors |= {IMAGE_PREFIX + name: tensor for name, tensor in image_to_upstream(own, trunk.timm_name).items()}
        arguments["backbone_type"], arguments["model_name"] = BUILDER_NAMES[student_name(trunk.timm_name)]
    if "text" in slots:
        rest = {name: tensor for name, tensor in rest.items() if not name.startswith(SLOTS["text"].owns)}
        own = text_to_upstream(text_tensors(merged))
        tensors |= {TEXT_PREFIX + name: tensor for name, tensor in own.items()}
        student = slots["text"]["student"]
        arguments["text_encoder_type"] = TEXT_STUDENTS[student].tower if student in TEXT_STUDENTS else "none has this"
        arguments["text_encoder_context_length"] = text.max_position_embeddings
    notes = [f"  {BUILDER}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"]
    if "text" in slots:
        notes.append(
            f"  the builder's own default, 77 positions, does not load a table of {text.max_position_embeddings}"
        )
        if mismatch := padding_mismatch(merged, slots):
            notes.append(f"  {mismatch}")
    return key_map(merged.config).to_original(rest, extra, own_trunk(merged.config)) | tensors, notes


FORMATS = {"sam3": sam3_file, "efficientsam3": efficientsam3_file}
