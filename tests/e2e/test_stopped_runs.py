# SPDX-License-Identifier: Apache-2.0
"""Requests to stop that every process of a run gets, as from systemd, Docker, Kubernetes, `timeout` and Slurm.

Each ends with code 75 and everything saved, and the same command resumes to the same weights, bit for bit.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from commands import Family, command, metrics, run, run_here, step_of
from safetensors.torch import load_file
from wandb_files import read_wandb

from effsam3.data.store.reader import StoreReader
from effsam3.training import checkpoint
from effsam3.training.progress import read_progress

STEPS = 12
SHORT = (
    f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=4", "train.save_every=5", "optim.warmup_steps=2",
    "train.ema=0.5", "data.workers=2",
)  # fmt: skip
TRACKED = "train.loggers=[wandb, tensorboard]"


def line_of(hardware: str, *arguments: str) -> list[str]:
    """The command line of a training."""
    return command("train", *arguments, launch=hardware != "cpu")


def assert_same_weights(expected: Path, found: Path) -> None:
    last = f"checkpoints/step-{STEPS:06d}"
    for name in (checkpoint.WEIGHTS, checkpoint.TRAINED, checkpoint.OPTIMIZER):
        whole, resumed = (load_file(folder / last / name) for folder in (expected, found))
        assert whole.keys() == resumed.keys() and all((whole[key] == resumed[key]).all() for key in whole), name


@pytest.fixture(scope="module")
def whole(shared):
    """Make the folder of a run of some hardware that nothing happens to, once."""
    folder, overrides = shared
    made = {}

    def of(hardware: str) -> Path:
        if hardware not in made:
            own = (*overrides, *SHORT, f"hardware={hardware}", f"name=whole-{hardware}")
            run(folder, "train", *own, launch=hardware != "cpu")
            made[hardware] = folder / f"runs/whole-{hardware}"
        return made[hardware]

    return of


@pytest.mark.parametrize(("hardware", "how"), [("cpu", "signal_group"), ("ddp_cpu", "signal_all")])
def test_stopped_at_random_moments(shared, whole, hardware, how):
    folder, overrides = shared
    name = f"random-{hardware}-{how}"
    mine = folder / "runs" / name
    arguments = (*overrides, *SHORT, TRACKED, f"hardware={hardware}", f"name={name}")
    moments = random.Random(f"{hardware} {how}")
    saved = 0
    for number, steps in zip((signal.SIGTERM, signal.SIGUSR1), (2, 4), strict=True):
        family = Family(folder, line_of(hardware, *arguments))
        goal = saved + moments.randint(1, steps)
        family.wait_until(lambda goal=goal: step_of(mine) >= goal)
        time.sleep(moments.uniform(0, 0.5))
        getattr(family, how)(number)
        printed = family.end()
        assert family.process.returncode == 75, printed
        assert "memory" not in printed and "asked to stop: saved at step" in printed
        progress = read_progress(mine)
        assert (progress.state, progress.error) == ("stopped", "") and progress.step >= goal
        assert checkpoint.latest(mine / "checkpoints").name == f"step-{progress.step:06d}"
        saved = progress.step
    family = Family(folder, line_of(hardware, *arguments))
    printed = family.end()
    assert family.process.returncode == 0 and f"resuming from step {saved}" in printed, printed
    assert_same_weights(whole(hardware), mine)
    assert metrics(mine).keys() == set(range(1, STEPS + 1))
    assert_one_curve(mine)


def assert_one_curve(folder: Path) -> None:
    """All starts are one wandb run without doubled steps, and one curve in TensorBoard, equal to metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = {step: values["train/loss"] for step, values in metrics(folder).items()}
    curve = EventAccumulator(str(folder / "tensorboard/effsam3")).Reload().Scalars("train/loss")
    assert [event.step for event in curve] == sorted(losses)
    assert [event.value for event in curve] == pytest.approx([losses[step] for step in sorted(losses)], rel=1e-6)

    parts = sorted((folder / "wandb").glob("offline-run-*"))
    assert {part.name.rpartition("-")[2] for part in parts} == {json.loads((folder / "wandb.json").read_text())["id"]}
    rows = [row for part in parts for row in read_wandb(part)["history"]]
    logged = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert len(rows) == len({row["_step"] for row in rows}), "a step was logged twice"
    assert logged == losses


def test_killed_without_a_warning_the_curves_are_one_all_the_same(shared):
    """Steps that were logged after the last checkpoint are taken, and logged, again."""
    folder, overrides = shared
    arguments, mine = (
        (*overrides, *SHORT, TRACKED, "train.save_every=3", "name=torn-curve"),
        folder / "runs/torn-curve",
    )
    family = Family(folder, line_of("cpu", *arguments))
    family.wait_until(lambda: step_of(mine) >= 5)
    family.process.kill()
    family.end()
    assert checkpoint.latest(mine / "checkpoints").name in ("step-000003", "step-000004")
    assert "resuming from step" in run(folder, "train", *arguments)
    assert_one_curve(mine)
    assert len(list((mine / "wandb").glob("torn-*"))) == 1


# ---- other moments of a training


def test_while_it_starts(shared):
    """From the first moment on: while torch is imported, while data and models are read."""
    folder, overrides = shared
    for number, delay_s in enumerate((0.5, 2.5)):
        family = Family(folder, line_of("cpu", *overrides, *SHORT, f"name=early-{number}"))
        time.sleep(delay_s)
        family.signal_group(signal.SIGTERM)
        printed = family.end()
        assert family.process.returncode == 75, printed
        assert "asked to stop" in printed and "Traceback" not in printed


@pytest.mark.parametrize("moment", ["validation", "saving"])
def test_while_it_validates_or_saves(shared, whole, moment):
    folder, overrides = shared
    arguments, mine = (*overrides, *SHORT, f"name=while-{moment}"), folder / f"runs/while-{moment}"
    family = Family(folder, line_of("cpu", *arguments))
    if moment == "validation":  # the line of training comes first
        family.wait_until(lambda: step_of(mine) == 4)
    else:
        family.wait_until(lambda: any((mine / "checkpoints").glob("*.partial")))
    family.signal_group(signal.SIGTERM)
    printed = family.end()
    assert family.process.returncode == 75, printed
    assert not list((mine / "checkpoints").glob("*.partial"))
    assert f"resuming from step {read_progress(mine).step}" in run(folder, "train", *arguments)
    assert_same_weights(whole("cpu"), mine)


@pytest.mark.parametrize("hardware", ["cpu", "ddp_cpu"])
def test_ctrl_c_saves(shared, hardware):
    folder, overrides = shared
    own = (*overrides, *SHORT, "train.steps=5000", "train.log_every=1", f"hardware={hardware}")
    family = Family(folder, line_of(hardware, *own, f"name=once-{hardware}"))
    family.wait_until(lambda: step_of(folder / f"runs/once-{hardware}") >= 1)
    family.signal_group(signal.SIGINT)
    printed = family.end()
    assert family.process.returncode == 75 and "Ctrl-C once more ends it at once" in printed, printed


# ---- other verbs


def test_an_embed_goes_on(shared, tmp_path):
    folder, _ = shared
    overrides = (
        "data.synthetic_images=160",
        f"data.index={tmp_path}/data/index.parquet",
        f"embed.to={tmp_path}/teacher",
    )
    overrides += ("embed.batch_size=2", "data.workers=2", "hardware=ddp_cpu", "name=embed")
    family = Family(folder, command("embed", *overrides, launch=True))
    family.wait_until(lambda: sum(path.stat().st_size for path in (tmp_path / "teacher").glob("*.bin")) > 0)
    family.signal_all(signal.SIGTERM)
    printed = family.end()
    assert family.process.returncode == 75 and "records made now are kept" in printed, printed
    before = len(StoreReader(tmp_path / "teacher", allow_unfinished=True))
    assert 0 < before < 160
    printed = run_here(folder, "embed", *overrides)
    assert f"({160 - before} made now" in printed
    assert "8 of 160 records recomputed" in run_here(folder, "embed", *overrides, "--check", "8")


def test_an_evaluation_ends_at_once_and_begins_again(shared, whole, tmp_path):
    folder, overrides = shared
    mine = whole("cpu")
    own = (
        *overrides,
        f"name={mine.name}",
        "data.workers=2",
        "evaluate.benchmarks=[fidelity]",
        "evaluate.max_images=4",
    )
    run_here(folder, "merge", *own)
    family = Family(folder, command("evaluate", *own))
    family.wait_until(lambda: len(family.members()) > 2)  # its data workers
    family.signal_group(signal.SIGTERM)
    printed = family.end()
    assert family.process.returncode == 75, printed
    # torch's loader complains where it is ended while it starts its workers.
    assert "the same command resumes" in printed and "Traceback" not in printed.split("Exception ignored")[0]
    run_here(folder, "evaluate", *own)
    assert json.loads((mine / "eval/fidelity.json").read_text())["images"] == 4
