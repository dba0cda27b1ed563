# SPDX-License-Identifier: Apache-2.0
"""What an efficient memory is made of: a tracker's config."""

from __future__ import annotations

from typing import Any

from transformers import Sam3TrackerVideoConfig

from effsam3.errors import UserError, did_you_mean

# What each mode keeps of a frame. In hybrid the map is kept only while the frame is recent or conditions.
MODES = {"hybrid": ("map", "latents"), "latents": ("latents",), "pooled": ("map",), "dense": ("map",)}


class MemoryConfigError(UserError):
    """An efficient memory that does not fit the tracker's grid or its weights."""


class EfficientTrackerConfig(Sam3TrackerVideoConfig):
    """`Sam3TrackerVideoConfig` and what the memory is made of. One set of weights serves every mode.

    `dense` keeps every cell of every frame, as SAM 3 does. `pooled` keeps the mean of windows of `memory_pool` x
    `memory_pool` cells. `latents` resamples a frame to a few latents. `hybrid` keeps the pooled map of conditioning
    frames and of the `memory_hot_frames` most recent ones, and latents of the others.
    """

    model_type = "effsam3_tracker_video"
    base_config_key = "tracker_config"  # so that the folder of a Sam3VideoModel is read too

    memory_mode: str = "hybrid"
    memory_pool: int = 2  # side of the pooled windows, in cells
    memory_global_latents: int = 64  # latents of a frame that read the whole map
    memory_window_latents: int = 64  # latents of a frame that read a window each; a square number
    memory_resampler_depth: int = 2  # layers
    memory_hot_frames: int = 1  # hybrid: how many recent frames keep their map

    @property
    def grid(self) -> int:
        """Side of the tracker's feature grid, in cells."""
        sizes: Any = self.memory_attention_rope_feat_sizes
        return sizes[0]

    @property
    def pool(self) -> int:
        """Side in cells of the windows that a map's tokens represent, in this mode."""
        return 1 if self.memory_mode == "dense" else self.memory_pool

    @property
    def kept(self) -> tuple[str, ...]:
        """What this mode keeps of a frame: its map, latents or both.

        Raises:
            MemoryConfigError: there is no such mode.
        """
        if self.memory_mode not in MODES:
            raise MemoryConfigError(f"memory_mode: no {self.memory_mode!r}{did_you_mean(self.memory_mode, MODES)}")
        return MODES[self.memory_mode]

    @property
    def keeps_map(self) -> bool:
        """Whether this mode keeps maps, of some frames or all."""
        return "map" in self.kept

    @property
    def keeps_latents(self) -> bool:
        """Whether this mode resamples frames to latents."""
        return "latents" in self.kept

    @property
    def map_tokens(self) -> int:
        """Tokens of one map as it is kept."""
        return (self.grid // self.pool) ** 2 if self.keeps_map else 0


def refuse_misfit(config: EfficientTrackerConfig) -> None:
    """Refuse a mode that does not exist and pooled windows that do not tile the grid.

    Raises:
        MemoryConfigError: one of these; the message names the key.
    """
    sides = [side for side in range(1, config.grid + 1) if config.grid % side == 0]
    if config.kept and config.memory_pool not in sides:
        raise MemoryConfigError(
            f"memory_pool: windows of {config.memory_pool}x{config.memory_pool} cells do not tile the "
            f"{config.grid}x{config.grid} grid; choose from {', '.join(map(str, sides))}"
        )
