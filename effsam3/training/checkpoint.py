# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written whole or not at all, found again, thinned out.

`checkpoints/step-000100/` holds `student.safetensors` (the weights to release: the moving average if there is one),
`trained.safetensors` (the weights themselves where those are an average), `optimizer.safetensors` and `trainer.json`:
whole tensors by name, so that a run saved on any hardware resumes exactly on any other.
`checkpoints/best-step-000100/` holds only the weights to release. A folder without the suffix `.partial` is complete;
the names are those of checkpoint_folders.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file

from effsam3.errors import UserError
from effsam3.files import atomic_folder
from effsam3.tensor_files import read_safetensors
from effsam3.training import optimizer_state
from effsam3.training.checkpoint_folders import best_first, complete, latest, ranking, step_folder

WEIGHTS = "student.safetensors"
TRAINED = "trained.safetensors"
OPTIMIZER = "optimizer.safetensors"
REMEDY = "delete this checkpoint to resume from the one before, or name another with --resume"


class CheckpointError(UserError):
    """A checkpoint that is not there or cannot be used."""


def chosen(checkpoints: Path, which: str) -> Path:
    """Return the checkpoint that `merge.checkpoint` names: `best`, `last` or a folder's name.

    Raises:
        CheckpointError: it does not exist; the message lists those that do.
    """
    best = best_first(checkpoints)
    names = [path.name for path in complete(checkpoints) + best]
    if which == "best" and best:
        return best[0]
    # A run without a validation yet has no best checkpoint; its last one is better than an error.
    if which in ("best", "last") and (last := latest(checkpoints)):
        return last
    if which in names:
        return checkpoints / which
    raise CheckpointError(
        f"no checkpoint {which!r} in {checkpoints}; "
        + (f"there are {', '.join(names)} (merge.checkpoint)" if names else "run `effsam3 train` first")
    )


def save(
    accelerator: Accelerator, student, optimizer, average, checkpoints: Path, trainer: dict, keep: int, is_best: bool
) -> Path:
    """Save a checkpoint, its weights once more if it is among the best, and drop all but the newest `keep`.

    Of the best, those are kept that `trainer` ranks (`ranking`). `average` is the student with averaged weights, None
    without averaging. Collective: every rank calls it and gives its part; only rank 0 writes, and all ranks fail if it
    cannot.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; older checkpoints are as they were.
    """
    from accelerate.utils import broadcast_object_list

    folder = step_folder(checkpoints, trainer["step"])
    # All ranks take part in gathering, before only rank 0 writes.
    weights = accelerator.get_state_dict(student)  # collective under ZeRO-3
    moments = optimizer_state.gather(accelerator, student, optimizer)
    problem = ""
    if accelerator.is_main_process:
        files = {WEIGHTS: weights, OPTIMIZER: moments}
        if average is not None:
            files |= {WEIGHTS: average.state_dict(), TRAINED: weights}
        try:
            _write(folder, files, trainer, is_best)
            # Only after the new one is complete: a crash in between leaves one too many, never one too few.
            for old in complete(checkpoints)[:-keep]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:  # safetensors wraps the disk's error
            problem = str(error)
    (problem,) = broadcast_object_list([problem])  # else the others would wait for rank 0 until they time out
    if problem:
        raise CheckpointError(
            f"{folder} could not be written ({problem}); make room or name another train.runs. The same command "
            f"resumes from {latest(checkpoints) or 'the beginning'}"
        )
    return folder


def _write(folder: Path, files: dict[str, dict], trainer: dict, is_best: bool) -> None:
    for torn in folder.parent.glob("*.partial"):  # left by a kill; their space may be needed
        shutil.rmtree(torn)
    best = folder.with_name(f"best-{folder.name}")
    with atomic_folder(folder) as partial:
        for name, tensors in files.items():
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, partial / name)
        (partial / "trainer.json").write_text(json.dumps(trainer, indent=1))
        if is_best:  # before the step itself, whose trainer.json names it
            with atomic_folder(best) as partial_best:
                for name in (WEIGHTS, "trainer.json"):
                    # Copied, not linked: the step's folder is deleted later, and not all cluster file systems have
                    # links.
                    shutil.copyfile(partial / name, partial_best / name)
            kept = [best, *(step_folder(folder.parent, one["step"], best=True) for one in ranking(trainer))]
            for old in complete(folder.parent, best=True):
                if old not in kept:
                    shutil.rmtree(old)


def read_weights(folder: Path) -> dict:
    """Read a checkpoint's releasable weights, {name: tensor}.

    Raises:
        CheckpointError: the file is missing or cut short, or a tensor in it is not finite.
    """
    return read_safetensors(folder / WEIGHTS, "choose another merge.checkpoint", CheckpointError)


def read_trained(folder: Path) -> tuple[dict, dict]:
    """Read what a run resumes from: the weights as they were trained, and `optimizer_state.gather`'s tensors.

    Raises:
        CheckpointError: a file is missing or cut short.
    """
    # With averaged weights the run resumes from the raw ones; the average has its own history.
    trained = TRAINED if (folder / TRAINED).exists() else WEIGHTS
    weights = read_safetensors(folder / trained, REMEDY, CheckpointError)
    return weights, read_safetensors(folder / OPTIMIZER, REMEDY, CheckpointError)
