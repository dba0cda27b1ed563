# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: complete ones are found, torn ones are not, old ones go."""

import resource
import signal

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from effsam3.training import checkpoint
from effsam3.training.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def save(accelerator, folder, step, is_best=False, average=None, keep=2, model=None):
    model = model or nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    return checkpoint.save(accelerator, model, optimizer, average, folder, {"step": step}, keep, is_best)


def test_keeps_the_newest_and_the_best(accelerator, tmp_path):
    for step, is_best in ((10, False), (20, True), (30, False), (40, False)):
        save(accelerator, tmp_path, step, is_best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-step-000020", "step-000030", "step-000040"]
    assert checkpoint.latest(tmp_path).name == "step-000040"
    assert checkpoint.chosen(tmp_path, "best").name == "best-step-000020"
    assert checkpoint.chosen(tmp_path, "last").name == "step-000040"
    assert checkpoint.chosen(tmp_path, "step-000030").name == "step-000030"
    with pytest.raises(CheckpointError, match="there are step-000030, step-000040, best-step-000020"):
        checkpoint.chosen(tmp_path, "step-000010")
    save(accelerator, tmp_path, 50, is_best=True)
    assert checkpoint.chosen(tmp_path, "best").name == "best-step-000050"


def test_a_torn_checkpoint_is_not_one(accelerator, tmp_path):
    assert checkpoint.latest(tmp_path) is None
    save(accelerator, tmp_path, 10)
    (tmp_path / "step-000020.partial").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-000010"
    save(accelerator, tmp_path, 20)
    assert not (tmp_path / "step-000020.partial").exists()


def test_the_average_is_what_is_released(accelerator, tmp_path):
    average = nn.Linear(2, 2)
    folder = save(accelerator, tmp_path, 10, average=average)
    released = load_file(folder / checkpoint.WEIGHTS)
    assert released.keys() == {"weight", "bias"} and torch.equal(released["weight"], average.weight)
    trained, _ = checkpoint.read_trained(folder)
    assert trained.keys() == {"weight", "bias"} and not torch.equal(trained["weight"], average.weight)


def test_a_million_steps_sort_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoint.step_folder(tmp_path, step).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-1000000"


def test_weights_cut_short_are_named(accelerator, tmp_path):
    folder = save(accelerator, tmp_path, 10)
    path = folder / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="student.safetensors cannot be read"):
        checkpoint.read_weights(folder)
    with pytest.raises(CheckpointError, match="student.safetensors cannot be read.* delete this checkpoint"):
        checkpoint.read_trained(folder)


def test_a_full_disk_loses_nothing(accelerator, tmp_path):
    """A limit on the size of files stands for the disk: rank 0 gets the same error in the same place."""
    save(accelerator, tmp_path, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of death
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written \(.*resumes from .*step-000010"):
            save(accelerator, tmp_path, 20, model=nn.Linear(1000, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]
    checkpoint.read_trained(tmp_path / "step-000010")


def test_nothing_trained_yet(tmp_path):
    with pytest.raises(CheckpointError, match="effsam3 train"):
        checkpoint.chosen(tmp_path, "best")
