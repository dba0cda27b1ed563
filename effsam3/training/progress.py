# SPDX-License-Identifier: Apache-2.0
"""A run's heartbeat: progress.json, written by rank 0, and how others read it.

Light: the standard library only, so that a run can be asked how it is without starting torch.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from effsam3.checked_files import read_json
from effsam3.errors import UserError
from effsam3.files import write_json
from effsam3.recipe.reader import load_recipe
from effsam3.shipped import recipe_file
from effsam3.stopping import is_alive

Found = TypeVar("Found")
FILE = "progress.json"
STATES = ("running", "stopped", "complete", "failed")  # as a run writes it; `true_state` adds killed and silent
# A run is silent after this many of its intervals without a sign of life, and at least this long, because starting,
# validating and saving take their time.
SILENT_INTERVALS, SILENT_S = 10, 600


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """What progress.json holds. Times are in seconds since 1970."""

    state: str  # one of STATES
    step: int  # optimizer steps done
    steps: int  # of the whole run
    first_step: int  # where this launch began
    started: float  # this launch
    updated: float  # the last sign of life
    interval_s: float  # between the last two signs that told of different steps; 0: there was one only
    host: str
    pid: int  # of rank 0
    hardware: str  # such as "2 x cpu, DDP"
    global_batch: int  # samples per step
    samples_per_s: float | None  # the latest known
    error: str  # empty unless failed

    def age_s(self, now: float | None = None) -> float:
        """Seconds since the last sign of life."""
        return max(0.0, (time.time() if now is None else now) - self.updated)

    def true_state(self, now: float | None = None) -> str:
        """Return the true state: a run that last wrote `running` may be `killed` or `silent`.

        A run of this host is `killed` when its process is gone. Any run is `silent` when its last sign is too old: it
        hangs, or its host has died.
        """
        if self.state != "running":
            return self.state
        if self.host == socket.gethostname() and not is_alive(self.pid):
            return "killed"
        return "silent" if self.age_s(now) > max(SILENT_S, SILENT_INTERVALS * self.interval_s) else "running"


class Progress:
    """Keeps progress.json of a run folder up to date: the main rank writes, and whichever rank fails first."""

    def __init__(self, folder: Path, is_main: bool, hardware: str, global_batch: int):
        """`hardware` is such as "2 x cpu, DDP"; `global_batch` counts samples per optimizer step."""
        self.path, self.is_main, self.hardware, self.global_batch = (
            Path(folder) / FILE,
            is_main,
            hardware,
            global_batch,
        )
        self.started = time.time()
        self.last: RunProgress | None = None
        self.begun = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Record that a run failed if it ends by an error; one that was asked to stop (SystemExit) has recorded that.

        Any rank may, and the first one counts: the others only lose their connection to it, or are killed.
        """
        if not self.begun or error is None or kind is SystemExit:
            return
        with suppress(OSError):  # a full disk must not hide the error
            found = read_progress(self.path.parent)
            if found is not None and found.state == "running":
                told = replace(found, state="failed", updated=time.time(), error=str(error) or kind.__name__)
                write_json(self.path, asdict(told))

    def update(self, state: str, step: int, steps: int, samples_per_s: float | None = None) -> None:
        """Write a sign of life; without `samples_per_s` the latest known speed stays."""
        assert state in STATES, state
        self.begun = True
        if not self.is_main:
            return
        now, last = time.time(), self.last
        if last is None:
            first_step, interval_s = step, 0.0
        else:
            # A validation speaks right after the step's own line: that is not how far apart signs usually are.
            first_step, interval_s = last.first_step, now - last.updated if step > last.step else last.interval_s
            samples_per_s = last.samples_per_s if samples_per_s is None else samples_per_s
        self.last = RunProgress(
            state=state,
            step=step,
            steps=steps,
            first_step=first_step,
            started=self.started,
            updated=now,
            interval_s=interval_s,
            host=socket.gethostname(),
            pid=os.getpid(),
            hardware=self.hardware,
            global_batch=self.global_batch,
            samples_per_s=samples_per_s,
            error="",
        )
        write_json(self.path, asdict(self.last))


# What progress.json must hold, by the fields of RunProgress.
_TYPES = {"str": str, "int": int, "float": float, "float | None": (float, None)}
PROGRESS_FORM = {field.name: _TYPES[str(field.type)] for field in fields(RunProgress) if field.name != "hardware"}
PROGRESS_FORM |= {"hardware?": str, "layout?": str}  # older runs called their hardware a layout


def read_progress(folder: str | Path) -> RunProgress | None:
    """Read a run's last heartbeat, None if there is none (yet).

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    found = read_json(path, PROGRESS_FORM, "delete it")
    if found["state"] not in STATES:
        raise UserError(f"{path} is damaged: {found['state'][:40]!r} is not a state of a run; delete it")
    hardware = found.get("hardware", found.get("layout", ""))
    return RunProgress(**{name: found[name] for name in PROGRESS_FORM if name[-1] != "?"}, hardware=hardware)


def named_folder(run: str | Path) -> Path:
    """Return the folder of a run or a release that is named by it or by its recipe.

    Raises:
        UserError: there is no such folder.
    """
    path = Path(run)
    folder = path if path.is_dir() or not recipe_file(path).is_file() else load_recipe(path).folder
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}; name one, such as runs/smoke-image, or the recipe of a run")
    return folder


def run_folder(run: str | Path) -> Path:
    """Return the folder of a run as `named_folder` does.

    Raises:
        UserError: there is no such folder, or nothing has been trained in it.
    """
    folder = named_folder(run)
    if not any((folder / name).is_file() for name in (FILE, "metrics.jsonl")):
        raise UserError(f"{folder} holds no training: neither {FILE} nor metrics.jsonl is there")
    return folder


def each_run(
    runs: Sequence[str], look: Callable[[Path], Found], folder_of: Callable[[str], Path] = run_folder
) -> tuple[list[Found], list[str]]:
    """Look at the folder of each run; returns what was found, and why others were left out.

    So `runs/*` may be asked for, where other folders lie too.

    Raises:
        UserError: nothing was found.
    """
    found, left_out = [], []
    for run in runs:
        try:
            found.append(look(folder_of(run)))
        except UserError as error:
            left_out.append(str(error))
    if not found:
        raise UserError(left_out[0] if len(runs) == 1 else "\n  - ".join(["none of these is a run:", *left_out]))
    return found, left_out
