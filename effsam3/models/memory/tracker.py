# SPDX-License-Identifier: Apache-2.0
"""SAM 3's tracker with an efficient memory: the slot `memory` of a release.

It is transformers' `Sam3TrackerVideoModel` with another memory bank: processors, sessions and
`propagate_in_video_iterator` work unchanged, on its own and inside `Sam3VideoModel`. Training calls `remember` and
`recall` with many objects at once; a session calls the same two.

Letters: O objects, G side of the grid, C channels of the tracker, M channels of the memory, L latents, N tokens,
P pointers, S side of a mask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, Sam3TrackerVideoModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import get_1d_sine_pe

from effsam3.models.memory.attention import EfficientMemoryAttention, FrameMemory, MemoryTokens
from effsam3.models.memory.config import EfficientTrackerConfig, MemoryConfigError, refuse_misfit
from effsam3.models.memory.resampler import PerceiverResampler, coordinates, windows
from effsam3.models.memory.session import forget

RESAMPLER = "memory_resampler."  # what SAM 3 does not have
LAYER = re.compile(r"memory_attention\.layers\.(\d+)\.(.+)")
# Hidden channels may be fewer than SAM 3's: the first ones are kept, on both sides of the activation.
SLICED = re.compile(r"memory_encoder\.memory_fuser\.layers\.\d+\.pointwise_conv[12]\.(weight|bias)")
STORED = torch.bfloat16  # of a session's memory, as in SAM 3


def make_resampler(config: EfficientTrackerConfig) -> PerceiverResampler:
    """Build the resampler that a config describes, untrained."""
    return PerceiverResampler(
        config.memory_encoder_output_channels,
        config.grid,
        config.memory_global_latents,
        config.memory_window_latents,
        config.memory_resampler_depth,
    )


class EfficientTracker(Sam3TrackerVideoModel):
    """SAM 3's tracker with a memory of pooled maps and latents.

    Raises:
        MemoryConfigError: windows or latents do not tile the grid; the message names the key.
    """

    config_class = EfficientTrackerConfig
    config: EfficientTrackerConfig

    def __init__(self, config: EfficientTrackerConfig, remove_vision_encoder: bool = False):
        super().__init__(config, remove_vision_encoder)
        refuse_misfit(config)
        self.memory_attention = EfficientMemoryAttention(config)
        # Always built, even where a mode does not use it, so that one checkpoint serves all modes.
        self.memory_resampler = make_resampler(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            module.reset_parameters()

    def remember(
        self, top_OCGG: Tensor, mask_logits_O1SS: Tensor, present_O: Tensor, is_prompted: bool
    ) -> FrameMemory:
        """Encode a frame and its masks for O objects; differentiable, nothing is detached or rounded.

        `top_OCGG` is the tracker neck's last level as it comes, for every object or one for all.
        `mask_logits_O1SS` are logits of any size; if `is_prompted`, evaluation takes them as hard masks. `present_O`
        (bool) marks visible objects: the others get the occlusion embedding.
        """
        config = self.config
        side = 4 * self.prompt_encoder.mask_input_size[0]
        logits_O1SS = mask_logits_O1SS.float()  # torch's antialiased kernel knows no bfloat16 on the CPU
        if logits_O1SS.shape[-1] != side:
            logits_O1SS = F.interpolate(logits_O1SS, (side, side), mode="bilinear", antialias=True)
        # As in SAM 2: a given mask is exact at inference, but hard values have no gradient in training.
        mask_O1SS = (logits_O1SS > 0).float() if is_prompted and not self.training else logits_O1SS.sigmoid()
        mask_O1SS = mask_O1SS * config.sigmoid_scale_for_mem_enc + config.sigmoid_bias_for_mem_enc
        map_OMGG, _ = self.memory_encoder(top_OCGG, mask_O1SS.to(top_OCGG.dtype))
        if self.occlusion_spatial_embedding_parameter is not None:
            # An absent object's map would look like background; the embedding marks it as absent instead.
            absent_O111 = (~present_O)[:, None, None, None]
            map_OMGG = map_OMGG + absent_O111 * self.occlusion_spatial_embedding_parameter[..., None, None]
        return FrameMemory(
            self._map_tokens(map_OMGG) if config.keeps_map else None,
            self.memory_resampler(map_OMGG, self._grid_encoding(map_OMGG.device)) if config.keeps_latents else None,
        )

    def recall(
        self,
        top_OCGG: Tensor,
        frames: list[tuple[int, FrameMemory]],
        pointers: list[tuple[int, Tensor]],
        video_frames: int | None = None,
    ) -> Tensor:
        """Condition a frame's features on remembered frames, for O objects; differentiable. Returns (O, C, G, G).

        `frames` are in the bank's order, each with its temporal offset: 0 for a conditioning frame, else how many
        frames back (1 to `num_maskmem` - 1). `pointers` are (signed distance in frames, object pointers (O, C)).
        `video_frames` is the video's length, None for a stream: a video shorter than
        `max_object_pointers_in_encoder` has its distances measured by its own length, as in SAM 3.
        """
        tokens = self._gather(frames, pointers, video_frames, top_OCGG)
        return self.memory_attention(top_OCGG, tokens)

    def _map_tokens(self, map_OMGG: Tensor) -> Tensor:
        """Return tokens of maps as they are kept: the mean of every window, row by row."""
        return windows(map_OMGG, self.config.pool).mean(2)

    def _grid_encoding(self, device: torch.device) -> Tensor:
        """Sine encoding of the grid's cells, float32 (M, G, G)."""
        shape = (1, self.mem_dim, self.config.grid, self.config.grid)
        return self.memory_encoder.position_encoding(shape, device, torch.float32)[0]

    def _gather(
        self,
        frames: list[tuple[int, FrameMemory]],
        pointers: list[tuple[int, Tensor]],
        video_frames: int | None,
        like: Tensor,
    ) -> MemoryTokens:
        """Lay the bank out as tokens; of each frame what its mode reads."""
        config = self.config
        # Offset 0 is a conditioning frame, so prompted frames always count as recent.
        hot = [config.memory_mode != "hybrid" or offset <= config.memory_hot_frames for offset, _ in frames]
        maps, latents = [], []
        for (offset, memory), is_hot in zip(frames, hot, strict=True):
            if memory.map_ONM is not None and is_hot:
                maps.append((offset, memory.map_ONM))
            else:
                assert memory.latents_OLM is not None  # a frame keeps at least one of the two
                latents.append((offset, memory.latents_OLM))
        longest = config.max_object_pointers_in_encoder
        # A short video must spread its distances over the same range as a long one, as SAM 3 was trained.
        longest = longest if video_frames is None else min(video_frames, longest)
        seen = _stacked(pointers, like)
        if seen is not None:
            seen = seen[0], seen[1] / max(longest - 1, 1)
        return self.tokens(_stacked(maps, like), _stacked(latents, like), seen)

    def tokens(
        self,
        maps: tuple[Tensor, Tensor] | None,
        latents: tuple[Tensor, Tensor] | None,
        pointers: tuple[Tensor, Tensor] | None,
    ) -> MemoryTokens:
        """Lay a memory out as tokens: maps first, then latents, then pointers; None for what there is not.

        Args:
            maps: tokens (O, F, N, M) of F frames' maps, and the frames' offsets (F,).
            latents: latents (O, F, L, M) of others, and their offsets.
            pointers: object pointers (O, P, C), and their distances (P,) as shares of the longest.
        """
        config = self.config
        device = self.memory_temporal_positional_encoding.device
        # What is constant over frames is brought to tokens exactly as the features were.
        constant_CGG = torch.cat([self._grid_encoding(device), coordinates(config.grid, device)])
        parts = []
        if maps is not None:
            map_NC = self._map_tokens(constant_CGG[None])[0]
            # A pooled token replaces pool x pool cells: ln of their number gives it the attention that they would
            # have drawn.
            parts.append(self._frame_tokens(*maps, map_NC, map_NC.new_full((len(map_NC),), 2 * math.log(config.pool))))
        if latents is not None:
            place_LC = self.memory_resampler.place(constant_CGG)
            parts.append(self._frame_tokens(*latents, place_LC, self.memory_resampler.log_multiplicity()))
        if pointers is not None:
            parts.append(self._pointer_tokens(*pointers))
        values, encodings, positions, biases = zip(*parts, strict=True)
        return MemoryTokens(
            torch.cat(values, 1),
            torch.cat(encodings),
            torch.cat(positions),
            # None where all biases are zero, because attention without a mask can use faster kernels.
            torch.cat(biases) if latents is not None or (maps is not None and config.pool > 1) else None,
        )

    def _frame_tokens(
        self, kept_OFNM: Tensor, offset_F: Tensor, constant_NC: Tensor, bias_N: Tensor
    ) -> tuple[Tensor, ...]:
        """Lay frames out one after the other: values, encodings, positions and biases."""
        # An offset of 0, a conditioning frame's, has the last encoding.
        temporal_FM = self.memory_temporal_positional_encoding[(offset_F - 1) % self.num_maskmem].flatten(1)
        # The last two channels are the coordinates, which must not receive the temporal encoding.
        encoding_FNM = constant_NC[:, :-2] + temporal_FM[:, None]
        place_FNX = constant_NC[:, -2:].expand(offset_F.shape[0], -1, -1)
        return (
            kept_OFNM.flatten(1, 2),
            encoding_FNM.flatten(0, 1),
            place_FNX.flatten(0, 1),
            bias_N.expand(offset_F.shape[0], -1).flatten(),
        )

    def _pointer_tokens(self, pointer_OPC: Tensor, distance_P: Tensor) -> tuple[Tensor, ...]:
        """Cut every pointer into tokens of M channels: values, encodings, positions and biases."""
        value_OPTM = pointer_OPC.unflatten(2, (-1, self.mem_dim))
        sine_PC = get_1d_sine_pe(distance_P, dim=self.hidden_dim)
        encoding_PM = self.temporal_positional_encoding_projection_layer(sine_PC.to(pointer_OPC.dtype)).float()
        encoding_PM = encoding_PM.repeat_interleave(value_OPTM.shape[2], 0)
        return (
            value_OPTM.flatten(1, 2),
            encoding_PM,
            # A pointer belongs to no place: position (0, 0) leaves it unrotated.
            torch.zeros_like(encoding_PM[:, :2]),
            torch.zeros_like(encoding_PM[:, 0]),
        )

    # ---- what transformers' sessions call

    def _encode_new_memory(  # type: ignore[override]  # a session keeps whatever this returns
        self,
        current_vision_feats: Tensor,
        pred_masks_high_res: Tensor,
        object_score_logits: Tensor,
        is_mask_from_pts: bool,
    ) -> tuple[Tensor, Tensor]:
        """Remember a frame of a session: tokens (N, O, M), map first, and no position encodings to store."""
        top_OCGG = current_vision_feats.permute(1, 2, 0).unflatten(2, self.backbone_feature_sizes[-1])
        memory = self.remember(top_OCGG, pred_masks_high_res, object_score_logits.flatten() > 0, is_mask_from_pts)
        # A session stores one tensor per frame, so map and latents are packed; the number of tokens tells what is
        # inside.
        kept = [tokens_ONM for tokens_ONM in (memory.map_ONM, memory.latents_OLM) if tokens_ONM is not None]
        packed_NOM = torch.cat(kept, 1).to(STORED).transpose(0, 1)
        return packed_NOM, packed_NOM.new_empty(0, *packed_NOM.shape[1:])

    def _unpack(self, packed_NOM: Tensor) -> FrameMemory:
        """Undo `_encode_new_memory`; a frame that has cooled down has its latents only."""
        tokens_ONM = packed_NOM.transpose(0, 1)
        latents = self.config.memory_global_latents + self.config.memory_window_latents
        if not self.config.keeps_latents:
            return FrameMemory(tokens_ONM)
        if tokens_ONM.shape[1] == latents:
            return FrameMemory(None, tokens_ONM)
        return FrameMemory(*tokens_ONM.tensor_split([self.config.map_tokens], 1))

    def _prepare_memory_conditioned_features(
        self,
        inference_session,
        frame_idx: int,
        obj_idx: int,
        is_initial_conditioning_frame: bool,
        current_vision_features: Tensor,  # type: ignore[override]  # transformers passes a tensor, too
        current_vision_positional_embeddings: Tensor,  # type: ignore[override]  # likewise
        num_total_frames: int,
        track_in_reverse_time: bool = False,
        streaming: bool = False,
    ) -> Tensor:
        """Recall a session's memory for one object: features (N, 1, C) to (1, C, G, G)."""
        top_OCGG = current_vision_features.permute(1, 2, 0).unflatten(2, self.backbone_feature_sizes[-1])
        # Nothing is remembered yet. SAM 3 adds this embedding instead of attending to an empty memory.
        if is_initial_conditioning_frame:
            return top_OCGG + self.no_memory_embedding.reshape(1, -1, 1, 1)
        bank = self._gather_memory_frame_outputs(inference_session, obj_idx, frame_idx, track_in_reverse_time)
        frames = [
            (offset, self._unpack(output["maskmem_features"].to(top_OCGG.device)))
            for offset, output in bank
            if output is not None and "maskmem_features" in output
        ]
        distances, found, _ = self._get_object_pointers(
            inference_session,
            obj_idx,
            frame_idx,
            num_total_frames,
            top_OCGG.device,
            track_in_reverse_time,
            streaming,
        )
        pointers = [(distance, pointer.flatten(0, -2)) for distance, pointer in zip(distances, found, strict=True)]
        return self.recall(top_OCGG, frames, pointers, None if streaming else num_total_frames)

    @torch.inference_mode()
    def forward(self, inference_session, *args, **kwargs):
        """Track one frame of a session, as in transformers, then drop what no later frame will read."""
        output = super().forward(inference_session, *args, **kwargs)
        forget(inference_session, output.frame_idx, self.config)
        return output


def _stacked(some: Sequence[tuple[int, Tensor]], like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return tensors (O, ...) as one (O, F, ...) of the type of `like`, and their numbers (F,); None of none."""
    if not some:
        return None
    numbers, tensors = zip(*some, strict=True)
    return torch.stack(tensors, 1).to(like.dtype), torch.tensor(numbers, device=like.device)


def in_mode(tracker: EfficientTracker, mode: str) -> EfficientTracker:
    """Return a tracker with the same weights and another `memory_mode`; parameters are shared."""
    config = deepcopy(tracker.config)
    config.memory_mode = mode
    other = EfficientTracker(config)
    # Assigned, so that four modes in a table take the memory of one.
    other.load_state_dict(tracker.state_dict(), assign=True)
    return torch.nn.Module.to(other, tracker.device).eval().requires_grad_(False)


# ---- first weights


def efficient_tracker_tensors(
    tensors: Mapping[str, Tensor], config: EfficientTrackerConfig, seed: int = 0
) -> dict[str, Tensor]:
    """Return the tensors of an `EfficientTracker` that starts from SAM 3's tracker.

    `tensors` are named as in `Sam3TrackerVideoModel`; those of its vision encoder are passed through. The
    memory-attention layers are spread evenly from the first to the last (0 and 3 for two of four). Memory-fuser layers
    are the first ones, their hidden channels too. The resampler is new, drawn from `seed`.

    Raises:
        MemoryConfigError: fewer layers or channels than the config asks for, or a tensor is missing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        resampler = make_resampler(config).state_dict(prefix=RESAMPLER)
    with torch.device("meta"):
        wanted = EfficientTracker(config, remove_vision_encoder=True).state_dict()
    # Spread evenly, because neighbouring layers do similar work: the first and the last differ most.
    kept = kept_layers(tensors, config.memory_attention_num_layers)
    placed = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_encoder.")} | resampler
    for name, target in wanted.items():
        if name in resampler:
            continue
        source = name
        if match := LAYER.fullmatch(name):
            source = f"memory_attention.layers.{kept[int(match[1])]}.{match[2]}"
        if source not in tensors:
            raise MemoryConfigError(f"SAM 3's tracker has no tensor {source}, which the efficient tracker starts from")
        placed[name] = cut(source, tensors[source], target.shape)
    return placed


def kept_layers(tensors: Mapping[str, Tensor], count: int) -> list[int]:
    """Return which of SAM 3's memory-attention layers become the `count` layers of the efficient tracker.

    Raises:
        MemoryConfigError: there are fewer.
    """
    there = 1 + max((int(match[1]) for name in tensors if (match := LAYER.fullmatch(name))), default=-1)
    if count > there:
        raise MemoryConfigError(
            f"memory_attention_num_layers: {count} layers asked for, SAM 3's tracker has {there}; ask for no more"
        )
    return [round(i * (there - 1) / max(count - 1, 1)) for i in range(count)]


def cut(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor, or its first channels when it is a hidden layer that may be narrower than SAM 3's.

    Raises:
        MemoryConfigError: the tensor cannot be brought to this shape.
    """
    if tensor.shape == shape:
        return tensor
    fits = tensor.ndim == len(shape) and all(has >= asked for has, asked in zip(tensor.shape, shape, strict=True))
    if not fits or not SLICED.fullmatch(name):
        raise MemoryConfigError(
            f"{name} is {tuple(tensor.shape)} in SAM 3's tracker and {tuple(shape)} in the efficient one; only the "
            "number of layers and memory_fuser_intermediate_dim may be smaller"
        )
    return tensor[tuple(slice(asked) for asked in shape)].clone()


class _Refusal(WeightRenaming):
    """Replaces the renames for any class but `EfficientTracker`, which would continue with random weights."""

    __slots__ = ()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        raise MemoryConfigError(
            "this model's tracker has an efficient memory, which transformers' own trackers cannot hold; load it with "
            "effsam3.models.memory.tracker.EfficientTracker, or as a part of the whole model with Sam3VideoModel"
        )


AutoConfig.register(EfficientTrackerConfig.model_type, EfficientTrackerConfig)
AutoModel.register(EfficientTrackerConfig, EfficientTracker)
# transformers finds a tracker's weights in the folder of a Sam3VideoModel by renames. By the class's name, not by the
# config's model_type: that is SAM 3's own when the folder is.
register_checkpoint_conversion_mapping(EfficientTracker.__name__, get_checkpoint_conversion_mapping("sam3_tracker"))
# Classes that are not found by name are looked up by the tracker's entry in config.json.
register_checkpoint_conversion_mapping(EfficientTrackerConfig.model_type, [_Refusal(".", ".")])
