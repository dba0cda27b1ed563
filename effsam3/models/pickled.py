# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that `torch.save` wrote: found in whatever stands around them, read without running a line of them.

A file is opened with `weights_only`, and its tensors stay on the disk until they are used (memory-mapped).
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from effsam3.errors import UserError

# Under which names a training script keeps its model, and under which the moving average of the model's weights.
MODELS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "student")
AVERAGES = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict")
# What wrapping a module in another leaves in the names of its tensors: at the front, anywhere, at the front of all.
WRAPPED = re.compile(r"^module\.|(?<![^.])_orig_mod\.")
FRONT = "model."
COUNTER = "n_averaged"  # torch.optim.swa_utils counts here; no weight
TRAINING = {"param_groups", "optimizer", "optimizer_state_dict", "optimizer_states", "lr_scheduler", "scheduler"}
# What torch.load raises at files in its old format with random bytes in them; those have no checksums.
DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    AssertionError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
)


class PickledError(UserError):
    """A file that is not a whole checkpoint of tensors."""


@dataclass(frozen=True)
class Pickled:
    """The model in a file.

    Attributes:
        tensors: {name: tensor} as saved, of whatever type, memory-mapped.
        entry: the keys that lead to them, such as `model`; empty when they are the file's own entries.
        aside: everything else that stood on the way: numbers, settings, optimizer states, weights that were not taken.
    """

    tensors: dict[str, Tensor]
    entry: tuple[str, ...] = ()
    aside: dict[str, Any] = field(default_factory=dict)

    @property
    def is_average(self) -> bool:
        """Whether these are the averaged weights of a file that has both."""
        return any(key in AVERAGES for key in self.entry)


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """Read a model's tensors, {name: tensor} in the types in which they were saved; see `open_pickled`."""
    return open_pickled(path).tensors


def open_pickled(path: str | Path) -> Pickled:
    """Find the model in a file that `torch.save` wrote, its averaged weights if it has them.

    Entries such as `model` are unwrapped and the prefixes of wrappers (`module.`, `_orig_mod.`, `model.`) taken off.

    Raises:
        PickledError: no such file; cut short, damaged, or written by something else; objects in it besides tensors
            and plain values; no model, or several without saying which; a name twice.
    """
    path = Path(path)
    return _find(_load(path), path, ())


def content_key(path: Path) -> str:
    """Return a hash (16 hex digits) of what a file holds, whatever it is called.

    `torch.save` writes a zip, which lists its records with their checksums at the end: no need to read gigabytes.

    Raises:
        PickledError: as `open_pickled` on files that are not whole.
    """
    digest = xxhash.xxh3_64()
    if _is_zip(path) and has_checksums(records := _records(path)):
        for record in records:
            digest.update(f"{_inner(record)} {record.file_size} {record.CRC}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


# ---- the file


def _load(path: Path) -> Any:
    is_zip = _is_zip(path)
    if is_zip:
        _refuse_damaged_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except DAMAGE as error:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        if objects:
            raise PickledError(
                f"{path} holds objects that would have to be made by running code ({', '.join(sorted(objects)[:5])}); "
                "nothing of it was run. If you trust its origin, save the tensors alone where it came from: "
                'torch.save({"model": model.state_dict()}, "model.pt")'
            ) from error
        raise PickledError(
            f"{path} is damaged, or holds more than tensors and plain values ({type(error).__name__}: "
            f"{_gist(error)}). Fetch it again; or save the tensors alone where it came from: "
            'torch.save({"model": model.state_dict()}, "model.pt")'
        ) from error


def _gist(error: BaseException) -> str:
    """The part of an error of torch.load that is about the file, not about torch.load's arguments."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Unsupported", "Trying", "unexpected", "invalid"))]
    return (telling or lines or ["no reason given"])[0][:200]


def _is_zip(path: Path) -> bool:
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


def _records(path: Path) -> list[zipfile.ZipInfo]:
    """List the records of a zip.

    Raises:
        PickledError: the zip is cut short, or torch.save has not written it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile as error:
        raise PickledError(
            f"{path} is cut short: {path.stat().st_size:,} bytes, without the list of records that ends such a file; "
            "fetch it again"
        ) from error
    inner = {_inner(record) for record in records}
    if "constants.pkl" in inner:
        raise PickledError(
            f"{path} is a TorchScript program; expected tensors: "
            'torch.save({"model": torch.jit.load(FILE).state_dict()}, "model.pt")'
        )
    if "data.pkl" not in inner:
        raise PickledError(f"{path} is a zip, but not one of torch.save: it holds {', '.join(sorted(inner)[:3])}")
    return records


def _inner(record: zipfile.ZipInfo) -> str:
    """A record's name without the first folder, which is the name that the file once had."""
    return record.filename.partition("/")[2] or record.filename


def has_checksums(records: list[zipfile.ZipInfo]) -> bool:
    """Whether the zip was written with checksums; `torch.serialization.set_crc32_options(False)` leaves zeros."""
    return any(record.CRC for record in records)


def _refuse_damaged_zip(path: Path) -> None:
    """Compare every record with its checksum, which torch.load does not when it maps the file.

    Raises:
        PickledError: one differs.
    """
    if not has_checksums(_records(path)):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise PickledError(f"{path} is damaged: its record {damaged} does not have its checksum; fetch it again")


# ---- what it holds


def _find(content: Any, path: Path, entry: tuple[str, ...]) -> Pickled:
    """Find the model in what was read; `entry` are the keys that led to `content`."""
    if not isinstance(content, Mapping):
        raise PickledError(f"{path} holds a {type(content).__name__}{_at(entry)}; expected tensors by name")
    content = _grouped(content)
    inside = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    models, averages = ([key for key in names if key in inside] for names in (MODELS, AVERAGES))
    if not models and not averages:
        return _leaf(content, path, entry)
    for keys in (models, averages):
        if len(keys) > 1:
            raise PickledError(
                f"{path} holds {len(keys)} models{_at(entry)}: {', '.join(keys)}; save the one that is meant alone"
            )
    found = {key: _find(inside[key], path, (*entry, key)) for key in models + averages}
    key = (averages or models)[0]
    if len(found) == 2:
        plain, average = (found[name].tensors for name in (models[0], key))
        differing = [
            name
            for name in sorted(plain.keys() | average.keys())
            if name not in plain or name not in average or plain[name].shape != average[name].shape
        ]
        if differing:
            raise PickledError(
                f"{path} holds both {models[0]} and {key}{_at(entry)}, and {len(differing)} of their tensors differ "
                f"in name or shape (first: {differing[0]}); it is not clear which is meant: save that one alone"
            )
    aside = {name: value for name, value in content.items() if name != key}
    return Pickled(found[key].tensors, found[key].entry, aside | found[key].aside)


def _grouped(content: Mapping) -> Mapping:
    """Turn names such as `model.x` and `model_ema.x` side by side into two models; leave anything else alone."""
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return content
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first, {})[rest] = value
    known = groups.keys() <= {*MODELS, *AVERAGES}
    return groups if known and not groups.keys().isdisjoint(AVERAGES) else content


def _leaf(content: Mapping, path: Path, entry: tuple[str, ...]) -> Pickled:
    """Check and rename a model's own tensors."""
    others = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
    tensors = {key: value.detach() for key, value in content.items() if key not in others and key != COUNTER}
    if not tensors or not TRAINING.isdisjoint(content):
        kind = "a training state without its model" if not TRAINING.isdisjoint(content) else "no tensors by name"
        names = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise PickledError(
            f"{path} holds {kind}{_at(entry)}: {names}; expected tensors by name, alone or under {', '.join(MODELS)}"
        )
    if others:
        key, value = next(iter(others.items()))
        raise PickledError(
            f"{path} has {key!r}, of type {type(value).__name__}, among its tensors{_at(entry)}; save the tensors "
            "alone, or apart under `model`"
        )
    return Pickled(_without_wrappers(tensors, path), entry)


def _without_wrappers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Take off what wrappers have put into the names.

    Raises:
        PickledError: two names become one.
    """
    names = {name: name for name in map(str, tensors)}
    before = None
    while before != names:
        before = names
        names = {name: WRAPPED.sub("", short) for name, short in names.items()}
        if all(short.startswith(FRONT) for short in names.values()):
            names = {name: short.removeprefix(FRONT) for name, short in names.items()}
    twice = [short for short, count in Counter(names.values()).items() if count > 1]
    if twice:
        both = " and ".join(name for name, short in names.items() if short == twice[0])
        raise PickledError(
            f"{path} holds {len(twice)} tensors twice, once inside a wrapper (first: {both}); it is not clear which "
            "are meant: save those alone"
        )
    return {names[str(name)]: tensor for name, tensor in tensors.items()}


def _at(entry: tuple[str, ...]) -> str:
    return f" (under {'.'.join(entry)})" if entry else ""
