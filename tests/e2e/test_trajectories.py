# SPDX-License-Identifier: Apache-2.0
"""Runs that must learn the same: any micro-batch, any number of processes, interrupted or not, stored or online."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from commands import ENVIRONMENT, REPOSITORY, SMOKE, command, metrics, run, run_here, run_line
from safetensors.torch import load_file

STEPS = 8
SHORT = (
    f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=4", "train.save_every=2", "optim.warmup_steps=2",
    "train.ema=0.5", "train.keep_checkpoints=9",
)  # fmt: skip
KEYS = ("train/loss", "train/mse", "train/cosine", "train/grad_norm", "train/lr")


@pytest.fixture(scope="module")
def reference(shared) -> dict[int, dict]:
    folder, overrides = shared
    run_here(folder, "train", *overrides, *SHORT, "name=reference")
    return metrics(folder / "runs/reference")


def assert_same(reference: dict, other: dict, tolerance: float) -> None:
    assert reference.keys() == other.keys() and STEPS in other
    for step, values in reference.items():
        for key in KEYS:
            assert other[step][key] == pytest.approx(values[key], rel=tolerance, abs=1e-9), (step, key)


@pytest.mark.parametrize("micro", [8, 2])
def test_micro_batch_times_accumulation(shared, reference, micro):
    folder, overrides = shared
    run_here(folder, "train", *overrides, *SHORT, f"train.micro_batch_size={micro}", f"name=micro-{micro}")
    assert_same(reference, metrics(folder / f"runs/micro-{micro}"), 1e-4)


@pytest.mark.parametrize("hardware", ["ddp_cpu", "zero1_cpu", "zero2_cpu", "zero2_offload_cpu", "zero3_cpu"])
def test_two_processes(shared, reference, hardware):
    folder, overrides = shared
    arguments = (*overrides, *SHORT, f"hardware={hardware}", f"name={hardware}")
    if hardware == "zero2_cpu":  # by accelerate's own command, as the README has it
        config = REPOSITORY / f"accelerate_configs/{hardware}.yaml"
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        printed = run_line(folder, [*accelerate, str(REPOSITORY / "scripts/train.py"), str(SMOKE), *arguments])
    else:
        printed = run(folder, "train", *arguments, launch=True)
    assert "2 x cpu" in printed
    assert_same(reference, metrics(folder / "runs" / hardware), 1e-4)
    # The held-out images are divided among the ranks: the same numbers all the same.
    for step, values in metrics(folder / "runs/reference", "val/cosine").items():
        other = metrics(folder / "runs" / hardware, "val/cosine")[step]
        assert all(other[key] == pytest.approx(value, rel=1e-4) for key, value in values.items())


def test_teacher_beside_the_student(shared, reference):
    """Stored features are rounded to float16, which is all that may differ."""
    folder, overrides = shared
    run_here(folder, "train", *overrides, *SHORT, "teacher=online", "name=online")
    assert_same(reference, metrics(folder / "runs/online"), 5e-3)


def test_bf16_stays_close(shared, reference):
    folder, overrides = shared
    run_here(folder, "train", *overrides, *SHORT, "train.precision=bf16", "name=bf16")
    for step, values in metrics(folder / "runs/bf16").items():
        assert values["train/loss"] == pytest.approx(reference[step]["train/loss"], rel=0.05)
        assert values["train/loss"] != reference[step]["train/loss"]


def test_stops_when_it_gets_no_better(shared):
    folder, overrides = shared
    rates = ("optim.lr=1e-3", "optim.warmup_steps=2", "optim.min_lr=0", "optim.warmup_lr=0")
    # From step 2 on nothing moves any more, so that the second validation after it cannot be better.
    printed = run_here(
        folder, "train", *overrides, *rates, "train.steps=200", "train.eval_every=2", "train.patience=2",
        "train.log_every=100", "optim.clip_grad_norm=1e-30", "optim.weight_decay=0", "optim.eps=1", "name=patient",
    )  # fmt: skip
    assert "no better for 2 validations in a row: stopping at step 6" in printed
    assert "student, step 2" in printed
    again = run_here(folder, "train", recipe=folder / "runs/patient/recipe.yaml")
    assert "this run is complete: 6 steps" in again


def test_other_samples_are_noticed(shared, reference):
    """The comparison can fail: another seed is another trajectory."""
    folder, overrides = shared
    run_here(folder, "train", *overrides, *SHORT, "train.seed=1", "name=seed")
    with pytest.raises(AssertionError):
        assert_same(reference, metrics(folder / "runs/seed"), 5e-3)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_and_resumed(shared, reference):
    folder, overrides = shared
    name = "killed"
    arguments = ("train", *overrides, *SHORT, f"name={name}")
    checkpoints = folder / "runs" / name / "checkpoints"
    process = subprocess.Popen(
        command(*arguments), cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: (checkpoints / "step-000002").is_dir(), process)
    process.kill()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, printed
    assert not (checkpoints / f"step-{STEPS:06d}").is_dir()
    printed = run_here(folder, *arguments)
    assert "resuming from step" in printed
    assert_same(reference, metrics(folder / "runs" / name), 1e-12)
    whole, resumed = (
        load_file(folder / "runs" / run_name / "checkpoints" / f"step-{STEPS:06d}" / "student.safetensors")
        for run_name in ("reference", name)
    )
    assert all((whole[key] == resumed[key]).all() for key in whole)


@pytest.mark.parametrize(("saved", "step", "hardware"), [
    ("zero3_cpu", 2, "cpu"), ("zero2_offload_cpu", 4, "ddp_cpu"), ("reference", 4, "zero1_cpu"),
    ("zero1_cpu", 6, "zero2_offload_cpu"), ("ddp_cpu", 4, "zero3_cpu"),
])  # fmt: skip
def test_resumes_on_other_hardware(shared, reference, saved, step, hardware):
    """A run saved on any hardware resumes on any other, with any number of processes: the same steps."""
    folder, overrides = shared
    checkpoint = folder / "runs" / saved / f"checkpoints/step-{step:06d}"
    name = f"{saved}-{hardware}"
    arguments = (*overrides, *SHORT, f"name={name}", f"hardware={hardware}", "--resume", str(checkpoint))
    printed = (run_here if hardware == "cpu" else partial(run, launch=True))(folder, "train", *arguments)
    assert f"resuming from step {step}" in printed
    found = metrics(folder / "runs" / name)
    assert_same({number: reference[number] for number in range(step + 1, STEPS + 1)}, found, 1e-4)
    # Of the averaged weights, which are saved and read too.
    whole, moved = (metrics(folder / "runs" / run_name, "val/cosine")[STEPS] for run_name in ("reference", name))
    assert moved["val/cosine"] == pytest.approx(whole["val/cosine"], rel=1e-4)


def test_batchnorm_is_validated_as_it_is_saved(shared):
    """Each rank has its own running statistics until rank 0's are shared: what is reported is what is released."""
    folder, overrides = shared
    run(
        folder, "train", *overrides, "student=efficientvit_b0", "train.steps=3", "train.eval_every=3",
        "train.log_every=3", "optim.warmup_steps=1", "optim.lr=1e-3", "hardware=zero3_cpu", "name=batchnorm",
        launch=True,
    )  # fmt: skip
    reported = metrics(folder / "runs/batchnorm", "val/cosine")[3]["val/cosine"]
    run_here(folder, "merge", *overrides, "name=batchnorm")
    run_here(
        folder, "evaluate", *overrides, "name=batchnorm", "evaluate.benchmarks=[fidelity]", "evaluate.max_images=8"
    )
    measured = json.loads((folder / "runs/batchnorm/eval/fidelity.json").read_text())["cosine"]
    assert measured == pytest.approx(reported, rel=1e-4)


def test_wandb_without_a_login_stays_on_disk(shared, tmp_path):
    folder, overrides = shared
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("WANDB")}
    short = ("train.steps=2", "train.log_every=1", "optim.warmup_steps=1", "name=tracked")
    printed = run(
        folder, "train", *overrides, *short, "train.loggers=[wandb, tensorboard]",
        environment=environment | {"HOME": str(tmp_path), "EFFSAM3_CACHE": os.environ["EFFSAM3_CACHE"]},
    )  # fmt: skip
    assert "wandb sync" in printed
    (recorded,) = Path(folder / "runs/tracked/wandb").glob("offline-run-*/*.wandb")
    logged = recorded.read_bytes()
    # Numbers, the whole recipe, and where it all comes from.
    assert all(
        name in logged for name in (b"train/loss", b"val/cosine", b"optim.clip_grad_norm", b"provenance.commit")
    )
    (events,) = (folder / "runs/tracked/tensorboard").rglob("events*.0")
    assert b"train/loss" in events.read_bytes()
