# SPDX-License-Identifier: Apache-2.0
"""What of a tracker can be trained."""

from __future__ import annotations

from collections.abc import Sequence

from effsam3.models import trainable
from effsam3.models.memory.tracker import EfficientTracker

# The neck's coarsest level feeds nothing in the tracker, and what is not recalled has no position.
UNUSED = ("vision_encoder.neck.fpn_layers.3.", "no_memory_positional_encoding")


def unused_of(tracker: EfficientTracker) -> tuple[str, ...]:
    """Return beginnings of the names of what the tracker never calls."""
    # Without latents the resampler is never called; training it would only decay its weights.
    return UNUSED if tracker.config.keeps_latents else (*UNUSED, "memory_resampler.")


def find_trainable(tracker: EfficientTracker, asked: Sequence[str]) -> dict[str, list[str]]:
    """Return what each name means in a tracker, as `trainable.find_trainable` does, and raises."""
    of = f" ({tracker.config.memory_mode} memory)"
    return trainable.find_trainable(tracker, asked, unused_of(tracker), "tracker", of)
