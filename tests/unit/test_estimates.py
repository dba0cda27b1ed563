# SPDX-License-Identifier: Apache-2.0
"""Memory before it hurts: hardware by hand, verdicts, advice, an out-of-memory message."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effsam3 import train
from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.hardware.accelerate_configs import REDUCE_BUCKET
from effsam3.hardware.budget.estimates import (
    GIB,
    Hardware,
    Sizes,
    advice,
    attempt,
    estimate,
    explain_out_of_memory,
    fits,
    header_lines,
    largest_micro_batch,
    measure,
    micro_batches,
    other_changes,
    out_of_memory_explained,
    read_hardware,
    resized,
    running_hardware,
    states,
    table,
)
from effsam3.recipe.reader import flat, load_recipe
from effsam3.train import announce
from effsam3.training.report import Report

RECIPES = Path(__file__).parents[2] / "recipes"
IMAGE, TEXT, MEMORY = (str(RECIPES / f"smoke/{stage}.yaml") for stage in ("image", "text", "memory"))
LARGE = ["hardware=gpu", "train.global_batch_size=64", "train.micro_batch_size=64"]
SHORT = ["sam3.checkpoint=tiny", "data.frames=3", "train.micro_batch_size=1"]  # clips for the memory


# ---- hardware, by hand


@pytest.mark.parametrize(
    ("processes", "stage", "offloads", "expected", "host"),
    [
        (1, None, (False, False), {"weights": 4000, "gradients": 4000, "optimizer": 8000}, 0),
        (4, None, (False, False), {"weights": 4000, "gradients": 8000, "optimizer": 8000}, 0),
        (4, 1, (False, False), {"weights": 4000, "gradients": 4000, "optimizer": 3000}, 0),
        (4, 2, (False, False), {"weights": 4000, "gradients": 1000, "optimizer": 3000}, 0),
        (4, 3, (False, False), {"weights": 5000, "gradients": 1000, "optimizer": 3000}, 0),
        (4, 2, (True, False), {"weights": 4000, "gradients": 0}, 4000),
        (4, 3, (True, True), {"weights": 4000, "gradients": 0}, 5000),
    ],
)
def test_what_hardware_keeps_of_a_thousand_parameters(processes, stage, offloads, expected, host):
    buckets = 0 if stage is None else 4 * REDUCE_BUCKET
    device, moved = states(Hardware("x", processes, stage, *offloads), 1000)
    assert device.pop("ZeRO's buckets", 0) == buckets
    assert (device, moved) == (expected, host)


def test_hardware_is_read_from_their_files():
    assert read_hardware("zero3") == Hardware("zero3", 8, 3, False, False)
    assert read_hardware("ddp_cpu").zero_stage is None and not read_hardware("ddp_cpu").has_gpu
    assert read_hardware("gpu").has_gpu and read_hardware("gpu").processes == 1


def test_an_estimate_adds_up():
    recipe = load_recipe(IMAGE, ["hardware=gpu", "train.ema=0.9", "train.keep_checkpoints=2"])
    found = estimate(recipe, Sizes(trained=1000, frozen=50, micro_batch=700, flops=0))
    assert found.total == 16_000 + 4000 + 50 + 700 + GIB
    assert found.checkpoint == 16_000  # weights, two moments, averaged weights
    assert found.checkpoints == 2 * 16_000 + 4000


# ---- output


def test_micro_batches_divide_the_global_batch():
    recipe = load_recipe(IMAGE, ["train.global_batch_size=512"])
    assert micro_batches(recipe, 8) == [1, 2, 4, 8, 16, 32, 64]
    assert micro_batches(load_recipe(IMAGE, ["train.global_batch_size=48"]), 8) == [1, 2, 3, 6]


def test_the_largest_micro_batch_that_fits_is_advised():
    recipe = load_recipe(IMAGE, LARGE)
    sizes = measure(recipe)
    quarter = estimate(*resized(recipe, sizes, 16)).total
    device = int(quarter / 0.9) + 1
    assert fits(quarter, device) and not fits(quarter + 2, device)
    assert largest_micro_batch(recipe, sizes, device) == ("train.micro_batch_size=16", quarter)
    assert advice(recipe, sizes, device) == [f"train.micro_batch_size=16 would take {quarter / GIB:.1f} GiB"]
    assert largest_micro_batch(recipe, sizes, GIB) is None
    assert [line.endswith("too much by itself") for line in advice(recipe, sizes, GIB)] == [True]


def test_where_no_micro_batch_helps_the_hardware_is_named_next():
    """A student of a billion parameters: what counts is what is kept of it."""
    recipe = load_recipe(
        IMAGE, ["hardware=zero2", "train.global_batch_size=64", "train.ema=0.9", "train.precision=bf16"]
    )
    sizes = replace(measure(recipe), trained=1_000_000_000)
    totals = {change: total / GIB for change, total in other_changes(recipe, sizes)}
    assert list(totals)[0] == "hardware=zero3" and list(totals)[-1] == "train.ema=0"
    now = estimate(recipe, sizes).total / GIB
    assert now - totals["train.ema=0"] == pytest.approx(4e9 / GIB)
    assert now - totals["hardware=zero3"] == pytest.approx(-0.5e9 / GIB)  # whole while a step runs, and its part


def test_a_table_says_whether_a_device_is_enough():
    recipe = load_recipe(IMAGE, LARGE)
    enough, short = table(recipe, 80), table(recipe, 1.5)
    assert "verdict   fits 80.0 GiB" in enough and "would take" not in enough
    assert "verdict   does not fit 1.5 GiB" in short and "train.micro_batch_size=" in short
    parts = [line.split()[:2] for line in enough.splitlines()[1:] if line.startswith(" ")]
    total = sum(float(size) * {"GiB": 1, "MiB": 1 / 1024}[unit] for size, unit in parts)
    assert float(enough.split("about ")[1].split()[0]) == pytest.approx(total, abs=0.15)
    assert "24 GiB (RTX 4090, A10) are enough" in table(recipe)


def test_show_prints_it_last_and_keeps_it_a_comment(tmp_path, capsys):
    assert main(["show", IMAGE, "hardware=gpu", "--device-gib", "24"]) == 0
    text = capsys.readouterr().out
    assert text.index("# verdict   fits 24.0 GiB") > text.index("# store")
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(IMAGE, ["hardware=gpu"])


def test_show_estimates_only_what_it_is_asked_for(capsys):
    assert main(["show", IMAGE]) == 0
    quick = capsys.readouterr().out
    assert main(["show", IMAGE, "--budget"]) == 0
    asked = capsys.readouterr().out
    assert asked.startswith(quick) and asked[len(quick) :].startswith("# device    about ") and "verdict" not in quick
    assert main(["show", str(RECIPES / "smoke/release.yaml"), "--budget"]) == 0
    assert "# device    nothing is trained here" in capsys.readouterr().out


def test_show_refuses_a_device_without_memory_and_says_what_is_unknown(capsys):
    assert main(["show", IMAGE, "--device-gib", "0"]) == 2
    assert "--device-gib: 0 is not above 0" in capsys.readouterr().err
    assert main(["show", IMAGE, "--budget", "sam3.checkpoint=someone/sam3"]) == 0
    assert "# device    unknown yet: sam3.checkpoint: the sizes of 'someone/sam3'" in capsys.readouterr().out


def test_the_header_has_one_line():
    recipe, hardware = load_recipe(IMAGE), read_hardware("cpu")
    line = header_lines(recipe, hardware, Sizes(trained=1000, frozen=0, micro_batch=3 * GIB, flops=0))["budget"]
    assert line.startswith("about 3.0 GiB") and "(micro-batch 3.0 GiB, " in line
    assert "\n" not in line


def test_a_run_on_a_gpu_is_announced_without_another_dry_run(tmp_path, monkeypatch, capsys):
    """Memory for the header and operations for the speed are of one dry run, that of `measure`."""
    recipe = load_recipe(IMAGE, ["hardware=gpu"])
    sizes = measure(recipe)
    assert sizes.micro_batch > 1e6 and sizes.flops > 1e9
    monkeypatch.setattr("effsam3.hardware.budget.dry_run.dry_stage", None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA L4")
    accelerator = SimpleNamespace(
        device=torch.device("cuda"),
        is_main_process=True,
        num_processes=1,
        state=SimpleNamespace(deepspeed_plugin=None),
    )
    stage = SimpleNamespace(describe=lambda: {"student": "tiny"}, train_size=100, facts={})
    loggers = SimpleNamespace(start=lambda *started: "")
    state = {"step": 0, "ended": True}
    announce(recipe, stage, accelerator, Report(tmp_path, True), loggers, 10, 2, state, sizes)
    assert "\nbudget   about 1.1 GiB" in capsys.readouterr().out
    source = inspect.getsource(train)
    assert "dry_run" not in source and source.count("attempt(") == source.count("attempt(measure, recipe") == 1


def test_a_run_is_on_the_hardware_that_it_was_started_on():
    def started(processes, plugin=None):
        return SimpleNamespace(num_processes=processes, state=SimpleNamespace(deepspeed_plugin=plugin))

    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": zero})
    assert running_hardware(started(4), "zero2") == Hardware("zero2", 4, None, False, False)
    assert running_hardware(started(16, plugin), "ddp") == Hardware("ddp", 16, 3, True, False)


@pytest.mark.parametrize("path", [IMAGE, TEXT, MEMORY])
def test_an_estimate_that_cannot_be_made_stops_nothing(path):
    recipe = load_recipe(path, ["sam3.checkpoint=someone/sam3"])
    with pytest.raises(UserError, match="sizes of 'someone/sam3' are not known"):
        measure(recipe)
    assert attempt(measure, recipe, None) is None
    with pytest.raises(UserError, match="out of memory.*; lower train.micro_batch_size"):
        with out_of_memory_explained(recipe):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_clip_with_fewer_frames_or_objects_takes_less():
    recipe = load_recipe(MEMORY, ["sam3.checkpoint=tiny", "data.objects=2", "data.frames=5", "train.trunk_batch=1"])
    sizes = Sizes(trained=1000, frozen=0, micro_batch=1000 * GIB, flops=0)
    found = dict(islice((pair for pair in other_changes(recipe, sizes) if pair[0].startswith("data")), 2))
    base = estimate(recipe, replace(sizes, micro_batch=0)).total
    assert found == {"data.objects=1": base + 500 * GIB, "data.frames=2": base + 400 * GIB}


@pytest.mark.parametrize(("path", "keys"), [(IMAGE, []), (TEXT, []), (MEMORY, SHORT)])
def test_the_knobs_are_keys_of_the_recipe(path, keys):
    recipe = load_recipe(path, keys)
    assert set(recipe.knobs) <= set(flat(recipe))


def test_out_of_memory_names_the_knobs_and_what_would_help():
    recipe = load_recipe(IMAGE, ["hardware=gpu"])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore about fragmentation")
    told = explain_out_of_memory(recipe, error)
    assert isinstance(told, UserError)
    lines = str(told).splitlines()
    assert lines[0] == "the device is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert "train.micro_batch_size=4, hardware=gpu, train.ema=0.0" in lines[2]
    assert lines[3].startswith("change: train.micro_batch_size=2 would take 1.")
    small = str(explain_out_of_memory(load_recipe(IMAGE, LARGE), error, device_gib=1.5))
    assert "change: train.micro_batch_size=16 would take" in small
