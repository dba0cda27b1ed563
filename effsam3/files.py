# SPDX-License-Identifier: Apache-2.0
"""Room on the disk, compared with what will be written before anything is."""

from __future__ import annotations

import shutil
from pathlib import Path

from effsam3.errors import UserError


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write where `path` is, or will be made."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def gigabytes(size: int) -> str:
    """Return a size in GB, with three digits that count however small it is."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e9:.3g} GB"


def refuse_full_disk(path: Path, needed: int, what: str, remedy: str) -> None:
    """Raise UserError unless `needed` bytes fit where `path` is; `what` takes them and `remedy` makes them fewer."""
    if needed > (free := free_bytes(path)):
        raise UserError(f"{what} will take {gigabytes(needed)} in {path}, where {gigabytes(free)} are free; {remedy}")
