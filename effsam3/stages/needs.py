# SPDX-License-Identifier: Apache-2.0
"""What the verbs of a recipe will need, asked before the first of them has cost anything.

Each need is asked by the code that its verb will run into later: a student of untrained weights is put into its slot,
held-out images are opened, the folder of videos is listed. What one stage needs is in NEEDS of its training.py and
measuring.py. `launch` refuses what any verb of its chain lacks. On their own, `embed` and `train` show in
their header what later verbs lack, which may run on another machine.

python -m effsam3.stages.needs RECIPE VERB[,VERB] [key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from effsam3 import stages
from effsam3.errors import UserError
from effsam3.files import refuse_full_disk, refuse_unwritable
from effsam3.hardware.budget.estimates import FP32, checkpoint_bytes
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import map_tensors, read_config
from effsam3.models.merging.combine import combine
from effsam3.models.merging.formats import FORMATS, extras, refuse_fewer_layers, refuse_other_padding
from effsam3.models.merging.slots import SLOTS, owners_card
from effsam3.models.registry import is_made_up
from effsam3.publish.release import refuse_unlicensed, sam_license
from effsam3.recipe.common import FeatureRecipe, Recipe, StageRecipe
from effsam3.recipe.reader import load_recipe
from effsam3.stages.base import start_from_model
from effsam3.training.checkpoint_folders import STEP, step_folder
from effsam3.training.resume import AUTO, resumable

VERBS = ("train", "merge", "evaluate", "push")  # that need something


# ---- train


def writable_folder(recipe: StageRecipe) -> None:
    """A run folder that can be made and written; it is not made yet."""
    refuse_unwritable(recipe.folder, recipe.runs_key)


def same_run(recipe: StageRecipe) -> None:
    """No run of another recipe in the folder."""
    resumable(recipe, recipe.folder, AUTO)


def initial_weights(recipe: FeatureRecipe) -> None:
    """The student, and the weights that it starts from."""
    start_from_model(stages.training(recipe.stage).untrained(recipe), recipe)


def room_for_checkpoints(recipe: StageRecipe, trained: int | None = None) -> None:
    """Room for the checkpoints of a student with that number of parameters, None to count them."""
    if trained is None:
        student = stages.training(recipe.stage).untrained(recipe)
        trained = sum(tensor.numel() for tensor in student.state_dict().values())
    one, best = checkpoint_bytes(recipe, trained), trained * FP32
    kept, kept_best = recipe.train.keep_checkpoints, recipe.train.keep_best
    if recipe.train.steps is not None:
        kept = min(kept, -(-recipe.train.steps // min(recipe.train.save_every, recipe.train.eval_every)))
        kept_best = min(kept_best, -(-recipe.train.steps // recipe.train.eval_every))
    there = sum(file.stat().st_size for file in (recipe.folder / "checkpoints").rglob("*") if file.is_file())
    # A new one is whole before the oldest goes, and so is the best one.
    needed = max((kept + 1) * one + (kept_best + 1) * best - there, one + best)
    refuse_full_disk(
        recipe.folder,
        needed,
        f"{kept} checkpoints, the next one and the weights of the best {kept_best}",
        "lower train.keep_checkpoints or train.keep_best, or name another disk with train.runs",
    )


# ---- merge


def kept_checkpoint(recipe: StageRecipe) -> None:
    """A checkpoint that will have been saved and kept."""
    which, train = recipe.merge.checkpoint, recipe.train
    if which in ("best", "last") or (recipe.folder / "checkpoints" / which).is_dir():
        return
    match = STEP.match(which)
    step = int(match[2]) if match else 0
    due = step % train.save_every == 0 or step % train.eval_every == 0 or step == train.steps
    if not match or not due or (train.steps is not None and step > train.steps):
        raise UserError(
            f"merge.checkpoint: no checkpoint will be called {which}; choose best, last, or a step that is saved "
            f"(train.save_every is {train.save_every}"
            f"{'' if train.steps is None else f', the last step {train.steps}'}), such as "
            f"{step_folder(Path(), train.save_every).name}"
        )
    if (
        not match[1]
        and train.steps is not None
        and train.steps // train.save_every - step // train.save_every >= (train.keep_checkpoints)
    ):
        raise UserError(
            f"merge.checkpoint: {which} will be gone at the end, of which train.keep_checkpoints keeps "
            f"{train.keep_checkpoints}; keep more, or choose best or last"
        )


def whole_merge(recipe: StageRecipe) -> str:
    """A whole SAM 3 that the student fits, formats that hold it, room for them: a merge of untrained weights."""
    folder = chassis_at_hand(recipe)
    if folder is None:
        return f"{recipe.sam3.checkpoint} is not on this machine; it will be fetched"
    config = read_config(folder)
    about = {"origin": f"{recipe.name}, untrained", "facts": {}}
    # What is changed in place keeps its name and size: there is nothing that could not fit.
    parts = [stages.merging(slot).untrained_part(recipe, config, about) for slot in recipe.sources()]
    card = owners_card(folder, parts)
    refuse_fewer_layers(card, recipe.merge.formats)
    slots = card["slots"]
    inherited = tuple(prefix for slot in owners_card(folder, [])["slots"] for prefix in SLOTS[slot].owns)
    # A format may compute with the values of students that are in it already; of all else sizes are enough.
    rest = {
        name: tensor if name.startswith(inherited) else torch.empty(tensor.shape, device="meta")
        for name, tensor in map_tensors(folder).items()
    }
    merged = combine(config, {"chassis": rest}, parts)
    if "efficientsam3" in recipe.merge.formats and not recipe.merge.allow_padding_mismatch:
        refuse_other_padding(merged, slots)
    files = [FORMATS[name](merged, extras(folder), slots)[0] for name in recipe.merge.formats if name in FORMATS]
    size = sum(tensor.numel() * FP32 for tensors in (merged.tensors, *files) for tensor in tensors.values())
    refuse_full_disk(
        recipe.folder,
        size,
        f"the merged model ({', '.join(recipe.merge.formats)})",
        "name fewer merge.formats, or another disk with train.runs",
    )
    return ""


def chassis_at_hand(recipe: StageRecipe) -> Path | None:
    """Return the recipe's SAM 3 as a folder, None for one on the Hub that has not been fetched."""
    name = recipe.sam3.checkpoint
    if is_made_up(name) or Path(name).exists() or name.count("/") != 1 or name.startswith(("runs/", ".")):
        return chassis_folder(name, recipe.sam3.revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=recipe.sam3.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / "config.json").is_file() else None


# ---- push


def licence(recipe: Recipe) -> None:
    """The SAM License, where weights of SAM 3 would become public."""
    asked, chassis = recipe.push, recipe.sam3.checkpoint
    if asked.repo is not None and not is_made_up(chassis):
        found = sam_license(chassis, recipe.sam3.revision, asked.license, recipe.folder / "merged")
        refuse_unlicensed(chassis, found, asked.private)


# ---- all of them


def needs_of(recipe: Recipe, verb: str) -> list[Callable[[], str | None]]:
    """Return what asks for a verb's needs: each raises UserError where one is not there, and may return a remark."""
    if verb == "push":
        return [partial(licence, recipe)]
    if verb == "evaluate":  # a release is measured by the recipes of its parts
        return [partial(need, own) for own in recipe.learned().values() for need in stages.measuring(own.stage).NEEDS]
    if not isinstance(recipe, StageRecipe):
        return []
    if verb == "train":
        own = stages.training(recipe.stage).NEEDS
        if isinstance(recipe, FeatureRecipe):
            own = (initial_weights, *own)
        return [partial(need, recipe) for need in (writable_folder, same_run, *own, room_for_checkpoints)]
    return [partial(need, recipe) for need in (kept_checkpoint, whole_merge)]


def lacking(recipe: Recipe, verbs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Ask for all that these verbs need; returns what is not there, and remarks, each beginning with its verb."""
    missing: dict[str, str] = {}
    remarks: list[str] = []
    for verb in VERBS:
        for ask in needs_of(recipe, verb) if verb in verbs else ():
            try:
                remark = ask()
            except UserError as error:
                missing.setdefault(str(error), verb)  # a later verb that lacks the same has nothing to add
            else:
                remarks += [f"{verb}: {remark}"] if remark else []
    return [f"{verb}: {what}" for what, verb in missing.items()], remarks


def refuse(recipe: Recipe, verbs: Sequence[str]) -> list[str]:
    """Return the remarks of `lacking`.

    Raises:
        UserError: something is not there; all of it is named.
    """
    missing, remarks = lacking(recipe, verbs)
    if missing:
        raise UserError(f"{recipe.name}: nothing has begun, because" + "".join(f"\n  - {line}" for line in missing))
    return remarks


def header_lines(recipe: Recipe, verbs: Sequence[str]) -> dict[str, str]:
    """Lines for a run's header: what later verbs lack, as far as it can be told now."""
    missing, remarks = lacking(recipe, verbs)
    lines = [*missing, *remarks]
    return {"later": "\n         ".join(lines)} if lines else {}


def main(argv: Sequence[str]) -> int:
    """Run `refuse` in a process of its own, whose memory is free again when the verbs begin."""
    path, verbs, *overrides = argv
    try:
        for remark in refuse(load_recipe(path, overrides), verbs.split(",")):
            print(remark, flush=True)
        for line in lacking(load_recipe(path, overrides), ["push"])[0]:  # which nobody has asked for yet
            print(line, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
