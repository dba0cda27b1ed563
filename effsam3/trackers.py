# SPDX-License-Identifier: Apache-2.0
"""wandb and TensorBoard through accelerate; a missing login or network never stops or hangs a run."""

from __future__ import annotations

import netrc
import os
from pathlib import Path


def has_wandb_login() -> bool:
    """Whether wandb would find a key: in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


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
    options = {"wandb": {"name": name, "dir": str(folder)}} if "wandb" in trackers else {}
    if "wandb" not in trackers:
        accelerator.init_trackers(project, flat, options)
        return note
    from wandb.errors import CommError, UsageError

    try:
        accelerator.init_trackers(project, flat, options)
    except (CommError, UsageError) as error:
        os.environ["WANDB_MODE"] = "offline"
        accelerator.init_trackers(project, flat, options)
        note = f"wandb: {error}; the run stays on disk, upload it later with `wandb sync {folder}/wandb/offline-run-*`"
    return note
