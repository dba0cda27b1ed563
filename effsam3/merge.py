# SPDX-License-Identifier: Apache-2.0
"""The verb `merge`: put trained students and changed tensors into a SAM 3 checkpoint, every tensor owned exactly once.

python scripts/merge.py recipes/stage1/image/es_rv_m.yaml
python scripts/merge.py recipes/release/es_rv_m_mc_s.yaml --format sam3
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig

from effsam3 import stages
from effsam3.checked_files import read_json
from effsam3.files import refuse_unwritable, write_text
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config, read_tensors
from effsam3.models.merging.adapt import Adapted, read_adapted
from effsam3.models.merging.combine import combine, slot_table
from effsam3.models.merging.formats import extras, write_model
from effsam3.models.merging.slots import (
    MergeError,
    Part,
    model_folder,
    owners_card,
    part_of_model,
    refuse_other_chassis,
)
from effsam3.recipe.common import AdaptingRecipe, Recipe, StageRecipe
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.training import checkpoint
from effsam3.training.checkpoint_folders import validation_of
from effsam3.training.report import Report, provenance
from effsam3.training.resume import read_trainer


def run(recipe: Recipe) -> Path:
    """Write `runs/<name>/merged`, a whole SAM 3 with the students in place; return the folder.

    Raises:
        MergeError: a part is missing or does not fit, or a tensor has no owner or two.
        CheckpointError: there is no such checkpoint.
    """
    refuse_unwritable(recipe.folder, recipe.runs_key)
    is_release = not isinstance(recipe, StageRecipe)
    if is_release:
        refuse_other_run(recipe.folder)
    sam3 = recipe.sam3
    chassis = chassis_folder(sam3.checkpoint, sam3.revision)
    config = read_config(chassis)
    parts = [part_of(slot, folder, recipe.merge.checkpoint, config) for slot, folder in recipe.sources().items()]
    rest = read_tensors(chassis)
    for part in parts:
        refuse_other_chassis(part, rest, sam3.checkpoint, sam3.revision)
    adapted = [adapted_of(folder, recipe) for folder in recipe.adapted()]
    merged = combine(config, {"chassis": rest}, parts, adapted)
    owners = owners_card(chassis, parts, [one.card() for one in adapted])
    card = owners | {
        "chassis": sam3.checkpoint,
        "revision": sam3.revision,
        "provenance": provenance(),
    }
    folder = recipe.folder
    report = Report(folder)
    notes = write_model(
        merged,
        folder / "merged",
        card,
        chassis,
        extras(chassis),
        recipe.merge.formats,
        recipe.merge.allow_padding_mismatch,
    )
    if is_release:
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        report.write_json("provenance.json", provenance() | {"recipe": recipe.name} | owners)
    origins = {part.slot: f"{part.student}, {part.origin}" for part in parts} | {"chassis": sam3.checkpoint}
    origins |= {one.name: f"changed in place, {one.origin}" for one in adapted}
    report.say(slot_table(merged, origins))
    for note in (*notes, *(note for one in adapted for note in one.notes)):
        report.say(note)
    report.say(
        f"\n{folder / 'merged'} holds the whole model; it reads back bit for bit. next: effsam3 evaluate {folder}"
    )
    return folder / "merged"


def refuse_other_run(folder: Path) -> None:
    """Refuse to write a release over a run that has learned something.

    Raises:
        MergeError: the folder holds a run of another stage.
    """
    if not (folder / "recipe.yaml").is_file():
        return
    if isinstance(run := load_recipe(folder / "recipe.yaml"), StageRecipe):
        raise MergeError(
            f"{folder} holds a run of stage {run.stage}, which a release would replace; give the release another name"
        )


# ---- run folders to parts


def part_of(slot: str, folder: Path, which: str, config: PreTrainedConfig) -> Part:
    """Return the student of a run folder, or of a merged or imported model; `config` is the chassis'.

    Raises:
        MergeError: there is neither, or it is of another stage or does not fit.
        CheckpointError: the run has no checkpoint `which`.
    """
    if not (folder / "recipe.yaml").is_file() and model_folder(folder) is not None:
        return part_of_model(slot, folder)
    trained = trained_recipe(slot, folder)
    features, weights, about = what_was_learned(trained, folder, which)
    teacher = {"checkpoint": trained.sam3.checkpoint, "revision": trained.sam3.revision}
    if "fingerprint" in features["teacher"]:  # an imported store names none
        teacher["fingerprint"] = features["teacher"]["fingerprint"]
    about["facts"]["student_init"] = trained.student_init
    return stages.merging(slot).part_of_run(trained, features, weights, config, about | {"teacher": teacher})


def adapted_of(folder: Path, asked: Recipe) -> Adapted:
    """Return the tensors that a run changed in place, or those of a folder that holds nothing else.

    `asked` is the recipe that is merged: that of a release, or the run's own, whose section `merge` may have changed.

    Raises:
        MergeError: there is neither, it is a run of a stage that fills a slot, or it does not fit its own SAM 3.
        CheckpointError: the run has no such checkpoint.
    """
    if not (folder / "recipe.yaml").is_file():
        return read_adapted(folder)
    trained = load_recipe(folder / "recipe.yaml")
    if not isinstance(trained, AdaptingRecipe):
        raise MergeError(
            f"parts.adapted: {folder} is a run of stage {trained.stage}, which changes no tensors in place; name a "
            f"run that does, or give this one to its slot (parts.{trained.stage})"
        )
    if folder == asked.folder:
        trained = replace(trained, merge=asked.merge)
    features, weights, about = what_was_learned(trained, folder, asked.merge.checkpoint)
    # On the SAM 3 that it learned on, whatever it is merged into: `adapt` compares the two.
    chassis = chassis_folder(trained.sam3.checkpoint, trained.sam3.revision)
    about["name"] = folder.name
    return stages.merging(trained.stage).adapted_of_run(trained, features, weights, chassis, about)


def what_was_learned(trained: StageRecipe, folder: Path, which: str) -> tuple[dict, dict[str, Tensor], dict]:
    """Return what a run records of its features, its weights, and the `origin` and `facts` of a part made of them.

    Raises:
        MergeError: the record is missing or damaged.
        CheckpointError: there is no checkpoint `which`.
    """
    source = checkpoint.chosen(folder / "checkpoints", which)
    form = {"features": stages.merging(trained.stage).FEATURES_FORM}
    features = read_json(folder / "provenance.json", form, "restore it, or train again", MergeError)["features"]
    facts = {"validation": validation_of(read_trainer(source))}
    about = {"origin": f"{folder.name}/{source.name}", "facts": facts}
    return features, checkpoint.read_weights(source), about


def trained_recipe(slot: str, folder: Path) -> StageRecipe:
    """Return the recipe of the run that fills a slot.

    Raises:
        MergeError: there is no run, or it is of another stage.
    """
    if not (folder / "recipe.yaml").is_file():
        raise MergeError(
            f"the slot {slot} has no part: there is no run and no model in {folder}; train one with `effsam3 launch` "
            f"on a recipe of stage {slot}, or name another folder (parts.{slot})"
        )
    trained = load_recipe(folder / "recipe.yaml")
    if trained.stage != slot:
        raise MergeError(f"{folder} is a run of stage {trained.stage}; the slot {slot} needs one of stage {slot}")
    return trained
