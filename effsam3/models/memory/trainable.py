# SPDX-License-Identifier: Apache-2.0
"""What of a tracker can be trained, found by the names of its submodules and parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from effsam3.errors import UserError, did_you_mean
from effsam3.models.memory.tracker import EfficientTracker

# The neck's coarsest level feeds nothing in the tracker, and what is not recalled has no position.
UNUSED = ("vision_encoder.neck.fpn_layers.3.", "no_memory_positional_encoding")


def unused_of(tracker: EfficientTracker) -> tuple[str, ...]:
    """Return beginnings of the names of what the tracker never calls."""
    # Without latents the resampler is never called; training it would only decay its weights.
    return UNUSED if tracker.config.keeps_latents else (*UNUSED, "memory_resampler.")


def find_trainable(tracker: EfficientTracker, asked: Sequence[str]) -> dict[str, list[str]]:
    """Return for each name the whole names of the submodules and parameters that it means, outermost ones only.

    A name means what is called so from the tracker on, such as `memory_encoder` or `mask_decoder.iou_prediction_head`;
    where there is no such thing, everything below that ends in it, such as `self_attn`.

    Raises:
        UserError: a name means nothing, or only what the tracker never uses.
    """
    unused = unused_of(tracker)
    parameters = [name for name, _ in tracker.named_parameters() if not name.startswith(unused)]
    # Every module that holds a parameter which is used, and the parameters themselves.
    known = {name.rsplit(".", up)[0]: None for name in parameters for up in range(name.count("."), -1, -1)}
    found: dict[str, list[str]] = {}
    for name in asked:
        places = [name] if name in known else [one for one in known if one.endswith(f".{name}")]
        if not places:
            if any(f".{one}".startswith(f".{name}.") or f".{name}." in f".{one}" for one in unused):
                raise UserError(
                    f"model.trainable: the tracker never uses {name!r} ({tracker.config.memory_mode} memory)"
                )
            last = {one.rpartition(".")[2] for one in known}
            raise UserError(
                f"model.trainable: nothing in the tracker is called {name!r}{_near(name, [*known, *last])}; its "
                f"modules are {', '.join(dict.fromkeys(one.split('.')[0] for one in known))}"
            )
        found[name] = outermost(places)
    return found


def _near(name: str, known: Sequence[str]) -> str:
    """Return a suggestion, where one is near: the list of all names would fill pages."""
    near = did_you_mean(name, known)
    return near.removesuffix("?") if near.startswith("; did you") else ""


def outermost(names: Sequence[str]) -> list[str]:
    """Return names without those that lie in another of them, each once, in order."""
    once = list(dict.fromkeys(names))
    return [name for name in once if not name.startswith(tuple(f"{other}." for other in once))]


def count_parameters(tracker: nn.Module, places: Sequence[str]) -> int:
    """Return how many numbers these submodules and parameters hold."""
    starts = tuple(f"{place}." for place in places)
    return sum(one.numel() for name, one in tracker.named_parameters() if f"{name}.".startswith(starts))
