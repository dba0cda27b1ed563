# SPDX-License-Identifier: Apache-2.0
"""How many tokens a tracked frame reads: only arithmetic, no torch, so that `show` answers at once."""

from __future__ import annotations

CHANNELS = 64  # of a memory token; transformers' memory attention allows no others


def count_tokens(
    mode: str,
    *,
    grid: int,
    pool: int,
    latents: int,
    hot_frames: int,
    pointer_tokens: int,
    frames: int,
    pointers: int,
) -> int:
    """Count the tokens that a frame reads for one object: of `frames` frames, one of them conditioning, and pointers.

    Args:
        mode: one of `memory_config.MODES`; what it does not keep is not counted.
        grid: side of the tracker's feature grid, in cells.
        pool: side of the pooled windows, in cells; `dense` does not pool.
        latents: of a frame, global and of windows.
        hot_frames: how many recent frames keep their map in `hybrid`.
        pointer_tokens: tokens of one pointer, the tracker's width divided by `CHANNELS`.
    """
    mapped = {"latents": 0, "hybrid": min(frames, 1 + hot_frames)}.get(mode, frames)
    side = grid if mode == "dense" else grid // pool
    return mapped * side**2 + (frames - mapped) * latents + pointers * pointer_tokens
