# SPDX-License-Identifier: Apache-2.0
"""A run's heartbeat: progress.json, what is true of it, and finding runs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from effsam3.errors import UserError
from effsam3.training import progress
from effsam3.training.progress import Progress, each_run, read_progress, run_folder
from effsam3.training.report import read_lines

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "recipes" / "smoke" / "image.yaml"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves by hand: `clock[0]` in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    return now


def test_what_is_written_is_read(tmp_path, clock):
    run = Progress(tmp_path, True, "2 x cpu, DDP", 8)
    clock[0] = 1005.0
    run.update("running", 40, 200)
    found = read_progress(tmp_path)
    assert (found.state, found.step, found.steps, found.first_step) == ("running", 40, 200, 40)
    assert (found.started, found.updated, found.interval_s) == (1000.0, 1005.0, 0.0)
    assert (found.pid, found.hardware, found.global_batch, found.error) == (os.getpid(), "2 x cpu, DDP", 8, "")
    assert found.samples_per_s is None
    clock[0] = 1025.0
    run.update("running", 50, 200, samples_per_s=4.0)
    clock[0] = 1026.0  # the validation of the same step
    run.update("running", 50, 200)
    found = read_progress(tmp_path)
    assert (found.interval_s, found.samples_per_s, found.first_step) == (20.0, 4.0, 40)
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_runs_of_before_called_their_hardware_a_layout(tmp_path):
    Progress(tmp_path, True, "2 x cpu, DDP", 8).update("running", 1, 2)
    path = tmp_path / "progress.json"
    path.write_text(path.read_text().replace('"hardware"', '"layout"'))
    assert read_progress(tmp_path).hardware == "2 x cpu, DDP"


def test_other_ranks_write_nothing(tmp_path):
    Progress(tmp_path, False, "2 x cpu, DDP", 8).update("running", 1, 2)
    assert list(tmp_path.iterdir()) == []
    assert read_progress(tmp_path) is None


def fail(run, problem):
    with pytest.raises(type(problem)), run:
        raise problem


def test_the_first_rank_that_fails_says_why(tmp_path):
    main, other, early = (Progress(tmp_path, is_main, "2 x cpu, DDP", 8) for is_main in (True, False, False))
    for run in (main, other):
        run.update("running", 7, 20)
    fail(early, UserError("another recipe"))  # it had not begun: the file is not about it
    assert read_progress(tmp_path).state == "running"
    fail(other, UserError("the shard is cut short"))
    fail(main, RuntimeError("connection closed"))
    found = read_progress(tmp_path)
    assert (found.state, found.error, found.step) == ("failed", "the shard is cut short", 7)


def test_one_that_asked_to_end_has_said_so(tmp_path):
    run = Progress(tmp_path, True, "1 x cpu", 8)
    run.update("stopped", 7, 20)
    fail(run, SystemExit(75))
    assert read_progress(tmp_path).state == "stopped"


def test_an_unknown_state_is_a_programmers_mistake(tmp_path):
    with pytest.raises(AssertionError, match="finished"):
        Progress(tmp_path, True, "1 x cpu", 8).update("finished", 1, 2)


def test_a_run_whose_process_is_gone_was_killed(tmp_path):
    code = (
        "import sys, time; from effsam3.training.progress import Progress; "
        f"Progress({str(tmp_path)!r}, True, '1 x cpu', 8).update('running', 3, 9); print('up', flush=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    assert read_progress(tmp_path).true_state() == "running"
    process.kill()
    process.wait()
    assert read_progress(tmp_path).true_state() == "killed"
    for state in ("stopped", "complete", "failed"):  # these have nothing to do with a process any more
        assert replace(read_progress(tmp_path), state=state).true_state() == state


@pytest.mark.parametrize(("interval_s", "limit_s"), [(0.0, 600), (12.0, 600), (120.0, 1200)])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_run_that_says_nothing_for_long_is_silent(tmp_path, clock, interval_s, limit_s, elsewhere):
    Progress(tmp_path, True, "1 x cpu", 8).update("running", 3, 9)
    found = replace(read_progress(tmp_path), interval_s=interval_s)
    if elsewhere:
        found = replace(found, host="another-host", pid=2**22 + 1)  # no process here can have that number
    assert found.true_state(1000 + limit_s) == "running"
    assert found.true_state(1000 + limit_s + 1) == "silent"
    assert found.age_s(1012) == 12 and found.age_s(990) == 0


def test_a_reader_never_meets_half_a_file(tmp_path):
    code = (
        "from effsam3.training.progress import Progress; "
        f"run = Progress({str(tmp_path)!r}, True, 'x' * 100_000, 8); "
        "[run.update('running', step, 100) for step in range(100)]; run.update('complete', 100, 100)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    steps = []
    while process.poll() is None:
        if (found := read_progress(tmp_path)) is not None:
            steps.append(found.step)
    assert process.returncode == 0
    assert steps == sorted(steps) and read_progress(tmp_path).state == "complete"


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "progress.json").write_text('{"state": "running"}')
    with pytest.raises(UserError, match=r"progress.json is damaged: step is missing; delete it"):
        read_progress(tmp_path)


def test_lines_that_a_kill_has_cut_off_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "x{"step": 3}\n{"step": 4}\n{"step": 5, "train/lo')
    assert read_lines(path) == [{"step": 1}, {"step": 4}]


def test_a_run_is_found_by_its_folder_and_by_its_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "smoke-image"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run folder runs/smoke-image"):
        run_folder(SMOKE)
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="holds no training: neither progress.json nor metrics.jsonl"):
        run_folder(folder)
    (folder / "metrics.jsonl").touch()
    assert run_folder(folder) == folder
    assert run_folder(SMOKE) == Path("runs/smoke-image")


def test_of_several_what_is_no_run_is_left_out(tmp_path):
    Progress(tmp_path, True, "1 x cpu", 8).update("running", 3, 9)
    found, left_out = each_run([str(tmp_path), "nowhere"], lambda folder: folder)
    assert found == [tmp_path] and len(left_out) == 1 and "there is no run folder nowhere" in left_out[0]
    with pytest.raises(UserError, match="^there is no run folder nowhere"):
        each_run(["nowhere"], Path)
    with pytest.raises(UserError, match="none of these is a run:\n  - .*nowhere.*\n  - .*neither"):
        each_run(["nowhere", "neither"], Path)
