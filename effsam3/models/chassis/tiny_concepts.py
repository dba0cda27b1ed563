# SPDX-License-Identifier: Apache-2.0
"""The made-up chassis `tiny_concepts`: a small SAM 3 that can learn phrases on a CPU, and that answers to its image.

transformers draws new weights so small that image and phrase do not reach the queries of a SAM 3 without training; of
`tiny`, whatever trunk is put under it, they are the same. Here they are drawn so that queries differ from each other,
and from one pair of image and phrase to the next. So the chassis learns from the first steps, and a comparison of what
two trunks make of its heads means something.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from effsam3.models.chassis.tiny import Shape

if TYPE_CHECKING:
    from torch import nn

# Its grid of 8 x 8 gives masks of 32 x 32. 64 channels are too few for transformers' tracker to remember frames (see
# `tiny.WIDTH`), and most of the time goes into the detector: boxes and points work on images, videos do not.
SHAPE = Shape(
    image_size=160, patch_size=20, window_size=4, positions=160, width=64, mlp_ratio=4, decoder_layers=3, queries=12
)
WRITES_RESIDUAL = ("o_proj", "fc2")  # layers whose output is added to what goes past them
RESIDUAL_GAIN = 0.3  # of these: a larger one drowns the queries, which then all become the same
TOKEN_DEVIATION = 0.3  # of the embeddings of text tokens
FIRST_BOX = 0.25  # sides of the boxes that queries begin with, in shares of the image


def initialise(model: Any) -> None:
    """Draw the weights of all that a `Sam3VideoModel` has after its trunk anew, in place.

    Linear layers are Xavier's, convolutions Kaiming's; every level of the necks has deviation 1 on random images;
    queries are drawn from N(0, 1) and begin on a grid of boxes all over the image.
    """
    import torch
    from torch import nn

    detector, tracker = model.detector_model, model.tracker_model
    heads = (
        detector.text_projection,
        detector.geometry_encoder,
        detector.detr_encoder,
        detector.detr_decoder,
        detector.mask_decoder,
        detector.dot_product_scoring,
        tracker.mask_decoder,
    )
    necks = (detector.vision_encoder.neck, model.tracker_neck)
    with torch.no_grad():
        for part in (*heads, *necks):
            for name, module in part.named_modules():
                _draw(name, module)
        nn.init.normal_(detector.text_encoder.text_model.embeddings.token_embedding.weight, std=TOKEN_DEVIATION)
        _spread_queries(detector.detr_decoder)
        side = SHAPE.image_size
        trunk_BND = detector.vision_encoder.backbone(torch.randn(4, 3, side, side)).last_hidden_state
        trunk_BDGG = trunk_BND.transpose(1, 2).unflatten(2, (SHAPE.grid, SHAPE.grid))
        for neck in necks:
            for layer, level_BDHW in zip(neck.fpn_layers, neck(trunk_BDGG)[0], strict=True):
                layer.proj2.weight.div_(level_BDHW.std())


def _draw(name: str, module: nn.Module) -> None:
    from torch import nn

    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, RESIDUAL_GAIN if name.endswith(WRITES_RESIDUAL) else 1.0)
        nn.init.zeros_(module.get_parameter("bias"))
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_uniform_(module.weight, a=1)
        nn.init.zeros_(module.get_parameter("bias"))


def _spread_queries(decoder: Any) -> None:
    import torch
    from torch import nn

    nn.init.normal_(decoder.query_embed.weight)
    nn.init.normal_(decoder.presence_token.weight)
    queries = torch.arange(SHAPE.queries)
    columns = math.ceil(math.sqrt(SHAPE.queries))
    rows = math.ceil(SHAPE.queries / columns)
    centres_Q2 = torch.stack([(queries % columns + 0.5) / columns, (queries // columns + 0.5) / rows], -1)
    decoder.reference_points.weight.copy_(
        torch.logit(torch.cat([centres_Q2, torch.full_like(centres_Q2, FIRST_BOX)], -1))
    )
    # Small, so that the first steps of the boxes are, too.
    decoder.box_head.layer3.weight.mul_(0.1)
    nn.init.zeros_(decoder.box_head.layer3.bias)
