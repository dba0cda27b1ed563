# SPDX-License-Identifier: Apache-2.0
"""The model in a file of `torch.save`: found inside whatever a training script puts around it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from effsam3.models.chassis.torch_file import PickledError, load
from effsam3.tensor_files import not_plain

# Under which names a training script keeps its model, and under which the moving average of the model's weights.
MODELS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "student")
AVERAGES = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict")
# What wrapping a module in another leaves in the names of its tensors: at the front, anywhere, at the front of all.
WRAPPED = re.compile(r"^module\.|(?<![^.])_orig_mod\.")
FRONT = "model."
COUNTER = "n_averaged"  # torch.optim.swa_utils counts here; no weight
DEEPEST = 8  # entries around a model


@dataclass(frozen=True)
class Pickled:
    """The model in a file.

    Attributes:
        tensors: {name: tensor} as saved, of whatever type, memory-mapped.
        entry: the keys that lead to them, such as `model`; empty when they are the file's own entries.
        aside: everything else on the way: numbers, settings, optimizer states, weights that were not taken.
    """

    tensors: dict[str, Tensor]
    entry: tuple[str, ...] = ()
    aside: dict[str, Any] = field(default_factory=dict)

    @property
    def is_average(self) -> bool:
        """Whether these are the averaged weights of a file that has both."""
        return any(key in AVERAGES for key in self.entry)


def open_pickled(path: str | Path) -> Pickled:
    """Find the model in a file that `torch.save` wrote, its averaged weights if it has them.

    Entries such as `model` are unwrapped and the prefixes of wrappers (`module.`, `_orig_mod.`, `model.`) removed.

    Raises:
        PickledError: as `torch_file.load`; no model, or several with no way to choose; a name twice.
    """
    path = Path(path)
    return _find(load(path), path, ())


def _find(content: Any, path: Path, entry: tuple[str, ...]) -> Pickled:
    """Find the model in what was read; `entry` are the keys that led to `content`."""
    if not isinstance(content, Mapping) or len(entry) > DEEPEST:
        raise PickledError(f"{path} holds a {type(content).__name__}{_at(entry)}; expected tensors by name")
    content = _grouped(content)
    inside = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    models, averages = ([key for key in names if key in inside] for names in (MODELS, AVERAGES))
    if not models and not averages:
        return Pickled(_tensors(content, path, entry), entry)
    for keys in (models, averages):
        if len(keys) > 1:
            raise PickledError(
                f"{path} holds {len(keys)} models{_at(entry)}: {', '.join(keys)}; save only one of them"
            )
    found = {key: _find(inside[key], path, (*entry, key)) for key in models + averages}
    # The average, where both are there: it is what was evaluated.
    key = (averages or models)[0]
    if len(found) == 2:
        plain, average = ({name: t.shape for name, t in found[of].tensors.items()} for of in (models[0], key))
        if differing := sorted(name for name, _ in plain.items() ^ average.items()):
            raise PickledError(
                f"{path} holds both {models[0]} and {key}{_at(entry)}, whose tensors differ in name or shape (first: "
                f"{differing[0]}); it is not clear which is meant: save only one of them"
            )
    aside = {name: value for name, value in content.items() if name != key}
    return Pickled(found[key].tensors, found[key].entry, aside | found[key].aside)


def _grouped(content: Mapping) -> Mapping:
    """Turn names such as `model.x` and `model_ema.x` side by side into two models; leave anything else as it is."""
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return content
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first, {})[rest] = value
    known = groups.keys() <= {*MODELS, *AVERAGES}
    return groups if known and not groups.keys().isdisjoint(AVERAGES) else content


def _tensors(content: Mapping, path: Path, entry: tuple[str, ...]) -> dict[str, Tensor]:
    """Check a model's own tensors, and remove what wrappers put into their names."""
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    tensors.pop(COUNTER, None)
    others = [f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise PickledError(
            f"{path} does not hold tensors by name{_at(entry)}: {', '.join(others[:6]) or 'nothing'}; expected a "
            f"model's tensors and nothing else, or those under {', '.join(MODELS)}"
        )
    for name, tensor in tensors.items():
        if problem := not_plain(tensor):
            raise PickledError(f"{path}: the tensor {name} {problem}")
    names = {name: name for name in tensors}
    # Again until nothing changes: wrappers stand around each other in any order.
    before = None
    while before != names:
        before = names
        names = {name: WRAPPED.sub("", short) for name, short in names.items()}
        if all(short.startswith(FRONT) for short in names.values()):
            names = {name: short.removeprefix(FRONT) for name, short in names.items()}
    twice = [short for short, count in Counter(names.values()).items() if count > 1]
    if twice:
        both = " and ".join(name for name, short in names.items() if short == twice[0])
        raise PickledError(f"{path} holds {len(twice)} tensors twice, once inside a wrapper (first: {both}); save one")
    return {names[name]: tensor for name, tensor in tensors.items()}


def _at(entry: tuple[str, ...]) -> str:
    return f" (under {'.'.join(entry)})" if entry else ""
