# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that `torch.save` wrote: found in whatever stands around them, read without running a line of them.

A file is opened with `weights_only`, and its tensors stay on the disk until they are used (memory-mapped).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from effsam3.models.chassis.torch_file import PickledError, has_checksums, inner_name, is_zip, load, records_of

# Under which names a training script keeps its model, and under which the moving average of the model's weights.
MODELS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "student")
AVERAGES = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict")
# What wrapping a module in another leaves in the names of its tensors: at the front, anywhere, at the front of all.
WRAPPED = re.compile(r"^module\.|(?<![^.])_orig_mod\.")
FRONT = "model."
COUNTER = "n_averaged"  # torch.optim.swa_utils counts here; no weight
TRAINING = {"param_groups", "optimizer", "optimizer_state_dict", "optimizer_states", "lr_scheduler", "scheduler"}
DEEPEST = 8  # entries around a model


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
    return _find(load(path), path, ())


def content_key(path: Path) -> str:
    """Return a hash (16 hex digits) of what a file holds, whatever it is called.

    `torch.save` writes a zip, which lists its records with their checksums at the end: no need to read gigabytes.

    Raises:
        PickledError: as `open_pickled` on files that are not whole.
    """
    digest = xxhash.xxh3_64()
    if is_zip(path) and has_checksums(records := records_of(path)):
        for record in records:
            digest.update(f"{inner_name(record)} {record.file_size} {record.CRC}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


# ---- what it holds


def _find(content: Any, path: Path, entry: tuple[str, ...]) -> Pickled:
    """Find the model in what was read; `entry` are the keys that led to `content`."""
    if len(entry) > DEEPEST:
        raise PickledError(f"{path} holds entries inside entries{_at(entry[:DEEPEST])}; save the model alone")
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
