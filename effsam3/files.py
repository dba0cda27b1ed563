# SPDX-License-Identifier: Apache-2.0
"""Every write of the package, whole or not at all; room on the disk; folders that record how they were made.

A file or folder is written under a hidden name next to its own, brought to the disk (fsync) and renamed. So even after
a kill or a power cut it has the old content or the new. Only logs and journals, which grow, are written in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effsam3.checked_files import read_json
from effsam3.errors import UserError

PARTIAL = ".partial"  # what a name ends in until its content is whole


# ---- files and folders


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path for a library to write to; what is there at the end of the block becomes the file `path`.

    The name has another ending: libraries that go by it must be told the format. An error leaves `path` as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)  # what a full disk leaves


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as partial, open(partial, "wb") as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it becomes `path`, in place of what is there.

    An error leaves `path` as it was. One process at a time may write a folder.
    """
    partial, old = (path.with_name(f".{path.name}{ending}") for ending in (PARTIAL, f".old{PARTIAL}"))
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for inside in partial.rglob("*"):
            if inside.is_symlink():
                continue  # what it points to is not ours to change
            if inside.is_file():
                inside.chmod(inside.stat().st_mode | 0o044)  # safetensors lets only the owner read
            sync(inside)
        sync(partial)
        if path.exists():  # no call replaces a folder: for the time of one rename there is none
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- folders stamped with their settings


def stamp(file: Path, settings: dict[str, Any], what: str, key: str, real: Path | None = None) -> None:
    """Note in `file` with which settings the files next to it are made, before the first of them is.

    Called again, it lets the same settings pass, so that what a kill has interrupted can be finished.

    Args:
        what: they are, such as "synthetic images".
        key: of the recipe, or option, that names where they are.
        real: what must not be touched when it is there without a stamp.

    Raises:
        UserError: they were made with other settings, or `real` was not made here.
    """
    if file.is_file():
        found = read_json(file, dict, "delete it and what is next to it")
        if found != settings:
            raise UserError(
                f"{key}: {file.parent} holds {what} made with {found}, asked for is {settings}; name another folder, "
                "or delete this one"
            )
        return
    if real is not None and real.exists():
        raise UserError(
            f"{key}: {real} is there and was not made from {what}; name another path, or set data.source to what it is"
        )
    refuse_unwritable(file.parent, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


# ---- the disk


def refuse_unwritable(folder: Path, named_by: str) -> None:
    """Refuse a folder into which no file can be written, without making it; `named_by` is the option or key for it.

    Raises:
        UserError: it is a file, or it, or where it would be made, cannot be written.
    """
    import tempfile  # a moment, which `show` does not have to wait

    there = folder
    try:
        # A file is really made: permissions alone do not tell of read-only mounts and quotas.
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{named_by}: {folder} cannot be written ({there}: {error.strerror}); name a folder that can be"
        ) from error


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
