# SPDX-License-Identifier: Apache-2.0
"""Parts and a chassis become one model, in which every tensor has one owner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor
from transformers import PreTrainedConfig

from effsam3.models.chassis.classes import empty_tensors
from effsam3.models.chassis.slim import slim_config, slim_tensors
from effsam3.models.merging.adapt import Adapted, adapt
from effsam3.models.merging.slots import SLOTS, MergeError, Part, Slot
from effsam3.training.report import table

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A whole model: its config, its tensors, the owner of each (a slot, a name in `rest`, or of who changed it), and
    what was dropped."""

    config: PreTrainedConfig
    tensors: dict[str, Tensor]
    owners: dict[str, str]
    dropped: dict[str, list[int]]  # what is no longer there -> elements of each of its tensors


def combine(
    config: PreTrainedConfig,
    rest: dict[str, dict[str, Tensor]],
    parts: Sequence[Part],
    adapted: Sequence[Adapted] = (),
) -> Merged:
    """Put parts into the SAM 3 that `config` describes and whose tensors `rest` holds by owner, such as `chassis`.

    Tensors of the chassis and of parts may then be changed in place (`adapted`).

    Raises:
        MergeError: a part is of another size than the chassis, two parts take over the same, a tensor has no owner or
            two, or a changed one does not fit.
        UserError: changed tensors are of more layers than the chassis has.
    """
    refuse_overlap(parts)
    layers = layers_to_keep(adapted)
    whole, rest = rest, {owner: slim_tensors(config, tensors, layers) for owner, tensors in rest.items()}
    stay = {id(tensor) for tensors in rest.values() for tensor in tensors.values()}
    gone = [tensor.numel() for tensors in whole.values() for tensor in tensors.values() if id(tensor) not in stay]
    dropped = {"layers of the detector's fusion encoder": gone}
    config = slim_config(config, layers)
    for part in parts:
        slot = SLOTS[part.slot]
        refuse_misfit(part, slot.config_of(config), slot)
        # Configs change one after the other, because the model that the result must fit depends on all of them.
        config = slot.install(config, part.config)
        # Counted before they go, so that the table of a merge shows what a student has saved.
        dropped[f"what stood in the slot {part.slot}"] = [
            tensor.numel()
            for tensors in rest.values()
            for name, tensor in tensors.items()
            if name.startswith(part.owns)
        ]
    # The real classes, built without memory, list the merged model's tensors; nothing is assumed about names.
    expected = shapes(empty_tensors(config))
    offers = {part.slot: part.tensors for part in parts}
    owners = assign(
        expected,
        {slot: shapes(tensors) for slot, tensors in offers.items()},
        {owner: shapes(tensors) for owner, tensors in rest.items()},
        tuple(prefix for part in parts for prefix in part.also),
    )
    offers |= rest
    # References only: a merge of memory-mapped files holds no second copy of SAM 3.
    tensors = {name: offers[owner][name] for name, owner in owners.items()}
    tensors, owners = adapt(tensors, owners, adapted)
    return Merged(config=config, tensors=tensors, owners=owners, dropped=dropped)


def layers_to_keep(adapted: Sequence[Adapted]) -> int | None:
    """Return how many layers of the detector's fusion encoder stay, None: all.

    Raises:
        MergeError: changed tensors were made for different ones.
    """
    asked = {one.encoder_layers: one for one in adapted if one.encoder_layers is not None}
    if len(asked) > 1:
        made_for = ", ".join(f"{one.name} for {layers}" for layers, one in asked.items())
        raise MergeError(
            f"changed tensors are of fusion encoders of different layers: {made_for}; leave some out (parts.adapted)"
        )
    return next(iter(asked), None)


def refuse_overlap(parts: Sequence[Part]) -> None:
    """Refuse parts that take over the same tensors, such as an image student and a memory trained with its own trunk.

    Raises:
        MergeError: two do; the message names them and what both bring.
    """
    for one, other in combinations(parts, 2):
        both = [prefix for prefix in one.owns if prefix.startswith(other.owns)]
        both += [prefix for prefix in other.owns if prefix.startswith(one.owns) and prefix not in both]
        if both:
            raise MergeError(
                f"both {one.student} in the slot {one.slot} ({one.origin}) and {other.student} in the slot "
                f"{other.slot} ({other.origin}) bring {', '.join(both)}; leave one out, or train the second on the "
                "merged model of the first"
            )


def refuse_misfit(part: Part, own: PreTrainedConfig, slot: Slot) -> None:
    """Refuse a part whose sizes are not those of what it replaces, whose config is `own`.

    Raises:
        MergeError: they are not; the message names the size.
    """
    theirs, ours = part.config.to_dict(), own.to_dict()
    # Every size that other parts of the model rely on; the student's own sizes are free.
    for key, meaning in slot.alike.items():
        if theirs[key] != ours[key] and not (key in slot.at_most and theirs[key] < ours[key]):
            raise MergeError(
                f"the student {part.student} in the slot {part.slot} ({part.origin}) has the {meaning} {theirs[key]}, "
                f"this SAM 3 {ours[key]}; put together what was trained against the same SAM 3"
            )


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assign(
    expected: Shapes, students: dict[str, Shapes], rest: dict[str, Shapes], also: tuple[str, ...] = ()
) -> dict[str, str]:
    """Give every tensor of the merged model its one owner: a slot's name, or a name in `rest`, such as `chassis`.

    Args:
        expected: {name: shape} of the merged model.
        students: {slot: {name: shape}} with names of the merged model.
        rest: {owner: {name: shape}}; tensors of a filled slot are dropped, and those that begin with one of `also`.

    Raises:
        MergeError: a tensor without an owner, with two, of another shape, or left over.
    """
    # By prefix, not by name: a slot's old tensors go whole, whatever they are called in this SAM 3.
    dropped = tuple(prefix for slot in students for prefix in SLOTS[slot].owns) + also
    kept = {
        owner: {name: shape for name, shape in tensors.items() if not name.startswith(dropped)}
        for owner, tensors in rest.items()
    }
    offers = {**students, **kept}
    owners, problems = {}, []
    for name, shape in expected.items():
        # One owner exactly: none would leave random numbers, two would leave it to the order of a dict.
        owning = [owner for owner, tensors in offers.items() if name in tensors]
        # All problems are collected before any is reported, because one wrong prefix causes many.
        if len(owning) != 1:
            problems.append(f"{name} has {'no owner' if not owning else 'the owners ' + ' and '.join(owning)}")
        elif offers[owning[0]][name] != shape:
            problems.append(f"{name} from {owning[0]} is {offers[owning[0]][name]}, the model needs {shape}")
        else:
            owners[name] = owning[0]
    for owner, tensors in offers.items():
        # A trained tensor that nobody would load is as wrong as a missing one.
        problems += [f"{name} of {owner} lands nowhere" for name in tensors if name not in expected]
    if problems:
        raise MergeError(f"{len(problems)} tensors cannot be merged: " + "; ".join(problems[:5]))
    return owners


def slot_table(merged: Merged, origins: dict[str, str]) -> str:
    """Return the account of a merged model: who owns how many tensors and elements, and what was dropped.

    `origins` names for every owner where its tensors come from.
    """
    tensors, elements = Counter(merged.owners.values()), Counter[str]()
    for name, owner in merged.owners.items():
        # Counted from the result, not from the parts, so that the table cannot claim what is not there.
        elements[owner] += merged.tensors[name].numel()
    rows = [
        [owner, origin, f"{tensors[owner]:,}", f"{elements[owner] / 1e6:.2f} M"] for owner, origin in origins.items()
    ]
    for what, gone in merged.dropped.items():
        if gone:
            rows.append(["dropped", what, f"{len(gone):,}", f"-{sum(gone) / 1e6:.2f} M"])
    rows.append(["merged", "", f"{len(merged.owners):,}", f"{sum(elements.values()) / 1e6:.2f} M"])
    return table(rows, ["slot", "from", "tensors", "elements"], text_columns=2)
