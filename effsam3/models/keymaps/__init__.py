# SPDX-License-Identifier: Apache-2.0
"""Tables of tensor names: one table per pair of formats, read in both directions.

A row is a template of the one format's name, a template of the other's, and how the numbers change if they do:

    ("blocks.{n}.norm{1|2}.{wb}", "layers.{n}.layer_norm{1|2}.{wb}")      the same tensor under another name
    ("attn.qkv.{wb}", "attention.{q|k|v}_proj.{wb}")                      one tensor, and its thirds under three names
    ("text_projection", "text_projection.weight", "transposed")

A hole in braces is the same in both names. It is a list of alternatives, or the name of an entry of `COMMON`
or of the table's own `holes`: a regular expression, or {value in the first name: value in the second}. A
hole that is in one of the names only lists the parts, in their order along the first dimension, of what is one tensor
in the other format; with `same`, each part is the whole tensor again.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from effsam3.errors import UserError

HOLE = re.compile(r"\{([^}]*)\}")
Row = tuple[str, ...]
Choices = str | Mapping[str, str]

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # tensors of a BatchNorm
COMMON: dict[str, Choices] = {
    "n": r"\d+",
    "wb": {"weight": "weight", "bias": "bias"},
    "norm": {name: name for name in NORM},
    "rest": ".+",
}


class KeyMapError(UserError):
    """A tensor that a table has no place for, or that is not of the shape that its place asks for."""


def section(first: str, second: str, rows: Iterable[Row]) -> list[Row]:
    """Return the rows with a prefix before each name of the first and of the second format."""
    return [(first + row[0], second + row[1], *row[2:]) for row in rows]


class Rule:
    """A row, read in one direction: from `source` names to `target` names."""

    def __init__(self, source: str, target: str, change: str, choices: Mapping[str, Choices]):
        """`choices` has for every hole its regular expression, or {value in the source: value in the target}."""
        assert change in ("", "transposed", "same"), change
        self.source, self.target, self.change, self.choices = source, target, change, choices
        self.holes, targets = HOLE.findall(source), HOLE.findall(target)
        # At most one of these two has an entry: the parts of one tensor under several names.
        self.gathers = [hole for hole in self.holes if hole not in targets]
        self.splits = [hole for hole in targets if hole not in self.holes]
        assert len(self.gathers) + len(self.splits) <= 1, source
        # A template is its literals with holes between them: a hole's values become a group of the pattern.
        literals = [re.escape(text) for text in HOLE.split(source)[::2]]
        groups = [f"({self._pattern(hole)})" for hole in self.holes] + [""]
        self.pattern = re.compile("".join(text + group for text, group in zip(literals, groups, strict=True)))

    def _pattern(self, hole: str) -> str:
        choices = self.choices[hole]
        return choices if isinstance(choices, str) else "|".join(map(re.escape, choices))

    def match(self, name: str) -> dict[str, str] | None:
        """Return the values of the holes in a source name; None if this rule is not for it."""
        found = self.pattern.fullmatch(name)
        return found and dict(zip(self.holes, found.groups(), strict=True))

    def targets(self, pieces: Mapping[str, str]) -> list[str]:
        """Return the target names, one for each part that the tensor is split into."""
        names = [self.target]
        for hole in self.splits:
            parts = self.choices[hole]
            assert not isinstance(parts, str)  # a split names its parts
            names = [name.replace(f"{{{hole}}}", part) for name in names for part in parts.values()]
        for hole, piece in pieces.items():
            choices = self.choices[hole]
            other = piece if isinstance(choices, str) else choices[piece]
            names = [name.replace(f"{{{hole}}}", other) for name in names]
        return names

    def split(self, name: str, tensor: Tensor, count: int) -> Sequence[Tensor]:
        """Return `count` parts of a tensor: views of it.

        Raises:
            KeyMapError: its first dimension cannot be divided by `count`, or it is no matrix to transpose.
        """
        if self.change == "transposed":
            if tensor.ndim != 2:
                raise KeyMapError(f"{name} has the shape {tuple(tensor.shape)}; expected a matrix")
            return [tensor.T]
        if count == 1 or self.change == "same":
            return [tensor] * count
        if tensor.ndim == 0 or tensor.shape[0] % count:
            raise KeyMapError(
                f"{name} has the shape {tuple(tensor.shape)}; it holds {count} parts of the same size "
                f"({self.target}), so its first dimension must be a multiple of {count}"
            )
        return tensor.chunk(count)

    def gather(self, target: str, parts: Mapping[str, tuple[str, Tensor]]) -> Tensor:
        """Join the parts {value of the hole: (name, tensor)} of one tensor.

        Raises:
            KeyMapError: a part is missing, or they do not fit each other.
        """
        wanted = self.choices[self.gathers[0]]
        names = [name for name, _ in parts.values()]
        if len(parts) < len(wanted):
            raise KeyMapError(
                f"{target} is made of {len(wanted)} tensors ({self.source}), of which there are {len(parts)}: "
                f"{', '.join(names)}"
            )
        first, *others = tensors = [parts[piece][1] for piece in wanted]
        if any(other.shape != first.shape for other in others):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.values())
            raise KeyMapError(f"{target} is made of tensors of one shape, these differ: {shapes}")
        if self.change == "same":
            if not first.is_meta and not all(torch.equal(first, other) for other in others):
                raise KeyMapError(f"{' and '.join(names)} differ; both are {target}, so they must be the same")
            return first
        return torch.cat(tensors)


class Direction:
    """A table read in one direction."""

    def __init__(self, rules: Sequence[Rule], whose: str):
        """`whose` is whose names these rules know."""
        self.rules, self.whose = rules, whose

    def matches(self, name: str) -> list[tuple[Rule, dict[str, str]]]:
        """Return the rules for a name with the values of their holes; in a sound table never more than one."""
        found = ((rule, rule.match(name)) for rule in self.rules)
        return [(rule, pieces) for rule, pieces in found if pieces is not None]

    def targets(self, name: str) -> list[str]:
        """Return what a name becomes in the other format: nothing if it is unknown, several names if it is split."""
        return [target for rule, pieces in self.matches(name) for target in rule.targets(pieces)]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under the other format's names: views where that is possible.

        Raises:
            KeyMapError: a name that no rule knows, a part that is missing, or a shape that cannot be divided.
        """
        placed: dict[str, Tensor] = {}
        # Parts may come in any order and far apart: they are joined when all names have been seen.
        gathered: dict[str, tuple[Rule, dict[str, tuple[str, Tensor]]]] = {}
        unknown = []
        for name, tensor in tensors.items():
            found = self.matches(name)
            if not found:
                unknown.append(name)
                continue
            rule, pieces = found[0]
            targets = rule.targets(pieces)
            if rule.gathers:
                parts = gathered.setdefault(targets[0], (rule, {}))[1]
                parts[pieces[rule.gathers[0]]] = name, tensor
                placed[targets[0]] = tensor  # keeps the place in the order
            else:
                placed |= zip(targets, rule.split(name, tensor, len(targets)), strict=True)
        if unknown:
            raise KeyMapError(
                f"{len(unknown)} of {len(tensors)} tensors are not among {self.whose} names (first: {unknown[0]}"
                f"{self._nearest(unknown[0])})"
            )
        return placed | {target: rule.gather(target, parts) for target, (rule, parts) in gathered.items()}

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, [rule.source for rule in self.rules], n=1, cutoff=0.7)
        return f"; the nearest that is known is {near[0]}" if near else ""


class KeyMap:
    """A table in both directions: `forward` takes the first format's names to the second's, `backward` undoes it."""

    def __init__(self, rows: Iterable[Row], holes: Mapping[str, Choices], first: str, second: str):
        """`first` and `second` name in messages whose names they are, such as `transformers'`."""
        forward, backward = [], []
        for one, other, *changes in rows:
            change = changes[0] if changes else ""
            choices = {hole: _choices(hole, {**COMMON, **holes}) for hole in HOLE.findall(one + other)}
            forward.append(Rule(one, other, change, choices))
            backward.append(Rule(other, one, change, {hole: _inverse(choices[hole]) for hole in choices}))
        self.forward, self.backward = Direction(forward, first), Direction(backward, second)


def _choices(hole: str, holes: Mapping[str, Choices]) -> Choices:
    return {piece: piece for piece in hole.split("|")} if "|" in hole else holes[hole]


def _inverse(choices: Choices) -> Choices:
    return choices if isinstance(choices, str) else {other: piece for piece, other in choices.items()}
