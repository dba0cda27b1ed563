# SPDX-License-Identifier: Apache-2.0
"""What learns in a SAM 3's detector, as one module: it is optimised, saved and merged, and nothing else.

Letters: B images, R phrases of all images, S image side in pixels, D channels of the trunk, G side of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effsam3.models.heads.detector import Answers, Asked, answer, detector_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.recompute import recomputing
from effsam3.models.trainable import TrainedParts

# What phrases do not reach. Of the geometry encoder, without example boxes: all that encodes them, and, as the token
# that sums up the image is then alone, what it compares itself with.
UNUSED = (
    "vision_encoder.neck.fpn_layers.3.",
    "text_encoder.text_projection.",  # CLIP's own; SAM 3 has another after it
    "text_encoder.projection.",  # a text student's
    "geometry_encoder.boxes_",
    "geometry_encoder.label_embed.",
    "geometry_encoder.vision_layer_norm.",
)


def unused_of(detector: Any) -> tuple[str, ...]:
    """Return beginnings of the names of what no phrase reaches: training it would only decay its weights."""
    geometry = (
        f"geometry_encoder.layers.{layer}.self_attn.{name}_proj."
        for layer in range(len(detector.geometry_encoder.layers))
        for name in "qk"
    )
    pixels = detector.mask_decoder.pixel_decoder
    read = len(detector.vision_encoder.neck.fpn_layers) - 2  # the coarsest of three levels is where it begins
    finer = (f"mask_decoder.pixel_decoder.{kind}.{layer}." for kind in ("conv_layers", "norms")
             for layer in range(read, len(pixels.norms)))  # fmt: skip
    return (*UNUSED, *geometry, *finer)


class ConceptStudent(TrainedParts):
    """The trained parts of a detector, under the detector's own names; the frozen rest is next to it, not inside.

    BatchNorm stays in eval mode where it is trained, too: a micro-batch has few images, and statistics of so few
    would move features away from what the heads know.
    """

    model: Any

    def __init__(self, model: nn.Module, trained: Iterable[str], recompute: bool):
        """`model` is a whole SAM 3, `trained` are names of submodules and parameters of its detector."""
        whole: Any = model.requires_grad_(False)
        super().__init__(whole.detector_model, trained, unused_of(whole.detector_model))
        self.keep_beside(model=model)
        self.recompute = recompute
        trunk = whole.detector_model.vision_encoder.backbone
        # The detector's own layers are computed again phrase by phrase, see `answer`.
        self.recomputed = recomputing(trunk, trunk) if recompute else []

    def train(self, mode: bool = True) -> ConceptStudent:
        """Set the mode of what learns, without BatchNorm, and whether activations are computed again."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        for layer in self.recomputed:
            layer.training = mode  # of the layer only: what is inside of it goes by its own
        return self

    def forward(
        self, pixels_B3SS: Tensor, asked: Asked, loss: Callable[[Tensor, Answers], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what `loss` makes of the trunk's features (B, D, G, G) and the answers; one pass of the trunk.

        The loss runs inside, so that what wraps this module sees one forward that ends in scalars.
        """
        # Every parameter has a gradient in every step, on every rank, whatever was asked. Made first, so that all
        # gradients are ready in the same order on every rank: ZeRO-1 and 2 add the ranks' rows in that order.
        touched = sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
        feat_BDGG = trunk_features(self.model, pixels_B3SS)
        answers = answer(self.model, detector_levels(self.model, feat_BDGG), asked, self.recompute and self.training)
        terms = loss(feat_BDGG, answers)
        return terms | {"loss": terms["loss"] + 0 * touched}
