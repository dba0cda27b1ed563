# SPDX-License-Identifier: Apache-2.0
"""Folders that are made once and kept: made-up and converted chassis."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from effsam3.errors import ChassisError
from effsam3.files import atomic_folder, free_bytes, gigabytes


def cache_folder() -> Path:
    """Return where made-up and converted chassis are kept: `$EFFSAM3_CACHE`, else `~/.cache/effsam3`."""
    return Path(os.environ.get("EFFSAM3_CACHE", Path.home() / ".cache" / "effsam3"))


def kept_in_cache(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`, filled by `write` if it is not there: whole or not at all, and only once.

    Processes that ask at the same time wait for the first of them.

    Raises:
        ChassisError: the disk is full or the cache not writable.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Asked for only where something is to be made: reading works where file systems have no locks.
        with FileLock(folder.with_name(f".{name}.lock")):
            if not folder.is_dir():
                with atomic_folder(folder) as partial:
                    write(partial)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # where locks do not hold, another process may have been first
            free = gigabytes(free_bytes(folder))
            raise ChassisError(
                f"sam3.checkpoint: {folder} cannot be written ({error}); {free} are free there. Make room, or set "
                "EFFSAM3_CACHE to a folder that has it"
            ) from error
    return folder
