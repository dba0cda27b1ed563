# SPDX-License-Identifier: Apache-2.0
"""wandb and TensorBoard through accelerate; a missing login or network never stops or hangs a run."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

INIT_TIMEOUT_S = 30  # to reach wandb before the run goes on without it


def has_wandb_login() -> bool:
    """Whether wandb would find a key: in the environment, or in ~/.netrc for the host that it would log in to."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    host = urlparse(wandb.Settings().base_url).hostname
    try:
        found = netrc.netrc()
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
    return any(found.authenticators(name) is not None for name in (host, "api.wandb.ai"))


def start_trackers(accelerator, trackers: tuple[str, ...], project: str, name: str, folder: Path, config: dict) -> str:
    """Start the trackers and return what to tell the user about them, empty if there is nothing to tell.

    wandb without a login, or with one but without a network, writes to `folder` and can be uploaded later
    (`wandb sync`).
    """
    if not trackers:
        return ""
    note = ""
    if "wandb" in trackers and not has_wandb_login() and "WANDB_MODE" not in os.environ:
        os.environ["WANDB_MODE"] = "offline"
        note = f"wandb: no login, so the run stays on disk; upload it with `wandb sync {folder}/wandb/offline-run-*`"
    flat = {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in config.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    flat = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flat.items()}
    if "wandb" not in trackers:
        accelerator.init_trackers(project, flat)
        return note
    import wandb

    options = {"name": name, "dir": str(folder), "settings": wandb.Settings(init_timeout=INIT_TIMEOUT_S)}
    try:
        accelerator.init_trackers(project, flat, {"wandb": options})
    except wandb.errors.Error as error:  # no network, a key that is refused: the run matters more
        reason = str(error).splitlines()[0]
        accelerator.init_trackers(project, flat, {"wandb": options | {"mode": "offline"}})
        note = f"wandb: {reason} The run stays on disk, upload it with `wandb sync {folder}/wandb/offline-run-*`"
    return note
