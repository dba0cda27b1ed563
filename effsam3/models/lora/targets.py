# SPDX-License-Identifier: Apache-2.0
"""Which layers of a SAM 3 get an adapter, by the part that they belong to.

By part, not by the end of a name: `q_proj` alone would also hit the tracker, and would miss the text encoder's
`out_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from effsam3.errors import UserError
from effsam3.models.chassis.tensors import NECK, TRACKER_NECK, TRUNK
from effsam3.models.lora.parts import PARTS

# Layers that no loss of the stage reaches: peft would adapt them, and their adapters would never get a gradient.
UNUSED = (
    # CLIP's own, and that of a text student; SAM 3 has another after the encoder.
    "detector_model.text_encoder.text_projection",
    "detector_model.text_encoder.projection",
    "tracker_model.mask_decoder.pred_obj_score_head.",  # whether an object is in the frame; prompted ones always are
)
LEVELS = 3  # of a neck's four; nothing reads the coarsest


def target_modules(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Return the names of the layers of a whole SAM 3 that get an adapter: of every part, at least one.

    Raises:
        UserError: a part has no layer that can have one.
    """
    found: list[str] = []
    for part in parts:
        own = [name for name, layer in model.named_modules() if _adaptable(name, layer, PARTS[part])]
        if not own:
            raise UserError(f"adapters.parts: {part} has neither linear layers nor 1x1 convolutions in this model")
        found += own
    return sorted(found)


def _adaptable(name: str, layer: nn.Module, prefixes: tuple[str, ...]) -> bool:
    if not name.startswith(prefixes) or name.startswith(UNUSED):
        return False
    # torch's MultiheadAttention never calls its `out_proj`: an adapter there would do nothing, and merging it would.
    if isinstance(layer, nn.Linear):
        return not isinstance(layer, NonDynamicallyQuantizableLinear)
    # A convolutional student is made of these; grouped ones have no update of low rank.
    return (
        isinstance(layer, nn.Conv2d)
        and name.startswith(TRUNK)
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.groups == 1
    )


def view_biases(tracker: bool, detector: bool) -> Iterator[str]:
    """Yield the biases that end each level of the necks: what is added to them is added to the features exactly."""
    for neck, used in ((TRACKER_NECK, tracker), (NECK, detector)):
        for level in range(LEVELS if used else 0):
            yield f"{neck}fpn_layers.{level}.proj2.bias"
