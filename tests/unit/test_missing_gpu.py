# SPDX-License-Identifier: Apache-2.0
"""Where GPUs are asked for and there are none, nothing runs on the CPU without a word; nor the other way round."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effsam3.cli import main
from effsam3.errors import RecipeError
from effsam3.hardware.accelerator import device_for, refuse_missing_gpu

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "recipes/smoke/image.yaml")
FOR_CPUS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*cpu.yaml"))
FOR_GPUS = sorted({path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} - set(FOR_CPUS))
TWINS = {"gpu": "cpu", "ddp": "ddp_cpu", "zero2": "zero2_cpu", "zero3_offload": "cpu"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("hardware", FOR_GPUS)
def test_hardware_of_gpus(hardware, monkeypatch):
    with pytest.raises(RecipeError, match=f"hardware: {hardware} is for GPUs, but torch .* finds none .* hardware="):
        refuse_missing_gpu(hardware)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuse_missing_gpu(hardware)


@pytest.mark.parametrize("hardware", FOR_CPUS)
def test_hardware_of_cpus(hardware):
    refuse_missing_gpu(hardware)


@pytest.mark.parametrize("hardware", [*FOR_CPUS, *FOR_GPUS])
def test_a_gpu_that_is_there_is_used_where_gpus_are_asked_for(hardware, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for(hardware).type == ("cpu" if hardware in FOR_CPUS else "cuda")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # `accelerate launch` has another config than the recipe
    assert device_for(hardware).type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_for(hardware).type == "cpu"


@pytest.mark.parametrize("hardware", TWINS)
def test_what_takes_its_place(hardware):
    with pytest.raises(RecipeError, match=f"all the same: hardware={TWINS[hardware]}$"):
        refuse_missing_gpu(hardware)


@pytest.mark.parametrize("verb", ["embed", "train", "evaluate"])
def test_every_verb_that_takes_hardware(verb, capsys, tmp_path):
    assert main([verb, SMOKE, "hardware=gpu", f"train.runs={tmp_path}"]) == 2
    assert "hardware: gpu is for GPUs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("hardware", "code"), [("gpu", 1), ("cpu", 0)])
def test_by_accelerates_own_command(hardware, code, tmp_path):
    """Its config counts, not the recipe's, which may name another one."""
    other = {"gpu": "cpu", "cpu": "gpu"}[hardware]
    (tmp_path / "script.py").write_text(
        "from effsam3.hardware.accelerator import device_for, refuse_missing_gpu\n"
        f"refuse_missing_gpu({other!r})\nprint('it works')\n"
    )
    config = ROOT / f"accelerate_configs/{hardware}.yaml"
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}  # as on a machine without one
    done = subprocess.run([*line, str(tmp_path / "script.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("it works" in done.stdout) == (code == 0)
    assert ("`accelerate launch` was told to use GPUs" in done.stderr) == (code == 1)
