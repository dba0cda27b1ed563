# SPDX-License-Identifier: Apache-2.0
"""The slots of SAM 3: which tensors a student takes over, and how the config records it.

A `Part` fills one slot; models/merging/combine.py puts any number of parts into one model. A slot is a row of `SLOTS`:
the tensors that it owns may be those of several modules, and of other slots, which then cannot be filled as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Sam3LiteTextTextConfig

from effsam3.checked_files import can_be_path, read_json
from effsam3.errors import UserError
from effsam3.models.chassis.card import CARD, CARD_FORM
from effsam3.models.chassis.sizes import at_image_size
from effsam3.models.chassis.slim import slim_tensors
from effsam3.models.chassis.tensors import (
    NECK,
    TRACKER_NECK,
    TRUNK,
    fingerprint,
    read_config,
    read_tensors,
    to_float32,
)
from effsam3.models.image.student import StudentTrunk, student_config
from effsam3.models.memory.slot import MEMORY, TRACKER, memory_config, with_memory
from effsam3.models.text.student import (
    DETECTOR,
    TEXT_ENCODER,
    TEXT_PROJECTION,
    lite_text_config,
    lite_text_detector_config,
    text_student,
    to_lite_text_tensors,
)


class MergeError(UserError):
    """A student that does not fit the slot, or a tensor with no owner or with two."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A student, ready for its slot.

    Attributes:
        config: the slot's part of the merged config.json.
        tensors: by their names in the merged `Sam3VideoModel`, float32.
        teacher: `checkpoint`, `revision` and `fingerprint` of the SAM 3 it learned from, as far as known.
        facts: what else the merged model's effsam3.json records of the slot.
        also: beginnings of the names of what it takes over outside its slot.
        adapted: what effsam3.json says of those of its tensors that were changed since, see models/merging/adapt.py.
    """

    slot: str
    student: str
    config: PreTrainedConfig
    tensors: dict[str, Tensor]
    origin: str
    teacher: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    also: tuple[str, ...] = ()
    adapted: tuple[dict, ...] = ()

    @property
    def owns(self) -> tuple[str, ...]:
        """Beginnings of the names of all that it takes over."""
        return SLOTS[self.slot].owns + self.also

    def card(self) -> dict:
        """Return the slot's entry in effsam3.json."""
        also = {"also": list(self.also)} if self.also else {}
        return {"student": self.student, "from": self.origin, "teacher": self.teacher, **also, **self.facts}


# ---- the table of slots


def _image_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.detector_config.vision_config.backbone_config


def _with_image(config: PreTrainedConfig, student: Any) -> PreTrainedConfig:
    config = at_image_size(config, student.image_size)
    # Detector and tracker see the same trunk, each through a neck of its own.
    config.detector_config.vision_config.backbone_config = deepcopy(student)
    config.tracker_config.vision_config.backbone_config = deepcopy(student)
    return config


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.detector_config.text_config


def _with_text(config: PreTrainedConfig, student: PreTrainedConfig) -> PreTrainedConfig:
    config = deepcopy(config)
    assert isinstance(student, Sam3LiteTextTextConfig)
    config.detector_config = lite_text_detector_config(config.detector_config, student)
    return config


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What a student of this slot owns in a `Sam3VideoModel`, where its config is, and what must be as in the chassis.

    `module` is where the student's module is. `alike` maps an attribute of the slot's config to its name in
    messages; of those in `at_most` the student's may be smaller.
    """

    owns: tuple[str, ...]
    module: str
    config_of: Callable[[PreTrainedConfig], PreTrainedConfig]
    install: Callable[[PreTrainedConfig, PreTrainedConfig], PreTrainedConfig]
    alike: dict[str, str]
    at_most: tuple[str, ...] = ()


SLOTS = {
    "image": Slot(
        owns=(TRUNK,),
        module=TRUNK,
        config_of=_image_config,
        install=_with_image,
        alike={"hidden_size": "channels", "image_size": "image size", "patch_size": "patch size (with it the grid)"},
        at_most=("image_size",),
    ),
    "text": Slot(
        owns=(TEXT_ENCODER, TEXT_PROJECTION),
        module=DETECTOR,
        config_of=_text_config,
        install=_with_text,
        alike={"max_position_embeddings": "context length"},
    ),
    "memory": Slot(
        owns=MEMORY,
        module=TRACKER,
        config_of=memory_config,
        install=with_memory,
        alike={
            "image_size": "image size",
            "memory_attention_hidden_size": "channels of the tracker",
            "memory_attention_rope_feat_sizes": "grid",
        },
    ),
    # The trunk's width is the student's own: its necks read it, and nothing else does.
    "vision": Slot(
        owns=(TRUNK, NECK, TRACKER_NECK),
        module=TRUNK,
        config_of=_image_config,
        install=_with_image,
        alike={"image_size": "image size", "patch_size": "patch size (with it the grid)"},
        at_most=("image_size",),
    ),
}


# ---- parts


def image_part(
    student: str, head: str, seen: int | None, weights: Mapping[str, Tensor], config: PreTrainedConfig, **about
) -> Part:
    """Make a part of a trained `StudentTrunk`'s tensors.

    Args:
        seen: side in pixels of the images that it sees, None: the chassis'.
        about: the part's other attributes.

    Raises:
        MergeError: its width is not the trunk's in `config`, the chassis', or its tensors are not this student's.
    """
    trunk = _image_config(config)
    if "feature_mean" in weights and (width := len(weights["feature_mean"])) != trunk.hidden_size:
        raise MergeError(
            f"the student {student} gives {width} channels, the chassis' trunk {trunk.hidden_size}: it belongs to "
            "another SAM 3; train it against this one, or name that one (sam3.checkpoint; --sam3 of `effsam3 import`)"
        )
    sizes = {key: getattr(trunk, key) for key in ("hidden_size", "image_size", "patch_size")}
    # Sizes come from the chassis, because the chassis' neck and heads will read what the student outputs.
    built = student_config(student, head, seen, **sizes)
    with torch.device("meta"):
        # Without memory: only names and shapes are compared.
        wanted = StudentTrunk(built).state_dict()
    refuse_other_student(wanted, weights, f"{student} with head {head}")
    # Trained weights may be half precision, the chassis' are not; one type in a file keeps loading simple.
    tensors = {TRUNK + name: to_float32(tensor) for name, tensor in weights.items()}
    return Part(slot="image", student=student, config=built, tensors=tensors, **about)


def text_part(
    student: str, padding: str, weights: Mapping[str, Tensor], config: PreTrainedConfig, facts: dict, **about
) -> Part:
    """Make a part of a trained `StudentText`'s tensors; `facts` and `about` are the part's other attributes.

    Raises:
        MergeError: its tensors are not this student's.
    """
    length = _text_config(config).max_position_embeddings
    built = text_student(student, length, config.detector_config.detr_encoder_config.hidden_size, padding)
    refuse_other_student(built.state_dict(), weights, student)
    built.load_state_dict(weights)
    tensors = {DETECTOR + name: tensor for name, tensor in to_lite_text_tensors(built).items()}
    lite_text = lite_text_config(student, length, padding)
    facts = facts | {"padding": padding}
    return Part(slot="text", student=student, config=lite_text, tensors=tensors, facts=facts, **about)


def read_card(folder: Path, also: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """Read a merged or imported model's effsam3.json, which must also have the form of `also` next to the slots.

    Raises:
        MergeError: it cannot be read, or does not name who fills the slots.
    """
    card = read_json(folder / CARD, {**CARD_FORM, **also}, "merge or import the model again", MergeError)
    if not can_be_path(card.get("chassis", "")):
        raise MergeError(f"{folder / CARD} names an impossible chassis; merge the model again")
    if other := card["slots"].keys() - SLOTS.keys():
        raise MergeError(f"{folder / CARD} fills a slot {min(other)!r}, which does not exist; merge the model again")
    return card


def owners_card(chassis: Path | None, parts: Sequence[Part], adapted: Sequence[dict] = ()) -> dict:
    """Return what effsam3.json says of who fills the `slots` and who changed tensors in place (`adapted`).

    What a chassis that is itself a merged model says of them stays true for the tensors that no part replaces.

    Args:
        adapted: entries of what is changed now.

    Raises:
        MergeError: the chassis' card cannot be read, or a part replaces half of what a student in it filled.
    """
    inside = read_card(chassis) if chassis is not None and (chassis / CARD).is_file() else {"slots": {}}
    # The card must describe the tensors: an entry of the chassis whose tensors are replaced would be a lie.
    replaced = tuple(prefix for part in parts for prefix in part.owns)
    slots = {}
    for slot, filled in inside["slots"].items():
        lost = [prefix for prefix in SLOTS[slot].owns if prefix.startswith(replaced)]
        # Half a student left in a slot would load without an error and compute nonsense.
        if lost and len(lost) < len(SLOTS[slot].owns):
            raise MergeError(
                f"{chassis} has {filled['student']} in the slot {slot}, of which {', '.join(lost)} would be replaced; "
                "merge into a SAM 3 without it"
            )
        if not lost:
            # What an earlier part took over outside its slot may have been replaced since.
            also = [prefix for prefix in filled.get("also", ()) if not prefix.startswith(replaced)]
            slots[slot] = {key: value for key, value in filled.items() if key != "also"}
            slots[slot] |= {"also": also} if also else {}
    slots |= {part.slot: part.card() for part in parts}
    entries = [_entry(one, lambda name: not name.startswith(replaced)) for one in inside.get("adapted", ())]
    card = {"slots": slots} | {key: inside[key] for key in ("encoder_layers",) if key in inside}
    for layers in {one["encoder_layers"] for one in adapted if "encoder_layers" in one}:  # `combine` refuses several
        card["encoder_layers"] = layers
        assert chassis is not None  # whose layers were taken out: what stays of them is called otherwise now
        own = read_config(chassis)
        entries = [one | {"tensors": [*slim_tensors(own, dict.fromkeys(one["tensors"]), layers)]} for one in entries]
    entries += [entry for part in parts for entry in part.adapted] + list(adapted)
    entries = [entry for entry in entries if entry["tensors"]]
    return card | ({"adapted": entries} if entries else {})


def _entry(entry: dict, kept: Callable[[str], bool]) -> dict:
    """An entry of effsam3.json's `adapted` with some of its tensors."""
    return entry | {"tensors": [name for name in entry["tensors"] if kept(name)]}


def first_chassis(card: dict) -> tuple[str, str | None]:
    """Return the checkpoint and the revision that a merged model began with, through all merges before it.

    Raises:
        MergeError: a card on the way cannot be read, or they go round in a circle.
    """
    seen: set[Path] = set()
    while (inner := model_folder(Path(card["chassis"]))) is not None and (inner / CARD).is_file():
        if inner.resolve() in seen:
            raise MergeError(f"{inner / CARD} names a chassis that was merged into itself; merge the model again")
        # Cards are files that anybody may edit; a circle must not hang the merge.
        seen.add(inner.resolve())
        card = read_card(inner, {"chassis": str, "revision": (str, None)})
    return card["chassis"], card["revision"]


def model_folder(folder: Path) -> Path | None:
    """Return where the model of a run, or of a folder that is one itself, lies; None if there is none."""
    return next((place for place in (folder, folder / "merged") if (place / "config.json").is_file()), None)


def part_of_model(slot: str, place: Path) -> Part:
    """Take the student out of one slot of a merged or imported model.

    Raises:
        MergeError: there is no model, it has no effsam3.json, or no student in this slot.
    """
    if (folder := model_folder(place)) is None:
        raise MergeError(
            f"there is no model in {place}: neither config.json nor merged/config.json; run `effsam3 merge` or "
            f"`effsam3 import` first, or name another folder (parts.{slot} of a release, student_init of a stage)"
        )
    if not (folder / CARD).is_file():
        raise MergeError(
            f"{folder} has no {CARD}: it was neither merged nor imported here. `effsam3 import` makes such a folder "
            "of an EfficientSAM3 checkpoint"
        )
    whole = read_card(folder)
    if slot not in (slots := whole["slots"]):
        raise MergeError(f"{folder} has no student in the slot {slot}; it has {', '.join(slots) or 'none'}")
    card = dict(slots[slot])
    also = tuple(card.pop("also", ()))
    owns = SLOTS[slot].owns + also
    return Part(
        slot=slot,
        also=also,
        student=card.pop("student"),
        origin=card.pop("from"),
        teacher=card.pop("teacher", {}),
        facts=card,
        config=SLOTS[slot].config_of(read_config(folder)),
        tensors={name: tensor for name, tensor in read_tensors(folder).items() if name.startswith(owns)},
        adapted=tuple(_entry(one, lambda name: name.startswith(owns)) for one in whole.get("adapted", ())),
    )


def start_from(student: Any, slot: str, place: Path) -> None:
    """Give a new student the weights of the same one in a merged or imported model.

    Its statistics stay; its last layer is rescaled instead, so that it computes what the model's student computes.
    `student` is a StudentTrunk or a StudentText.

    Raises:
        MergeError: there is no model, or another student in its slot.
    """
    part = part_of_model(slot, place)
    mean_C, scale_C = student.feature_mean.clone(), student.feature_scale.clone()
    tensors = {"feature_mean": torch.zeros_like(mean_C), "feature_scale": torch.ones_like(scale_C)}
    tensors |= {name.removeprefix(SLOTS[slot].module): tensor for name, tensor in part.tensors.items()}
    refuse_other_student(student.state_dict(), tensors, f"the recipe's student (student_init: it is {part.student})")
    student.load_state_dict(tensors)
    layer: Any = student.last_layer
    with torch.no_grad():
        ratio_C = student.feature_scale / scale_C
        layer.weight.mul_(ratio_C.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.mul_(ratio_C).add_((student.feature_mean - mean_C) / scale_C)
    student.set_feature_statistics(mean_C, scale_C)


def refuse_other_student(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights whose names, shapes or kinds (real numbers or whole ones) are not the student's.

    Raises:
        MergeError: they are not; the message names the first.
    """
    ours, theirs = (
        {(key, tuple(tensor.shape), tensor.is_floating_point()) for key, tensor in tensors.items()}
        for tensors in (wanted, found)
    )
    if wrong := sorted(ours ^ theirs):
        raise MergeError(
            f"{len(wrong)} tensors are not those of {name} (first: {wrong[0][0]} {wrong[0][1]}); "
            "was the recipe changed after training, or is this a checkpoint of something else?"
        )


def refuse_other_chassis(part: Part, chassis: Mapping[str, Tensor], checkpoint: str, revision: str | None) -> None:
    """Refuse to put a student into another SAM 3 than the one it learned from; of some, that is not known.

    Raises:
        MergeError: the fingerprint of the chassis' own slot is not the teacher's; or the teacher's is not known, and
            its name or revision is another.
    """
    teacher, owns = part.teacher, SLOTS[part.slot].owns
    if not teacher:
        return
    learned = f"{part.student} in the slot {part.slot} ({part.origin}) learned from {teacher['checkpoint']}"
    hint = "merge into the one that it learned from (sam3.checkpoint, sam3.revision)"
    if "fingerprint" not in teacher:
        if (teacher["checkpoint"], teacher["revision"]) != (checkpoint, revision):
            raise MergeError(
                f"{learned}, revision {teacher['revision']}, the chassis is {checkpoint}, revision {revision}; {hint}"
            )
        return
    # By content, because names and revisions change when a checkpoint is copied or converted.
    tensors = {key: tensor for key, tensor in chassis.items() if key.startswith(owns)}
    if len(owns) == 1:  # a teacher of one part is fingerprinted without the part's prefix
        tensors = {key.removeprefix(owns[0]): tensor for key, tensor in tensors.items()}
    if (found := fingerprint(tensors)) != teacher["fingerprint"]:
        raise MergeError(
            f"{learned} (fingerprint {teacher['fingerprint']}), the chassis {checkpoint} is another ({found}); {hint}"
        )
