# SPDX-License-Identifier: Apache-2.0
"""What the verbs of a recipe will need, asked before the first of them has cost anything.

NEEDS is the whole list. Each row asks by the code that its verb will run into later: a student of untrained weights
is put into its slot, held-out images are opened, the folder of videos is listed. `launch` refuses what any verb of its
chain lacks; `embed` and `train` alone say in their header what later verbs lack, which may run on another machine.

python -m effsam3.stages.needs RECIPE VERB[,VERB] [key=value ...]
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch

from effsam3 import stages
from effsam3.benchmarks.measurable import measurable
from effsam3.data.captions.text_files import read_texts
from effsam3.data.images.sa1b import SPLITS, UnreadableImage, load_index, read_image
from effsam3.data.videos.vos import open_vos
from effsam3.errors import UserError
from effsam3.files import refuse_full_disk
from effsam3.hardware.budget.estimates import FP32, checkpoint_bytes
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import map_tensors, read_config, shapes_of
from effsam3.models.chassis.tiny import MADE_UP
from effsam3.models.memory.slot import memory_config, tracker_config
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.memory.training import PARTS
from effsam3.models.merging.combine import combine
from effsam3.models.merging.formats import FORMATS, extras, refuse_other_padding
from effsam3.models.merging.slots import SLOTS, inherited_slots, start_from
from effsam3.models.registry import chassis_facts
from effsam3.publish.release import recipes_by_slot, refuse_unlicensed, sam_license
from effsam3.recipe.reader import load_recipe
from effsam3.recipe.rules import names_a_model
from effsam3.training import checkpoint
from effsam3.training.report import refuse_unwritable
from effsam3.training.resume import AUTO, resumable

LEARNING = ("image", "text", "memory")
TRIED = 3  # held-out images that are opened


# ---- train


def writable_folder(recipe) -> None:
    """A run folder that can be made and written; it is not made yet."""
    refuse_unwritable(recipe.folder, "train.runs")


def same_run(recipe) -> None:
    """No run of another recipe in the folder."""
    resumable(recipe, recipe.folder, AUTO)


def initial_weights(recipe) -> None:
    """The student, and the weights that it starts from."""
    student = _student(recipe)
    if names_a_model(recipe.student_init):
        start_from(student, recipe.stage, Path(recipe.student_init))


def both_splits(recipe) -> None:
    """Images to learn from and images held out; an index that is still to be made will have both."""
    data = recipe.data
    if data.source == "folder" and not Path(data.index).is_file() and not Path(data.folder).is_dir():
        raise UserError(f"data.folder: there is no folder {data.folder}")
    if data.source == "sa1b" or Path(data.index).is_file():
        for split in SPLITS:
            load_index(data.index, split, data.limit)


def whole_maps(recipe) -> None:
    """Features that `loss.neck` can be computed of."""
    from effsam3.stages.image.training import refuse_partial_maps

    own = chassis_facts(recipe.sam3.checkpoint).grid if recipe.loss.neck else 0
    refuse_partial_maps(recipe, recipe.embed.tap, recipe.embed.grid or own)


def room_for_checkpoints(recipe, trained: int | None = None) -> None:
    """Room for the checkpoints of a student with so many parameters, None to count them."""
    if trained is None:
        trained = sum(tensor.numel() for tensor in _student_tensors(recipe).values())
    one, best = checkpoint_bytes(recipe, trained), trained * FP32
    kept = recipe.train.keep_checkpoints
    if recipe.train.steps is not None:
        kept = min(kept, -(-recipe.train.steps // min(recipe.train.save_every, recipe.train.eval_every)))
    there = sum(file.stat().st_size for file in (recipe.folder / "checkpoints").rglob("*") if file.is_file())
    # A new one is whole before the oldest goes, and so is the best one.
    needed = max((kept + 1) * one + 2 * best - there, one + best)
    refuse_full_disk(
        recipe.folder,
        needed,
        f"{kept} checkpoints, the next one and the best one's weights",
        "lower train.keep_checkpoints, or name another disk with train.runs",
    )


# ---- merge


def kept_checkpoint(recipe) -> None:
    """A checkpoint that will have been saved and kept."""
    which, train = recipe.merge.checkpoint, recipe.train
    if which in ("best", "last") or (recipe.folder / "checkpoints" / which).is_dir():
        return
    match = checkpoint.STEP.match(which)
    step = int(match[2]) if match else 0
    due = step % train.save_every == 0 or step % train.eval_every == 0 or step == train.steps
    if not match or not due or (train.steps is not None and step > train.steps):
        raise UserError(
            f"merge.checkpoint: no checkpoint will be called {which}; choose best, last, or a step that is saved "
            f"(train.save_every is {train.save_every}"
            f"{'' if train.steps is None else f', the last step {train.steps}'}), such as "
            f"{checkpoint.step_folder(Path(), train.save_every).name}"
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


def whole_merge(recipe) -> str:
    """A whole SAM 3 that the student fits, formats that hold it, room for them: a merge of untrained weights."""
    folder = chassis_at_hand(recipe)
    if folder is None:
        return f"{recipe.sam3.checkpoint} is not on this machine; it will be fetched"
    config = read_config(folder)
    facts = {"tap": "trunk", "image_size": 0, "channels": 0}
    if recipe.stage == "image":
        sizes = chassis_facts(recipe.sam3.checkpoint)
        channels = sizes.hidden_size if recipe.embed.tap == "trunk" else sizes.fpn_hidden_size
        facts = {"tap": recipe.embed.tap, "image_size": sizes.image_size, "channels": channels}
    about = {"origin": f"{recipe.name}, untrained", "facts": {}}
    part = stages.merging(recipe.stage).part_of_run(recipe, facts, _student_tensors(recipe), config, about)
    slots = inherited_slots(folder) | {part.slot: part.card()}
    rest = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(folder).items()}
    if "text" in inherited_slots(folder):  # a format may compute with them
        rest |= {name: one for name, one in map_tensors(folder).items() if name.startswith(SLOTS["text"].owns)}
    merged = combine(config, {"chassis": rest}, [part])
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


def chassis_at_hand(recipe) -> Path | None:
    """The recipe's SAM 3 as a folder, None for one on the Hub that has not been fetched."""
    name = recipe.sam3.checkpoint
    if name in MADE_UP or Path(name).exists() or name.count("/") != 1 or name.startswith(("runs/", ".")):
        return chassis_folder(name, recipe.sam3.revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=recipe.sam3.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / "config.json").is_file() else None


def _student(recipe) -> torch.nn.Module:
    """The recipe's student for image or text as it starts, but for another model's weights."""
    facts = chassis_facts(recipe.sam3.checkpoint)
    if recipe.stage == "text":
        from effsam3.stages.text import training as text

        return text.make_student(recipe, facts.fpn_hidden_size)[0]
    from effsam3.stages.image import training as image

    channels = facts.hidden_size if recipe.embed.tap == "trunk" else facts.fpn_hidden_size
    return image.make_student(recipe, channels, facts.image_size, facts.patch_size)


def _student_tensors(recipe) -> dict[str, torch.Tensor]:
    """The tensors of the recipe's student as it starts, of the memory's without their values."""
    if recipe.stage != "memory":
        return _student(recipe).state_dict()
    folder = chassis_folder(recipe.sam3.checkpoint, recipe.sam3.revision)
    config = tracker_config(memory_config(read_config(folder)), recipe.memory)
    with torch.device("meta"):
        whole = EfficientTracker(deepcopy(config)).state_dict()
    prefixes = tuple(prefix for part in recipe.memory.trains for prefix in PARTS[part])
    return {name: tensor for name, tensor in whole.items() if name.startswith(prefixes)}


# ---- evaluate


def benchmarks(recipe) -> str:
    """Something that can be measured; what cannot is named."""
    if recipe.stage == "image" and not Path(recipe.data.index).is_file():
        return ""
    return " ".join(measurable(recipe)[1])


def photographs(recipe) -> None:
    """Held-out photographs that can be read, although the store may have their pixels."""
    index = Path(recipe.data.index)
    if not index.is_file():
        return
    rows, reasons = load_index(index, "val", recipe.data.limit), []
    for row in rows.select(range(min(TRIED, len(rows)))):
        try:
            read_image(row, index.parent)
            return
        except UnreadableImage as error:
            reasons.append(str(error))
    raise UserError(f"none of the first {len(reasons)} held-out images of {index} can be read: {reasons[0]}")


def phrase_list(recipe) -> None:
    """The phrases to measure on, which are read to their end."""
    asked = recipe.evaluate
    if asked.phrases is not None:
        if not Path(asked.phrases).is_file():
            raise UserError(f"evaluate.phrases: there is no file {asked.phrases}")
        deque(read_texts(asked.phrases, asked.phrase_column, "evaluate.phrase_column").values, maxlen=0)


def videos(recipe) -> None:
    """The videos to measure on."""
    if recipe.evaluate.videos is not None:
        open_vos(recipe.evaluate.videos, split=recipe.evaluate.split)


# ---- push


def licence(recipe) -> None:
    """The SAM License, where weights of SAM 3 would become public."""
    asked, chassis = recipe.push, recipe.sam3.checkpoint
    if asked.repo is not None and chassis not in MADE_UP:
        found = sam_license(chassis, recipe.sam3.revision, asked.license, recipe.folder / "merged")
        refuse_unlicensed(True, found, asked.private)


# ---- the table


@dataclass(frozen=True)
class Need:
    """What a verb of some stages needs. `ask` raises UserError where it is not there, and may return a remark."""

    verb: str
    stages: tuple[str, ...]
    ask: Callable[[object], str | None]


NEEDS = (
    Need("train", LEARNING, writable_folder),
    Need("train", LEARNING, same_run),
    Need("train", ("image", "text"), initial_weights),
    Need("train", ("image",), both_splits),
    Need("train", ("image",), whole_maps),
    Need("train", LEARNING, room_for_checkpoints),
    Need("merge", LEARNING, kept_checkpoint),
    Need("merge", LEARNING, whole_merge),
    Need("evaluate", ("image", "text"), benchmarks),
    Need("evaluate", ("image",), photographs),
    Need("evaluate", ("text",), phrase_list),
    Need("evaluate", ("memory",), videos),
    Need("push", (*LEARNING, "release"), licence),
)


def lacking(recipe, verbs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Ask for all that these verbs need; returns what is not there, and remarks, each beginning with its verb."""
    missing, remarks = {}, []
    for need in NEEDS:
        if need.verb not in verbs:
            continue
        # A release is measured as the recipes of its parts say.
        parts = recipes_by_slot(recipe)[0].values() if need.verb == "evaluate" else [recipe]
        for own in parts:
            if own.stage not in need.stages:
                continue
            try:
                remark = need.ask(own)
            except UserError as error:
                missing.setdefault(str(error), need.verb)  # a later verb that lacks the same has nothing to add
            else:
                remarks += [f"{need.verb}: {remark}"] if remark else []
    return [f"{verb}: {what}" for what, verb in missing.items()], remarks


def refuse(recipe, verbs: Sequence[str]) -> list[str]:
    """Return the remarks of `lacking`.

    Raises:
        UserError: something is not there; all of it is named.
    """
    missing, remarks = lacking(recipe, verbs)
    if missing:
        raise UserError(f"{recipe.name}: nothing has begun, because" + "".join(f"\n  - {line}" for line in missing))
    return remarks


def header_lines(recipe, verbs: Sequence[str]) -> dict[str, str]:
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
