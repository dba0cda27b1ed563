# SPDX-License-Identifier: Apache-2.0
"""The verb `status` on folders as `train` leaves them: running, ended, died, of several runs at once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from effsam3.cli import main
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.status import as_text, status
from effsam3.training import checkpoint
from effsam3.training.meters import Unreadable
from effsam3.training.progress import Progress
from effsam3.training.report import Report, duration
from effsam3.training.state import examine, sparkline

ROOT = Path(__file__).parents[2]
HARDWARE = "2 x cpu, DDP"


def train(runs, name="r", state="running", steps_done=60, **more):
    """Leave behind what `train` does at this step of 200: logged every 10, validated and saved every 50."""
    overrides = [f"name={name}", f"train.runs={runs}", "train.loggers=[tensorboard]"]
    recipe = load_recipe(ROOT / "recipes/smoke/image.yaml", overrides)
    report = Report(recipe.folder)
    (recipe.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    report.write_json("provenance.json", {"hardware": HARDWARE})
    progress = Progress(recipe.folder, True, HARDWARE, 8)
    report.metrics({"val/cosine": 0.01, "val/mse": 2.0}, 0)
    for step in range(10, steps_done + 1, 10):
        values = {"train/loss": 100 / step, "train/mse": 60 / step, "train/cosine": 40 / step, "train/lr": 1e-3}
        values |= {"perf/samples_per_s": 16.0, "perf/data_wait": 0.03, "train/grad_norm": 0.25}
        report.metrics(values | more, step)
        progress.update("running", step, 200, 16.0)
        if step % 50 == 0:
            report.metrics({"val/cosine": 0.9 - step / 1000, "val/mse": 1.0}, step)
            for best in [False, True] if step == 50 else [False]:
                saved = checkpoint.step_folder(recipe.folder / "checkpoints", step, best)
                saved.mkdir(parents=True)
                (saved / "trainer.json").write_text(json.dumps({"step": step, "ended": step == 200}))
    progress.update(state, steps_done, 200)
    return recipe.folder


def edit_progress(folder, **values):
    path = folder / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_facts_of_a_running_run(tmp_path):
    folder = train(tmp_path, **{"perf/peak_gib": 12.34, "perf/mfu": 0.415})
    facts = examine(folder)
    assert (facts["name"], facts["stage"], facts["student"]) == ("r", "image", "tiny_convnext")
    assert (facts["state"], facts["step"], facts["steps"], facts["pid"]) == ("running", 60, 200, os.getpid())
    assert facts["losses"] == {"loss": 100 / 60, "mse": 1.0, "cosine": 40 / 60}
    assert facts["loss_curve"] == [10.0, 5.0, 100 / 30, 2.5, 2.0, 100 / 60]
    assert (facts["lr"], facts["grad_norm"], facts["data_wait"]) == (1e-3, 0.25, 0.03)
    assert (facts["samples_per_s"], facts["samples_per_s_per_device"]) == (16.0, 8.0)
    assert facts["eta_s"] == 140 * 8 / 16
    assert (facts["peak_gib"], facts["mfu"]) == (12.34, 0.415)
    assert facts["metric"] == "val/cosine"
    assert facts["start"] == {"step": 0, "value": 0.01}
    assert facts["best"] == facts["latest"] == {"step": 50, "value": 0.85}
    assert (facts["checkpoints"], facts["best_checkpoint"]) == (["step-000050"], "best-step-000050")


def test_what_a_person_reads(tmp_path):
    folder = train(tmp_path, **{"perf/peak_gib": 12.34, "perf/mfu": 0.415})
    unreadable = Unreadable(folder)
    unreadable.note({"unreadable": [("a.jpg", "cut short"), ("b.jpg", "empty")]}, 4)
    Unreadable(folder).note({"unreadable": [("a.jpg", "cut short")]}, 9)  # a second launch meets one again
    (folder / "skipped.jsonl").write_text('{"step": 7, "micro_batch": 0}\n' * 2)
    (folder / "effsam3").mkdir()
    (folder / "effsam3" / "events.out.tfevents.1.host").touch()
    edit_progress(folder, updated=5000.0, host="gpu-7", pid=42)
    blocks = "".join(chr(0x2581 + height) for height in (7, 4, 3, 2, 1, 0))  # of log 10/5/3.33/2.5/2/1.67
    assert as_text(examine(folder, now=5012.0)).splitlines() == [
        f"r   image, tiny_convnext   {folder}",
        "",
        "state     running, last sign 12 s ago; 2 x cpu, DDP; process 42 on gpu-7",
        "step      [#######.................] 60 of 200, 30.0 %, about 1 min left",
        "speed     16.0 samples/s, 8.0 per device, 3 % of the time waiting for data",
        f"loss      1.6667  (mse 1.0000, cosine 0.6667)  {blocks}",
        "optim     lr 1.00e-03, gradient norm 0.250",
        "device    peak memory 12.3 GiB, MFU 41.5 %",
        "held out  val/cosine: start 0.0100, best 0.8500 at step 50, latest 0.8500 at step 50",
        "saved     step-000050, best-step-000050",
        f"bad data  2 unreadable samples, {folder}/unreadable.jsonl names them",
        f"skipped   1 micro-batches, {folder}/skipped.jsonl names them",
        f"loggers   {folder}/effsam3",
        "next      wait, or stop it with `kill 42` on gpu-7: it saves first",
    ]


def test_what_to_do_next(tmp_path):
    folder = train(tmp_path, state="stopped")
    again = f"the same command, or `effsam3 launch {folder} train`, resumes from step-000050"
    assert examine(folder)["next"] == again
    edit_progress(folder, state="failed", error="the disk is full")
    assert examine(folder)["next"] == f"fix what the error names, then {again}"
    text = as_text(examine(folder, now=0.0))
    assert f"state     failed, 0 s ago; {HARDWARE}\n          the disk is full\n" in text
    edit_progress(folder, state="running", host=socket.gethostname(), pid=2**22 + 1)
    assert (examine(folder)["state"], examine(folder)["next"]) == ("killed", again)
    assert f"state     killed, last sign 0 s ago; {HARDWARE}\n" in as_text(examine(folder, now=0.0))
    edit_progress(folder, host="gpu-7", pid=42, updated=1.0)
    assert examine(folder)["state"] == "silent"
    assert "see whether process 42 on gpu-7 still works" in examine(folder)["next"]
    edit_progress(folder, state="complete")
    assert examine(folder)["next"] == f"effsam3 merge {folder}"
    (folder / "merged").mkdir()
    (folder / "merged" / "config.json").touch()
    assert examine(folder)["next"] == f"effsam3 evaluate {folder}"
    (folder / "eval").mkdir()
    (folder / "eval" / "summary.md").touch()
    assert f"effsam3 push {folder} --dry-run" in examine(folder)["next"]


def test_a_run_that_has_only_begun(tmp_path):
    Progress(tmp_path, True, "1 x cpu", 8).update("running", 0, 200)
    facts = examine(tmp_path)
    assert (facts["name"], facts["stage"], facts["best"], facts["eta_s"]) == (tmp_path.name, None, None, None)
    assert "\nsaved     nothing yet\n" in as_text(facts) and "loss" not in as_text(facts)


def test_a_run_from_before_progress_was_kept(tmp_path):
    folder = train(tmp_path, steps_done=120)
    (folder / "progress.json").unlink()
    facts = examine(folder)
    assert (facts["state"], facts["step"], facts["steps"], facts["hardware"]) == ("unknown", 120, 200, HARDWARE)
    assert (facts["samples_per_s_per_device"], facts["eta_s"]) == (8.0, None)
    assert "unknown: there is no progress.json" in as_text(facts)
    folder = train(tmp_path, "ended", steps_done=200)
    (folder / "progress.json").unlink()
    assert examine(folder)["state"] == "complete"


def test_the_start_is_never_the_best(tmp_path):
    report = Report(tmp_path / "r")
    train(tmp_path, steps_done=40)
    for step, value in [(0, 0.5), (50, 0.2), (100, 0.4), (150, 0.4), (200, 0.3)]:
        report.metrics({"val/cosine": value}, step)
    facts = examine(tmp_path / "r")
    assert facts["best"] == {"step": 100, "value": 0.4}  # the first of equal ones, as `train` keeps it
    assert facts["latest"] == {"step": 200, "value": 0.3}


def test_a_line_cut_off_while_it_is_written(tmp_path):
    folder = train(tmp_path)
    before = examine(folder, now=0.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 70, "train/loss": 1.4')
    assert examine(folder, now=0.0) == before


def test_checkpoints_are_those_that_train_goes_on_from(tmp_path):
    folder = train(tmp_path, steps_done=200)
    (folder / "checkpoints" / "step-000190.partial").mkdir()
    for step in (999_950, 1_000_000):  # text would sort the other way round
        checkpoint.step_folder(folder / "checkpoints", step).mkdir()
    names = [path.name for path in checkpoint.complete(folder / "checkpoints")]
    assert names[-1] == "step-1000000" and len(names) == 6
    assert examine(folder)["checkpoints"] == names


def test_several_runs_are_a_table(tmp_path):
    first, second = train(tmp_path, "a"), train(tmp_path, "b", state="complete", steps_done=200)
    (tmp_path / "photos").mkdir()
    lines = status([str(path) for path in sorted(tmp_path.iterdir())]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == [
        str(first), "running", "60 of 200", "30.0 %", "1 min", "16.0", "1.6667", "val/cosine 0.8500 at 50", "0.8500"
    ]  # fmt: skip
    assert cells[3] == [
        str(second), "complete", "200 of 200", "100.0 %", "-", "16.0", "0.5000", "val/cosine 0.8500 at 50", "0.7000"
    ]  # fmt: skip
    assert (
        lines[4] == f"left out: {tmp_path}/photos holds no training: neither progress.json nor metrics.jsonl is there"
    )
    assert len(lines) == 5


def test_json_is_a_list_without_nan(tmp_path, capsys):
    folder = train(tmp_path, **{"train/grad_norm": float("nan")})
    assert main(["status", str(folder), "--json"]) == 0
    refuse = pytest.fail  # called for NaN and infinities
    (facts,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert facts["grad_norm"] is None and facts["best"] == {"step": 50, "value": 0.85}
    assert main(["status", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no run folder nowhere;")


def test_status_imports_nothing_heavy(tmp_path):
    folder = train(tmp_path)
    heavy = ["torch", "numpy", "transformers", "accelerate", "safetensors", "matplotlib"]
    code = "import sys; from effsam3.cli import main; main(['status', sys.argv[1]]); "
    code += f"print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_watching_ends_with_the_run(tmp_path):
    folder = train(tmp_path)
    run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    edit_progress(folder, pid=run.pid)
    command = [sys.executable, "-m", "effsam3.cli", "status", folder, "--watch", "1"]
    watching = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [watching.stdout.readline() for _ in range(3)]
    assert "running" in lines[2]
    run.kill()
    run.wait()
    rest, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert "state     killed" in rest
    assert "\x1b" not in "".join(lines) + rest  # no terminal, nothing to clear


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.2, "59 s"), (60, "1 min"), (3599, "59 min"), (7500, "2 h 5 min"), (100_800, "1 d 4 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sparklines():
    assert sparkline([1, 2, 4, 128]) == "".join(chr(0x2581 + height) for height in (0, 1, 2, 7))  # log2: 0 1 2 7
    assert sparkline([-7, 0, float("nan"), 7]) == "".join(chr(0x2581 + height) for height in (0, 4, 7))
    assert sparkline([3, 3]) == 2 * chr(0x2581)
    assert sparkline([3]) == ""
