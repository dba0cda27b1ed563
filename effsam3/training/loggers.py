# SPDX-License-Identifier: Apache-2.0
"""wandb and TensorBoard through accelerate; a missing login or network never stops or hangs a run."""

from __future__ import annotations

import netrc
import os
import secrets
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from effsam3.checked_files import read_json
from effsam3.files import write_json
from effsam3.training.report import read_metrics

CONNECT_TIMEOUT_S = 10
WANDB_FILE = "wandb.json"  # in the run folder
# `logged`: the last step of starts that came to their end, whose folders are `parts`.
WANDB_FORM = {"id": str, "path": str, "inode": int, "logged": int, "parts": [str]}


def wandb_obstacle() -> str:
    """Say why wandb cannot be reached from here, empty if it can: no login, or no connection to its host.

    Asked before wandb is started, because wandb itself retries for minutes and cannot be sent offline afterwards.
    """
    import wandb

    url = urlparse(os.environ.get("WANDB_BASE_URL", wandb.Settings().base_url))
    if not os.environ.get("WANDB_API_KEY"):
        try:
            logins = netrc.netrc()
        except (FileNotFoundError, netrc.NetrcParseError):
            return "no login"
        if not any(logins.authenticators(host) for host in (url.hostname or "", "api.wandb.ai")):
            return "no login"
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{url.hostname} cannot be reached ({error})"
    return ""


class Loggers:
    """The loggers of one run folder, over all its starts: one wandb run, one curve in TensorBoard.

    Args:
        names: `wandb`, `tensorboard`; none: nothing is tracked.
        say: tells the user what they should know.
    """

    def __init__(
        self, accelerator: Accelerator, names: tuple[str, ...], folder: Path, say: Callable[[str], object] = print
    ):
        self.accelerator, self.names, self.folder, self.say = accelerator, names, folder, say
        self.wandb_from = 0  # wandb has the steps before this one already
        self.last = 0  # the last step that was logged

    def start(self, project: str, name: str, config: dict[str, Any], step: int) -> None:
        """Start the loggers.

        wandb that cannot be reached writes to the folder, to be uploaded later (`wandb sync`); an id or a key that it
        refuses leaves the run without wandb. `WANDB_MODE` and `WANDB_RUN_ID`, where they are set, are obeyed.

        Args:
            config: the recipe's values and more, by dotted key.
            step: the last step before this start, 0 at the beginning. What TensorBoard shows of later ones is of an
                earlier start and is hidden. What wandb lacks of the steps before is logged again from metrics.jsonl.
        """
        if not self.names or not self.accelerator.is_main_process:
            return
        scalars = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.items()}
        options: dict[str, dict] = {"tensorboard": {"purge_step": step + 1}}
        obstacle = ""
        if "wandb" in self.names:
            if "WANDB_MODE" not in os.environ and (obstacle := wandb_obstacle()):
                os.environ["WANDB_MODE"] = "offline"
                os.environ.pop("WANDB_API_KEY", None)  # not needed offline, and wandb would judge it all the same
            kept = wandb_run(self.folder)
            set_torn_parts_aside(self.folder, kept)
            options["wandb"] = {"name": name, "dir": str(self.folder), "id": kept["id"], "resume": "allow"}
        if self._init(project, options) and obstacle:
            synced = f"wandb sync {self.folder}/wandb/offline-run-*"
            self.say(f"wandb: {obstacle}; the run stays on disk, upload it with `{synced}`")
        for logger in self.accelerator.trackers:
            if logger.name == "wandb":
                self._catch_up(logger, kept["logged"], step)
            # TensorBoard shows it as a run of its own next to the curve, one for each time it is stored.
            if logger.name == "wandb" or step == 0:
                logger.store_init_configuration(scalars)

    def _init(self, project: str, options: dict[str, dict]) -> bool:
        """Start accelerate's trackers; return whether all of them run."""
        if "wandb" not in self.names:
            self.accelerator.init_trackers(project, None, options)
            return True
        from wandb.errors import Error

        try:
            self.accelerator.init_trackers(project, None, options)
        except Error as error:
            self.accelerator.log_with = [one for one in self.accelerator.log_with if str(one) != "wandb"]
            self.accelerator.trackers.clear()
            self.accelerator.init_trackers(project, None, options)
            self.say(
                f"wandb: {str(error).splitlines()[0]}; the run continues; all numbers are in metrics.jsonl. "
                f"Delete {self.folder / WANDB_FILE} if the id in it is to blame"
            )
            return False
        return True

    def _catch_up(self, logger: GeneralTracker, logged: int, step: int) -> None:
        """Log to wandb the steps up to `step` that it lacks: offline it loses what it has when the run is killed."""
        self.wandb_from = max(logged + 1, logger.run.step)  # online the server has counted
        for line in read_metrics(self.folder / "metrics.jsonl"):
            if self.wandb_from <= line["step"] <= step:
                logger.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers of a step."""
        self.last = step
        for logger in tuple(self.accelerator.trackers):
            if logger.name != "wandb" or step >= self.wandb_from:
                self._try(logger, partial(logger.log, values, step=step))

    def picture(self, name: str, image_HW3: np.ndarray, step: int) -> None:
        """Log a picture, uint8 RGB."""
        layouts: dict[str, dict] = {"tensorboard": {"dataformats": "NHWC"}}
        for logger in tuple(self.accelerator.trackers):
            if logger.name != "wandb" or step >= self.wandb_from:
                options = layouts.get(logger.name, {})
                self._try(logger, partial(logger.log_images, {name: image_HW3[None]}, step=step, **options))

    def finish(self) -> None:
        """Close the loggers and leave the other ranks."""
        for logger in tuple(self.accelerator.trackers):
            if self._try(logger, logger.finish) and logger.name == "wandb":
                kept = wandb_run(self.folder)
                part = Path(logger.run.dir).parent.name
                logged = max(kept["logged"], self.last)
                write_json(self.folder / WANDB_FILE, kept | {"logged": logged, "parts": [*kept["parts"], part]})
        self.accelerator.trackers.clear()
        self.accelerator.end_training()

    def _try(self, logger: GeneralTracker, call: Callable[[], None]) -> bool:
        """Call a logger and return whether it is there: a request to stop that all processes got ends wandb's, too."""
        try:
            call()
        except ConnectionError as error:
            self.accelerator.trackers.remove(logger)
            self.say(
                f"{logger.name}: its own process has ended ({error}); the numbers that it lacks are in metrics.jsonl"
            )
            return False
        return True


def wandb_run(folder: Path) -> dict:
    """Return what is known of a run folder's wandb run, a new one where it has none; kept in the folder.

    A copy of a run folder goes another way, so it gets an id of its own. A folder that was moved is known by its
    number in the file system, one that came back from a backup by its path.
    """
    place = {"path": str(folder.resolve()), "inode": folder.stat().st_ino}
    file, kept = folder / WANDB_FILE, None
    if file.is_file():
        kept = read_json(file, WANDB_FORM, "delete it to begin another wandb run")
    if kept is None or not any(kept[key] == value for key, value in place.items()):
        kept = {"id": secrets.token_hex(4), "logged": 0, "parts": []} | place
        write_json(file, kept)
    return kept | {"id": os.environ.get("WANDB_RUN_ID", kept["id"])}


def set_torn_parts_aside(folder: Path, kept: dict) -> None:
    """Rename what starts that were killed have left of an offline run, so that it is not uploaded.

    wandb writes in blocks of 32 KiB, so the last ones are missing; all steps come again from metrics.jsonl.
    """
    for part in (folder / "wandb").glob(f"offline-run-*-{kept['id']}"):
        if part.name not in kept["parts"] and not any(part.glob("*.synced")):
            part.rename(part.with_name(f"torn-{part.name}"))
