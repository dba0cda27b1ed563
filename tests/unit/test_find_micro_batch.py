# SPDX-License-Identifier: Apache-2.0
"""The search for the largest micro-batch, and trials that leave a student as it was."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from run_folders import RECIPES
from torch import nn

from effsam3.errors import UserError
from effsam3.hardware.accelerator import set_batch
from effsam3.hardware.budget.dry_run import Ledger, dry_stage
from effsam3.hardware.budget.find_micro_batch import find, kept, run, trial, warning_of
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


class Squares:
    """A stage with a real student and loss."""

    def __init__(self, student):
        self.student = student

    def example(self, samples):
        return {"pixels": torch.empty(samples, 3, 16, 16, device="meta")}

    def loss(self, student, batch):
        return {"loss": student(batch["pixels"]).square().mean()}


def trial_of(stage, reserved=0):
    return partial(trial, stage, torch.device("cpu"), "fp32", reserved)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.5), nn.Conv2d(8, 1, 1))


def test_a_trial_leaves_the_student_as_it_was(student):
    student.eval()
    student[0].weight.grad = torch.ones_like(student[0].weight)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    attempt = trial_of(Squares(student), reserved=100)
    random = torch.get_rng_state()
    assert attempt(4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not student.training
    assert student[0].weight.grad.eq(1).all() and student[4].weight.grad is None


def test_a_trial_that_fails_leaves_it_too(student):
    stage, calls = Squares(student), []

    def loss(model, batch):
        calls.append(len(batch["pixels"]))
        model(batch["pixels"])  # moves BatchNorm's statistics before memory ends
        raise torch.OutOfMemoryError("CUDA out of memory")

    stage.loss = loss
    with pytest.raises(UserError, match="not even micro_batch_size=1"):
        find([1, 2, 4], trial_of(stage))
    assert calls == [2, 1]
    assert student[1].num_batches_tracked == 0 and student[1].running_mean.eq(0).all()


def test_search_and_trial_together_under_a_limit_of_bytes(student):
    """The device's limit is a number of bytes that a ledger enforces."""
    attempt = trial_of(Squares(student), reserved=1 << 20)

    def peak(size):
        with Ledger() as ledger:
            attempt(size)
        return ledger.peak

    limit = peak(6)
    assert peak(1) > 1 << 20  # what the optimizer will take is held

    def limited(size):
        if peak(size) > limit:
            raise torch.OutOfMemoryError(f"{size} samples take more than {limit} bytes")
        return True

    assert find([1, 2, 3, 4, 6, 12, 24], limited) == 6


def test_a_cpu_is_refused():
    recipe = load_recipe(SMOKE, ["train.find_micro_batch=true"])
    with pytest.raises(UserError, match=r"a CPU's memory has no limit .* \(it is 4\)"):
        run(recipe, None, SimpleNamespace(device=torch.device("cpu")), None)


@pytest.mark.parametrize(("path", "keys"), [("image", []), ("text", []), ("memory", ["sam3.checkpoint=tiny"])])
def test_a_trial_s_samples_are_as_large_as_they_can_be(path, keys):
    recipe = load_recipe(RECIPES / f"smoke/{path}.yaml", keys)
    batch = dry_stage(recipe, 1).stage.example(3)
    largest = {
        "image": {"pixels": (3, 3, 224, 224), "features": (3, 64, 16, 16)},
        "text": {"ids": (3, 32), "mask": (3, 32)},
        "memory": {"pixels": (3, 8, 3, 224, 224), "valid": (3, 2)},
    }
    assert {name: tuple(batch[name].shape) for name in largest[path]} == largest[path]
    if path == "memory":
        assert batch["valid"].all() and batch["masks"].flatten(3).any(3).all()


def test_the_batch_is_set_where_accelerate_and_deepspeed_read_it():
    accelerator = Accelerator(cpu=True)
    set_batch(accelerator, 2, 4)
    assert accelerator.gradient_accumulation_steps == 4
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config={"gradient_clipping": 1.0}))
    under_deepspeed = SimpleNamespace(num_processes=3, state=state)
    set_batch(under_deepspeed, 2, 4)
    assert state.deepspeed_plugin.deepspeed_config == {
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 24,
    }


def test_batchnorm_is_warned_of(student):
    warning = warning_of(student, 2)
    assert warning.startswith("WARNING") and "BatchNorm2d" in warning and "train.micro_batch_size=2" in warning
    assert warning_of(nn.Linear(2, 2), 2) == ""


def test_a_run_goes_on_with_what_it_found(tmp_path):
    recipe = load_recipe(SMOKE, ["train.find_micro_batch=true"])
    assert kept(recipe, tmp_path) is recipe
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe.changed("train.micro_batch_size", 8)))
    assert kept(recipe, tmp_path) is recipe  # no checkpoint: it is tried again
    (tmp_path / "checkpoints").mkdir()
    assert kept(recipe, tmp_path) == recipe.changed("train.micro_batch_size", 8)
    plain = load_recipe(SMOKE)
    assert kept(plain, tmp_path) is plain
