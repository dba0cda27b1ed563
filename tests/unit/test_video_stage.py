# SPDX-License-Identifier: Apache-2.0
"""Stage video without a loop: what learns, prompts and weights of objects that come later, and what is merged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from own_videos import coco_video, moving, own_videos, walks, write_frames, write_json
from run_folders import RECIPES, merged_run

from effsam3.data.sampler import PADDING
from effsam3.errors import RecipeError, UserError
from effsam3.losses.masks import bce, dice, soft_iou
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import fingerprint, read_config, read_tensors
from effsam3.models.memory.prompts import draw_kind
from effsam3.models.memory.slot import in_whole_model
from effsam3.models.memory.trainable import find_trainable
from effsam3.models.memory.training import Decoded, Tracked
from effsam3.models.merging.slots import MergeError
from effsam3.recipe.reader import load_recipe
from effsam3.stages.memory import training as memory_training
from effsam3.stages.video.facts import TERMS
from effsam3.stages.video.merging import adapted_of_run
from effsam3.stages.video.training import STAGE, load_tracker, make_tracker, untrained
from effsam3.training.report import Report

SMOKE = RECIPES / "smoke/video.yaml"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return [
        *own_videos(walks(folder)), f"train.runs={folder}/runs", "data.frames=4", "data.reverse=0",
        "data.held_out=0.3", "prompts={mask: 0.25, point: 0.25, box: 0.25, mixed: 0.25}",
    ]  # fmt: skip


def make(overrides, folder, *more):
    return STAGE.from_recipe(load_recipe(SMOKE, [*overrides, *more]), Report(folder), Accelerator(cpu=True))


@pytest.fixture(scope="module")
def stage(overrides, tmp_path_factory):
    return make(overrides, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def batch(stage):
    """Two clips of the first step."""
    return next(iter(stage.train_batches(0, 1, 2)))


def part(batch, *clips):
    clips = list(clips)
    taken = {name: value[clips] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return taken | {name: [batch[name][clip] for clip in clips] for name in ("keys", "numbers")} | {"unreadable": []}


# ---- what learns


def test_the_header_counts_what_learns(stage):
    lines = stage.describe()
    assert stage.student_parameters == sum(p.numel() for p in stage.student.parameters())
    assert f"{stage.student_parameters / 1e6:.2f} M of" in lines["learns"]
    for name in ("memory_attention", "memory_encoder", "mask_decoder"):
        count = sum(p.numel() for p in stage.student.tracker.get_submodule(name).parameters())
        assert stage.counts[name] == count and f"{name} {count / 1e6:.2f} M (" in lines["learns"]
    assert "COCO-video JSON" in lines["data"] and "dense memory" in lines["tracker"]


def test_what_readers_repaired_is_counted_by_reason(overrides, tmp_path):
    content = coco_video(moving())
    for annotation in content["annotations"]:
        annotation["category_id"] = annotation.pop("track_id")
    write_frames(tmp_path / "walk", [f"{k:05d}.jpg" for k in range(5)])
    stage = make(overrides, tmp_path, f"data.path={write_json(tmp_path / 'tracks.json', content)}")
    assert "1 x category_as_track" in stage.describe()["data"] or "2 x category_as_track" in stage.describe()["data"]
    assert len(stage.train_data) == len(stage.val_data) == 1  # one video, divided in time


@pytest.fixture(scope="module")
def tracker():
    with torch.device("meta"):
        return make_tracker(read_config(chassis_folder("tiny")).tracker_config)


def test_names_are_found_at_the_top_below_and_as_parameters(tracker):
    found = find_trainable(tracker, ["memory_encoder", "transformer", "neck", "no_memory_embedding", "linear1"])
    assert found["memory_encoder"] == ["memory_encoder"] and found["transformer"] == ["mask_decoder.transformer"]
    assert found["neck"] == ["vision_encoder.neck"] and found["no_memory_embedding"] == ["no_memory_embedding"]
    assert found["linear1"] == [f"memory_attention.layers.{layer}.linear1" for layer in (0, 1)]
    # Whole names win: there is more than one that ends in it.
    assert find_trainable(tracker, ["memory_attention.layers.0.linear1.bias"]) == {
        "memory_attention.layers.0.linear1.bias": ["memory_attention.layers.0.linear1.bias"]
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "memory_encoderr",
            r"nothing in the tracker is called 'memory_encoderr'; did you mean memory_encoder; its mod",
        ),
        (
            "zebra",
            r"called 'zebra'; its modules are .*vision_encoder.*mask_decoder.*memory_attention",
        ),
        ("memory_resampler", r"the tracker never uses 'memory_resampler' \(dense memory\)"),
        ("fpn_layers.3", "never uses 'fpn_layers.3'"),
    ],
)
def test_a_name_that_means_nothing(overrides, tmp_path, name, message):
    with pytest.raises(UserError, match=f"model.trainable: .*{message}"):
        make(overrides, tmp_path, f"model.trainable=[{name}]")


def test_a_name_of_many_places_trains_all_of_them_and_says_so(overrides, tmp_path):
    stage = make(overrides, tmp_path, "model.trainable=[linear1,memory_attention.layers.0,no_object_pointer]")
    line = stage.describe()["learns"]
    assert "linear1 " in line and "2 x, memory_attention.layers.0.linear1, memory_attention.layers.1.linear1" in line
    names = set(stage.student.state_dict())
    wanted = {name for name in stage.student.tracker.state_dict() if name.startswith("memory_attention.layers.0.")}
    assert names == wanted | {f"memory_attention.layers.1.linear1.{kind}" for kind in ("weight", "bias")} | {
        "no_object_pointer"
    }
    student = stage.student.train()
    assert student.tracker.memory_attention.layers[0].training
    assert not student.tracker.memory_attention.layers[1].training  # of which only a part learns
    assert {name for name, p in student.tracker.named_parameters() if p.requires_grad} == names


def test_the_memory_encoder_learns_through_later_frames(overrides, tmp_path, batch):
    """Nothing is detached between frames: the encoder's only effect is on what later frames recall."""
    stage = make(overrides, tmp_path, "model.trainable=[memory_encoder]")
    stage.loss(stage.student.train(), batch)["loss"].backward()
    silent = {name for name, p in stage.student.named_parameters() if not p.grad.any()}
    assert not silent, silent


def test_a_module_moves_and_its_scale_too(overrides, tmp_path):
    stage = make(overrides, tmp_path, "model.trainable=[vision_encoder.neck,memory_encoder]", "optim.vision_scale=0.5")
    assert stage.lr_scales == {"": 1.0, "vision_encoder.": 0.5} and not stage.student.trunk_frozen


def test_zero3_is_refused_where_ranks_run_other_modules():
    """DeepSpeed compares the order of modules between ranks, and ends the run in its second step."""

    class Zero3:
        class state:
            deepspeed_plugin = SimpleNamespace(zero_stage=3)

    with pytest.raises(UserError, match="hardware: ZeRO-3 needs the same modules.*model.trainable.*choose zero2"):
        STAGE.from_recipe(load_recipe(SMOKE), None, Zero3())
    memory = load_recipe(RECIPES / "smoke/memory.yaml", ["memory.trains=[memory,decoder]", "sam3.checkpoint=tiny"])
    for recipe in (memory, load_recipe(RECIPES / "smoke/memory.yaml", ["train.objects_at_once=1"])):
        with pytest.raises(UserError, match="ZeRO-3 .*(decoder of the tracker|objects in turns)"):
            memory_training.STAGE.from_recipe(recipe, None, Zero3())


# ---- clips, prompts and weights


def test_dividing_a_batch_changes_nothing(stage, batch):
    student = stage.student.train()

    def gradients():
        found = {name: p.grad.clone() for name, p in student.named_parameters()}
        student.zero_grad()
        return found

    whole = stage.loss(student, batch)
    whole["loss"].backward()
    expected = gradients()
    parts = [stage.loss(student, part(batch, clip)) for clip in (1, 0)]
    (sum(one["loss"] for one in parts) / 2).backward()
    assert whole.keys() == {"loss", *TERMS}
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(one[name].item() for one in parts) / 2, rel=1e-4, abs=1e-6), name
    for name, tensor in gradients().items():
        assert (tensor - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name


def given(stage, batch):
    """{object: frames on which it is prompted}, and the inputs."""
    inputs = stage.inputs(batch)
    return [one.nonzero()[:, 0].tolist() for one in inputs.prompts.given_OF], inputs


def test_objects_are_prompted_where_they_appear_and_count_from_there(stage):
    clips = stage.val_data.__getitems__([0])
    shown = clips["masks"][0, :, :].flatten(2).any(2)  # (T, N)
    prompted, inputs = given(stage, clips)
    assert prompted == [[int(one.int().argmax())] for one in shown.T[: len(prompted)]] and len(prompted) == 2
    for (first,), weight_T in zip(prompted, inputs.weight_OT, strict=True):
        assert not weight_T[:first].any() and (weight_T[first:] > 0).all()
    assert (
        inputs.weight_OT.sum().item() == pytest.approx(1)
        and inputs.weight_OT[inputs.weight_OT > 0].unique().numel() == 1
    )


def test_chosen_frames(overrides, tmp_path, stage):
    chosen = make(overrides, tmp_path, "prompts.frames=[1,3]")
    clips = chosen.val_data.__getitems__([0])
    prompted, _ = given(chosen, clips)
    shown = clips["masks"][0].flatten(2).any(2)
    for frames, shown_T in zip(prompted, shown.T[: len(prompted)], strict=True):
        assert frames == [frame for frame in (1, 3) if shown_T[frame]]
    assert any(frames == [1, 3] for frames in prompted)
    clips["masks"][0, :, 0] = torch.tensor([True, False, True, False])[:, None, None]  # on none of these frames
    assert given(chosen, clips)[0][0] == [0]


def test_kinds_of_prompts_have_nothing_to_do_with_a_clips_direction(stage):
    clips = 400
    batch = {
        "valid": torch.ones(clips, 2, dtype=torch.bool),
        "masks": torch.zeros(clips, 1, 2, 1, 1, dtype=torch.bool),
        "numbers": list(range(clips)),
    }
    seed, shares = stage.recipe.train.seed, {"mask": 0.5, "box": 0.5}
    kinds = [draw_kind(shares, rng) for rng in stage.objects(batch).generators]
    # What `Clips` draws first: whether the clip runs backwards.
    backwards = [np.random.default_rng([seed, number, 0]).random() < 0.5 for number in range(clips)]
    for slot in (0, 1):
        found = Counter(zip(backwards, kinds[slot::2], strict=True))
        assert len(found) == 4 and min(found.values()) > clips / 8


def test_frames_beyond_the_end_neither_count_nor_prompt(stage):
    clips = stage.val_data.__getitems__([0])
    clips["inside"][0, 2:] = False
    clips["masks"][0, :, 0] = True
    # Only shown by frames that repeat the last one.
    clips["masks"][0, :, 1] = torch.tensor([False, False, True, True])[:, None, None]
    prompted, inputs = given(stage, clips)
    assert prompted[0] == [0] and (inputs.weight_OT > 0).tolist() == [[True, True, False, False], [False] * 4]
    sums = stage.validate(stage.student.eval(), clips)
    by_mask = bool(inputs.prompts.by_mask_OF[0, 0])
    assert sums["positions"] == (1 if by_mask else 2) and sums["clips"] == 1


def test_padding_takes_part_and_counts_nowhere(stage, batch):
    empty = stage.val_data.__getitems__([PADDING, PADDING])
    parts = stage.loss(stage.student.train(), empty)
    assert all(value.item() == 0 for value in parts.values())
    parts["loss"].backward()
    assert not any(p.grad.any() for p in stage.student.parameters())
    stage.student.zero_grad()
    sums = stage.validate(stage.student.eval(), empty)
    assert all(value == 0 for value in sums.values())
    with pytest.raises(UserError, match="data.path: nothing was measured in the [0-9]+ held-out videos"):
        stage.summarise(sums)  # no best checkpoint is chosen from nothing
    # A mean over clips that are there, however they are padded.
    one, padded = (stage.val_data.__getitems__(rows) for rows in ([0], [0, PADDING]))
    alone, both = (stage.summarise(stage.validate(stage.student, clips)) for clips in (one, padded))
    assert alone == pytest.approx(both, rel=1e-5) and alone["val/loss"] > 0
    assert alone.keys() == {"val/j", "val/loss", *(f"val/loss_{name}" for name in TERMS)}


def test_the_loss_of_a_clip_equals_the_documented_formula(stage):
    """Every term = sum(l v) / sum(v) over objects and frames; the temporal one over pairs of frames."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=generator)
    target = torch.rand(2, 3, 8, 8, generator=generator) > 0.5
    valid = torch.ones(2, 3, dtype=torch.bool)
    student = stage.student
    before, each = student.scoring, torch.arange(2)
    weights = {"bce": 1.0, "dice": 1.0, "soft_iou": 0.5, "temporal": 0.1, "iou": 0.0, "presence": 0.0}
    student.scoring = replace(before, weights=weights, side_px=8, smooth=1e-6)
    tracked = [
        Tracked(
            t,
            [Decoded(each, logits[:, t, None], torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1, 4))],
            logits[:, t],
        )
        for t in range(3)
    ]
    found = student.losses(tracked, target, valid / 6)
    student.scoring = before
    flat, flat_target = logits.view(6, 1, 8, 8), target.view(6, 8, 8).float()
    for name, term in (("bce", bce(flat, flat_target)), ("dice", dice(flat, flat_target, 1e-6)),
                       ("soft_iou", soft_iou(flat, flat_target, 1e-6))):  # fmt: skip
        assert found[name].item() == pytest.approx(term.mean().item(), rel=1e-5)
    total = 0.0
    for n in range(2):
        for t in range(2):
            change = (logits[n, t + 1].sigmoid() - logits[n, t].sigmoid()).abs()
            total += (change - (target[n, t + 1] ^ target[n, t]).float()).square().mean().item() / 4
    assert found["temporal"].item() == pytest.approx(total, rel=1e-5)


def test_held_out_clips_are_drawn_to_their_end(stage):
    clips = stage.val_data.__getitems__([0, PADDING])
    clips["inside"][0, 3:] = False
    (frames,) = stage.pictures(stage.student.eval(), clips)
    numbers = clips["frames"][0, :3].tolist()
    assert [title for title, _ in frames] == [f"{clips['keys'][0]}, frame {number}" for number in numbers]
    assert min(np.asarray(picture).std() for _, picture in frames) > 0


# ---- recipes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["prompts.frames=[3]", "data.frames=3"], "prompts.frames: frame 3 of clips of 3 frames"),
        (["prompts.mask=1"], "mask: mask, point, box and mixed are shares and add up to 1.75, not 1"),
        (["data.held_out=1"], "held_out: must be above 0 and below 1"),
        (["loss.focal=0", "loss.dice=0", "loss.bce=0", "loss.soft_iou=0"], "no mask would be learned"),
        (["data.look=outlines"], "look: outlines is one of drawn videos; set data.source=synthetic"),
        (["data.masks=synthetic", "data.val_split=val"], "masks: synthetic ones are drawn over all videos"),
        (["model.trainable=[]"], "model.trainable is empty|trainable: is empty"),
        (["train.monitor=val/los"], "stage video is not judged by val/los; did you mean val/loss"),
    ],
)
def test_keys_that_contradict_each_other(overrides, keys, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(SMOKE, [*overrides, *keys])


# ---- merged, and on other models


def adapted(stage, recipe, chassis):
    weights = {name: tensor + 0.25 for name, tensor in stage.student.state_dict().items()}
    about = {"name": "mine", "origin": "mine/step-000003", "facts": {}}
    return weights, adapted_of_run(recipe, {"teacher": stage.facts["teacher"]}, weights, chassis, about)


def test_what_was_learned_takes_its_places_in_the_whole_model(stage):
    folder = chassis_folder("tiny")
    weights, found = adapted(stage, stage.recipe, folder)
    before = read_tensors(folder)
    assert found.made_on == fingerprint({name: before[name] for name in found.tensors})
    assert len(found.tensors) == len(weights)
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, before[name] + 0.25)
    with pytest.raises(MergeError, match="its tensors are not those of memory_encoder in tiny, such as m"):
        adapted(stage, replace(stage.recipe, model=replace(stage.recipe.model, trainable=("memory_encoder",))), folder)


@pytest.mark.parametrize("kind", ["memory", "image"])
def test_on_an_efficient_memory_and_on_a_students_trunk(overrides, tmp_path, kind):
    folder = merged_run(tmp_path, kind)
    trainable = "[memory_resampler,memory_attention]" if kind == "memory" else "[neck,memory_attention]"
    stage = make(overrides, tmp_path, f"sam3.checkpoint={folder}", f"model.trainable={trainable}", "data.frames=3")
    own = load_tracker(folder / "merged").state_dict()
    assert stage.config.memory_mode == ("hybrid" if kind == "memory" else "dense")
    assert all(torch.equal(tensor, own[name]) for name, tensor in stage.student.tracker.state_dict().items())
    (batch,) = stage.train_batches(0, 1, 2)
    terms = stage.loss(stage.student.train(), batch)
    terms["loss"].backward()
    learning = [p.grad for p in stage.student.parameters() if p.requires_grad]
    assert np.isfinite(terms["loss"].item()) and sum(bool(grad.any()) for grad in learning) > len(learning) / 2
    _, found = adapted(stage, stage.recipe, folder / "merged")
    assert set(found.tensors) <= set(read_tensors(folder / "merged"))
    assert untrained(stage.recipe).state_dict().keys() == stage.student.state_dict().keys()
    assert {in_whole_model(name) for name in stage.student.state_dict()} == set(found.tensors)
