# SPDX-License-Identifier: Apache-2.0
"""Tensors changed in place, anywhere in a model: an adapter folded into its weights, a fine-tuned head.

A `Part` replaces what is in its slot; `Adapted` keeps names, shapes and types, and knows what it was made on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from effsam3.checked_files import parse_json
from effsam3.models.chassis.tensors import fingerprint
from effsam3.models.merging.slots import MergeError
from effsam3.tensor_files import open_safetensors, read_safetensors

FILE = "adapted.safetensors"
REMEDY = "write it as docs/formats.md describes (parts.adapted)"


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """Changed tensors, ready to take the place of those that they were made of.

    Attributes:
        name: what messages and the model's effsam3.json call them; not a slot's.
        origin: where they come from.
        tensors: as they are now, by their names in the whole model.
        made_on: `fingerprint` of the same tensors before they were changed.
        facts: what else the model's effsam3.json records of them.
        notes: lines worth telling when they are merged.
        encoder_layers: of the detector's fusion encoder, as they were made for; None: as many as the model has.
    """

    name: str
    origin: str
    tensors: dict[str, Tensor]
    made_on: str
    facts: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    encoder_layers: int | None = None

    def card(self) -> dict:
        """Return what effsam3.json says of them."""
        own = {"name": self.name, "from": self.origin, "made_on": self.made_on, "tensors": sorted(self.tensors)}
        slim = {} if self.encoder_layers is None else {"encoder_layers": self.encoder_layers}
        return own | slim | self.facts


def read_adapted(folder: Path) -> Adapted:
    """Read a folder with `FILE`: the changed tensors, and `made_on` in its metadata, as JSON under `effsam3`.

    Raises:
        MergeError: it is not there or damaged, or does not say what it was made on.
    """
    path = folder / FILE
    if not path.is_file():
        raise MergeError(f"parts.adapted: {folder} holds no {FILE}; {REMEDY}")
    with open_safetensors(path, REMEDY, MergeError) as file:
        said = (file.metadata() or {}).get("effsam3", "{}")
    about = parse_json(said, {"made_on": str}, f"parts.adapted: the metadata of {path}", REMEDY, MergeError)
    if not (tensors := read_safetensors(path, REMEDY, MergeError)):
        raise MergeError(f"parts.adapted: {path} holds no tensors; {REMEDY}")
    return Adapted(name=folder.name, origin=str(folder), tensors=tensors, made_on=about["made_on"])


def adapt(
    tensors: dict[str, Tensor], owners: dict[str, str], adapted: Sequence[Adapted]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Put changed tensors into a model whose tensors have `owners`; returns its new tensors and owners.

    Raises:
        MergeError: a tensor is of two of them, unknown, of another shape or type; what they were made on is something
            else; or two owners have one name.
    """
    names = [*set(owners.values()), *(one.name for one in adapted)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise MergeError(f"two owners of tensors are called {twice[0]!r}; rename the folder of one (parts.adapted)")
    new_tensors, new_owners = dict(tensors), dict(owners)
    for one in adapted:
        if problems := list(filter(None, (_problem(one, name, tensors, owners, new_owners) for name in one.tensors))):
            raise MergeError(f"{len(problems)} tensors of {one.name} ({one.origin}) cannot be merged: {problems[0]}")
        # A change only makes sense on the weights that it was learned on; names and shapes would fit any SAM 3.
        before = fingerprint({name: tensors[name] for name in one.tensors})
        if before != one.made_on:
            whose = ", ".join(sorted({owners[name] for name in one.tensors}))
            raise MergeError(
                f"{one.name} ({one.origin}) was made on other tensors (fingerprint {one.made_on}) than those of "
                f"{whose} that it would change here ({before}); merge it with what it was made on"
            )
        # After all checks, so that an error leaves nothing half changed.
        new_tensors |= one.tensors
        new_owners |= dict.fromkeys(one.tensors, one.name)
    return new_tensors, new_owners


def _problem(one: Adapted, name: str, tensors: dict[str, Tensor], owners: dict, new_owners: dict) -> str:
    """Say why a changed tensor cannot take the place of the one of its name, empty if it can."""
    if name not in tensors:
        return f"the model has no {name}"
    if new_owners[name] != owners[name]:
        return f"{name} is changed by {new_owners[name]}, too"
    changed, own = one.tensors[name], tensors[name]
    if changed.shape != own.shape:
        return f"{name} is {tuple(changed.shape)}, the model's {tuple(own.shape)}"
    if changed.dtype != own.dtype:
        return f"{name} is {changed.dtype}, the model's {own.dtype}"
    return ""


def adapted_modules(
    wanted: Collection[str],
    weights: Mapping[str, Tensor],
    trained: Any,
    features: dict,
    about: dict,
    whole_name: Callable[[str], str] = str,
) -> Adapted:
    """Return what a run has learned in place of modules of a SAM 3, by their names in the whole model.

    Args:
        wanted: names of what the recipe `trained` trains, as `weights` must have them.
        features: what the run has recorded of what it started from.
        whole_name: turns one of these names into that in the whole model.

    Raises:
        MergeError: the run's tensors are others.
    """
    if set(wanted) != weights.keys():
        other = sorted(set(wanted) ^ weights.keys())
        raise MergeError(
            f"{about['origin']}: its tensors are not those of {', '.join(trained.model.trainable)} in "
            f"{trained.sam3.checkpoint}, such as {other[0]}; merge it with the SAM 3 and model.trainable that it had"
        )
    tensors = {whole_name(name): tensor for name, tensor in weights.items()}
    return Adapted(tensors=tensors, made_on=features["teacher"]["fingerprint"], **about)
