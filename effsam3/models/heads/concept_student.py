# SPDX-License-Identifier: Apache-2.0
"""What learns in a SAM 3's detector, as one module: it is optimised, saved and merged, and nothing else.

Letters: B images, R phrases of all images, S image side in pixels, D channels of the trunk, G side of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effsam3.models.heads.detector import Answers, Asked, answer, detector_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.lora.adapter import inject, lora_config
from effsam3.models.lora.student import Adapters
from effsam3.models.lora.targets import target_modules
from effsam3.models.recompute import recomputing
from effsam3.models.trainable import TrainedParts, register

DETECTOR = "detector_model."  # the beginning of its tensors' names in a whole SAM 3

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


def adapted_layers(model: Any, parts: Sequence[str]) -> list[str]:
    """Return the names of the layers of a whole SAM 3 that get an adapter, as far as phrases reach them.

    Raises:
        UserError: a part has no layer that can have one.
    """
    unused = tuple(DETECTOR + name for name in unused_of(model.detector_model))
    return [name for name in target_modules(model, parts) if not f"{name}.".startswith(unused)]


class ConceptStudent(TrainedParts):
    """The trained parts of a detector, under the detector's own names; the frozen rest is next to it, not inside.

    Adapters of other parts, if there are any, go by peft's names in files. BatchNorm stays in eval mode where it is
    trained, too: a micro-batch has few images, and statistics of so few would move features away from what the heads
    know.
    """

    model: Any

    def __init__(self, model: nn.Module, trained: Iterable[str], recompute: bool, adapters: Adapters | None = None):
        """`model` is a whole SAM 3, `trained` are names of submodules and parameters of its detector.

        Raises:
            UserError: a part of `adapters` has no layer that can have one.
        """
        whole: Any = model.requires_grad_(False)
        layers, low_rank = [], {}
        if adapters is not None:
            layers = adapted_layers(model, adapters.parts)
            # Before what is trained is found in the model: peft freezes all else.
            low_rank = inject(model, lora_config(layers, adapters.rank, adapters.alpha, adapters.dropout))
        super().__init__(whole.detector_model, trained, unused_of(whole.detector_model))
        for name, parameter in low_rank.items():
            parameter.requires_grad_()
            register(self, name, parameter)
        self.modules_adapted = layers
        self.dropouts = [layer for name, layer in model.named_modules() if ".lora_dropout." in name]
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
        for layer in self.dropouts:
            layer.train(mode)
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
