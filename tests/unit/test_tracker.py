# SPDX-License-Identifier: Apache-2.0
"""The training forward: the same tracking as transformers' sessions, the right gradients, nothing frozen moves.

Letters: O objects, T frames, S image side.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import Sam3TrackerVideoInferenceSession, Sam3TrackerVideoModel

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_part, read_config
from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.student import Scoring, TrackerStudent
from effsam3.models.memory.tracker import EfficientTracker, efficient_tracker_tensors
from effsam3.models.memory.training import (
    PARTS,
    Decoded,
    Features,
    Prompts,
    Tracked,
    encode_frames,
    nearest,
    read_tracker_tensors,
    track,
)

T, S = 4, 224  # in hybrid mode the fourth frame is the first to read latents
WEIGHTS = {"focal": 20.0, "dice": 1.0, "iou": 1.0, "presence": 1.0, "memory": 1.0}


def shapes(objects=3, frames=T):
    """Noisy frames with discs that move, and the discs' masks (O, T, S, S)."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij")
    pixels, masks = torch.randn(frames, 3, S, S, generator=generator) * 0.1, torch.zeros(objects, frames, S, S).bool()
    for o in range(objects):
        for t in range(frames):
            masks[o, t] = (x - 50 - 50 * o - 5 * t).square() + (y - 60 - 30 * o).square() < (18 + 4 * o) ** 2
            pixels[t, :, masks[o, t]] = torch.rand(3, 1, generator=generator) * 2 - 1
    return pixels, masks


def by_mask(objects):
    return Prompts(
        torch.zeros(objects, 1, 2, 2),
        torch.full((objects, 1, 2), -1, dtype=torch.int32),
        torch.ones(objects, 1).bool(),
    )


def mixed():
    """One object by its mask, one by a point, one by a box."""
    points = torch.tensor([[[0, 0], [0, 0]], [[100, 90], [0, 0]], [[124, 94], [176, 146]]]).float()
    labels = torch.tensor([[-1, -1], [1, -1], [2, 3]], dtype=torch.int32)
    return Prompts(points[:, None], labels[:, None], torch.tensor([[True], [False], [False]]))


@pytest.fixture(scope="module")
def tensors():
    """The tiny chassis' tracker, every object scored present: else masks would all be gated away."""
    tensors = {name: tensor.clone() for name, tensor in read_tracker_tensors(chassis_folder("tiny")).items()}
    tensors["mask_decoder.pred_obj_score_head.proj_out.bias"].fill_(5.0)
    return tensors


def make_tracker(tensors, mode, vision=True):
    own = read_config(chassis_folder("tiny")).tracker_config.to_dict()
    own.pop("model_type")
    config = EfficientTrackerConfig(**own, memory_mode=mode)
    given = {name: tensor for name, tensor in tensors.items() if vision or not name.startswith("vision_encoder.")}
    tracker = EfficientTracker(config, remove_vision_encoder=not vision)
    return load_part(tracker, efficient_tracker_tensors(given, config))


def make_student(tensors, mode="hybrid", parts=("memory",), side_px=56, **options):
    options = {"trunk_batch": 8, "objects_at_once": None, "recompute": False} | options
    teacher = make_tracker(tensors, "dense", vision=False)
    trained = [prefix.removesuffix(".") for part in parts for prefix in PARTS[part]]
    student = TrackerStudent(make_tracker(tensors, mode), trained, teacher, Scoring(WEIGHTS, side_px), **options)
    for name, parameter in student.named_parameters():
        if name.startswith("memory_resampler.") and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)  # what starts at zero hides what stands behind it
    return student


def inputs(prompts=None):
    pixels, masks = shapes()
    clip = torch.zeros(3, dtype=torch.long)
    return pixels[None], masks, clip, torch.full((3, T), 1 / 3), prompts or mixed()


def test_tracks_what_transformers_session_tracks(tensors):
    pixels, masks = shapes()
    own = read_config(chassis_folder("tiny")).tracker_config
    reference = load_part(Sam3TrackerVideoModel(own), tensors)
    session = Sam3TrackerVideoInferenceSession(video=pixels, video_height=S, video_width=S, dtype=torch.float32)
    for o in range(3):
        session.obj_id_to_idx(o)
        session.add_mask_inputs(o, 0, masks[o, :1][None].float())
    session.obj_with_new_inputs = [0, 1, 2]
    reference(session, frame_idx=0)
    expected = [output.pred_masks for output in reference.propagate_in_video_iterator(session)]

    tracker = make_tracker(tensors, "dense")
    with torch.no_grad():
        features = encode_frames(tracker, pixels, chunk=3, frozen=True)
        found = track(tracker, features, torch.arange(T).expand(3, T), masks, by_mask(3), by_truth=False)
    for t in range(1, T):
        low = found[t].predictions[0].best()[0]
        scale = expected[t].abs().max()
        # A session keeps memory in bfloat16, training does not.
        assert (low - expected[t][:, 0]).abs().max() < 2e-3 * scale, t
    assert low.std() > 0.01 * scale


def test_all_objects_at_once_equal_one_by_one(tensors):
    tracker = make_tracker(tensors, "hybrid")
    pixels, masks = shapes()
    clicks = torch.linspace(0.1, 0.9, 6).view(3, 2)
    prompts = mixed()
    prompts = replace(prompts, corrections={0: clicks, 2: clicks})
    with torch.no_grad():
        features = encode_frames(tracker, pixels, 8, frozen=True)
        together = track(tracker, features, torch.arange(T).expand(3, T), masks, prompts)
        for o in range(3):
            one = torch.tensor([o])
            alone = track(tracker, features, torch.arange(T)[None], masks[one], prompts.some(one))
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a.logits_OSS[one], b.logits_OSS, rtol=1e-4, atol=1e-4)


def test_gradients_are_ready_in_the_same_order_whatever_the_prompts(tensors):
    """ZeRO-1 and 2 lay them out in that order, and would add one rank's weights to another's biases."""
    student = make_student(tensors, parts=tuple(PARTS)).train()
    ready = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: ready.append(name))
    orders = []
    for prompts in (mixed(), by_mask(3)):
        ready.clear()
        student(*inputs(prompts))["loss"].backward()
        orders.append(list(ready))
    assert orders[0] == orders[1] and len(orders[0]) > 100


def test_a_copy_for_averaging_shares_what_is_frozen(tensors):
    student = make_student(tensors).eval()
    copied = deepcopy(student)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    own, other = dict(student.tracker.named_parameters()), dict(copied.tracker.named_parameters())
    assert own.keys() == other.keys() and trained < own.keys()
    assert all((own[name] is other[name]) == (name not in trained) for name in own)
    assert all(other[name] is parameter for name, parameter in copied.named_parameters())
    given = inputs()
    torch.testing.assert_close(copied(*given)["j"], student(*given)["j"])
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert next(student.parameters()).any()


@pytest.mark.parametrize("mode", ["hybrid", "latents", "pooled"])
def test_every_trained_parameter_learns_and_nothing_else_moves(tensors, mode):
    student = make_student(tensors, mode).train()
    before = {name: tensor.clone() for name, tensor in student.tracker.state_dict().items()}
    pixels, masks, *rest = inputs()
    masks[2, 1] = False  # an absent object: the only use of the occlusion embedding
    losses = student(pixels, masks, *rest)
    losses["loss"].backward()
    assert {"loss", *WEIGHTS} == set(losses)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    frozen = [name for name, parameter in student.tracker.named_parameters() if not parameter.requires_grad]
    assert any(name.startswith("mask_decoder") for name in frozen)
    torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1).step()
    after = student.tracker.state_dict()
    for name in frozen:
        assert torch.equal(before[name], after[name]), name
    assert not any(torch.equal(before[name], after[name]) for name in after if name.startswith("memory_encoder.fu"))


def test_frozen_parts_stay_in_eval_mode(tensors):
    student = make_student(tensors).train()
    assert student.tracker.memory_attention.training and student.tracker.training
    tracker, teacher = student.tracker, student.teacher
    frozen = (tracker.mask_decoder, tracker.vision_encoder, tracker.prompt_encoder, *teacher.children())
    assert not any(module.training for part in frozen for module in part.modules())


def test_a_later_loss_reaches_an_earlier_frame(tensors):
    student = make_student(tensors).train()
    pixels, masks = shapes()
    features = encode_frames(student.tracker, pixels, 8, frozen=True)
    top = features.top.clone().requires_grad_()
    features = Features(features.fine, features.middle, top)
    tracked = track(student.tracker, features, torch.arange(T).expand(3, T), masks, by_mask(3))
    tracked[-1].predictions[0].logits_NMLL.sum().backward()
    assert all(top.grad[t].any() for t in range(T))


def test_activations_computed_again_and_objects_in_turns_change_nothing(tensors):
    expected = make_student(tensors).train()
    clicks = torch.linspace(0.1, 0.9, 3).view(3, 1)
    prompts = mixed()
    prompts = replace(prompts, corrections={0: clicks, 2: clicks})
    parts = expected(*inputs(prompts))
    parts["loss"].backward()
    for options in ({"recompute": True}, {"objects_at_once": 1, "trunk_batch": 1}):
        student = make_student(tensors, **options).train()
        student.load_state_dict(expected.state_dict())
        found = student(*inputs(prompts))
        found["loss"].backward()
        assert found["loss"].item() == pytest.approx(parts["loss"].item(), rel=1e-5)
        for (name, a), b in zip(student.named_parameters(), expected.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-7, name


def test_dense_memory_agrees_with_its_teacher(tensors):
    assert make_student(tensors, "dense").train()(*inputs())["memory"].item() < 1e-9
    assert make_student(tensors, "latents").train()(*inputs())["memory"].item() > 1e-4


def test_the_best_mask_is_chosen_by_the_students_own_weights(tensors):
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4, :] = True
    sure = torch.where(mask[:, 0], 8.0, -8.0)  # four pixels wrong: the lower dice, the higher focal loss
    sure[:, 0, :4] *= -1
    logits, one = torch.stack([torch.zeros(1, 8, 8), sure], 1), torch.zeros(1)
    decoded = Decoded(one.long(), logits, torch.zeros(1, 2), one, torch.zeros(1, 2, 4))
    student = make_student(tensors, side_px=8)
    found = []
    for focal in (20.0, 0.0):
        student.scoring = Scoring(WEIGHTS | {"focal": focal}, 8)
        found.append(student.losses([Tracked(0, [decoded], sure)], mask, torch.ones(1, 1))["dice"].item())
    assert found[0] > 0.4 > 0.1 > found[1]


def test_a_copy_for_averaging_is_whole(tensors):
    student = make_student(tensors)
    copy = deepcopy(student)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.1)
    name = "memory_encoder.projection.weight"
    assert torch.equal(copy.tracker.get_parameter(name), copy.get_parameter(name))
    assert not torch.equal(student.tracker.get_parameter(name), copy.get_parameter(name))


def test_student_holds_its_parts_under_the_trackers_names(tensors):
    student = make_student(tensors, parts=("memory", "neck"))
    names = set(student.state_dict())
    assert names < set(student.tracker.state_dict())
    assert {name.split(".")[0] for name in names} == {
        "memory_attention",
        "memory_encoder",
        "memory_resampler",
        "memory_temporal_positional_encoding",
        "occlusion_spatial_embedding_parameter",
        "vision_encoder",
    }


def test_corrections_add_predictions_and_conditioning_frames(tensors):
    student = make_student(tensors).train()
    pixels, masks = shapes()
    features = encode_frames(student.tracker, pixels, 8, frozen=True)
    prompts = mixed()
    clicks = {0: torch.rand(3, 3), 1: torch.rand(3, 2)}
    prompts = replace(prompts, corrections=clicks)
    tracked = track(student.tracker, features, torch.arange(T).expand(3, T), masks, prompts)
    # Frame 0: a point and a box decoded, three corrections of both; the given mask is never scored.
    assert [len(frame.predictions) for frame in tracked] == [5, 3, 1, 1]
    assert all(part.objects_N.tolist() == [1, 2] for part in tracked[0].predictions[2:])
    assert tracked[1].predictions[1].objects_N.tolist() == [0, 1, 2]


def test_all_conditioning_frames_are_read_where_there_is_no_limit(tensors):
    """-1, as in transformers; corrected frames condition."""
    student = make_student(tensors).eval()
    pixels, masks = shapes()
    features = encode_frames(student.tracker, pixels, 8, frozen=True)
    prompts = mixed()
    clicks = {frame: torch.rand(3, 1) for frame in (0, 1, 2)}
    prompts = replace(prompts, corrections=clicks)

    def last(most):
        student.tracker.config.max_cond_frame_num = most
        with torch.no_grad():
            return track(student.tracker, features, torch.arange(T).expand(3, T), masks, prompts)[-1].logits_OSS

    assert torch.equal(last(-1), last(9)) and not torch.equal(last(-1), last(1))


def test_a_given_mask_enters_memory_as_it_is_and_an_absent_object_not_at_all(tensors):
    tracker = make_tracker(tensors, "hybrid")
    pixels, masks = shapes()
    masks = masks.clone()
    masks[1, 2] = False
    with torch.no_grad():
        features = encode_frames(tracker, pixels, 8, frozen=True)
        tracked = track(tracker, features, torch.arange(T).expand(3, T), masks, by_mask(3))
    assert torch.equal(tracked[0].logits_OSS > 0, masks[:, 0]) and not tracked[0].predictions
    assert (tracked[2].logits_OSS[1] == -1024).all() and (tracked[2].logits_OSS[0] > -1024).all()


# ---- prompted later


def at(objects, *frames, kind="mask"):
    """Prompts of all objects on some frames: by their masks, or by boxes around discs where `shapes` has them."""
    drawn = []
    for o in range(objects):
        none = torch.zeros(2, 2), torch.full((2,), -1, dtype=torch.int32), True
        centres = {t: torch.tensor([50.0 + 50 * o + 5 * t, 60.0 + 30 * o]) for t in frames}
        boxes = {
            t: (torch.stack([c - 20, c + 20]), torch.tensor([2, 3], dtype=torch.int32), False)
            for t, c in centres.items()
        }
        drawn.append(boxes if kind == "box" else dict.fromkeys(frames, none))
    return Prompts.of(drawn)


def in_session(tensors, prompts, objects, frames):
    """Logits of a transformers session whose prompts are all given before it is propagated: {frame: (O, L, L)}."""
    pixels, masks = shapes(objects)
    own = read_config(chassis_folder("tiny")).tracker_config
    reference = load_part(Sam3TrackerVideoModel(own), tensors)
    session = Sam3TrackerVideoInferenceSession(video=pixels, video_height=S, video_width=S, dtype=torch.float32)
    for o in range(objects):
        session.obj_id_to_idx(o)
    for t in frames:
        for o in range(objects):
            if prompts.by_mask_OF[o, t]:
                session.add_mask_inputs(o, t, masks[o, t][None, None].float())
            else:
                points, labels = prompts.points_OFP2[o, t][None, None], prompts.labels_OFP[o, t][None, None]
                session.add_point_inputs(o, t, {"point_coords": points, "point_labels": labels})
        session.obj_with_new_inputs = list(range(objects))
        reference(session, frame_idx=t)
    return {output.frame_idx: output.pred_masks[:, 0] for output in reference.propagate_in_video_iterator(session)}


@pytest.mark.parametrize(("frames", "kind"), [((1,), "mask"), ((0, 2), "mask"), ((0, 2), "box")])
def test_prompts_on_chosen_frames_track_what_a_session_tracks(tensors, frames, kind):
    prompts = at(2, *frames, kind=kind)
    tracker = make_tracker(tensors, "dense")
    expected = in_session(tensors, prompts, 2, frames)
    pixels, masks = shapes(2)
    with torch.no_grad():
        features = encode_frames(tracker, pixels, 4, frozen=True)
        found = track(tracker, features, torch.arange(T).expand(2, T), masks, prompts, by_truth=False)
    assert [frame.time for frame in found] == sorted(expected) == list(range(frames[0], T))
    for frame in found:
        wanted = expected[frame.time]
        if frame.time in frames:
            assert frame.conditioned_OCGG is None
            if kind == "mask":
                continue  # what was given is not predicted
        low = frame.predictions[0].best()[0]
        scale = wanted.abs().max()
        assert (low - wanted).abs().max() < 2e-3 * scale and low.std() > 0.01 * scale, frame.time


def test_the_nearest_conditioning_frames_are_those_of_transformers():
    model = Sam3TrackerVideoModel
    for given in ([0], [0, 2], [0, 1, 5, 7, 9], [3, 4, 5]):
        for time in range(11):
            for most in (2, 3, 4):  # with 1, and one before and after, transformers slices by -1
                wanted, _ = model._select_closest_cond_frames(None, time, dict.fromkeys(given), most)
                found = nearest(given, time, most)
                assert sorted(found) == sorted(wanted), (given, time, most)


def test_objects_prompted_on_other_frames_do_not_change_each_other(tensors):
    student = make_student(tensors).eval()
    pixels, masks = shapes()
    none = torch.zeros(2, 2), torch.full((2,), -1, dtype=torch.int32), True
    prompts = Prompts.of([{0: none}, {2: none}, {0: none, 2: none}])
    weights = torch.full((3, T), 0.1)
    student.scoring = replace(student.scoring, held_out=True)
    together = student(pixels[None], masks, torch.zeros(3, dtype=torch.long), weights, prompts)
    assert len(prompts.groups(None)) == 3 and together["j"][1, :2].tolist() == [0, 0]
    parts = []
    for o in range(3):
        one = torch.tensor([o])
        parts.append(
            student(pixels[None], masks[one], torch.zeros(1, dtype=torch.long), weights[one], prompts.some(one))
        )
        torch.testing.assert_close(parts[-1]["j"][0], together["j"][o])
    torch.testing.assert_close(sum(part["loss"] for part in parts), together["loss"])
