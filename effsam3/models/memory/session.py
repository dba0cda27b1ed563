# SPDX-License-Identifier: Apache-2.0
"""The memory bank of a session, kept from growing with the video.

transformers keeps every frame's memory and full-size masks for ever, though a frame reads only a few of them. An
`EfficientTracker` forgets by itself; `forget_as_it_tracks` makes SAM 3's own tracker do so.
"""

from __future__ import annotations

from torch import Tensor, nn

from effsam3.models.memory.config import EfficientTrackerConfig


def forget_as_it_tracks(tracker: nn.Module) -> None:
    """Have a `Sam3TrackerVideoModel` forget after every frame; what it predicts stays the same."""
    if not isinstance(tracker.config, EfficientTrackerConfig):
        tracker.register_forward_hook(_forget_after, with_kwargs=True)


def _forget_after(tracker, arguments: tuple, named: dict, output) -> None:
    session = arguments[0] if arguments else named["inference_session"]
    forget(session, output.frame_idx, tracker.config)


def forget(session, frame: int, config) -> None:
    """Drop from a tracker's session what no frame after `frame` will read, whichever way the video is tracked.

    What stays, for each object: frames within reach of `frame`, frames within reach of a frame with the user's inputs
    (tracking may start there again, in either direction), and all that those inputs gave. `frame` itself may be
    tracked once more, after a click or with a new object. Frames that the detector made conditioning frames, without
    inputs, stay while they are among the nearest `max_cond_frame_num`.
    """
    for index, outputs in session.output_dict_per_obj.items():
        inputs = session.point_inputs_per_obj[index].keys() | session.mask_inputs_per_obj[index].keys()
        _forget_tracked(outputs["non_cond_frame_outputs"], frame, {frame, *inputs}, config)
        _forget_conditioning(outputs["cond_frame_outputs"], frame, inputs, config)


def _forget_tracked(outputs: dict[int, dict], frame: int, anchors: set[int], config) -> None:
    """Trim the frames that were tracked: pointers reach further than memories, memories further than maps."""
    for index in list(outputs):
        # Every frame with inputs is an anchor: tracking may restart there, and will then read its neighbours.
        distance = min(abs(index - anchor) for anchor in anchors)
        output = outputs[index]
        if distance >= config.max_object_pointers_in_encoder:
            del outputs[index]
            continue
        output.pop("high_res_masks", None)
        # A later click on this very frame needs its mask as a prompt; on other frames nothing reads it.
        if index != frame:
            output.pop("pred_masks", None)
        if distance >= config.num_maskmem:
            output.pop("maskmem_features", None)
            output.pop("maskmem_pos_enc", None)
        if "maskmem_features" in output:
            # Only recent frames are read as maps; of the others the latents are enough, a tenth of the bytes.
            keeps_latents = isinstance(config, EfficientTrackerConfig) and config.keeps_latents
            cold = keeps_latents and abs(index - frame) > config.memory_hot_frames
            output["maskmem_features"] = _own(_cold(output, config) if cold else output["maskmem_features"])


def _forget_conditioning(outputs: dict[int, dict], frame: int, inputs: set[int], config) -> None:
    """Trim conditioning frames; their low-resolution masks stay, a session shows them again."""
    # Frames that the user has prompted always stay; those that the detector made compete for a limited number.
    made = sorted((index for index in outputs if index not in inputs), key=lambda index: abs(index - frame))
    limit = len(made) if config.max_cond_frame_num == -1 else config.max_cond_frame_num
    for index in made[limit:]:
        if abs(index - frame) >= config.num_maskmem:
            del outputs[index]
    for output in outputs.values():
        output.pop("high_res_masks", None)
        if "maskmem_features" in output:
            output["maskmem_features"] = _own(output["maskmem_features"])


def _cold(output: dict, config) -> Tensor:
    """Return the latents of a packed frame (N, 1, M), which come last."""
    return output["maskmem_features"][-(config.memory_global_latents + config.memory_window_latents) :]


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor itself if it fills its storage, else a copy: a view would keep the rest alive."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
