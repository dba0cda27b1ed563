# SPDX-License-Identifier: Apache-2.0
"""Small parts of the loop; whole runs are in tests/e2e."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from effsam3.errors import UserError
from effsam3.train import sample_seed
from effsam3.training.batchnorm import share_batchnorm
from effsam3.training.meters import PEAK_TFLOPS, Window, peak_tflops, step_line


def test_sync_batchnorm_keeps_names_and_parameters():
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    names, weight = list(student.state_dict()), student[1].weight
    with pytest.raises(UserError, match="on GPUs only; set train.sync_batchnorm=false"):
        share_batchnorm(student, SimpleNamespace(device=torch.device("cpu")))
    shared = share_batchnorm(student, SimpleNamespace(device=torch.device("cuda")))
    assert isinstance(shared[1], nn.SyncBatchNorm) and shared[1].weight is weight
    assert list(shared.state_dict()) == names


def test_seeds_are_those_of_every_machine_and_differ():
    """Against the numbers that an interrupted run needs again, whatever Python it resumes with."""
    assert sample_seed(0, 0, 0, 0) == 15793235383387715774
    assert sample_seed(3, 1000, 2, 7) == 4940867430204434680
    places = [
        (seed, step, micro, rank) for seed in (0, 1) for step in range(50) for micro in (0, 1) for rank in (0, 1)
    ]
    assert len({sample_seed(*place) for place in places}) == len(places)
    torch.manual_seed(sample_seed(0, 0, 0, 0))  # takes all 64 bits


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA A10G", 70), ("NVIDIA H200", 989), ("Radeon", None),
])  # fmt: skip
def test_the_peak_of_known_devices(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == tflops
    assert peak_tflops(torch.device("cpu")) is None
    assert all(
        part not in other for other in PEAK_TFLOPS for part in list(PEAK_TFLOPS)[: list(PEAK_TFLOPS).index(other)]
    )


def test_speed_by_hand(monkeypatch):
    """2 ranks, 8 samples a step in 2 micro-batches of each; 5 steps in 10 s, 1 s of which was waiting."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=2,
        gradient_accumulation_steps=2,
        reduce=lambda value, how: value,
        gather=lambda row: torch.cat([row, row + 1]),
    )
    now = iter([0.0, 0.0, 1.0, 10.0, 10.0])
    monkeypatch.setattr("effsam3.training.meters.time.perf_counter", lambda: next(now))
    window = Window(accelerator, global_batch=8, flops=3e12, per_rank=True)
    window.peak = 24.0
    assert window.wait_for(iter(["batch"])) == "batch"
    for _ in range(10):
        window.add({"loss": torch.tensor(0.5)})
    values = window.close(1e-3, torch.tensor(2.0))
    assert values["train/loss"] == 0.5 and values["train/grad_norm"] == 2
    assert values["perf/samples_per_s"] == 4 and values["perf/samples_per_s_per_device"] == 2
    assert values["perf/data_wait"] == pytest.approx(0.1) and values["perf/step_s"] == 2
    assert step_line(5, 200, values | {"perf/peak_gib": 12.34}, 390.0) == (
        "step   5/200      6 min left  loss 0.5000  lr 1.0e-03  gradient 2  2 s/step  4.0 samples/s  12.3 GiB  "
        "waiting for data 10%"
    )
    assert values["perf/tflops_per_device"] == pytest.approx(6) and values["perf/mfu"] == pytest.approx(0.25)
    assert (values["rank0/step_s"], values["rank1/step_s"]) == (2, 3)
