# SPDX-License-Identifier: Apache-2.0
"""Runs that something happens to: killed ranks and workers, full disks, damaged files, NaN, no network.

Each ends promptly with a code and a line that says why, loses nothing that was saved, and resumes to the same numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import ENVIRONMENT, REPOSITORY, SMOKE, command, metrics, run, run_here
from test_trajectories import KEYS, wait_for

from effsam3.data.images.sa1b import load_index
from effsam3.data.sampler import StepSampler
from effsam3.data.store.format import create_store
from effsam3.data.store.reader import StoreReader, name_of
from effsam3.data.store.writer import StoreWriter, finish_store
from effsam3.training import checkpoint

TEXT = REPOSITORY / "recipes/smoke/text.yaml"
STEPS, BATCH, MICRO = 6, 8, 4
SHORT = (
    f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", f"train.micro_batch_size={MICRO}", "train.log_every=1",
    f"train.eval_every={STEPS}", "train.save_every=1", "train.keep_checkpoints=9", "optim.warmup_steps=2",
)  # fmt: skip
PROMPTLY_S = 60  # two ranks that lose each other, on a busy machine


def start(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    """Start a verb and leave it running."""
    return subprocess.Popen(
        command(*arguments, **options),
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen, timeout: float = PROMPTLY_S) -> str:
    """Wait for the end and return what was printed; a hang is a failure, and leaves nothing running."""
    family = psutil.Process(process.pid).children(recursive=True)
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        for member in (process, *family):
            with suppress(psutil.NoSuchProcess):
                member.kill()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    wait_for(lambda: checkpoint.step_folder(folder / "checkpoints", step).is_dir(), process)


def rank_of(process: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of one rank of an `effsam3 launch`."""
    family = psutil.Process(process.pid).children(recursive=True)
    return next(member for member in family if member.environ().get("RANK") == str(rank))


def assert_same(expected: Path, found: Path, tolerance: float) -> None:
    expected, found = metrics(expected), metrics(found)
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    for step, values in expected.items():
        for key in KEYS:
            assert found[step][key] == pytest.approx(values[key], rel=tolerance, abs=1e-9), (step, key)


@pytest.fixture(scope="module")
def whole(shared) -> Path:
    """The folder of a run that nothing happened to."""
    folder, overrides = shared
    run_here(folder, "train", *overrides, *SHORT, "name=whole")
    return folder / "runs/whole"


def sampled(index: Path, step: int, micro: int, rank: int = 0, world: int = 1, batch: int = MICRO) -> str:
    """Key of the first training image of a micro-batch; steps count from 0."""
    keys = load_index(index, "train")["key"]
    batches = list(StepSampler(len(keys), 0, BATCH, batch, rank, world).micro_batches(step, step + 1))
    return keys[batches[micro][0]]


def copy_store(source: Path, to: Path, image: str, poison: bool = False) -> Path:
    """Write a store anew with the record of an image at its end, its features NaN on request; returns the file."""
    store = StoreReader(source)
    (last,) = (key for key in store.keys if name_of(key) == image)
    keys = [*(key for key in store.keys if key != last), last]
    create_store(to, store.manifest.fields, store.manifest.description, expected=len(keys))
    with StoreWriter(to, 0) as writer:
        for key in keys:
            record = {name: value[0] for name, value in store.read(store.positions([key])).items()}
            if poison and key == last:
                record["features"].fill_(float("nan"))
            writer.write(key, record)
    finish_store(to, keys, store.manifest.statistics)
    return to / "shard-00000-0000.bin"


# ---- ranks


def test_a_rank_is_killed_then_both_are_stopped_then_they_finish(shared, whole):
    folder, overrides = shared
    arguments = ("train", *overrides, *SHORT, "hardware=ddp_cpu", "name=pair")
    mine = folder / "runs/pair"

    process = start(folder, *arguments, launch=True)
    wait_for_step(mine, 1, process)
    rank_of(process, 1).kill()
    printed = end(process)
    assert process.returncode == 1, printed
    assert "rank      : 1" in printed and "exitcode  : -9" in printed
    said = subprocess.run(command("status", recipe=mine), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert "failed" in said.stdout and "the same command" in said.stdout, said.stdout

    process = start(folder, *arguments, launch=True)
    wait_for_step(mine, 4, process)
    process.terminate()
    printed = end(process, 180)
    assert process.returncode == 75 and "resuming from step" in printed, printed
    assert "asked to stop: saved at step" in printed
    assert json.loads((mine / "progress.json").read_text())["state"] == "stopped"
    stopped = checkpoint.latest(mine / "checkpoints")
    assert stopped.name < f"step-{STEPS:06d}"

    printed = run(folder, *arguments, launch=True)
    assert f"resuming from step {int(stopped.name[-6:])}" in printed
    assert_same(whole, mine, 1e-4)


# ---- disk


def test_killed_while_it_writes_a_checkpoint(shared, whole):
    """The half-written one is not used, the one before is."""
    folder, overrides = shared
    arguments, mine = ("train", *overrides, *SHORT, "name=torn"), folder / "runs/torn"
    process = start(folder, *arguments)
    wait_for_step(mine, 1, process)
    partial = []
    while not partial:  # stopped too late for one checkpoint, it goes on to the next
        process.send_signal(signal.SIGCONT)
        while not list((mine / "checkpoints").glob(".step-*.partial")):
            assert process.poll() is None, "the run ended before it could be stopped in a checkpoint"
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        partial = list((mine / "checkpoints").glob(".step-*.partial"))
    process.kill()
    process.wait()
    before = checkpoint.latest(mine / "checkpoints")
    assert before.name < partial[0].name[1:]
    assert f"resuming from step {int(before.name[-6:])}" in run(folder, *arguments)
    assert_same(whole, mine, 1e-12)
    assert not list((mine / "checkpoints").glob("*.partial"))


@pytest.fixture
def disk(tmp_path) -> Iterator[Path | None]:
    """A disk of its own with room for all checkpoints; None where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", folder], capture_output=True)
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_and_room_lets_it_resume(shared, whole, disk, tmp_path):
    folder, overrides = shared
    runs = disk or tmp_path / "disk"
    arguments, mine = ("train", *overrides, *SHORT, f"train.runs={runs}", "name=full"), runs / "full"
    process = start(folder, *arguments, "hardware=ddp_cpu", launch=True)
    wait_for_step(mine, 2, process)
    others = runs / "others"
    if disk is not None:  # somebody else fills it, but for less than a checkpoint's 17 MB
        with suppress(OSError), open(others, "wb", buffering=0) as file:
            while shutil.disk_usage(disk).free > 5_000_000:
                file.write(bytes(1_000_000))
    else:  # no file may grow beyond a limit instead: the same error in the same place
        rank_of(process, 0).rlimit(psutil.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    printed = end(process, 180)
    assert process.returncode == 1, printed
    last = checkpoint.latest(mine / "checkpoints")
    assert "could not be written" in printed
    assert f"make room or name another train.runs. The same command resumes from {last}" in printed
    assert last.name >= "step-000002" and not list((mine / "checkpoints").glob("*.partial"))
    for saved in checkpoint.complete(mine / "checkpoints"):
        checkpoint.read_trained(saved)
    progress = json.loads((mine / "progress.json").read_text())
    assert progress["state"] == "failed" and "make room" in progress["error"]

    if disk is not None:
        others.unlink()
    assert f"resuming from step {int(last.name[-6:])}" in run(folder, *arguments)
    assert_same(whole, mine, 1e-4)


def test_compiling_is_refused_under_deepspeed(shared):
    folder, overrides = shared
    more = ("hardware=zero2_cpu", "name=compiled", "train.compile=true")
    printed = run(folder, "train", *overrides, *SHORT, *more, launch=True, code=1)
    assert "train.compile does not go with DeepSpeed (zero2_cpu); set it to false" in printed
    assert not (folder / "runs/compiled").exists()


def test_what_rank_0_alone_refuses_ends_both_ranks(shared):
    """The other one would wait for it in a collective, and end in a traceback of its own."""
    folder, overrides = shared
    more = ("hardware=ddp_cpu", "name=refused", "data.synthetic_images=40")  # 48 have been drawn
    process = start(folder, "train", *overrides, *SHORT, *more, launch=True)
    printed = end(process, 180)
    assert process.returncode == 1 and printed.count("error: ") == 1, printed
    assert "asked for is {'images': 40" in printed
    assert "rank1]" not in printed and "Connection" not in printed, printed


# ---- damaged data


def test_a_shard_cut_short_while_two_ranks_read_it(shared, tmp_path):
    """Only one of the ranks comes to the record that is gone."""
    folder, overrides = shared
    needed = sampled(folder / "data/index.parquet", 4, micro=0, rank=1, world=2)
    shard = copy_store(folder / "teacher", tmp_path / "teacher", needed)
    more = (f"embed.to={tmp_path}/teacher", "hardware=ddp_cpu", "name=cut")
    process = start(folder, "train", *overrides, *SHORT, *more, launch=True)
    wait_for_step(folder / "runs/cut", 1, process)
    os.truncate(shard, shard.stat().st_size - 1)
    printed = end(process, 180)
    assert process.returncode == 1, printed
    assert printed.count(f"error: truncated shard {shard}") == 1
    assert checkpoint.latest(folder / "runs/cut/checkpoints").name == "step-000004"


def test_an_image_that_one_of_two_ranks_cannot_read(shared, tmp_path):
    folder, overrides = shared
    shutil.copytree(folder / "data", tmp_path / "data")
    index = tmp_path / "data/index.parquet"
    key = sampled(index, 1, micro=0, rank=1, world=2)
    rows = load_index(index, "train")
    broken = tmp_path / "data" / rows["image_file"][list(rows["key"]).index(key)]
    broken.write_bytes(broken.read_bytes()[:700])
    more = (f"data.index={index}", "teacher=online", "hardware=ddp_cpu", "name=broken")
    printed = run(folder, "train", *overrides, *SHORT, *more, "train.steps=3", launch=True)
    (line,) = [json.loads(line) for line in (folder / "runs/broken/unreadable.jsonl").read_text().splitlines()]
    assert (line["step"], line["key"]) == (2, key) and "unreadable.jsonl names them" in printed
    assert list(metrics(folder / "runs/broken")) == [1, 2, 3]


# ---- NaN


@pytest.fixture(scope="module")
def poisoned(shared, tmp_path_factory) -> tuple[str, str]:
    """The image whose features are NaN in a store, seen first in the second step, and the override for that store."""
    folder, to = shared[0], tmp_path_factory.mktemp("poisoned") / "teacher"
    key = sampled(folder / "data/index.parquet", 1, micro=1)
    copy_store(folder / "teacher", to, key, poison=True)
    return key, f"embed.to={to}"


def test_nan_stops_the_run_and_names_the_sample(shared, poisoned):
    folder, overrides = shared
    key, store = poisoned
    arguments, mine = ("train", *overrides, *SHORT, store, "train.micro_batch_size=1", "name=nan"), folder / "runs/nan"
    printed = run_here(folder, *arguments, code=2)
    assert "the loss is nan on rank 0 at step 2" in printed and "train.not_finite=skip" in printed
    found = json.loads((mine / "not_finite.json").read_text())
    assert found["step"] == 2 and len(found["micro_batches"]) == BATCH
    assert [one["samples"] for one in found["micro_batches"] if one["loss"] == "nan"] == [[key]]
    assert checkpoint.latest(mine / "checkpoints").name == "step-000001"

    assert "resuming from step 1" in run_here(folder, *arguments, "train.not_finite=skip")  # as it was told
    lines = [json.loads(line) for line in (mine / "skipped.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 2 and {sample for line in lines for sample in line["ranks"][0]["samples"]} == {key}
    assert len(metrics(mine)) == STEPS


@pytest.fixture(scope="module")
def skipped(shared, poisoned) -> Path:
    """The folder of a run of one process that left the sample out."""
    folder, overrides = shared
    run_here(folder, "train", *overrides, *SHORT, poisoned[1], "train.not_finite=skip", "name=skip")
    return folder / "runs/skip"


def test_nan_is_left_out_and_named(shared, poisoned, skipped, whole):
    lines = [json.loads(line) for line in (skipped / "skipped.jsonl").read_text().splitlines()]
    (first,) = [line for line in lines if line["step"] == 2]
    assert first["micro_batch"] == 1 and poisoned[0] in first["ranks"][0]["samples"]
    assert all(poisoned[0] in line["ranks"][0]["samples"] for line in lines)
    expected, found = metrics(whole), metrics(skipped)
    assert found[1]["train/loss"] == expected[1]["train/loss"] and found[2]["train/loss"] < expected[2]["train/loss"]
    assert len(found) == STEPS


@pytest.mark.parametrize("hardware", ["ddp_cpu", "zero2_cpu"])
def test_two_ranks_leave_out_the_same(shared, poisoned, skipped, hardware):
    """Micro-batches of two on two ranks are those of four on one."""
    folder, overrides = shared
    more = (
        poisoned[1],
        "train.not_finite=skip",
        "train.micro_batch_size=2",
        f"hardware={hardware}",
        f"name=skip-{hardware}",
    )
    run(folder, "train", *overrides, *SHORT, *more, launch=True)
    assert_same(skipped, folder / f"runs/skip-{hardware}", 1e-4)


# ---- data workers


def test_a_worker_that_hangs_for_a_while_and_one_that_is_killed(shared, whole):
    folder, overrides = shared
    arguments, mine = ("train", *overrides, *SHORT, "name=worker"), folder / "runs/worker"
    process = start(folder, *arguments, "data.workers=1")
    wait_for_step(mine, 1, process)
    (worker,) = psutil.Process(process.pid).children()
    worker.suspend()
    saved, since = None, time.monotonic()
    while time.monotonic() - since < 3:  # until the run has stood still for so long
        if (newest := checkpoint.latest(mine / "checkpoints")) != saved:
            saved, since = newest, time.monotonic()
        assert process.poll() is None
        time.sleep(0.05)
    worker.resume()
    waiting = int(saved.name[-6:]) + 1
    wait_for_step(mine, waiting, process)
    worker.kill()
    printed = end(process)
    assert process.returncode == 2, printed
    # What torch sees first: the signal, or in its next look at its workers that one is gone.
    found = r"DataLoader worker \(pid.*\) (is killed by signal: Killed|exited unexpectedly)\. A worker without memory"
    assert re.search(found, printed) and "data.workers=0" in printed
    assert "Traceback" not in printed
    waited = {step: line["perf/data_wait"] for step, line in metrics(mine).items()}
    assert waited[waiting] > max(0.2, waited[1])
    assert "resuming from step" in run(folder, *arguments)
    assert_same(whole, mine, 1e-12)


# ---- network


def test_an_unreachable_wandb_does_not_hold_the_run_up(shared, tmp_path):
    folder, overrides = shared
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("WANDB")} | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0" * 40,
        "HOME": str(tmp_path),
        "EFFSAM3_CACHE": os.environ["EFFSAM3_CACHE"],
    }
    short = ("train.steps=2", "optim.warmup_steps=1", "train.loggers=[wandb]", "name=unreachable")
    printed = run(folder, "train", *overrides, *SHORT, *short, environment=environment)
    assert "wandb: 127.0.0.1 cannot be reached" in printed and "wandb sync" in printed
    (recorded,) = (folder / "runs/unreachable/wandb").glob("offline-run-*/*.wandb")
    assert b"train/loss" in recorded.read_bytes()


# ---- stopped in the middle of an epoch


def test_stopped_and_resumed(shared, tmp_path):
    """A teacher beside the student: the samples go on where they stood."""
    folder, overrides = shared
    arguments = ("train", *overrides, "teacher=online", *SHORT, f"train.runs={tmp_path}/runs")
    run(folder, *arguments, "name=whole", recipe=SMOKE)
    process = start(folder, *arguments, "name=stopped", recipe=SMOKE)
    wait_for_step(tmp_path / "runs/stopped", 2, process)
    process.terminate()
    printed = end(process)
    assert process.returncode == 75, printed
    assert checkpoint.latest(tmp_path / "runs/stopped/checkpoints").name < f"step-{STEPS:06d}"
    assert "resuming from step" in run(folder, *arguments, "name=stopped", recipe=SMOKE)
    assert_same(tmp_path / "runs/whole", tmp_path / "runs/stopped", 1e-12)
