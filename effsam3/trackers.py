# SPDX-License-Identifier: Apache-2.0
"""wandb and TensorBoard through accelerate; a missing login or network never stops or hangs a run."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from effsam3.report import write_json

CONNECT_TIMEOUT_S = 10
WANDB_ID = "wandb.json"  # in the run folder


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
        if not any(logins.authenticators(host) for host in (url.hostname, "api.wandb.ai")):
            return "no login"
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{url.hostname} cannot be reached ({error})"
    return ""


class Trackers:
    """The trackers of one run folder, over all its starts: one wandb run, one curve in TensorBoard.

    Args:
        names: `wandb`, `tensorboard`; none: nothing is tracked.
    """

    def __init__(self, accelerator, names: tuple[str, ...], folder: Path):
        self.accelerator, self.names, self.folder = accelerator, names, folder
        self.wandb_from = 0  # wandb has the steps before this one already

    def start(self, project: str, name: str, config: dict, step: int, logged: int) -> str:
        """Start the trackers and return what to tell the user about them, empty if there is nothing to tell.

        wandb that cannot be reached writes to the folder, to be uploaded later (`wandb sync`); an id or a key that it
        refuses leaves the run without wandb. `WANDB_MODE` and `WANDB_RUN_ID`, where they are set, are obeyed.

        Args:
            step: the last step before this start, 0 at the beginning. What TensorBoard shows of later ones is of an
                earlier start and is hidden.
            logged: the last step that an earlier start logged; wandb takes no step twice.
        """
        if not self.names or not self.accelerator.is_main_process:
            return ""
        flat = _flat(config)
        options = {"tensorboard": {"purge_step": step + 1}}
        obstacle = ""
        if "wandb" in self.names:
            if "WANDB_MODE" not in os.environ and (obstacle := wandb_obstacle()):
                os.environ["WANDB_MODE"] = "offline"
                os.environ.pop("WANDB_API_KEY", None)  # not needed offline, and wandb would judge it all the same
            run_id, is_new = wandb_run_id(self.folder)
            self.wandb_from = 0 if is_new else logged + 1
            options["wandb"] = {"name": name, "dir": str(self.folder), "id": run_id, "resume": "allow"}
        note = self._init(project, options)
        for tracker in self.accelerator.trackers:
            # TensorBoard's is a run of its own beside the curve, one for each time it is stored.
            if tracker.name == "wandb" or step == 0:
                tracker.store_init_configuration(flat)
        if note:
            return note
        if obstacle:
            synced = f"wandb sync {self.folder}/wandb/offline-run-*"
            return f"wandb: {obstacle}; the run stays on disk, upload it with `{synced}`"
        return ""

    def _init(self, project: str, options: dict[str, dict]) -> str:
        if "wandb" not in self.names:
            self.accelerator.init_trackers(project, None, options)
            return ""
        from wandb.errors import Error

        try:
            self.accelerator.init_trackers(project, None, options)
        except Error as error:
            self.accelerator.log_with = [one for one in self.accelerator.log_with if str(one) != "wandb"]
            self.accelerator.trackers.clear()
            self.accelerator.init_trackers(project, None, options)
            return (
                f"wandb: {str(error).splitlines()[0]}; this run goes on without it, its numbers are in metrics.jsonl. "
                f"Delete {self.folder / WANDB_ID} if the id in it is to blame"
            )
        return ""

    def log(self, values: dict[str, float], step: int) -> str:
        """Log numbers of a step; returns what to tell the user."""
        notes = []
        for tracker in tuple(self.accelerator.trackers):
            if tracker.name != "wandb" or step >= self.wandb_from:
                notes.append(self._try(tracker, lambda tracker=tracker: tracker.log(values, step=step)))
        return "\n".join(filter(None, notes))

    def finish(self) -> str:
        """Close the trackers; returns what to tell the user."""
        notes = [self._try(tracker, tracker.finish) for tracker in tuple(self.accelerator.trackers)]
        self.accelerator.trackers.clear()
        return "\n".join(filter(None, notes))

    def _try(self, tracker, call: Callable[[], None]) -> str:
        """Call a tracker; wandb's own process may be gone, ended by a request to stop that all processes got."""
        try:
            call()
        except ConnectionError as error:
            self.accelerator.trackers.remove(tracker)
            return (
                f"{tracker.name}: its own process has ended ({error}); the numbers that it lacks are in metrics.jsonl"
            )
        return ""


def wandb_run_id(folder: Path) -> tuple[str, bool]:
    """Return the id of a run folder's wandb run and whether it is a new one; kept in the folder.

    A copy of a run folder goes another way, so it gets an id of its own. A folder that was moved is known by its
    number in the file system, one that came back from a backup by its path.
    """
    if "WANDB_RUN_ID" in os.environ:
        return os.environ["WANDB_RUN_ID"], False
    place = {"path": str(folder.resolve()), "inode": folder.stat().st_ino}
    file = folder / WANDB_ID
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if any(kept[key] == value for key, value in place.items()):
            return kept["id"], False
    run_id = secrets.token_hex(4)
    write_json(file, {"id": run_id} | place)
    return run_id, True


def _flat(config: dict) -> dict[str, int | float | str]:
    flat = {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in config.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flat.items()}
