# SPDX-License-Identifier: Apache-2.0
"""Stage prompted: what is shown, what learns, and from what; on the small SAM 3 whose heads answer to its trunk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from run_folders import image_run

from effsam3 import merge
from effsam3.data.images.sa1b import mask_of, read_annotations
from effsam3.data.sampler import PADDING
from effsam3.errors import RecipeError, UserError
from effsam3.hardware.budget.dry_run import cost, dry_stage
from effsam3.losses.masks import bce, distilled
from effsam3.models.chassis.tensors import TRUNK
from effsam3.models.heads.prompted_student import FEWEST_DIFFERING, with_click
from effsam3.models.heads.tracker import Shown, decode_alike, tracker_levels
from effsam3.models.memory.prompts import draw_anywhere
from effsam3.recipe.reader import load_recipe
from effsam3.stages.prompted.prompts import asks, draw_exemplars, draw_prompts
from effsam3.stages.prompted.training import STAGE
from effsam3.training.report import Report

SMOKE = "smoke/prompted"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """A student with BatchNorm in the place of the trunk of `tiny_concepts`, and drawn images."""
    folder = tmp_path_factory.mktemp("prompted")
    run = image_run(folder, student="tiny_separable_w4", head="linear", chassis="tiny_concepts")
    merge.run(load_recipe(run / "recipe.yaml"))
    return [
        f"sam3.checkpoint={run}", "teacher={checkpoint: tiny_concepts, features: online, store: null}",
        f"data.index={folder}/data/index.parquet", "data.synthetic_images=12", f"train.runs={folder}/runs",
        "prompts.per_image=4",
    ]  # fmt: skip


def make(overrides, folder, *more):
    return STAGE.from_recipe(load_recipe(SMOKE, [*overrides, *more]), Report(folder), Accelerator(cpu=True))


@pytest.fixture(scope="module")
def stage(overrides, tmp_path_factory):
    return make(overrides, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def batch(stage):
    """Two images of the first step."""
    return next(iter(stage.train_batches(0, 1, 2)))


def prompts_of(stage, batch):
    return draw_prompts(stage.recipe, batch, stage.image_size, stage.device)


# ---- what is shown


def test_as_many_of_each_kind_on_every_image_by_its_number(stage, batch):
    prompts = prompts_of(stage, batch)
    assert {kind: one.shown.points_OP2.shape for kind, one in prompts.items()} == {
        "point": (4, 1, 2),
        "box": (4, 2, 2),
    }
    assert sum(one.weight_N.sum().item() for one in prompts.values()) == pytest.approx(1)
    again = prompts_of(stage, batch)
    other = prompts_of(stage, batch | {"numbers": [number + 8 for number in batch["numbers"]]})
    alone = prompts_of(stage, {name: value[1:] for name, value in batch.items()})
    for kind, one in prompts.items():
        assert one.shown.image_O.tolist() == [0, 0, 1, 1]
        assert torch.equal(one.shown.points_OP2, again[kind].shown.points_OP2)
        assert not torch.equal(one.shown.points_OP2, other[kind].shown.points_OP2)
        # Whatever else is in the micro-batch.
        assert torch.equal(one.shown.points_OP2[2:], alone[kind].shown.points_OP2)
        assert torch.equal(one.chance_NR[2:], alone[kind].chance_NR)


def test_points_and_boxes_are_on_the_annotated_objects(stage):
    """Against the annotations at the image's own size, in its own pixels."""
    data, (position,) = stage.train_data, [3]
    row = data.images.index[position]
    masks = [mask_of(one, row["height"], row["width"]) for one in read_annotations(row, data.images.folder)]
    scale = np.array([row["width"], row["height"]]) / stage.image_size
    for number in range(20):
        batch = data.__getitems__([(position, number)])
        prompts = prompts_of(stage, batch)
        slack = 2 * stage.image_size / batch["masks"].shape[-1]  # a mask's pixel is many of the image's
        for point in prompts["point"].shown.points_OP2[:, 0].numpy():
            near = [np.abs((np.argwhere(mask)[:, ::-1] + 0.5) / scale - point - 0.5).max(1).min() for mask in masks]
            assert min(near) < slack
        for corners in prompts["box"].shown.points_OP2.numpy():
            assert (corners[1] > corners[0]).all() or (corners[1] >= corners[0] - slack).all()


def test_few_objects_are_shown_several_times_and_none_as_places_on_a_grid(stage):
    data = stage.train_data
    fewer = next(p for p in range(len(data)) if data.images.index[p]["num_masks"] < 4)
    masks = data.__getitems__([(fewer, 0)])["masks"][0]
    assert torch.equal(masks[data.images.index[fewer]["num_masks"]], masks[0]) and masks.flatten(1).any(1).all()
    batch = data.__getitems__([(fewer, 0)])
    batch["masks"][:] = False
    prompts = prompts_of(stage, batch)
    first, second = prompts["point"].shown.points_OP2[:, 0]
    half = stage.image_size / 2
    assert (first < half).all() and second[0] > half > second[1]  # its two points are in two cells of four
    low, high = prompts["box"].shown.points_OP2.unbind(1)
    assert (high > low).all() and (low >= -0.5 * 5).all() and (high < stage.image_size).all()


@pytest.mark.parametrize(("places", "columns"), [(1, 1), (2, 2), (8, 3), (9, 3)])
def test_each_place_of_a_grid_is_a_cell_of_its_own(places, columns):
    for kind in ("point", "box"):
        drawn = [draw_anywhere(kind, place, places, 900, np.random.default_rng(place))[0] for place in range(places)]
        # Of a box that sticks out of the image only the rest is left: its middle may be in another cell.
        inside = [one for one in drawn if 0 < one.min() and one.max() < 899]
        cells = {tuple((one.mean(0) // (900 / columns)).tolist()) for one in inside}
        assert len(cells) == len(inside) and (kind == "box" or len(inside) == places)


def test_unreadable_images_and_padding_count_nowhere(stage, batch):
    empty = stage.val_data.__getitems__([PADDING, PADDING])
    terms = stage.loss(stage.student.train(), empty)
    assert all(value.item() == 0 for value in terms.values())
    sums = stage.validate(stage.student.eval(), empty)
    assert all(value == 0 for value in sums.values())
    with pytest.raises(UserError, match="data.index: nothing was measured"):
        stage.summarise(sums)
    one, padded = (stage.val_data.__getitems__(rows) for rows in ([0], [0, PADDING]))
    alone, both = (stage.summarise(stage.validate(stage.student, rows)) for rows in (one, padded))
    assert {"val/heads", "val/heads_presence", "val/heads_masks_box", "val/heads_masks_point_corrected"} < alone.keys()
    assert alone == pytest.approx(both, rel=1e-4) and alone["val/loss"] > 0


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, []), (0.25, [0, 4, 8]), (0.5, [0, 2, 4, 6, 8, 10]), (1.0, [*range(12)])]
)
def test_example_boxes_are_asked_in_the_same_steps_on_every_rank(overrides, share, expected):
    recipe = load_recipe(SMOKE, [*overrides, f"prompts.exemplar={share}", "train.global_batch_size=4"])
    asked = [asks(recipe, number) for number in range(48)]
    assert asked == [number // 4 in expected for number in range(48)]


def test_an_example_box_is_that_of_the_object_shown_first(stage, batch):
    asked = draw_exemplars(stage.recipe, batch, stage.tokenizer, stage.device)
    assert asked.box_labels_RN.tolist() == [[1], [1]] and asked.image_R.tolist() == [0, 1]
    for (x, y, width, height), mask_LL in zip(
        asked.boxes_RN4[:, 0].tolist(), batch["masks"][:, 0].numpy(), strict=True
    ):
        rows, columns = (np.flatnonzero(mask_LL.any(axis)) / len(mask_LL) for axis in (1, 0))
        edge = 1 / len(mask_LL)
        assert (x - width / 2, y - height / 2) == pytest.approx((columns[0], rows[0]), abs=1e-6)
        assert (x + width / 2, y + height / 2) == pytest.approx((columns[-1] + edge, rows[-1] + edge), abs=1e-6)


# ---- clicks


def test_clicks_come_from_the_disagreement_with_the_teachers_label():
    rng = np.random.default_rng(0)
    logits, target = (torch.tensor(rng.normal(size=(6, 3, 8, 8)), dtype=torch.float32) for _ in range(2))
    target[5] = logits[5]  # nothing to correct
    iou = torch.tensor(rng.random((6, 3)), dtype=torch.float32)
    shown = Shown(torch.zeros(6, dtype=torch.int64), torch.zeros(6, 1, 2), torch.ones(6, 1, dtype=torch.int32))
    seen: list[set] = [set() for _ in range(6)]
    for chance in np.linspace(0, 0.999, 97):
        longer, counts = with_click(shown, logits, target, iou, torch.full((6,), chance), 80)
        for n in range(6):
            x, y = ((longer.points_OP2[n, 1] + 0.5) / 10 - 0.5).round().long().tolist()
            place = int(iou[n].argmax())
            own, truth = logits[n, place].numpy() > 0, target[n, place].numpy() > 0
            assert counts[n] == ((own != truth).sum() >= FEWEST_DIFFERING)
            if counts[n]:
                assert own[y, x] != truth[y, x] and longer.labels_OP[n, 1] == truth[y, x]
                seen[n].add((y, x))
    for n in range(5):
        place = int(iou[n].argmax())
        differing = {tuple(p) for p in np.argwhere((logits[n, place].numpy() > 0) != (target[n, place].numpy() > 0))}
        assert seen[n] == differing  # all of them, and no other
    assert not counts[5] and counts[:5].any()


# ---- what learns


def test_prompting_two_objects_together_is_prompting_each_alone(stage, batch):
    features = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = tracker_levels(stage.student.model, features)
    for one in prompts_of(stage, batch).values():
        together = decode_alike(stage.student.model, levels, one.shown)
        for n in range(len(one.weight_N)):
            alone = decode_alike(stage.student.model, levels, Shown(*(part[n : n + 1] for part in one.shown)))
            for both, single in zip(together, alone, strict=True):
                assert torch.allclose(both[n], single[0], atol=1e-5)
        assert not torch.allclose(together[0][0], together[0][1], atol=1e-3)


@pytest.mark.parametrize("term", ["bce", "dice", "iou", "exemplar"])
def test_gradients_reach_the_whole_trunk_and_nothing_else(stage, batch, term):
    """By each term of masks alone; through the tracker, and through the detector."""
    student, weights = stage.student.train(), stage.student.weights
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    student.weights = dict.fromkeys(weights, 0.0) | {term: 1.0}
    stage.loss(student, batch)["loss"].backward()
    student.weights = weights
    learning = {name for name, p in student.model.named_parameters() if p.grad is not None and p.grad.any()}
    trunk = {name for name, _ in student.model.named_parameters() if name.startswith(TRUNK)}
    assert learning == trunk == {name for name, _ in student.named_parameters()}
    assert not any(p.grad is not None for p in student.teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.model.state_dict().items())
    frozen = [module for name, module in student.model.named_modules() if not f"{name}.".startswith(TRUNK)]
    assert not any(module.training for module in (*frozen, *student.teacher.modules()))
    student.zero_grad()


def test_the_loss_is_zero_at_the_teacher_and_bce_is_the_divergence():
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(3, 2, 8, 8, generator=generator) for _ in range(2))
    same = distilled(other, other)
    assert all(value.abs().max() < 1e-6 for value in same.values())
    p, t = own.sigmoid().double(), other.sigmoid().double()
    divergence = (t * (t / p).log() + (1 - t) * ((1 - t) / (1 - p)).log()).mean((2, 3)).mean(1)
    assert torch.allclose(distilled(own, other)["bce"].double(), divergence, atol=1e-6)
    # The same gradient as plain BCE against the teacher's probabilities.
    own.requires_grad_()
    plain = bce(own.flatten(0, 1)[:, None], other.sigmoid().flatten(0, 1)).mean()
    gradients = (torch.autograd.grad(loss, own)[0] for loss in (plain, distilled(own, other)["bce"].mean()))
    assert torch.allclose(*gradients, atol=1e-8)
    # No mask is nearer to the teacher's than the teacher's own, however much in doubt it is.
    doubtful = torch.zeros(1, 1, 8, 8)
    assert all(distilled(logit * torch.ones_like(doubtful), doubtful)["dice"] > 0 for logit in (-4.0, 4.0))


def test_dividing_a_batch_changes_nothing(stage, batch):
    student = stage.student.train()
    whole = stage.loss(student, batch)
    parts = [stage.loss(student, {name: value[i : i + 1] for name, value in batch.items()}) for i in (0, 1)]
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(one[name].item() for one in parts) / 2, rel=1e-4, abs=1e-7), name


def test_batchnorm_and_the_swap_of_unstable_masks(stage):
    student = stage.student.train()
    norms = [m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and all(m.weight.requires_grad for m in norms)
    for mode in (True, False):
        student.train(mode)
        for model in (student.model, student.teacher):
            assert model.tracker_model.mask_decoder.dynamic_multimask_via_stability is not mode
            assert not model.tracker_model.mask_decoder.training


def test_recomputing_changes_nothing_but_the_memory(overrides, tmp_path, batch):
    run = image_run(tmp_path, chassis="tiny_concepts")  # whose trunk has layers that can be recomputed
    merge.run(load_recipe(run / "recipe.yaml"))
    found, costs = [], []
    for on in ("false", "true"):
        keys = [*overrides, f"sam3.checkpoint={run}", f"train.recompute={on}"]
        one = make(keys, tmp_path / on)
        one.loss(one.student.train(), batch)["loss"].backward()
        found.append({name: p.grad for name, p in one.student.named_parameters()})
        costs.append(cost(dry_stage(load_recipe(SMOKE, keys), 2)))
    assert all(torch.allclose(found[0][name], grad, rtol=1e-3, atol=1e-6) for name, grad in found[1].items())
    assert costs[1].peak < 0.7 * costs[0].peak and costs[0].flops == costs[1].flops


# ---- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["teacher.features=stored"], "store: features are to be stored, but not where"),
        (["teacher.store=x"], "store: x is given, but features is online"),
        (["loss.bce=0", "loss.dice=0"], "bce and dice are both 0; no mask would be learned"),
        (["prompts.point=2"], "point: must be between 0 and 1"),
        (["model.trainable=[]"], "trainable: is empty"),
    ],
)
def test_keys_that_contradict_each_other(overrides, keys, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(SMOKE, [*overrides, *keys])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.trainable=[trunck]"], "nothing in the model is called 'trunck'"),
        (["model.trainable=[memory_attention]"], "the model never uses 'memory_attention', by the recipe's"),
        (["model.trainable=[detr_decoder]", "prompts.exemplar=0"], "the model never uses 'detr_decoder'"),
        (["sam3.checkpoint=tiny_concepts"], "loss.mse: .* tiny_concepts has none; name a store"),
        (["teacher.checkpoint=tiny"], "teacher.checkpoint: its image_size is 224, that of sam3.checkpoint 160"),
        (["teacher={checkpoint: tiny_concepts, features: stored, store: nowhere}"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(overrides, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        make(overrides, tmp_path, *keys)
