# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save as files: read by torch.load once all that it trusts in them has been compared.

Its format is a zip of records, one for the pickle and one for each storage; its old format is a row of pickles with
the storages behind them.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from effsam3.errors import UserError
from effsam3.models.chassis.pickle_outline import Outline, OutlineError, foreign

# What torch.load raises at files that it cannot read all the same.
DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    AssertionError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
)
# What zipfile raises at files that are no whole zip.
NO_ZIP = (
    zipfile.BadZipFile,
    NotImplementedError,
    ValueError,
    OSError,
    EOFError,
    LookupError,
    RuntimeError,
    OverflowError,
    struct.error,
    zlib.error,
)
END_OF_ZIP = 22  # bytes of the record that ends a zip without a comment
LOCAL_HEADER = 30  # bytes before a record's own name
OLD_MAGIC, OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the old format
SAVE_ALONE = 'save the tensors alone where it came from: torch.save({"model": model.state_dict()}, "model.pt")'


class PickledError(UserError):
    """A file that is not a whole checkpoint of tensors."""


def load(path: Path) -> Any:
    """Read what torch.save has written, tensors memory-mapped (those of the old format are not).

    Raises:
        PickledError: no such file; cut short, damaged, or written by something else; objects in it besides tensors
            and plain values, of which nothing is run; tensors without plain numbers.
    """
    new = is_zip(path)
    try:
        outline = _outline_of_zip(path) if new else _outline_of_old(path)
    except OutlineError as error:
        raise PickledError(f"{path} {error}; fetch it again") from error
    if objects := foreign(outline.names):
        raise PickledError(
            f"{path} holds objects that would have to be made by running code ({', '.join(objects[:5])}); nothing of "
            f"it was run. If you trust its origin, {SAVE_ALONE}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=new)
    except DAMAGE as error:
        raise PickledError(
            f"{path} is damaged, or holds more than tensors and plain values ({type(error).__name__}: "
            f"{_gist(error)}). Fetch it again; or {SAVE_ALONE}"
        ) from error


def _gist(error: BaseException) -> str:
    """The part of an error of torch.load that is about the file, not about torch.load's arguments."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Unsupported", "Trying", "unexpected", "invalid"))]
    return (telling or lines or ["no reason given"])[0][:200]


def is_zip(path: Path) -> bool:
    """Tell torch.save's format (a zip) from its old one (a bare pickle).

    Raises:
        PickledError: the file is neither.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise PickledError(
            f"{path} cannot be read ({error.strerror}); expected a file that torch.save wrote"
        ) from error
    if not head:
        raise PickledError(f"{path} is empty; fetch it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        raise PickledError(
            f"{path} is a safetensors file under another name: rename it {path.stem}.safetensors, and where a "
            "checkpoint is asked for name the folder that holds it and its config.json"
        )
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise PickledError(f"{path} is not a file of torch.save; it begins with {head[:40]!r}")
    return head.startswith(b"PK")


# ---- the zip


def records_of(path: Path) -> list[zipfile.ZipInfo]:
    """List the records of a zip.

    Raises:
        PickledError: the zip is cut short, or torch.save has not written it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except NO_ZIP as error:
        raise PickledError(
            f"{path} is cut short: {path.stat().st_size:,} bytes, without the list of records that ends such a file "
            f"({error}); fetch it again"
        ) from error
    inner = {inner_name(record) for record in records}
    if "constants.pkl" in inner:
        raise PickledError(
            f"{path} is a TorchScript program; expected tensors: "
            'torch.save({"model": torch.jit.load(FILE).state_dict()}, "model.pt")'
        )
    if "data.pkl" not in inner:
        raise PickledError(f"{path} is a zip, but not one of torch.save: it holds {', '.join(sorted(inner)[:3])}")
    return records


def inner_name(record: zipfile.ZipInfo) -> str:
    """A record's name without the first folder, which is the name that the file once had."""
    return record.filename.partition("/")[2] or record.filename


def has_checksums(records: list[zipfile.ZipInfo]) -> bool:
    """Whether the zip was written with checksums; `torch.serialization.set_crc32_options(False)` leaves zeros."""
    return any(record.CRC for record in records)


def _outline_of_zip(path: Path) -> Outline:
    """Take the pickle in a zip apart, and compare what it needs with the records that are there.

    Raises:
        OutlineError: something does not fit.
        PickledError: the zip is damaged.
    """
    records = records_of(path)
    _refuse_damaged_zip(path, records)
    by_name = {inner_name(record): record for record in records}
    version = _content(path, by_name["version"]) if "version" in by_name else b""
    if not version.strip().isdigit():
        raise OutlineError(f"is damaged: its format's version is {version[:20]!r}, expected a number")
    outline = Outline(io.BytesIO(_content(path, by_name["data.pkl"])))
    for key, needed in outline.storages.items():
        found = by_name[f"data/{key}"].file_size if f"data/{key}" in by_name else None
        if found != needed:
            there = "is not there" if found is None else f"has {found:,} bytes"
            raise OutlineError(
                f"is damaged: its tensors need {needed:,} bytes of the record data/{key}, which {there}"
            )
    return outline


def _content(path: Path, record: zipfile.ZipInfo) -> bytes:
    """Read a record, whatever its checksum says: some files have none."""
    with open(path, "rb") as file:
        file.seek(_start(file, record))
        return file.read(record.file_size)


def _start(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where a record begins, behind a header of its own."""
    file.seek(record.header_offset + LOCAL_HEADER - 4)
    return record.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))


def _refuse_damaged_zip(path: Path, records: list[zipfile.ZipInfo]) -> None:
    """Compare every record with its checksum and its place, which torch.load does not when it maps the file.

    Raises:
        PickledError: one differs.
    """
    names = [record.filename for record in records]
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
        raise PickledError(f"{path} is damaged: two of its records have one name, or they are in two folders")
    if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
        raise PickledError(
            f"{path} was packed again after torch.save wrote it: its record {packed[0]} is compressed, and torch maps "
            "records as they are; unpack it and store it without compression (zip -0)"
        )
    try:
        with open(path, "rb") as file:
            file.seek(-END_OF_ZIP, 2)
            ends_here = file.read(4) == b"PK\x05\x06"
            for record in records:
                fits = _start(file, record) + record.file_size <= path.stat().st_size
                ends_here = ends_here and fits and record.file_size == record.compress_size
        with zipfile.ZipFile(path) as archive:
            for record in records:  # compares the names before the records with those in the list
                archive.open(record).close()
            damaged = archive.testzip() if has_checksums(records) else None
    except NO_ZIP as error:
        raise PickledError(f"{path} is damaged: its records are not where its list says ({error})") from error
    if not ends_here:
        raise PickledError(f"{path} is damaged: its records do not end where its list says; fetch it again")
    if damaged is not None:
        raise PickledError(f"{path} is damaged: its record {damaged} does not have its checksum; fetch it again")


# ---- the old format


def _outline_of_old(path: Path) -> Outline:
    """Take the pickles of the old format apart: magic, protocol, machine, content, keys; then compare the storages.

    Raises:
        OutlineError: something does not fit, or the file is another pickle.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        first = Outline(stream)
        if first.content != OLD_MAGIC:
            what = ", ".join(foreign(first.names)[:5])
            raise OutlineError(
                f"is a pickle, but not one of torch.save{f' (it refers to {what}; nothing was run)' if what else ''}"
            )
        if Outline(stream).content != OLD_PROTOCOL:
            raise OutlineError("is of a version of torch.save's old format that is not known")
        machine, outline, keys = Outline(stream), Outline(stream), Outline(stream).content
        if machine.names or not isinstance(machine.content, dict) or not machine.content.get("little_endian"):
            raise OutlineError("was not written on a little-endian machine, or is damaged")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise OutlineError("is damaged: it does not list its records")
        if set(keys) != outline.storages.keys() or len(set(keys)) < len(keys):
            raise OutlineError("is damaged: the records that it lists are not those that its tensors need")
        for key in keys:
            (elements,) = struct.unpack("<q", (stream.read(8) + bytes(8))[:8])
            left = len(stream) - stream.tell()
            itemsize = outline.itemsizes[key]
            if elements * itemsize != outline.storages[key] or outline.storages[key] > left:
                raise OutlineError(
                    f"is cut short or damaged: its tensors need {outline.storages[key]:,} bytes of the record {key}, "
                    f"which says {elements:,} numbers; {left:,} bytes are left in the file"
                )
            stream.seek(outline.storages[key], 1)
        if stream.tell() < len(stream):
            raise OutlineError(f"is damaged: {len(stream) - stream.tell():,} bytes follow its last record")
    return outline
