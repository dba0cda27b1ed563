# SPDX-License-Identifier: Apache-2.0
"""The verb `launch`: run verbs of a recipe as processes, on the layout that its `hardware` names."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from effsam3.errors import UserError, did_you_mean
from effsam3.layouts import REPOSITORY, layout_environment, layout_file, layout_processes
from effsam3.recipe import load_recipe, refuse_verb

DISTRIBUTED = {"export": True, "train": True, "merge": False, "evaluate": False}  # verb -> started by accelerate


def launch(recipe_path: str, arguments: Sequence[str]) -> int:
    """Run `[VERB] [key=value ...]` of a recipe, all verbs in order without one; returns the first exit code not 0.

    Raises:
        UserError: the recipe, the verb or the layout is wrong; nothing has been started then.
    """
    verbs = [argument for argument in arguments[:1] if "=" not in argument]
    overrides = list(arguments[len(verbs) :])
    for verb in verbs:
        if verb not in DISTRIBUTED:
            raise UserError(f"{verb!r} cannot be launched{did_you_mean(verb, DISTRIBUTED)}")
    recipe = load_recipe(recipe_path, overrides)
    for verb in verbs:
        refuse_verb(recipe, verb)
    if not verbs:
        # An online teacher runs beside the student: there is nothing to store.
        verbs = [verb for verb in recipe.launched if verb != "export" or recipe.teacher == "stored"]
    for command in [command_of(verb, recipe.hardware, [recipe_path, *overrides]) for verb in verbs]:
        print(f"+ {shlex.join(command)}", flush=True)
        if code := _run(command, layout_environment(layout_file(recipe.hardware))):
            return code
    return 0


def command_of(verb: str, hardware: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs a verb's script on a layout.

    Raises:
        UserError: there is no such layout, or effsam3 is installed without its repository.
    """
    script = REPOSITORY / "scripts" / f"{verb}.py"
    if not script.is_file():
        raise UserError(f"{script} is not there; `effsam3 launch` needs a clone of the repository (pip install -e .)")
    file = layout_file(hardware)
    # One process needs no launcher, which would stand between it and the signals of a batch system.
    distributed = DISTRIBUTED[verb] and layout_processes(file) > 1
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", _short(file)] if distributed else []
    return [sys.executable, *accelerate, _short(script), *arguments]


def _short(path: Path) -> str:
    """Return the path as seen from the working directory where it lies below that."""
    return str(path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path)


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end, passing on requests to stop; returns its exit code, 128 + signal if one ended it."""
    process = subprocess.Popen(command, env=os.environ | environment)
    # Batch systems signal this process only; the run itself must hear it to save. Ctrl-C reaches it by itself.
    # SIGUSR1 goes on as SIGTERM: the launcher of several processes forwards only the latter to them.
    reactions = dict.fromkeys((signal.SIGTERM, signal.SIGUSR1), lambda number, frame: process.terminate())
    reactions[signal.SIGINT] = signal.SIG_IGN
    before = {number: signal.signal(number, reaction) for number, reaction in reactions.items()}
    code = process.wait()
    for number, reaction in before.items():
        signal.signal(number, reaction)
    return code if code >= 0 else 128 - code
