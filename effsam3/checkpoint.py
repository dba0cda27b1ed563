# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written whole or not at all, found again, thinned out.

`checkpoints/step-000100/` holds `state/` (accelerate's, to resume exactly), `student.safetensors` (the weights to
release: the moving average if there is one) and `trainer.json`. `checkpoints/best-step-000100/` holds the weights
alone. A folder without the suffix `.partial` is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from effsam3.errors import UserError

STEP = re.compile(r"(best-)?step-(\d{6,})$")
WEIGHTS = "student.safetensors"


class CheckpointError(UserError):
    """A checkpoint that is not there or cannot be used."""


def step_folder(checkpoints: Path, step: int, best: bool = False) -> Path:
    """Return the folder name of a step."""
    return checkpoints / f"{'best-' if best else ''}step-{step:06d}"


def complete(checkpoints: Path, best: bool = False) -> list[Path]:
    """Return the complete checkpoints (or the best ones), oldest first."""
    found = []
    for path in checkpoints.glob("*step-*"):
        if (match := STEP.match(path.name)) and bool(match[1]) == best:
            found.append((int(match[2]), path))
    return [path for _, path in sorted(found)]


def latest(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint, None if there is none."""
    found = complete(checkpoints)
    return found[-1] if found else None


def chosen(checkpoints: Path, which: str) -> Path:
    """Return the checkpoint that `merge.checkpoint` names: `best`, `last` or a folder's name.

    Raises:
        CheckpointError: it does not exist; the message lists those that do.
    """
    names = [path.name for path in complete(checkpoints) + complete(checkpoints, best=True)]
    if which == "best" and (found := complete(checkpoints, best=True)):
        return found[-1]
    if which in ("best", "last") and (last := latest(checkpoints)):
        return last
    if which in names:
        return checkpoints / which
    raise CheckpointError(
        f"no checkpoint {which!r} in {checkpoints}; "
        + (f"there are {', '.join(names)} (merge.checkpoint)" if names else "run `effsam3 train` first")
    )


def save(accelerator, student, average, checkpoints: Path, trainer: dict, keep: int, is_best: bool) -> Path:
    """Save a checkpoint of all ranks, mark it best if it is, and drop all but the newest `keep`.

    `average` is the student with averaged weights, None without averaging. Collective: every rank calls it; rank 0
    alone renames and removes.
    """
    folder = step_folder(checkpoints, trainer["step"])
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)  # here: under DeepSpeed a rank may write before rank 0 has made it
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial / "state"))
    weights = accelerator.get_state_dict(student)  # collective under ZeRO-3
    if accelerator.is_main_process:
        from safetensors.torch import save_file

        if average is not None:
            weights = average.state_dict()
        save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, partial / WEIGHTS)
        (partial / "trainer.json").write_text(json.dumps(trainer, indent=1))
        sync(partial)
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, from before a resume
        partial.rename(folder)
        if is_best:
            _keep_best(folder)
        for old in complete(checkpoints)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def sync(folder: Path) -> None:
    """Bring a finished folder to the disk, readable for colleagues, before it gets its final name."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _keep_best(folder: Path) -> None:
    best = folder.with_name(f"best-{folder.name}")
    partial = best.with_name(best.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in (WEIGHTS, "trainer.json"):
        shutil.copyfile(folder / name, partial / name)
    sync(partial)
    shutil.rmtree(best, ignore_errors=True)
    partial.rename(best)
    for old in complete(folder.parent, best=True):
        if old != best:
            shutil.rmtree(old)


def read_weights(folder: Path) -> dict:
    """Read a checkpoint's releasable weights, {name: tensor}.

    Raises:
        CheckpointError: the file is missing or cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} cannot be read ({error}); choose another merge.checkpoint"
        ) from error
