# SPDX-License-Identifier: Apache-2.0
"""The text side: SAM 3's frozen text encoder as teacher, MobileCLIP's text towers as students.

A student is transformers' Sam3LiteText encoder and projection, so a merged model is plain `Sam3LiteText*`; one that
attends to its padding is a subclass (models/text_padding.py). Teacher and students take padded ids and their mask as
models/tokens.py makes them, padding on the right.

Letters: B texts, L tokens, C channels of SAM 3's detector, D channels inside a student.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import CLIPTextModelWithProjection, Sam3Config, Sam3LiteTextConfig, Sam3LiteTextTextConfig
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import (
    Sam3LiteTextRepMixerBlock,
    Sam3LiteTextTextPositionEmbedding,
)

from effsam3.models.chassis.tensors import ChassisError, fingerprint, load_part, read_config, read_tensors
from effsam3.models.registry import of_type, text_student_row
from effsam3.models.text.padding import RULES, padding_of
from effsam3.models.text.shortened import first_positions, shorten
from effsam3.models.text.tokens import PAD_ID

DETECTOR = "detector_model."
TEXT_ENCODER = DETECTOR + "text_encoder."  # these two are the slot `text`
TEXT_PROJECTION = DETECTOR + "text_projection."

Layer = TypeVar("Layer", nn.Conv1d, nn.Linear)


class TextTeacher(nn.Module):
    """Frozen SAM 3 text features: ids and mask (B, L) to one vector per token (B, L, C) float32, projection included.

    Attributes: `channels` C; `context_length`, the most tokens it can read; `fingerprint` of all its tensors.
    """

    part = "text encoder"

    def __init__(self, config: Sam3Config):
        """Build it from a SAM 3's sizes, those of its detector, without its weights."""
        super().__init__()
        text: Any = config.text_config
        self.context_length = text.max_position_embeddings
        detr: Any = config.detr_encoder_config
        self.channels = detr.hidden_size
        self.text_encoder = CLIPTextModelWithProjection(text)
        self.text_projection = nn.Linear(text.hidden_size, self.channels)
        self.fingerprint = ""  # of all weights, once it has them
        self.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path) -> TextTeacher:
        """Load it from a chassis folder.

        Raises:
            ChassisError: the folder's text encoder is not SAM 3's, or incomplete.
        """
        whole = read_config(folder)
        config = whole.detector_config
        if (kind := config.text_config.model_type) != (own := of_type(whole.model_type).text_type):
            raise ChassisError(
                f"sam3.checkpoint: the text encoder of {folder} is a {kind!r}, a student already; the teacher must be "
                f"SAM 3 itself (text encoder {own!r})"
            )
        teacher = cls(config)
        named: dict[str, Tensor] = {}
        for prefix, part in ((TEXT_ENCODER, teacher.text_encoder), (TEXT_PROJECTION, teacher.text_projection)):
            tensors = read_tensors(folder, prefix)
            named |= {prefix + name: tensor for name, tensor in tensors.items()}
            load_part(part, tensors).float()
        teacher.fingerprint = fingerprint(named)
        return teacher

    @property
    def own(self) -> nn.Module:
        """What `fingerprint` is of: encoder and projection."""
        return self

    def train(self, mode: bool = True) -> TextTeacher:
        """Stay in eval mode whatever mode the loop sets."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return features (B, L, C), float32.

        The encoder is causal, so padding never affects a token; features at padding are meaningless.
        """
        hidden_BLD = self.text_encoder.text_model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return self.text_projection(hidden_BLD).float()


def check_tokens(tokens_BLC: Tensor, mask_BL: Tensor) -> None:
    """Refuse features that a real text encoder cannot have made of these texts (two or more different ones).

    Raises:
        ChassisError: features that are not finite, or the same for every token.
    """
    valid_NC = tokens_BLC[mask_BL]
    if not valid_NC.isfinite().all():
        raise ChassisError("the teacher's text features are not finite; check sam3.checkpoint and train.precision")
    if (valid_NC.var(0, correction=0) <= 1e-6 * valid_NC.square().mean()).all():
        raise ChassisError("the teacher gives every token the same features; check sam3.checkpoint")


class FirstPositions(Sam3LiteTextTextPositionEmbedding):
    """The first L rows of the table of positions, where transformers would squeeze the whole table into L rows.

    So texts padded to less than the table get what they get when padded to all of it.
    """

    def forward(self, seq_len: int) -> Tensor:
        return self.position_embedding[0, :, :seq_len]


class StudentText(nn.Module):
    """A student in the place of SAM 3's text encoder: ids and mask (B, L) to features (B, L, C) float32, raw.

    It computes what `Sam3LiteTextModel.get_text_features` will on the same texts padded to `context_length`, which is
    the length of its table of positions. transformers stretches the table over any other length, and its SAM 3
    processors always pad to 32: a student for them has `context_length` 32, however short its training texts are.
    `padding` is its padding rule, kept in the config. Where tokens do not attend to padding, short texts are computed
    in less than the whole length, to the same features.

    `norms` tells what the BatchNorms of RepMixer blocks do in training: `batch` takes the statistics of each
    micro-batch, of all `context_length` positions, as in use; `kept` leaves those that the weights came with, as in
    eval mode, and so lets short texts be short in training, too.

    `feature_scale` and `feature_mean` are the teacher's per-channel deviation and mean: the network works in
    standardised units. `to_lite_text_tensors` multiplies them into the projection.
    """

    def __init__(self, config: Sam3LiteTextTextConfig, channels: int, norms: str = "batch"):
        super().__init__()
        self.context_length = config.max_position_embeddings
        self.padding, self.norms = padding_of(config), norms
        self.text_encoder = shorten(RULES[self.padding].text_model(config))
        embeddings = self.text_encoder.embeddings
        table = embeddings.position_embedding.position_embedding
        # The same table under the same name: checkpoints and merged models stay transformers' own.
        embeddings.position_embedding = FirstPositions(self.context_length, config.hidden_size)
        embeddings.position_embedding.position_embedding = table
        # MobileCLIP's own projection of the pooled text. SAM 3 never reads it, so it would never get a gradient; it
        # stays because transformers' class has it.
        self.text_encoder.projection.requires_grad_(False)
        self.text_projection = nn.Linear(config.hidden_size, channels)
        self.feature_mean: Tensor
        self.feature_scale: Tensor
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_scale", torch.ones(channels))

    def set_feature_statistics(self, mean_C: Tensor, deviation_C: Tensor) -> None:
        """Set the teacher's per-channel mean and deviation (float, C each)."""
        self.feature_mean.copy_(mean_C)
        self.feature_scale.copy_(deviation_C)

    @property
    def last_layer(self) -> nn.Linear:
        """The layer whose output `feature_scale` and `feature_mean` turn into features."""
        return self.text_projection

    def train(self, mode: bool = True) -> StudentText:
        """Set the mode, of BatchNorms whose statistics are kept always that of inference."""
        super().train(mode)
        if self.norms == "kept":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                    module.eval()
        return self

    @property
    def reads_padding(self) -> bool:
        """Whether tokens depend on all positions: these are attended, or counted in the statistics of a BatchNorm."""
        counts = self.training and self.norms == "batch" and self.text_encoder.config.use_repmixer_blocks
        return self.padding == "attended" or counts

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return features (B, L, C); L is at most `context_length`, and features at padding are meaningless."""
        length, missing = ids_BL.shape[1], self.context_length - ids_BL.shape[1]
        assert missing >= 0, f"{length} tokens, the student reads {self.context_length}"
        if self.reads_padding:
            ids_BL, mask_BL = F.pad(ids_BL, (0, missing), value=PAD_ID), F.pad(mask_BL, (0, missing))
            hidden_BLD = self.text_encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state[:, :length]
        else:
            hidden_BLD = first_positions(self.text_encoder, ids_BL, mask_BL, self.context_length)
        # float(): under bf16 autocast large channels would lose the small differences that matter.
        return self.text_projection(hidden_BLD).float() * self.feature_scale + self.feature_mean


def lite_text_config(name: str, context_length: int, padding: str = "masked") -> Sam3LiteTextTextConfig:
    """Return transformers' config of the text student `name` with `context_length` positions."""
    row = text_student_row(name)
    return RULES[padding].text_config(
        hidden_size=row.hidden_size,
        intermediate_size=4 * row.hidden_size,
        projection_dim=row.hidden_size,
        num_hidden_layers=row.num_hidden_layers,
        num_attention_heads=row.num_attention_heads,
        use_repmixer_blocks=row.use_repmixer_blocks,
        max_position_embeddings=context_length,
    )


def text_student(
    name: str, context_length: int, channels: int, padding: str = "masked", norms: str = "batch"
) -> StudentText:
    """Build the text student `name`, randomly initialised, for features of `channels`; see `StudentText`."""
    return StudentText(lite_text_config(name, context_length, padding), channels, norms)


def lite_text_detector_config(detector_config, text_config: Sam3LiteTextTextConfig) -> Sam3LiteTextConfig:
    """Return a `Sam3Config` as the `Sam3LiteTextConfig` with this text encoder and everything else the same.

    Its class is that of the text encoder's padding rule.
    """
    own = ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config", "mask_decoder_config")
    # Their model_type differs, nothing else.
    parts = {name: getattr(detector_config, name).to_dict() for name in own}
    for part in parts.values():
        del part["model_type"]
    # Copies: a config resets the attention of those that it takes in, and a model built from them would lose its mask.
    return RULES[padding_of(text_config)].detector_config(
        vision_config=deepcopy(detector_config.vision_config),
        text_config=deepcopy(text_config),
        initializer_range=detector_config.initializer_range,
        **parts,
    )


def to_lite_text_tensors(student: StudentText) -> dict[str, Tensor]:
    """Return the student's tensors as a merged model holds them, named from `detector_model.` on."""
    tensors = student.state_dict()
    mean_C, scale_C = tensors.pop("feature_mean"), tensors.pop("feature_scale")
    tensors["text_projection.weight"] = tensors["text_projection.weight"] * scale_C[:, None]
    tensors["text_projection.bias"] = tensors["text_projection.bias"] * scale_C + mean_C
    return dict(tensors)


class FoldedRepMixer(nn.Module):
    """A RepMixer block with its branches, norms and scales multiplied out: two depthwise convolutions and an MLP."""

    def __init__(self, block: Sam3LiteTextRepMixerBlock):
        super().__init__()
        mixer, feed_forward = block.token_mixer.mixer, block.conv_feed_forward
        weight_D1K, bias_D = _fold_norm(mixer.conv.weight[:, :, 0], mixer.batchnorm_conv)
        # x + scale * (conv(x) + skip(x) - reference(x)); the last two and x itself act at the kernel's middle.
        identity_D1K = torch.zeros_like(weight_D1K)
        identity_D1K[:, :, identity_D1K.shape[2] // 2] = 1
        skip, reference = (
            _fold_norm(identity_D1K, norm) for norm in (mixer.batchnorm_skip, block.token_mixer.reference_batchnorm)
        )
        scale_D = block.token_mixer.layer_scale[:, 0, 0]
        self.mixer = _depthwise(
            identity_D1K + scale_D[:, None, None] * (weight_D1K + skip[0] - reference[0]),
            scale_D * (bias_D + skip[1] - reference[1]),
        )
        self.depthwise_conv = _depthwise(
            *_fold_norm(feed_forward.depthwise_conv.weight[:, :, 0], feed_forward.depthwise_batchnorm)
        )
        fc1, fc2, scale_D = feed_forward.mlp.fc1, feed_forward.mlp.fc2, block.layer_scale[:, 0, 0]
        self.reach = 2 * (self.mixer.kernel_size[0] // 2)
        self.activation_fn = feed_forward.mlp.activation_fn
        assert fc1.bias is not None and fc2.bias is not None  # RepMixer's have one
        self.fc1 = _filled(nn.Linear(fc1.in_channels, fc1.out_channels), fc1.weight[:, :, 0, 0], fc1.bias)
        self.fc2 = _filled(
            nn.Linear(fc2.in_channels, fc2.out_channels),
            scale_D[:, None] * fc2.weight[:, :, 0, 0],
            scale_D * fc2.bias,
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, positions: int | None = None, **kwargs
    ) -> Tensor:
        """Take (B, L, D) and return its first `positions`, as `RepMixerBlock` does."""
        mixed_BDL = self.mixer(hidden_states.transpose(1, 2))
        update_BLD = self.depthwise_conv(mixed_BDL)[..., :positions].transpose(1, 2)
        return mixed_BDL[..., :positions].transpose(1, 2) + self.fc2(self.activation_fn(self.fc1(update_BLD)))


def _fold_norm(weight_D1K: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a depthwise convolution without bias followed by this BatchNorm."""
    assert norm.running_mean is not None and norm.running_var is not None  # it was trained with statistics
    return fuse_conv_bn_weights(
        weight_D1K, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def _depthwise(weight_D1K: Tensor, bias_D: Tensor) -> nn.Conv1d:
    channels, _, kernel = weight_D1K.shape
    conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
    return _filled(conv, weight_D1K, bias_D)


def _filled(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return layer


def fold_repmixer(model: nn.Module) -> nn.Module:
    """Return a copy for inference of any model in eval mode, its RepMixer blocks folded; it computes the same.

    The copy is for running, timing and exporting: transformers' class has no place for folded blocks, so what is saved
    is always the model itself.
    """
    assert not model.training, "BatchNorm folds with its running statistics: call eval() first"
    folded = deepcopy(model)
    for parent in list(folded.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Sam3LiteTextRepMixerBlock):
                setattr(parent, name, FoldedRepMixer(child).eval())
    return folded
