# SPDX-License-Identifier: Apache-2.0
"""Stage memory without a loop: what teaches stays as it is, how a batch is divided changes nothing, bad recipes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from run_folders import RECIPES, memory_run

from effsam3 import merge
from effsam3.cli import main
from effsam3.data.sampler import PADDING
from effsam3.errors import RecipeError, UserError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_tensors
from effsam3.recipe.reader import load_recipe
from effsam3.stages.memory.training import STAGE, load_trackers
from effsam3.training.report import Report

SMOKE = RECIPES / "smoke/memory.yaml"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Few and small drawn videos, and short clips that read a pooled map and latents."""
    folder = tmp_path_factory.mktemp("videos")
    return [
        "sam3.checkpoint=tiny", "data.synthetic_videos=8", "data.synthetic_frames=12", "data.synthetic_side_px=48",
        f"data.index={folder}/index.parquet", f"train.runs={folder}/runs", "data.frames=3", "memory.hot_frames=0",
        "loss.side_px=56", "prompts.corrected_frames=2", "prompts.clicks=1", "train.eval_samples=2",
    ]  # fmt: skip


def make(overrides, tmp_path, *more):
    recipe = load_recipe(SMOKE, [*overrides, *more])
    return STAGE.from_recipe(recipe, Report(tmp_path), Accelerator(cpu=True))


@pytest.fixture(scope="module")
def stage(overrides, tmp_path_factory):
    stage = make(overrides, tmp_path_factory.mktemp("stage"))
    for parameter in stage.student.parameters():
        if not parameter.any():  # what starts at zero hides what stands behind it
            torch.nn.init.normal_(parameter, std=0.05)
    return stage


@pytest.fixture(scope="module")
def batch(stage):
    """Four clips of the first step."""
    return next(iter(stage.train_batches(0, 1, stage.recipe.train.micro_batch_size)))


def part(batch, *clips):
    """Some of a batch's clips as a batch of their own."""
    clips = list(clips)
    taken = {name: value[clips] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return taken | {name: [batch[name][clip] for clip in clips] for name in ("keys", "numbers")} | {"unreadable": []}


def gradients(stage):
    found = {
        name: parameter.grad.clone() for name, parameter in stage.student.named_parameters() if parameter.requires_grad
    }
    stage.student.zero_grad()
    return found


def test_the_teacher_stays_as_it_is_while_the_student_learns(overrides, tmp_path, batch):
    """Both are read from one file: what is trained must not lie on the same memory."""
    stage = make(overrides, tmp_path)
    student, teacher = stage.student.train(), stage.student.teacher
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    stage.loss(student, batch)["loss"].backward()
    optimizer.step()
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    name = "memory_encoder.projection.weight"
    assert not torch.equal(student.get_parameter(name), after[name])
    assert student.tracker.get_parameter(name) is student.get_parameter(name)


def test_dividing_a_batch_changes_nothing(stage, batch):
    """Prompts and clicks depend on the clip's number alone; the loss is a mean over clips."""
    student = stage.student.train()
    stage.loss(student, batch)["loss"].backward()
    whole = gradients(stage)
    parts = [stage.loss(student, part(batch, *clips)) for clips in ([2, 3], [0, 1])]
    (sum(one["loss"] for one in parts) / 2).backward()
    divided = gradients(stage)
    assert all(tensor.isfinite().all() for tensor in whole.values()) and len(whole) > 100
    for name, tensor in whole.items():
        assert (divided[name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, name
    still = {name for name, tensor in whole.items() if not tensor.any()}
    assert still <= {"occlusion_spatial_embedding_parameter"}  # unless an object is absent


def test_corrected_frames_and_clicks(stage, batch):
    frames = {stage.corrected_frames(part(batch, clip)) for clip in range(4)}
    assert len(frames) == 1
    (corrected,) = frames
    assert corrected[0] == 0 and len(corrected) == 2
    later = {stage.corrected_frames({"numbers": [4 * step]})[1] for step in range(20)}
    assert later == {1, 2}
    shares = {"mask": 0.0, "point": 0.5, "box": 0.5}
    whole = stage.inputs(batch, shares, corrected)[4]
    alone = stage.inputs(part(batch, 3), shares, corrected)[4]
    count = len(alone.by_mask_OF)
    assert torch.equal(alone.points_OFP2, whole.points_OFP2[-count:])
    for frame, chances_OK in alone.corrections.items():
        assert torch.equal(chances_OK, whole.corrections[frame][-count:]) and chances_OK.shape == (count, 1)
    assert len(whole.corrections[0].unique()) == whole.corrections[0].numel()


def test_padding_takes_part_and_counts_nowhere(stage, batch):
    """The last batch of a rank may hold no clip at all: it still runs forward and backward, with gradients of zero."""
    empty = stage.val_data.__getitems__([PADDING, PADDING])
    assert not empty["valid"].any()
    parts = stage.loss(stage.student.train(), empty)
    assert all(value.item() == 0 for value in parts.values())
    parts["loss"].backward()
    assert not any(tensor.any() for tensor in gradients(stage).values())
    sums = stage.validate(stage.student.eval(), empty)
    assert sums["positions"] == 0 and sums["j"] == 0
    stage.student.train()
    half = part(batch, 0)
    half |= {name: torch.cat([half[name], empty[name][:1]]) for name in ("pixels", "masks", "valid", "frames")}
    half |= {"keys": [*half["keys"], ""], "numbers": [*half["numbers"], 0]}
    # A mean over clips, the empty one among them.
    alone = stage.loss(stage.student, part(batch, 0))["loss"].item()
    assert stage.loss(stage.student, half)["loss"].item() == pytest.approx(alone / 2, rel=1e-5)


def test_validation_shows_masks_and_is_j_of_all_later_frames(stage):
    rows = stage.val_data.__getitems__([0])
    objects = int(rows["valid"].sum())
    sums = stage.validate(stage.student.eval(), rows)
    # The tiny chassis scores every object absent: J is 1 where it is, 0 elsewhere.
    absent = sum((~rows["masks"][clip, 1:, slot].flatten(1).any(1)).sum() for clip, slot in rows["valid"].nonzero())
    assert sums["positions"] == 2 * objects and sums["j"] == absent
    assert stage.summarise(dict(sums)) == {"val/j": pytest.approx(float(absent) / (2 * objects))}
    stage.student.train()


def test_pictures_show_the_truth_next_to_what_is_tracked(stage):
    batch = stage.val_data.__getitems__([0, PADDING])
    drawn = stage.pictures(stage.student.eval(), batch)
    inputs = stage.held_out_inputs(batch)
    with torch.no_grad():
        found = stage.student(*inputs, drawn=True)
    stage.student.train()
    # What fills the batch up is not drawn; a clip has a picture a frame.
    assert [len(clip) for clip in drawn] == [3] and drawn[0][1][0].startswith(f"{batch['keys'][0]}, frame ")
    # The masks are those that the numbers are of.
    both_OT = (found["masks"] & inputs.masks_OTSS).flatten(2).sum(2)
    either_OT = (found["masks"] | inputs.masks_OTSS).flatten(2).sum(2)
    torch.testing.assert_close(found["j"], torch.where(either_OT == 0, 1.0, both_OT / either_OT.clamp(min=1)))
    # The first frame's masks were given: both halves show the same areas, with lines on the right.
    picture, image = np.asarray(drawn[0][0][1]), batch["pixels"][0, 0].movedim(0, -1).numpy()
    side = image.shape[0]
    left, right = picture[:, :side], picture[:, side:]
    area = inputs.masks_OTSS[inputs.clip_O == 0, 0].any(0).numpy()
    plain = (image * np.float32(0.85)).round().astype(np.uint8)
    assert area.any() and (left[area] != plain[area]).any(1).all() and (left[~area] == plain[~area]).all()
    assert ((left == right).all(2) | area).mean() > 0.95 and not (left == right).all()


def test_the_run_says_what_it_learns_from(stage):
    lines = stage.describe()
    assert lines["student"].startswith("hybrid memory, memory") and "clips of 3 frames" in lines["data"]
    memory = sum(p.numel() for n, p in stage.student.named_parameters() if p.requires_grad)
    assert stage.student_parameters == memory and f"{memory / 1e6:.2f} M parameters learn" in lines["student"]
    assert stage.facts["trains"] == ["memory"] and stage.facts["image_size"] == 224


# ---- what cannot be


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("memory.window_latents=36", "memory_window_latents: 36 windows do not tile the 16x16 grid; choose from 1, 4"),
        ("memory.pool=3", "memory_pool: windows of 3x3 cells do not tile the 16x16 grid"),
        ("memory.attention_layers=3", "memory.attention_layers: 3 layers asked for, the chassis' tracker has 2"),
        ("memory.fuser_layers=3", "memory.fuser_layers: 3 layers asked for, the chassis' tracker has 2"),
    ],
)
def test_a_memory_that_does_not_fit(overrides, key, message):
    with pytest.raises(UserError) as raised:
        load_trackers(load_recipe(SMOKE, [*overrides, key]), chassis_folder("tiny"))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["memory.trains=[decoder,neck]"], "memory.trains: decoder, neck without memory, which the merged slot needs"),
        (["evaluate.split=val"], "split: 'val' is a list in evaluate.videos, which is null"),
        (
            ["evaluate.evaluator=davis", "evaluate.appearing_later=true"],
            "DAVIS only scores the objects of the first frame",
        ),
    ],
)
def test_keys_that_contradict_each_other(keys, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(SMOKE, keys)


def test_fewer_layers_start_from_the_first_and_the_last(overrides):
    folder = chassis_folder("tiny")
    student, teacher = load_trackers(load_recipe(SMOKE, [*overrides, "memory.attention_layers=1"]), folder)
    own = read_tensors(folder, "tracker_model.memory_attention.layers.")
    assert len(student.memory_attention.layers) == 1 and len(teacher.memory_attention.layers) == 2
    name = "linear1.weight"
    assert torch.equal(student.memory_attention.layers[0].get_parameter(name), own[f"0.{name}"])
    assert teacher.config.memory_mode == "dense" and student.config.memory_mode == "hybrid"


def test_a_chassis_with_an_efficient_memory(overrides, tmp_path):
    merged = merge.run(load_recipe(memory_run(tmp_path) / "recipe.yaml"))
    with pytest.raises(UserError, match=r"has an efficient memory already \(hybrid\); the teacher must be a SAM 3"):
        load_trackers(load_recipe(SMOKE, [*overrides, f"sam3.checkpoint={merged}"]), merged)


def test_a_missing_index_says_how_it_is_made(overrides, tmp_path):
    index = tmp_path / "sav.parquet"
    with pytest.raises(UserError, match=r"make it with: effsam3 index sav FOLDER --out"):
        make(overrides, tmp_path, "data.source=sav", "data.synthetic_videos=0", f"data.index={index}")


def test_drawn_and_real_videos_are_not_mixed_up(overrides, stage, tmp_path):
    with pytest.raises(UserError, match="data.index: .* holds synthetic videos .*: 8.*: 9.*another folder"):
        make(overrides, tmp_path, "data.synthetic_videos=9")
    (tmp_path / "index.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="index.parquet is there and was not made from synthetic videos"):
        make(overrides, tmp_path, f"data.index={tmp_path}/index.parquet")


def test_clips_longer_than_all_videos(overrides, stage, tmp_path):
    with pytest.raises(UserError, match="none of .* videos has a clip of 4 annotated frames; .*: 3 annotated frames"):
        make(overrides, tmp_path, "data.frames=4")


def test_features_of_a_memory_are_not_embedded(overrides, capsys):
    assert main(["embed", str(SMOKE), *overrides]) == 2
    assert "is of stage memory, which knows train, merge, evaluate" in capsys.readouterr().err


def test_the_index_of_drawn_videos_says_what_was_drawn(stage):
    stamp = json.loads((stage.val_data.folder / "synthetic.json").read_text())
    assert stamp == {"videos": 8, "frames": 12, "side_px": 48}
