# SPDX-License-Identifier: Apache-2.0
"""wandb and TensorBoard through accelerate; a missing login or network never stops or hangs a run."""

from __future__ import annotations

import netrc
import os
import socket
from pathlib import Path
from urllib.parse import urlparse

CONNECT_TIMEOUT_S = 10


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


def start_trackers(accelerator, trackers: tuple[str, ...], project: str, name: str, folder: Path, config: dict) -> str:
    """Start the trackers and return what to tell the user about them, empty if there is nothing to tell.

    wandb that cannot be reached writes to `folder`, to be uploaded later (`wandb sync`); a key that it refuses leaves
    the run without wandb. `WANDB_MODE`, where it is set, is obeyed.
    """
    if not trackers:
        return ""
    obstacle = ""
    if accelerator.is_main_process and "wandb" in trackers and "WANDB_MODE" not in os.environ:
        if obstacle := wandb_obstacle():
            os.environ["WANDB_MODE"] = "offline"
            os.environ.pop("WANDB_API_KEY", None)  # not needed offline, and wandb would judge it all the same
    flat = {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in config.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    flat = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flat.items()}
    if "wandb" not in trackers:
        accelerator.init_trackers(project, flat)
        return ""
    from wandb.errors import Error

    try:
        accelerator.init_trackers(project, flat, {"wandb": {"name": name, "dir": str(folder)}})
    except Error as error:
        accelerator.log_with = [tracker for tracker in accelerator.log_with if str(tracker) != "wandb"]
        accelerator.init_trackers(project, flat)
        return f"wandb: {str(error).splitlines()[0]}; this run goes on without it, its numbers are in metrics.jsonl"
    if obstacle:
        return f"wandb: {obstacle}; the run stays on disk, upload it with `wandb sync {folder}/wandb/offline-run-*`"
    return ""
