# SPDX-License-Identifier: Apache-2.0
"""A frame's memory map cut into windows, and resampled to a few latents.

The resampler follows EdgeTAM (arXiv 2501.07256) with three differences: it starts as average pooling, its latents read
one another, and it tiles whatever grid the tracker has.

Letters: O objects, G side of the tracker's grid, M channels of the memory, W windows of the grid, K cells of a window,
N tokens, L latents, X column and row, C any channels, B batch, Q queries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effsam3.models.memory.config import MemoryConfigError


def windows(map_OMGG: Tensor, side: int) -> Tensor:
    """Cut a map into square windows of `side` x `side` cells: (O, W, K, M), windows and cells row by row."""
    across = map_OMGG.shape[-1] // side
    # Pure reshaping, so that pooling and resampling see exactly the same windows.
    cut = map_OMGG.unflatten(3, (across, side)).unflatten(2, (across, side))
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def coordinates(grid: int, device: torch.device) -> Tensor:
    """Column and row of every cell of a grid, float (X, G, G). Their mean over a window is the window's centre."""
    steps = torch.arange(grid, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(steps, steps, indexing="xy"))


def window_side(grid: int, count: int, key: str) -> int:
    """Return the side in cells of the windows when `count` of them tile the grid.

    Raises:
        MemoryConfigError: they do not; the message names the key and the counts that would.
    """
    across = math.isqrt(count)
    if across == 0 or across**2 != count or grid % across:
        fitting = ", ".join(str(n * n) for n in range(1, grid + 1) if grid % n == 0)
        raise MemoryConfigError(f"{key}: {count} windows do not tile the {grid}x{grid} grid; choose from {fitting}")
    return grid // across


class ResamplerAttention(nn.Module):
    """Attention with one head, no biases, and an output that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, query_BQM: Tensor, key_BNM: Tensor, value_BNM: Tensor) -> Tensor:
        # With an axis of heads, though there is one: exporters know no other attention.
        query, key, value = self.q_proj(query_BQM), self.k_proj(key_BNM), self.v_proj(value_BNM)
        return self.o_proj(F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0])


class ResamplerFeedForward(nn.Module):
    """LayerNorm, four times wider, GELU, and an output that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width, bias=False)
        self.linear2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, latents_OLM: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(self.norm(latents_OLM))))


class ResamplerLayer(nn.Module):
    """Latents read the map, then one another. A window's latent reads its window only, a global one every cell."""

    def __init__(self, width: int):
        super().__init__()
        self.map_norm = nn.LayerNorm(width)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attn = ResamplerAttention(width)
        self.cross_feed_forward = ResamplerFeedForward(width)
        self.self_norm = nn.LayerNorm(width)
        self.self_attn = ResamplerAttention(width)
        self.self_feed_forward = ResamplerFeedForward(width)

    def forward(self, latents_OLM: Tensor, map_OWKM: Tensor, encoding_WKM: Tensor, encoding_LM: Tensor) -> Tensor:
        cells_OWKM = self.map_norm(map_OWKM)
        query_OLM = self.cross_norm(latents_OLM)
        # There is one latent per window, and they come last; the rest are global.
        count = latents_OLM.shape[1] - map_OWKM.shape[1]
        # Only here do global latents learn where something is: so the encoding is in their values too.
        cells_ONM = (cells_OWKM + encoding_WKM).flatten(1, 2)
        global_OLM = self.cross_attn(query_OLM[:, :count], cells_ONM, cells_ONM)
        # Windows become the batch: one call of 64 small attentions instead of a mask over all cells.
        own_BKM = cells_OWKM.flatten(0, 1)
        window_OLM = self.cross_attn(query_OLM[:, count:].reshape(-1, 1, own_BKM.shape[-1]), own_BKM, own_BKM)
        read_OLM = torch.cat([global_OLM, window_OLM.reshape(query_OLM[:, count:].shape)], 1)
        # Residual: what is learned is the difference to average pooling.
        latents_OLM = latents_OLM + read_OLM
        latents_OLM = latents_OLM + self.cross_feed_forward(latents_OLM)
        normed_OLM = self.self_norm(latents_OLM)
        # Positions only in queries and keys: latents learn who is near, without mixing places into their content.
        placed_OLM = normed_OLM + encoding_LM
        latents_OLM = latents_OLM + self.self_attn(placed_OLM, placed_OLM, normed_OLM)
        return latents_OLM + self.self_feed_forward(latents_OLM)


class PerceiverResampler(nn.Module):
    """A frame's memory map to a few latents: global ones, then one for each window of the grid.

    Every update is residual and starts at zero, so an untrained resampler is average pooling: a window's latent is its
    window's mean, a global latent the map's mean plus a little noise. There is no last LayerNorm, so the latents keep
    the scale that SAM 3's pretrained memory attention expects.

    Raises:
        MemoryConfigError: the windows do not tile the grid.
    """

    def __init__(self, width: int, grid: int, global_latents: int, window_latents: int, depth: int):
        super().__init__()
        self.side = window_side(grid, window_latents, "memory_window_latents")
        self.global_offset = nn.Parameter(torch.empty(global_latents, width))
        self.window_offset = nn.Parameter(torch.empty(window_latents, width))
        # How many cells' worth of attention a window's latent draws, as a logarithm.
        self.window_log_multiplicity = nn.Parameter(torch.empty(1))
        self.layers = nn.ModuleList(ResamplerLayer(width) for _ in range(depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the resampler to average pooling."""
        # Noise, because equal global latents would receive equal gradients and stay equal.
        nn.init.normal_(self.global_offset, std=0.02)
        nn.init.zeros_(self.window_offset)
        # A window's latent replaces side x side cells: with ln of their number it draws as much attention as they did.
        nn.init.constant_(self.window_log_multiplicity, 2 * math.log(self.side))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                # Everything but the outputs starts random, or no gradient would reach it.
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in self.layers.modules():
            if isinstance(module, ResamplerAttention):
                # Zero outputs make every update vanish at first: the untrained resampler is exactly average pooling.
                nn.init.zeros_(module.o_proj.weight)
            elif isinstance(module, ResamplerFeedForward):
                nn.init.zeros_(module.linear2.weight)

    def place(self, constant_CGG: Tensor) -> Tensor:
        """Bring a constant of the grid to the latents, (L, C): zero for global ones, the mean over each window."""
        window_WC = windows(constant_CGG[None], self.side).mean(2)[0]
        return torch.cat([window_WC.new_zeros(len(self.global_offset), window_WC.shape[1]), window_WC])

    def log_multiplicity(self) -> Tensor:
        """Return what is added to the attention logits of the latents, (L,)."""
        return torch.cat(
            [
                self.window_log_multiplicity.new_zeros(len(self.global_offset)),
                self.window_log_multiplicity.expand(len(self.window_offset)),
            ]
        )

    def forward(self, map_OMGG: Tensor, encoding_MGG: Tensor) -> Tensor:
        """Return latents (O, L, M) of memory maps, given the grid's position encoding."""
        # The encoding is cut in the same way as the map, so that each cell keeps its own.
        map_OWKM = windows(map_OMGG, self.side)
        encoding_WKM = windows(encoding_MGG[None].to(map_OMGG.dtype), self.side)[0]
        encoding_LM = self.place(encoding_MGG).to(map_OMGG.dtype)
        window_OWM = map_OWKM.mean(2)
        latents_OLM = torch.cat(
            [window_OWM.mean(1, keepdim=True) + self.global_offset, window_OWM + self.window_offset], 1
        )
        for layer in self.layers:
            latents_OLM = layer(latents_OLM, map_OWKM, encoding_WKM, encoding_LM)
        return latents_OLM
