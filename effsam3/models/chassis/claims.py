# SPDX-License-Identifier: Apache-2.0
"""The guard of a teacher's weights: they are those of the SAM 3 that the recipe names, and were trained."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from effsam3.errors import ChassisError
from effsam3.models.registry import SAM3S

# Part of SAM 3 -> its parameters in transformers, by its row.
PARAMETERS = {"trunk": lambda row: row.sizes.trunk_params, "text encoder": lambda row: row.counts.text}


class OfSam3(Protocol):
    """A teacher: which of `PARAMETERS` it is, the module with its parameters, the fingerprint of its tensors."""

    part: str
    fingerprint: str

    @property
    def own(self) -> nn.Module: ...


def check_weights(teacher: OfSam3, claim: str, expected_fingerprint: str | None = None) -> None:
    """Refuse a teacher whose weights cannot be those of `claim`, the recipe's `sam3.checkpoint`.

    `expected_fingerprint` is what the recipe asks for; None: any.

    Raises:
        ChassisError: another parameter count than the claimed SAM 3's, another fingerprint than the recipe's, or
            matrices that are constant (never trained nor initialised).
    """
    row = SAM3S.get(claim)
    found = sum(parameter.numel() for parameter in teacher.own.parameters())
    if row is not None and row.counts is not None and found != (wanted := PARAMETERS[teacher.part](row)):
        raise ChassisError(
            f"the teacher claims to be {claim} but its {teacher.part} has {found:,} parameters; {row.label}'s has "
            f"{wanted:,}. Check sam3.checkpoint"
        )
    if expected_fingerprint is not None and teacher.fingerprint != expected_fingerprint:
        raise ChassisError(
            f"the teacher's {teacher.part} has the fingerprint {teacher.fingerprint}, the recipe asks for "
            f"{expected_fingerprint}; check sam3.checkpoint and sam3.revision, or correct sam3.fingerprint"
        )
    for name, parameter in teacher.own.named_parameters():
        # Biases and norms may well be constant, matrices that were drawn or trained never.
        if parameter.ndim > 1 and (parameter == parameter.flatten()[0]).all():
            raise ChassisError(f"the teacher's tensor {name} is constant; the checkpoint holds no trained weights")
