# SPDX-License-Identifier: Apache-2.0
"""Where a run resumes: auto, never or a path, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from effsam3.errors import UserError
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.training import checkpoint
from effsam3.training.resume import AUTO, FREE_KEYS, NEVER, read_trainer, resumable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoints/ folder as the trainer leaves it: steps 10 and 20, the best one's weights."""
    folder = tmp_path_factory.mktemp("saved")
    accelerator, model = Accelerator(cpu=True), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, best in ((10, True), (20, False)):
        checkpoint.save(accelerator, model, accelerator.prepare(optimizer), None, folder, {"step": step}, 9, best)
    return folder


@pytest.fixture
def begin(tmp_path, saved):
    """Make a run's recipe and folder, with checkpoints unless it has just begun; returns both."""

    def make(name: str, *overrides: str, steps=("step-000010", "step-000020", "best-step-000010")):
        recipe = load_recipe(ROOT / "recipes/smoke/image.yaml", [f"name={name}", f"train.runs={tmp_path}", *overrides])
        for step in steps:
            shutil.copytree(saved / step, recipe.folder / "checkpoints" / step)
        recipe.folder.mkdir(exist_ok=True)
        (recipe.folder / "recipe.yaml").write_text(dump_recipe(recipe))
        return recipe, recipe.folder

    return make


def changed(recipe, *overrides: str):
    """The same run's recipe with other values."""
    return load_recipe(recipe.folder / "recipe.yaml", overrides)


# ---- auto and never


def test_auto_takes_the_newest_complete_checkpoint(begin):
    recipe, folder = begin("mine")
    (folder / "checkpoints/step-000030.partial").mkdir()
    assert resumable(recipe, folder, AUTO) == folder / "checkpoints/step-000020"
    assert read_trainer(folder / "checkpoints/step-000020") == {"step": 20}


@pytest.mark.parametrize("resume", [AUTO, NEVER])
def test_a_run_without_checkpoints_begins(begin, resume):
    recipe, folder = begin("mine", steps=())
    assert resumable(recipe, folder, resume) is None
    shutil.rmtree(folder)
    assert resumable(recipe, folder, resume) is None


def test_never_refuses_a_folder_where_a_run_stands(begin):
    recipe, folder = begin("mine")
    with pytest.raises(UserError, match=r"has reached step 20, and --resume never starts fresh; choose another name"):
        resumable(recipe, folder, NEVER)


def test_another_recipe_is_refused_by_its_keys(begin):
    recipe, folder = begin("mine", "optim.lr=1e-3")
    with pytest.raises(
        UserError, match=r"another recipe \(optim.lr 0.001 -> 0.002; train.seed 0 -> 1\); choose another"
    ):
        resumable(changed(recipe, "optim.lr=2e-3", "train.seed=1"), folder, AUTO)


def test_what_does_not_change_the_learning_may_change(begin):
    recipe, folder = begin("mine")
    free = ("hardware=zero2", "data.workers=3", "train.log_every=3", "train.keep_checkpoints=1", "train.patience=2",
            "train.not_finite=skip",
            "evaluate.max_images=9", "merge.checkpoint=last")  # fmt: skip
    assert all(item.startswith(FREE_KEYS) for item in free)
    assert resumable(changed(recipe, *free), folder, AUTO) == folder / "checkpoints/step-000020"


@pytest.mark.parametrize("key", ["train.micro_batch_size=2", "train.ema=0.5", "train.steps=300", "student_init=timm"])
def test_what_changes_the_learning_may_not(begin, key):
    recipe, folder = begin("mine")
    with pytest.raises(UserError, match=key.partition("=")[0]):
        resumable(changed(recipe, key), folder, AUTO)


# ---- a path


@pytest.mark.parametrize(("path", "step"), [("", 20), ("checkpoints/step-000010", 10)])
def test_a_run_begins_with_another_s_checkpoint(begin, path, step):
    _, other = begin("other")
    recipe, folder = begin("mine", steps=())
    assert resumable(recipe, folder, str(other / path)) == other / f"checkpoints/step-{step:06d}"


def test_once_begun_it_goes_on_from_its_own(begin):
    """The same command after a requeue, although it names the other's checkpoint."""
    _, other = begin("other")
    recipe, folder = begin("mine", steps=("step-000010",))
    assert resumable(recipe, folder, str(other)) == folder / "checkpoints/step-000010"


def test_another_s_checkpoint_of_another_recipe_is_refused(begin):
    _, other = begin("other", "optim.lr=1e-3")
    recipe, folder = begin("mine", steps=())
    with pytest.raises(UserError, match=r"optim.lr 0.001 -> 0.002\); --resume needs the same recipe"):
        resumable(recipe, folder, str(other))


def test_its_own_newest_may_be_named_but_not_an_earlier_one(begin, monkeypatch):
    recipe, folder = begin("mine")
    monkeypatch.chdir(folder.parent)
    newest = Path("mine/checkpoints/step-000020")
    assert resumable(recipe, folder, str(newest)).resolve() == folder / "checkpoints/step-000020"
    with pytest.raises(UserError, match="has since reached step 20, past step-000010; give this run another name"):
        resumable(recipe, folder, "mine/checkpoints/step-000010")
    with pytest.raises(UserError, match=r"\(train.seed 0 -> 1\); choose another name"):
        resumable(changed(recipe, "train.seed=1"), folder, str(newest))


def test_weights_alone_are_no_place_to_go_on_from(begin):
    _, other = begin("other")
    recipe, folder = begin("mine", steps=())
    with pytest.raises(UserError, match="best-step-000010 only holds weights, no optimizer state; name a run"):
        resumable(recipe, folder, str(other / "checkpoints/best-step-000010"))


@pytest.mark.parametrize("path", ["nowhere", "mine", "Auto"])
def test_a_path_without_a_checkpoint(begin, monkeypatch, path):
    recipe, folder = begin("mine", steps=())
    monkeypatch.chdir(folder.parent)
    with pytest.raises(
        UserError, match=f"--resume: {path} is neither a checkpoint nor a run with one; .* auto or never"
    ):
        resumable(recipe, folder, path)


def test_a_checkpoint_that_has_left_its_run(begin, saved):
    """Whether its recipe was the same cannot be told."""
    recipe, folder = begin("mine", steps=())
    with pytest.raises(UserError, match="recipe.yaml"):
        resumable(recipe, folder, str(saved / "step-000020"))
