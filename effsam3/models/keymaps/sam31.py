# SPDX-License-Identifier: Apache-2.0
"""SAM 3.1's own names (`sam3.1_multiplex.pt`) in those of a `sam3.pt`, as far as both models have the same modules.

SAM 3.1 keeps SAM 3's detector and its heads for boxes, points and masks. Its neck has no level of half the trunk's
grid, which SAM 3 computes and never reads; what a video needs, SAM 3.1 has anew (object multiplex).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

VISION = "detector.backbone.vision_backbone."
RENAMED = {
    f"{VISION}interactive_convs.": f"{VISION}sam2_convs.",
    "tracker.model.interactive_sam_prompt_encoder.": "tracker.sam_prompt_encoder.",
    "tracker.model.interactive_sam_mask_decoder.": "tracker.sam_mask_decoder.",
    "tracker.model.interactive_mask_downsample.": "tracker.mask_downsample.",
    "tracker.model.interactivity_no_mem_embed": "tracker.no_mem_embed",
}
MULTIPLEX = (f"{VISION}propagation_convs.", "tracker.model.")  # of the rest: memory, many objects in one pass


def to_sam3(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what SAM 3 has, too, by SAM 3's names, and the object multiplex, by SAM 3.1's; tensors as given."""
    shared: dict[str, Tensor] = {}
    multiplex: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = next((old for old in RENAMED if name.startswith(old)), None)
        if old is not None:
            shared[RENAMED[old] + name.removeprefix(old)] = tensor
        else:
            (multiplex if name.startswith(MULTIPLEX) else shared)[name] = tensor
    return shared, multiplex
