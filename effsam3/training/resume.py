# SPDX-License-Identifier: Apache-2.0
"""Where a run resumes: its own newest checkpoint, another run's, or nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from effsam3.checked_files import read_json
from effsam3.errors import UserError
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.reader import differing_keys, load_recipe
from effsam3.training import checkpoint, loss_scale, optimizer_state
from effsam3.training.checkpoint_folders import RANKING_FORM

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

AUTO, NEVER = "auto", "never"
TRAINER_FORM = {
    "step": int,
    "untrained?": ({str: float}, None),
    "worse?": int,
    "ended?": bool,
    "loss_scale?": loss_scale.FORM,  # fp16 only
} | RANKING_FORM
# What may differ between a run and its continuation: nothing here changes what is learned.
SECTIONS_AFTER = ("evaluate.", "merge.", "push.")  # what is done with a trained student
# A run that begins with another's checkpoint, or whose folder was moved, has another name.
FREE_KEYS = ("name ", "hardware", "data.workers", "data.max_unreadable", "embed.batch_size", *SECTIONS_AFTER) + tuple(
    f"train.{key}"
    for key in (
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "keep_best",
        "monitor",
        "pictures",
        "patience",
        "not_finite",  # until the first NaN both are the same
        "per_rank",
        "find_micro_batch",
        "loggers",
        "trunk_batch",
        "objects_at_once",
        "recompute",
        "wandb_project",
        "runs",
    )
)


def resumable(recipe: StageRecipe, folder: Path, resume: str) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh run.

    Args:
        folder: the run's own.
        resume: `auto`: its newest checkpoint, if there is one; `never`: begin, and refuse if there is a run
            already; else a checkpoint, or a run's folder, that it begins with as long as it has none of its own.

    Raises:
        UserError: there is no such checkpoint, it is of a recipe that would learn something else, or resuming from it
            would leave later ones behind.
    """
    own = checkpoint.latest(folder / "checkpoints")
    if resume == NEVER and own is not None:
        raise UserError(
            f"{folder} holds a run that has reached step {_step(own)}, and --resume never starts fresh; choose "
            "another name, or delete the folder"
        )
    if resume in (AUTO, NEVER):
        chosen = own
    else:
        chosen = _named(Path(resume))
        if own is not None and chosen.resolve() != own.resolve():
            if chosen.resolve().parent == own.resolve().parent:
                raise UserError(
                    f"{folder} has since reached step {_step(own)}, past {chosen.name}; give this run another name, "
                    "or delete the later checkpoints"
                )
            chosen = own  # this run has begun already, such as before it was requeued
    if chosen is None:
        return None
    home = chosen.parent.parent
    is_own = home.resolve() == folder.resolve()
    differing = [
        key for key in differing_keys(load_recipe(home / "recipe.yaml"), recipe) if not key.startswith(FREE_KEYS)
    ]
    if differing:
        remedy = "choose another name, or delete the folder" if is_own else "--resume needs the same recipe"
        raise UserError(f"{home} holds a run of another recipe ({'; '.join(differing)}); {remedy}")
    return chosen


def read_trainer(folder: Path) -> dict[str, Any]:
    """Read what the trainer had counted when it saved a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    return read_json(folder / "trainer.json", TRAINER_FORM, checkpoint.REMEDY, checkpoint.CheckpointError)


def resumed_state(last: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Return the loop's state at a checkpoint, which may be another run's.

    Raises:
        UserError: it has taken all steps.
    """
    state = read_trainer(last)
    if last.parent.resolve() != (folder / "checkpoints").resolve():
        state |= {"best": None, "runners_up": [], "worse": 0}  # the other run's best weights stay there
    if state["step"] == steps and state["best"] is None:
        raise UserError(f"--resume: {last} has taken all {steps} steps; there is nothing left to begin with")
    return state


def resume_weights(last: Path, student: nn.Module, ema: ModelEmaV3 | None) -> dict[str, Tensor]:
    """Give student and moving average a checkpoint's weights, before ZeRO-3 divides them; return AdamW's moments.

    Raises:
        UserError: they are another student's.
    """
    from effsam3.models.merging.slots import refuse_other_student  # with transformers' models: only where one resumes

    weights, moments = checkpoint.read_trained(last)
    refuse_other_student(student.state_dict(), weights, f"the recipe's student ({last})")
    optimizer_state.refuse_other_moments(student, moments, f"{last / checkpoint.OPTIMIZER}")
    student.load_state_dict(weights)
    if ema is not None:
        ema.module.load_state_dict(checkpoint.read_weights(last))
    return moments


def _named(path: Path) -> Path:
    """A checkpoint folder by its own path or by its run's."""
    if (path / checkpoint.OPTIMIZER).is_file():
        return path
    if (newest := checkpoint.latest(path / "checkpoints")) is not None:
        return newest
    weights_alone = (path / checkpoint.WEIGHTS).is_file()
    what = "only holds weights, no optimizer state" if weights_alone else "is neither a checkpoint nor a run with one"
    raise UserError(f"--resume: {path} {what}; name a run's folder or one of its checkpoints/step-*, auto or never")


def _step(folder: Path) -> int:
    return read_trainer(folder)["step"]
