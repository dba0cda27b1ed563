# SPDX-License-Identifier: Apache-2.0
"""The verb `merge`: put a trained student into its slot of a SAM 3 checkpoint, every tensor owned exactly once.

python scripts/merge.py recipes/stage1/image/es_rv_m.yaml
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path

import torch

from effsam3 import checkpoint
from effsam3.errors import UserError
from effsam3.models.registry import IMAGE_STUDENTS
from effsam3.models.sam3 import (
    PROCESSOR_FILES,
    TRUNK,
    chassis_folder,
    fingerprint,
    load_part,
    quiet_transformers,
    read_config,
    read_tensors,
    shapes_of,
)
from effsam3.models.text import (
    DETECTOR,
    TEXT_ENCODER,
    TEXT_PROJECTION,
    lite_text_config,
    lite_text_detector_config,
    text_student,
    to_lite_text_tensors,
)
from effsam3.models.tokens import PROCESSOR_LENGTH
from effsam3.models.vision import StudentTrunk, StudentTrunkConfig
from effsam3.recipe import load_recipe
from effsam3.report import Report, provenance, table, write_json

SLOTS = {"image": (TRUNK,), "text": (TEXT_ENCODER, TEXT_PROJECTION)}  # slot -> what it owns in a Sam3VideoModel


class MergeError(UserError):
    """A student that does not fit the slot, or a tensor with no owner or with two."""


def run(recipe) -> Path:
    """Write `runs/<name>/merged`, a whole SAM 3 in transformers' layout with the student in place; returns the folder.

    Raises:
        MergeError: the student's features are not the trunk's, or a tensor has no owner or two.
        CheckpointError: there is no such checkpoint.
    """
    from transformers import Sam3VideoModel

    folder = Path(recipe.train.runs) / recipe.name
    source = checkpoint.chosen(folder / "checkpoints", recipe.merge.checkpoint)
    trained = load_recipe(folder / "recipe.yaml")
    features = json.loads((folder / "provenance.json").read_text())["features"]
    report = Report(folder)
    chassis = chassis_folder(trained.sam3.checkpoint, trained.sam3.revision)
    weights = checkpoint.read_weights(source)
    slot = trained.stage
    if slot == "image":
        refuse_neck(features)
        config = image_config(trained, read_config(chassis), weights)
        placed = {TRUNK + name: tensor for name, tensor in weights.items()}
    else:
        config, placed = text_config(trained, read_config(chassis), weights)

    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape) for name, tensor in Sam3VideoModel(deepcopy(config)).state_dict().items()
        }
    student_shapes = {name: tuple(tensor.shape) for name, tensor in placed.items()}
    owners = assign(expected, {slot: student_shapes}, shapes_of(chassis))
    kept = read_tensors(chassis)
    refuse_other_chassis(features["teacher"], slot, kept, trained.sam3.checkpoint)
    tensors = {name: placed[name] if owner == slot else kept[name] for name, owner in owners.items()}
    model = load_part(Sam3VideoModel, config, dict(tensors))
    merged = folder / "merged"
    partial = folder / "merged.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(partial, save_original_format=False)
    for name in PROCESSOR_FILES:
        if (chassis / name).is_file():
            shutil.copyfile(chassis / name, partial / name)
    write_json(
        partial / "effsam3.json",
        {
            "slots": {slot: {"student": trained.student, "from": f"{folder.name}/{source.name}"}},
            "chassis": trained.sam3.checkpoint,
            "revision": trained.sam3.revision,
            "validation": json.loads((source / "trainer.json").read_text())["best"],
            "provenance": provenance(),
        },
    )
    verify(partial, tensors)
    checkpoint.sync(partial)
    shutil.rmtree(merged, ignore_errors=True)
    partial.rename(merged)
    report.say(slot_table(trained, owners, expected, shapes_of(chassis), source))
    report.say(
        f"\n{merged} holds the whole model; it reads back bit for bit. next: effsam3 evaluate {folder}/recipe.yaml"
    )
    return merged


def refuse_neck(features: dict) -> None:
    """Only trunk features can stand in the trunk's slot.

    Raises:
        MergeError: the student learned the neck's output.
    """
    if features["tap"] != "trunk":
        raise MergeError(
            f"this student learned tap={features['tap']}: {features['channels']} channels, what SAM 3's detector neck "
            "makes of the trunk's features. The slot `image` is the trunk, whose features also feed the second neck, "
            "the tracker's; neck features cannot be turned back into them. Export and train with export.tap=trunk to "
            "merge"
        )


def refuse_other_chassis(teacher: dict, slot: str, chassis: dict, name: str) -> None:
    """Refuse to put a student into another SAM 3 than the one it learned from; an imported store names none.

    Raises:
        MergeError: the fingerprint of the chassis' own slot is not the teacher's.
    """
    if "fingerprint" not in teacher:
        return
    prefixes = SLOTS[slot]
    parts = {key: tensor for key, tensor in chassis.items() if key.startswith(prefixes)}
    if len(prefixes) == 1:  # a teacher of one part is fingerprinted without the part's prefix
        parts = {key.removeprefix(prefixes[0]): tensor for key, tensor in parts.items()}
    if (found := fingerprint(parts)) != teacher["fingerprint"]:
        raise MergeError(
            f"the student learned from {teacher['checkpoint']} (fingerprint {teacher['fingerprint']}), the chassis "
            f"{name} is another ({found}); merge into the SAM 3 that it learned from (sam3.checkpoint, sam3.revision)"
        )


def image_config(trained, config, weights: dict):
    """Return the chassis' config with the student as vision backbone, in the detector's and the tracker's view of it.

    Raises:
        MergeError: the student's width is not the trunk's, or its tensors are not this student's.
    """
    backbone = config.detector_config.vision_config.backbone_config
    width = len(weights["feature_mean"])
    if width != backbone.hidden_size:
        raise MergeError(
            f"the student gives {width} channels, the chassis' trunk {backbone.hidden_size}; train against this "
            f"chassis ({trained.sam3.checkpoint})"
        )
    student = StudentTrunkConfig(
        timm_name=IMAGE_STUDENTS[trained.student].timm_name,
        head=trained.head,
        hidden_size=width,
        image_size=backbone.image_size,
        patch_size=backbone.patch_size,
    )
    with torch.device("meta"):
        wanted = StudentTrunk(student).state_dict()
    refuse_other_student(wanted, weights, f"{trained.student} with head {trained.head}")
    config = deepcopy(config)
    config.detector_config.vision_config.backbone_config = deepcopy(student)
    config.tracker_config.vision_config.backbone_config = deepcopy(student)
    return config


def text_config(trained, config, weights: dict):
    """Return the chassis' config with a `sam3_lite_text` detector, and the student's tensors as the merged model
    names them.

    Raises:
        MergeError: the tensors are not this student's.
    """
    student = text_student(trained.student, PROCESSOR_LENGTH, config.detector_config.detr_encoder_config.hidden_size)
    refuse_other_student(student.state_dict(), weights, trained.student)
    student.load_state_dict(weights)
    config = deepcopy(config)
    lite_text = lite_text_config(trained.student, PROCESSOR_LENGTH)
    config.detector_config = lite_text_detector_config(config.detector_config, lite_text)
    return config, {DETECTOR + name: tensor for name, tensor in to_lite_text_tensors(student).items()}


def refuse_other_student(wanted: dict, found: dict, name: str) -> None:
    """Refuse weights whose names or shapes are not the student's.

    Raises:
        MergeError: they are not; the message names the first.
    """
    wanted, found = ({key: tuple(tensor.shape) for key, tensor in tensors.items()} for tensors in (wanted, found))
    if wanted != found:
        wrong = sorted(set(wanted.items()) ^ set(found.items()))
        raise MergeError(
            f"{len(wrong)} tensors of the checkpoint are not those of {name} (first: {wrong[0][0]} {wrong[0][1]}); "
            "was the recipe changed after training?"
        )


def assign(expected: dict, students: dict[str, dict], chassis: dict) -> dict[str, str]:
    """Give every tensor of the merged model its one owner: a slot's name, or `chassis`.

    Args:
        expected: {name: shape} of the merged model.
        students: {slot: {name: shape}} with names of the merged model.
        chassis: {name: shape} of the chassis, of which a filled slot's tensors are dropped.

    Raises:
        MergeError: a tensor without an owner, with two, of another shape, or left over.
    """
    dropped = tuple(prefix for slot in students for prefix in SLOTS[slot])
    kept = {name: shape for name, shape in chassis.items() if not name.startswith(dropped)}
    offers = {**students, "chassis": kept}
    owners, problems = {}, []
    for name, shape in expected.items():
        owning = [owner for owner, tensors in offers.items() if name in tensors]
        if len(owning) != 1:
            problems.append(f"{name} has {'no owner' if not owning else 'the owners ' + ' and '.join(owning)}")
        elif offers[owning[0]][name] != shape:
            problems.append(f"{name} from {owning[0]} is {offers[owning[0]][name]}, the model needs {shape}")
        else:
            owners[name] = owning[0]
    for owner, tensors in offers.items():
        problems += [f"{name} of {owner} lands nowhere" for name in tensors if name not in expected]
    if problems:
        raise MergeError(f"{len(problems)} tensors cannot be merged: " + "; ".join(problems[:5]))
    return owners


def verify(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read the written folder back.

    Raises:
        MergeError: a tensor differs in name, type or a single bit.
    """
    written = read_tensors(folder)
    wrong = sorted(set(written) ^ set(tensors)) or [
        name
        for name, tensor in tensors.items()
        if written[name].dtype != tensor.dtype or not torch.equal(written[name], tensor)
    ]
    if wrong:
        raise MergeError(f"{folder} does not read back as written: {len(wrong)} tensors differ (first: {wrong[0]})")


def slot_table(trained, owners: dict, expected: dict, chassis_shapes: dict, source: Path) -> str:
    """The printed account: who owns how many tensors and elements, and what was dropped."""
    slot, checkpoint_name = trained.stage, trained.sam3.checkpoint
    size = {name: int(torch.Size(shape).numel()) for name, shape in expected.items()}
    tensors, elements = Counter(owners.values()), Counter()
    for name, owner in owners.items():
        elements[owner] += size[name]
    gone = [torch.Size(shape).numel() for name, shape in chassis_shapes.items() if name.startswith(SLOTS[slot])]
    origin = {slot: f"{trained.student}, {source}", "chassis": checkpoint_name}
    rows = [[owner, origin[owner], f"{tensors[owner]:,}", f"{elements[owner] / 1e6:.2f} M"] for owner in origin]
    rows.append(["dropped", f"{checkpoint_name}, slot {slot}", f"{len(gone):,}", f"-{sum(gone) / 1e6:.2f} M"])
    rows.append(["merged", "", f"{len(owners):,}", f"{sum(size.values()) / 1e6:.2f} M"])
    return table(rows, ["slot", "from", "tensors", "elements"], text_columns=2)
