# SPDX-License-Identifier: Apache-2.0
"""MobileCLIP's text tower in Apple's format, written from its description, as a reference for tests."""

import torch
from torch import nn


class AppleAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv_proj, self.out_proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv_proj(x).chunk(3, 2))
        weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class AppleLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.pre_norm_mha = nn.Sequential(nn.LayerNorm(width), AppleAttention(width, heads), nn.Dropout(0.0))
        mlp = nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * width, width)
        self.pre_norm_ffn = nn.Sequential(nn.LayerNorm(width), *mlp)

    def forward(self, x):
        x = x + self.pre_norm_mha(x)
        return x + self.pre_norm_ffn(x)


def conv_and_norm(width):
    conv = nn.Conv2d(width, width, (1, 11), padding=(0, 5), groups=width, bias=False)
    return nn.ModuleDict({"conv": conv, "bn": nn.BatchNorm2d(width)})


class AppleRepMixer(nn.Module):
    """x + s (conv(x) + skip(x) - norm(x)), then x + s' ffn(conv(x)), every one of them followed by its BatchNorm."""

    def __init__(self, width):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.ones(width, 1, 1))
        self.token_mixer = nn.ParameterDict({"layer_scale": nn.Parameter(torch.ones(width, 1, 1))})
        self.token_mixer.norm = nn.ModuleDict({"rbr_skip": nn.BatchNorm2d(width)})
        branches = {"rbr_skip": nn.BatchNorm2d(width), "rbr_conv": nn.ModuleList([conv_and_norm(width)])}
        self.token_mixer.mixer = nn.ModuleDict(branches)
        fc1, fc2 = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.convffn = nn.ModuleDict({"conv": conv_and_norm(width), "fc1": fc1, "fc2": fc2})

    def forward(self, x):
        x = x.transpose(1, 2)[:, :, None]
        mixer, conv = self.token_mixer.mixer, self.token_mixer.mixer["rbr_conv"][0]
        mixed = conv["bn"](conv["conv"](x)) + mixer["rbr_skip"](x) - self.token_mixer.norm["rbr_skip"](x)
        x = x + self.token_mixer["layer_scale"] * mixed
        ffn = self.convffn
        hidden = ffn["conv"]["bn"](ffn["conv"]["conv"](x))
        x = x + self.layer_scale * ffn["fc2"](nn.functional.gelu(ffn["fc1"](hidden)))
        return x[:, :, 0].transpose(1, 2)


class AppleTower(nn.Module):
    """MobileCLIP-S0's text tower, of `tiny_text`'s size, with its parameters' names; without RepMixer, S1's."""

    def __init__(self, width=32, heads=2, positions=77, repmixer=True):
        super().__init__()
        self.embedding_layer = nn.Embedding(49408, width)
        self.positional_embedding = nn.ModuleDict({"pos_embed": nn.ParameterDict()})
        self.positional_embedding["pos_embed"]["pos_embed"] = nn.Parameter(torch.randn(1, 1, positions, width))
        layers = [AppleRepMixer(width), AppleLayer(width, heads), AppleRepMixer(width)]
        self.transformer = nn.ModuleList(layers if repmixer else [AppleLayer(width, heads) for _ in range(2)])
        self.final_layer_norm = nn.LayerNorm(width)
        self.projection_layer = nn.Parameter(torch.randn(width, width))

    def forward(self, ids):
        x = self.embedding_layer(ids) + self.positional_embedding["pos_embed"]["pos_embed"][0, :, : ids.shape[1]]
        for layer in self.transformer:
            x = layer(x)
        x = self.final_layer_norm(x)
        return x[torch.arange(len(x)), ids.argmax(1)] @ self.projection_layer, x


@torch.no_grad()
def randomise(tower):
    for key, tensor in tower.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
