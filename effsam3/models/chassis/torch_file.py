# SPDX-License-Identifier: Apache-2.0
"""Files of `torch.save`, opened by `torch.load` with `weights_only`: nothing in them is run.

`torch.load` does not look at checksums when it maps a file, so they are compared first.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
import xxhash

from effsam3.errors import UserError

# What zipfile and torch.load raise when bytes are missing or wrong.
DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    OverflowError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
SAVE_ALONE = 'save only the tensors where it came from: torch.save({"model": model.state_dict()}, "model.pt")'


class PickledError(UserError):
    """A file that is not a whole checkpoint of tensors."""


def load(path: Path) -> Any:
    """Read what `torch.save` wrote, tensors memory-mapped (those of its old format are read).

    Raises:
        PickledError: no such file; cut short, damaged, or written by something else; objects in it other than tensors
            and plain values.
    """
    is_zip = _is_zip(path)
    if is_zip:
        _records(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except DAMAGE as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise PickledError(
                f"{path} holds an object that only code could make ({named[1]}); nothing of it was run. If you trust "
                f"its origin, {SAVE_ALONE}"
            ) from error
        # torch ends with advice on `torch.load`, which is not for whoever runs a recipe.
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = ([line for line in lines if "torch.load" not in line] or lines or ["no reason given"])[-1].strip()
        raise PickledError(
            f"{path} is damaged or holds more than tensors and plain values ({type(error).__name__}: {reason[:200]}). "
            f"Fetch it again; or {SAVE_ALONE}"
        ) from error


def content_key(path: Path) -> str:
    """Return a hash (16 hex digits) of what a file holds, whatever its name: of the checksums in its zip's list.

    Raises:
        PickledError: the file is not a whole one of `torch.save`.
    """
    digest = xxhash.xxh3_64()
    if _is_zip(path) and _has_checksums(records := _records(path, compare=False)):
        for record in records:
            name = record.filename.partition("/")[2]  # without the name under which the file was saved
            digest.update(f"{name} {record.file_size} {record.CRC}\n".encode())
    else:
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _is_zip(path: Path) -> bool:
    """Tell `torch.save`'s format (a zip) from its old one (a pickle).

    Raises:
        PickledError: the file is neither.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(40)
    except OSError as error:
        raise PickledError(f"{path} cannot be read ({error.strerror}); expected a file of torch.save") from error
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        begins = f"begins with {head!r}" if head else "is empty"
        raise PickledError(f"{path} is not a file of torch.save: it {begins}; fetch it again")
    return head.startswith(b"PK")


def _records(path: Path, compare: bool = True) -> list[zipfile.ZipInfo]:
    """List the records of a zip, compared with their checksums unless told otherwise.

    Raises:
        PickledError: the zip is cut short, damaged, or compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            damaged = archive.testzip() if compare and _has_checksums(records) else None
    except DAMAGE as error:
        raise PickledError(f"{path} is cut short or damaged ({error}); fetch it again") from error
    if damaged is not None:
        raise PickledError(f"{path} is damaged: its record {damaged} does not have its checksum; fetch it again")
    numbers = [record for record in records if "/data/" in record.filename]
    if any(record.compress_type != zipfile.ZIP_STORED for record in numbers):  # torch.load would map packed bytes
        raise PickledError(f"{path} was packed again after torch.save wrote it; pack it without compression (zip -0)")
    return records


def _has_checksums(records: list[zipfile.ZipInfo]) -> bool:
    """Whether the zip was written with checksums; `torch.serialization.set_crc32_options(False)` leaves zeros."""
    return any(record.CRC for record in records)
