# SPDX-License-Identifier: Apache-2.0
"""EfficientSAM3's text student, written from its description in plain functions, as a reference for tests."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Sam3LiteTextTextConfig

from effsam3.models.chassis.tensors import read_config, read_tensors
from effsam3.models.text.student import DETECTOR, TEXT_ENCODER, TEXT_PROJECTION, StudentText

POSITIONS = "encoder.positional_embedding.pos_embed.pos_embed"
START, END = 49406, 49407


def linear(table_TD, length):
    """Resize a table along its rows, the half-pixel way: an independent reference in numpy."""
    rows = len(table_TD)
    places = np.clip((np.arange(length) + 0.5) * rows / length - 0.5, 0, rows - 1)
    return np.stack([np.interp(places, np.arange(rows), column) for column in table_TD.T], 1).astype(np.float32)


def upstream_text(tensors, ids_BL, heads):
    """EfficientSAM3's text student as its documents describe it, every token attending to every token."""

    def affine(name, x):
        return F.linear(x, tensors[name + ".weight"], tensors[name + ".bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], tensors[name + ".weight"], tensors[name + ".bias"])

    def batch_norm(name, x):
        values = (tensors[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values)

    length = ids_BL.shape[1]
    table = linear(tensors[POSITIONS][0, 0].numpy(), length)
    x = tensors["encoder.embedding_layer.weight"][ids_BL] + torch.from_numpy(table)
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("encoder.transformer.")}
    for layer in sorted(layers):
        at = f"encoder.transformer.{layer}."
        if at + "layer_scale" in tensors:
            maps = x.transpose(1, 2)[:, :, None]
            kernel = {"padding": (0, 5), "groups": maps.shape[1]}
            mixed = F.conv2d(maps, tensors[at + "token_mixer.mixer.rbr_conv.0.conv.weight"], **kernel)
            mixed = batch_norm(at + "token_mixer.mixer.rbr_conv.0.bn", mixed)
            mixed = mixed + batch_norm(at + "token_mixer.mixer.rbr_skip", maps)
            skipped = batch_norm(at + "token_mixer.norm.rbr_skip", maps)
            maps = maps + tensors[at + "token_mixer.layer_scale"] * (mixed - skipped)
            update = F.conv2d(maps, tensors[at + "convffn.conv.conv.weight"], **kernel)
            update = batch_norm(at + "convffn.conv.bn", update)
            for name in ("fc1", "fc2"):
                update = F.conv2d(update, *(tensors[f"{at}convffn.{name}.{kind}"] for kind in ("weight", "bias")))
                update = F.gelu(update) if name == "fc1" else update
            x = (maps + tensors[at + "layer_scale"] * update)[:, :, 0].transpose(1, 2)
            continue
        packed = affine(at + "pre_norm_mha.1.qkv_proj", norm(at + "pre_norm_mha.0", x))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + affine(at + "pre_norm_mha.1.out_proj", (weights @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(affine(at + "pre_norm_ffn.1", norm(at + "pre_norm_ffn.0", x)))
        x = x + affine(at + "pre_norm_ffn.4", hidden)
    return affine("projector", norm("encoder.final_layer_norm", x))


def random_rows(count):
    """Texts of 2, 3, ... tokens, start and end included."""
    generator = torch.Generator().manual_seed(0)
    return [[START, *torch.randint(1, START, (n,), generator=generator).tolist(), END] for n in range(count)]


def zero_padded(rows, length=32):
    """The rows themselves, and their ids as EfficientSAM3 pads them: zeros up to its context, and no mask."""
    return rows, torch.tensor([row + [0] * (length - len(row)) for row in rows])


@torch.no_grad()
def masked_features(folder, ids_BL, mask_BL):
    """The features of a merged folder's text student with its padding masked."""
    own = read_tensors(folder)
    tensors = {
        name.removeprefix(DETECTOR): t for name, t in own.items() if name.startswith((TEXT_ENCODER, TEXT_PROJECTION))
    }
    channels = len(tensors["text_projection.bias"])
    sizes = read_config(folder).detector_config.text_config.to_dict()
    config = Sam3LiteTextTextConfig(**{name: value for name, value in sizes.items() if name != "model_type"})
    student = StudentText(config, channels).eval()
    student.load_state_dict(tensors | {"feature_mean": torch.zeros(channels), "feature_scale": torch.ones(channels)})
    return student(ids_BL, mask_BL)
