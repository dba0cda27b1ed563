# SPDX-License-Identifier: Apache-2.0
"""The search for the largest micro-batch, and trials that leave a student as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from run_folders import RECIPES
from torch import nn

from effsam3.errors import UserError
from effsam3.hardware.budget.dry_run import Ledger
from effsam3.hardware.budget.find_micro_batch import Trial, find, heaviest, kept, repeated, run, take, with_micro_batch
from effsam3.recipe.reader import dump_recipe, load_recipe

SMOKE = RECIPES / "smoke/image.yaml"


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 12, 64, 100])
def test_the_largest_that_fits_is_found_in_few_trials(limit):
    candidates, tried = [1, 2, 4, 8, 16, 32, 64], []

    def trial(size):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    assert find(candidates, trial) == max(size for size in candidates if size <= limit)
    assert len(tried) == len(set(tried)) <= 3


def test_nothing_fits():
    with pytest.raises(UserError, match="not even micro_batch_size=3 fits"):
        find([3, 6], lambda size: False)


def test_another_error_is_not_taken_for_want_of_memory():
    with pytest.raises(ValueError, match="a bug"):
        find([1, 2], lambda size: (_ for _ in ()).throw(ValueError("a bug")))


def stage_of(student):
    """A stage with a real student and loss, on the CPU."""
    device = torch.device("cpu")

    def loss(model, batch):
        return {"loss": model(batch["pixels"].float()).square().mean()}

    recipe = load_recipe(SMOKE)
    return SimpleNamespace(
        recipe=recipe, student=student, device=device, accelerator=SimpleNamespace(device=device), loss=loss
    )


@pytest.fixture
def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.5), nn.Conv2d(8, 1, 1))


def test_a_trial_leaves_the_student_as_it_was(student):
    student.eval()
    student[0].weight.grad = torch.ones_like(student[0].weight)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trial = Trial(stage_of(student), {"pixels": torch.rand(2, 3, 16, 16)}, 0, reserved=100)
    random = torch.get_rng_state()
    assert trial(4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not student.training
    assert student[0].weight.grad.eq(1).all() and student[4].weight.grad is None


def test_a_trial_that_fails_leaves_it_too(student):
    stage, calls = stage_of(student), []

    def loss(model, batch):
        calls.append(len(batch["pixels"]))
        model(batch["pixels"])  # moves BatchNorm's statistics before memory ends
        raise torch.OutOfMemoryError("CUDA out of memory")

    stage.loss = loss
    with pytest.raises(UserError, match="not even micro_batch_size=1"):
        find([1, 2, 4], Trial(stage, {"pixels": torch.rand(1, 3, 16, 16)}, 0, 0))
    assert calls == [2, 1]
    assert student[1].num_batches_tracked == 0 and student[1].running_mean.eq(0).all()


def test_search_and_trial_together_under_a_limit_of_bytes(student):
    """The device's limit is a number of bytes that a ledger enforces."""
    trial = Trial(stage_of(student), {"pixels": torch.rand(1, 3, 32, 32)}, 0, reserved=1 << 20)

    def peak(size):
        with Ledger() as ledger:
            trial(size)
        return ledger.peak

    limit = peak(6)
    assert peak(1) > 1 << 20  # what the optimizer will take is held

    def limited(size):
        if peak(size) > limit:
            raise torch.OutOfMemoryError(f"{size} samples take more than {limit} bytes")
        return True

    assert find([1, 2, 3, 4, 6, 12, 24], limited) == 6


def test_one_sample_is_repeated():
    batch = {"pixels": torch.arange(6).reshape(3, 2), "numbers": [7, 8, 9], "unreadable": []}
    again = repeated(batch, 1, 4)
    assert again["pixels"].tolist() == [[2, 3]] * 4
    assert again["numbers"] == [8] * 4 and again["unreadable"] == []


def test_the_heaviest_sample_has_the_longest_text_or_the_most_objects():
    short, long = ({"ids": torch.zeros(2, length)} for length in (5, 9))
    assert heaviest([short, long, short])[0] is long
    clips = {"pixels": torch.zeros(3, 1), "valid": torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()}
    assert heaviest([clips]) == (clips, 1)


def test_a_cpu_is_refused():
    recipe = load_recipe(SMOKE, ["train.find_micro_batch=true"])
    with pytest.raises(UserError, match=r"a CPU's memory has no limit .* \(it is 4\)"):
        run(recipe, None, SimpleNamespace(device=torch.device("cpu")), None)


def test_what_is_found_is_taken_and_batchnorm_is_warned_of(student):
    recipe, said, accelerator = load_recipe(SMOKE), [], Accelerator(cpu=True)
    report, stage = SimpleNamespace(say=said.append), stage_of(student)
    found = take(recipe, 2, stage, accelerator, report)
    assert found.train.micro_batch_size == 2 and stage.recipe is found
    assert accelerator.gradient_accumulation_steps == 4  # 8 in all
    assert "micro_batch_size=2" in said[0] and "WARNING" in said[1] and "BatchNorm2d" in said[1]
    said.clear()
    take(recipe, 2, stage_of(nn.Linear(2, 2)), accelerator, report)
    assert len(said) == 1


def test_a_run_goes_on_with_what_it_found(tmp_path):
    recipe = load_recipe(SMOKE, ["train.find_micro_batch=true"])
    assert kept(recipe, tmp_path) is recipe
    (tmp_path / "recipe.yaml").write_text(dump_recipe(with_micro_batch(recipe, 8)))
    assert kept(recipe, tmp_path) is recipe  # no checkpoint: it is tried again
    (tmp_path / "checkpoints").mkdir()
    assert kept(recipe, tmp_path) == with_micro_batch(recipe, 8)
    plain = load_recipe(SMOKE)
    assert kept(plain, tmp_path) is plain
