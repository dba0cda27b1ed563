# SPDX-License-Identifier: Apache-2.0
"""Sessions of the efficient tracker: dense ones against transformers', and memory that does not grow."""

import pytest
import torch
from lively_trackers import MASKED, SIDE, efficient, lively_tracker, moving_video, trained
from transformers import Sam3TrackerVideoInferenceSession

from effsam3.models.chassis.tiny import WIDTH
from effsam3.models.memory.attention import FrameMemory


@pytest.fixture(scope="module")
def reference():
    return lively_tracker()


def square(number, side=SIDE):
    """A mask (1, 1, S, S) for object `number`."""
    mask = torch.zeros(1, 1, side, side)
    start = (17 * number) % (side // 2)
    mask[..., start : start + side // 3, side // 4 : side // 4 + 10 * number] = 1
    return mask


class Play:
    """A session and what it gave, by the order of the calls."""

    def __init__(self, model, frames=12, video=True):
        self.model, self.given, self.frames = model, [], moving_video(frames, model.image_size)
        self.session = Sam3TrackerVideoInferenceSession(
            video=self.frames if video else None,
            video_height=model.image_size,
            video_width=model.image_size,
            dtype=torch.float32,
        )

    def mask(self, number, frame):
        index = self.session.obj_id_to_idx(number)
        self.session.add_mask_inputs(index, frame, square(number + frame, self.model.image_size))
        self.session.obj_with_new_inputs.append(number)
        return self

    def point(self, number, frame, x=40.0, y=50.0):
        index = self.session.obj_id_to_idx(number)
        point = {"point_coords": torch.tensor([[[[x, y]]]]), "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
        self.session.add_point_inputs(index, frame, point)
        self.session.obj_with_new_inputs.append(number)
        return self

    def at(self, frame):
        return self._keep(self.model(self.session, frame))

    def stream(self, first, last):
        for frame in self.frames[first : last + 1]:
            self._keep(self.model(self.session, frame=frame))
        return self

    def track(self, start, reverse=False, most=None):
        for output in self.model.propagate_in_video_iterator(self.session, start, most, reverse):
            self._keep(output)
        return self

    def _keep(self, output):
        self.given.append((output.frame_idx, output.pred_masks.clone(), output.object_score_logits.clone()))
        return self

    def tensors(self):
        """Everything that the session's outputs hold: [(kind, name, tensor)]."""
        return [
            (kind, name, tensor)
            for outputs in self.session.output_dict_per_obj.values()
            for kind, frames in outputs.items()
            for output in frames.values()
            for name, tensor in output.items()
        ]

    def stored(self):
        """Bytes of storage behind the session's outputs, each counted once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for _, _, tensor in self.tensors()}
        return sum(storage.nbytes() for storage in storages.values())


def assert_same(found, expected, atol=1e-4):
    assert [frame for frame, *_ in found.given] == [frame for frame, *_ in expected.given]
    for (_, mask, score), (_, mask_too, score_too) in zip(found.given, expected.given, strict=True):
        torch.testing.assert_close(mask, mask_too, rtol=0, atol=atol)
        torch.testing.assert_close(score, score_too, rtol=0, atol=atol)


# ---- dense memory is transformers' tracker


def one_pass(play):
    play.mask(1, 0).point(2, 0).at(0).track(0)


def from_the_middle_both_ways(play):
    play.mask(1, 5).point(2, 5).at(5).track(5).track(5, reverse=True)


def an_object_added_later(play):
    play.point(1, 0).at(0).track(0, most=6).mask(2, 4).at(4).track(4)


def many_conditioning_frames(play):
    for frame in range(0, 12, 2):
        play.mask(1, frame).at(frame)
    play.track(3).track(7, reverse=True)


def a_tracked_frame_corrected(play):
    play.mask(1, 0).at(0).track(0, most=8).point(1, 6).at(6).track(6).track(6, reverse=True)


def a_stream(play):
    play.session.add_new_frame(play.frames[0])
    play.mask(1, 0).mask(2, 0).at(0).stream(1, 11)


def a_reset(play):
    play.mask(1, 0).at(0).track(0)
    play.session.reset_tracking_data()
    play.mask(3, 2).at(2).track(2)


@pytest.mark.parametrize(
    ("script", "frames"),
    [
        (one_pass, 12),  # fewer frames than pointers: their distances are scaled by the video's length
        (one_pass, 20),
        (from_the_middle_both_ways, 12),
        (an_object_added_later, 12),
        (many_conditioning_frames, 12),
        (a_tracked_frame_corrected, 12),
        (a_stream, 12),
        (a_reset, 12),
    ],
)
def test_a_dense_session_is_transformers_session(reference, script, frames):
    tracker = efficient(reference, memory_mode="dense")
    expected, found = (Play(model, frames, video=script is not a_stream) for model in (reference, tracker))
    script(expected)
    script(found)
    assert_same(found, expected)
    assert found.stored() < 0.5 * expected.stored()
    tracked = [mask for _, masks, _ in expected.given for mask in masks if 10 < mask.abs().max() < 1000]
    assert len(tracked) > 3


@pytest.mark.parametrize(
    ("changes", "script"),
    [
        ({"memory_mode": "pooled"}, from_the_middle_both_ways),
        ({"memory_mode": "latents"}, from_the_middle_both_ways),
        ({}, from_the_middle_both_ways),
        ({}, an_object_added_later),
        ({}, many_conditioning_frames),
        ({}, a_tracked_frame_corrected),
        ({}, a_stream),
        ({"memory_hot_frames": 0}, one_pass),
    ],
)
def test_other_modes_track_through_every_script(reference, changes, script):
    dense, other = (trained(efficient(reference, **asked)) for asked in ({"memory_mode": "dense"}, changes))
    expected, found = (Play(model, video=script is not a_stream) for model in (dense, other))
    script(expected)
    script(found)
    assert [frame for frame, *_ in found.given] == [frame for frame, *_ in expected.given]
    found, expected = (torch.cat([masks for _, masks, _ in play.given]) for play in (found, expected))
    assert found.isfinite().all() and (found - expected).abs().max() > 1e-2


# ---- memory does not grow


@pytest.mark.parametrize(
    ("mode", "frames", "objects"), [("hybrid", 300, 1), ("hybrid", 40, 2), ("dense", 40, 2), ("latents", 40, 2)]
)
def test_memory_stays_constant(mode, frames, objects):
    grid = 4
    latents = dict(memory_global_latents=2, memory_window_latents=4)
    tracker = efficient(lively_tracker(grid), grid, memory_mode=mode, **latents)
    play = Play(tracker, frames)
    for number in range(objects):
        play.mask(number, 0)
    play.at(0)
    stored = {output.frame_idx: play.stored() for output in tracker.propagate_in_video_iterator(play.session, 0)}
    # From where pointers no longer reach from the current frame to the first one, nothing is added.
    assert len({stored[frame] for frame in range(31, frames)}) == 1
    config = tracker.config
    # The first frame and the last two; other tracked frames in reach of the first or the last.
    kept = {"map": config.map_tokens, "latents": 6}  # of a frame; in bfloat16
    whole = sum(kept[what] for what in config.kept) * 2 * config.memory_encoder_output_channels
    cold = 6 * 2 * config.memory_encoder_output_channels if mode == "hybrid" else whole
    expected = 3 * whole + (6 + 5) * cold
    expected += (1 + 15 + 16) * 4 * (WIDTH + 1) + 2 * 4 * (4 * grid) ** 2  # pointers, scores; masks of two frames
    assert stored[frames - 1] == objects * expected
    for outputs in play.session.output_dict_per_obj.values():
        assert sorted(outputs["non_cond_frame_outputs"]) == [*range(1, 16), *range(frames - 16, frames)]
    # transformers' names: whoever reads a session finds what is there where it was.
    assert {name for _, name, _ in play.tensors()} == {
        "pred_masks",
        "object_pointer",
        "object_score_logits",
        "maskmem_features",
        "maskmem_pos_enc",
    }


@pytest.mark.parametrize(("every", "kept"), [(5, [0, 24, 29, 34, 39]), (1, [0, *range(33, 40)])])
def test_conditioning_frames_without_inputs_are_kept_within_the_limit(reference, every, kept):
    """As the detector makes them: the nearest four, and all that are in reach as ordinary frames."""
    tracker = efficient(reference)
    play = Play(tracker, 40).mask(1, 0).at(0)
    outputs = play.session.output_dict_per_obj[0]
    for output in tracker.propagate_in_video_iterator(play.session, 0):
        frame = output.frame_idx
        if frame % every == every - 1 and frame:
            outputs["cond_frame_outputs"][frame] = outputs["non_cond_frame_outputs"].pop(frame)
    play.at(39)
    assert sorted(outputs["cond_frame_outputs"]) == kept


# ---- training


def test_training_and_sessions_compute_the_same(reference):
    """Two objects at once through `remember` and `recall` give the masks of a session, which goes one by one."""
    tracker = trained(efficient(reference))
    play = Play(tracker, 9).mask(1, 0).mask(2, 0).at(0).track(0)
    given = torch.cat([square(1), square(2)])
    frames, pointers = [], []
    with torch.no_grad():
        for time, (_, expected, _) in enumerate(play.given[1:]):
            seen = tracker.get_image_features(play.frames[time : time + 1], return_dict=True).fpn_hidden_states
            maps = [
                x.permute(1, 2, 0).unflatten(2, size)
                for x, size in zip(seen, tracker.backbone_feature_sizes, strict=True)
            ]
            top = maps[-1].expand(2, -1, -1, -1)
            if time == 0:
                outputs = [tracker._use_mask_as_output(maps[-1], maps[:-1], mask[None]) for mask in given]
            else:
                past = [(0 if t == 0 else time - t, frames[t]) for t in [0, *range(max(1, time - 6), time)]]
                near = [(time - t, pointers[t]) for t in [0, *range(time - 1, 0, -1)]]
                conditioned = tracker.recall(top, past, near, video_frames=9)
                outputs = [
                    tracker._single_frame_forward(image_embeddings=[*maps[:-1], x[None]], multimask_output=True)
                    for x in conditioned
                ]
            masks = torch.cat([output.pred_masks.reshape(1, 1, MASKED, MASKED) for output in outputs])
            torch.testing.assert_close(masks, expected, rtol=0, atol=1e-2)
            high = torch.cat([output.high_res_masks.reshape(1, 1, SIDE, SIDE) for output in outputs])
            present = torch.cat([output.object_score_logits.flatten() for output in outputs]) > 0
            memory = tracker.remember(top, high, present, is_prompted=time == 0)
            # As a session stores it.
            frames.append(FrameMemory(memory.map_ONM.bfloat16(), memory.latents_OLM.bfloat16()))
            pointers.append(torch.cat([output.object_pointer.reshape(1, WIDTH) for output in outputs]))
