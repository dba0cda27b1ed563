# SPDX-License-Identifier: Apache-2.0
"""What `effsam3 launch` makes of the hardware and of the machines it is told of, and the code that it ends with."""

import json
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from effsam3 import launch as launcher
from effsam3.cli import main
from effsam3.hardware.accelerate_configs import read_config
from effsam3.launch import Machines, command_of

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/stage1/image/es_rv_m.yaml"  # a global batch of 512 in micro-batches of 16
FLAGS = ("--main-address", "node-0", "--node-rank")


@pytest.fixture
def started(monkeypatch, clone):
    """Note command lines instead of running them; each takes one of `ends`, which returns its code, or ends with 0."""
    noted = types.SimpleNamespace(lines=[], ends=[])

    def fake_run(command, environment):
        noted.lines.append(command)
        return noted.ends.pop(0)() if noted.ends else 0

    monkeypatch.setattr(launcher, "_run", fake_run)
    monkeypatch.setattr(launcher, "ask_for_needs", lambda *arguments: 0)  # see test_needs.py
    for name in launcher.SLURM_STEP:
        monkeypatch.delenv(name, raising=False)
    return noted


def options_of(line):
    """Return what accelerate is told, {option: value} without the dashes."""
    words = line[line.index("accelerate.commands.launch") + 1 : line.index("--module")]
    return {option.removeprefix("--"): value for option, value in zip(words[::2], words[1::2], strict=True)}


def accelerate_sees(line):
    """Return accelerate's own reading of a command line that starts it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    start = line.index("accelerate.commands.launch") + 1
    return _validate_launch_command(launch_command_parser().parse_args(line[start:]))[0]


# ---- hardware


def test_what_the_configs_say():
    folder = ROOT / "accelerate_configs"
    names = ("cpu", "ddp", "multinode_ddp", "multinode_zero2_cpu")
    configs = {name: read_config(folder / f"{name}.yaml") for name in names}
    assert {name: (one.kind, one.nodes, one.processes, one.port) for name, one in configs.items()} == {
        "cpu": ("NO", 1, 1, 29500),
        "ddp": ("MULTI_GPU", 1, 8, 29500),
        "multinode_ddp": ("MULTI_GPU", 2, 16, 29500),
        "multinode_zero2_cpu": ("DEEPSPEED", 2, 2, 29500),
    }
    assert read_config(folder / "ddp_cpu.yaml").port == 0


def test_twins_on_the_cpu_differ_in_machines_only():
    import yaml

    folder = ROOT / "accelerate_configs"
    machines = {"num_processes", "gpu_ids", "main_process_port"}
    twins = [file for file in folder.glob("*_cpu.yaml") if (folder / file.name.replace("_cpu", "")).is_file()]
    assert len(twins) >= 7
    for twin in twins:
        both = [yaml.safe_load(file.read_text()) for file in (twin, folder / twin.name.replace("_cpu", ""))]
        assert len({json.dumps({k: v for k, v in one.items() if k not in machines}) for one in both}) == 1, twin


def test_offloading_configs_offload():
    from accelerate.commands.config.config_args import load_config_from_file

    expected = {"zero2_offload": ("cpu", None), "zero2_offload_cpu": ("cpu", None), "zero3_offload": ("cpu", "cpu")}
    for name, devices in expected.items():
        config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml")).deepspeed_config
        assert (config["offload_optimizer_device"], config.get("offload_param_device")) == devices


# ---- command lines


def test_without_flags_the_config_says_it_all(started):
    assert main(["launch", RECIPE, "train", "hardware=zero2"]) == 0
    assert options_of(started.lines[0]) == {"config_file": "accelerate_configs/zero2.yaml"}


def test_four_nodes_of_four(started):
    arguments = ["--nodes", "4", *FLAGS, "3", "--main-port", "4000", "--processes-per-node", "4"]
    assert main(["launch", RECIPE, "train", "hardware=zero2", *arguments, "--log-dir", "logs"]) == 0
    assert options_of(started.lines[0]) == {
        "config_file": "accelerate_configs/zero2.yaml",
        "num_machines": "4",
        "num_processes": "16",
        "machine_rank": "3",
        "main_process_ip": "node-0",
        "deepspeed_multinode_launcher": "standard",
        "main_process_port": "4000",
        "tee": "3",
        "log_dir": "logs/node-3",
    }
    assert started.lines[0][-2:] == [RECIPE, "hardware=zero2"]
    seen = accelerate_sees(started.lines[0])
    assert (seen.num_machines, seen.num_processes, seen.machine_rank) == (4, 16, 3)
    assert (seen.main_process_ip, seen.main_process_port) == ("node-0", 4000)
    assert seen.use_deepspeed and seen.deepspeed_multinode_launcher == "standard"


def test_a_config_of_two_nodes_needs_no_number(started):
    assert main(["launch", RECIPE, "train", "hardware=multinode_ddp", *FLAGS, "1"]) == 0
    seen = accelerate_sees(started.lines[0])
    assert (seen.num_machines, seen.num_processes, seen.machine_rank, seen.main_process_port) == (2, 16, 1, 29500)
    assert seen.multi_gpu


def test_one_node_of_a_config_of_two(started):
    assert main(["launch", RECIPE, "train", "hardware=multinode_zero2", "--nodes", "1"]) == 0
    seen = accelerate_sees(started.lines[0])
    assert (seen.num_machines, seen.num_processes) == (1, 8)


def test_one_process_per_node_is_still_started_by_accelerate():
    machines = Machines(2, 1, "node-0").resolve("multinode_ddp_cpu")
    assert "accelerate.commands.launch" in command_of("train", "multinode_ddp_cpu", [], machines)
    assert "accelerate.commands.launch" not in command_of("merge", "multinode_ddp_cpu", [], machines)
    alone = Machines(1, processes_per_node=1).resolve("multinode_ddp_cpu")
    assert command_of("train", "multinode_ddp_cpu", [], alone)[0] == sys.executable
    assert "accelerate.commands.launch" not in command_of("train", "multinode_ddp_cpu", [], alone)


def test_only_node_0_merges_and_evaluates(started, capsys):
    for rank, verbs in (("0", ["embed", "train", "merge", "evaluate"]), ("1", ["embed", "train"])):
        started.lines.clear()
        assert main(["launch", RECIPE, "hardware=multinode_ddp", *FLAGS, rank]) == 0
        assert [line[line.index(RECIPE) - 1] for line in started.lines] == verbs
        said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("+ ")]
        skipped = [] if rank == "0" else ["merge", "evaluate"]
        assert said == [f"{verb} runs on node 0 only; this is node 1" for verb in skipped]


def test_concepts_are_shared_by_the_processes_of_node_0(started):
    own = ["evaluate.concepts=pairs.json", "evaluate.benchmarks=[concepts]", "hardware=multinode_ddp"]
    assert main(["launch", RECIPE, "evaluate", *own, *FLAGS, "0"]) == 0
    seen = accelerate_sees(started.lines[0])
    assert (seen.num_machines, seen.num_processes) == (1, 8) and seen.multi_gpu
    assert started.lines[0][-3:] == own
    started.lines.clear()
    assert main(["launch", RECIPE, "evaluate", *own, *FLAGS, "1"]) == 0
    assert started.lines == []
    assert main(["launch", RECIPE, "evaluate", *own[:-1], "hardware=cpu"]) == 0
    assert "accelerate.commands.launch" not in started.lines[0]


# ---- Slurm


def slurm(monkeypatch, nodes, tasks, rank):
    for name, value in zip(launcher.SLURM_STEP, (nodes, tasks, rank), strict=True):
        monkeypatch.setenv(name, str(value))


def test_slurm_gives_number_and_rank(started, monkeypatch):
    slurm(monkeypatch, 4, 4, 2)
    assert main(["launch", RECIPE, "train", "hardware=zero2", "--nodes", "slurm", "--main-address", "node-0"]) == 0
    seen = accelerate_sees(started.lines[0])
    assert (seen.num_machines, seen.num_processes, seen.machine_rank) == (4, 32, 2)


def test_a_job_changes_nothing_unless_asked(started, monkeypatch):
    slurm(monkeypatch, 4, 4, 2)
    assert main(["launch", RECIPE, "train", "hardware=zero2"]) == 0
    assert options_of(started.lines[0]) == {"config_file": "accelerate_configs/zero2.yaml"}


def test_slurm_with_several_tasks_on_a_node(started, monkeypatch, capsys):
    slurm(monkeypatch, 2, 16, 0)
    assert main(["launch", RECIPE, "train", "hardware=zero2", "--nodes", "slurm", "--main-address", "node-0"]) == 2
    assert "srun started 16 tasks on 2 nodes" in capsys.readouterr().err and started.lines == []


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("hardware=multinode_ddp", "2 nodes: --node-rank is missing; give 0 to 1"),
        ("hardware=zero2 --nodes 4 --main-address node-0", "4 nodes: --node-rank is missing; give 0 to 3"),
        ("hardware=zero2 --nodes 4 --node-rank 1", "4 nodes: --main-address is missing"),
        ("hardware=zero2 --nodes 4 --node-rank 4 --main-address a", "--node-rank 4: of 4 nodes (--nodes)"),
        ("hardware=zero2 --node-rank 1", "--node-rank 1: of 1 nodes (--nodes) it must be 0 to 0"),
        ("hardware=zero2 --nodes 2 --node-rank 1 --main-address a --main-port 0", "2 nodes: --main-port 0"),
        ("hardware=ddp_cpu --nodes 2 --node-rank 1 --main-address a", "2 nodes: --main-port 0"),
        ("hardware=cpu --nodes 2 --node-rank 1 --main-address a", "cpu is one process, --nodes and --processes-per"),
        ("hardware=gpu --processes-per-node 8", "ask for 1 x 8; choose hardware of several"),
        ("hardware=zero2 --processes-per-node 6", "which here is --nodes 1 x --processes-per-node 6"),
        ("hardware=zero2 --nodes slurm --main-address a", "SLURM_NODEID not set, so this was not started by srun"),
    ],
)
def test_mistakes_are_named_before_anything_starts(arguments, message, started, capsys):
    assert main(["launch", RECIPE, *shlex.split(arguments)]) == 2
    assert message in capsys.readouterr().err
    assert started.lines == []


@pytest.mark.parametrize(("value", "message"), [("0", "0 is not above 0"), ("two", "'two' is neither a number nor")])
def test_nodes_is_a_number_or_slurm(value, message, capsys):
    with pytest.raises(SystemExit):
        main(["launch", RECIPE, "--nodes", value])
    assert message in capsys.readouterr().err


def test_a_batch_that_cannot_be_divided_does_not_matter_to_embed(started):
    assert main(["launch", RECIPE, "embed", "hardware=zero2", "--processes-per-node", "6"]) == 0


# ---- exit codes


def ending(folder, state, code):
    """Return what a run does that leaves a state behind and ends with a code."""
    from effsam3.training.progress import Progress

    def end():
        folder.mkdir(parents=True, exist_ok=True)
        Progress(folder, True, "2 x cpu, MULTI_CPU", 8).update(state, 3, 8)
        return code

    return end


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("stopped", 1, 75), ("stopped", 75, 75), ("failed", 1, 1), ("running", 137, 137), ("complete", 0, 0)],
)
def test_a_saved_run_ends_with_75_whatever_the_launchers_code(started, tmp_path, state, code, expected):
    started.ends.append(ending(tmp_path / "run", state, code))
    assert main(["launch", RECIPE, "train", "hardware=ddp", f"train.runs={tmp_path}", "name=run"]) == expected


def test_a_stop_of_last_time_is_not_one_of_now(started, tmp_path):
    ending(tmp_path / "run", "stopped", 75)()
    started.ends.append(lambda: 1)  # before it has said anything, such as a missing store
    assert main(["launch", RECIPE, "train", "hardware=ddp", f"train.runs={tmp_path}", "name=run"]) == 1


def test_a_stopped_training_is_not_merged(started, tmp_path):
    started.ends.extend([lambda: 0, ending(tmp_path / "run", "stopped", 1)])
    assert main(["launch", RECIPE, "hardware=ddp", f"train.runs={tmp_path}", "name=run"]) == 75
    assert len(started.lines) == 2


# ---- scripts/sbatch.sh; tests/e2e/test_multinode.py trains with it

STAND_INS = {  # srun of one node; a run that can be stopped
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "effsam3": """
echo "$@" > said
[ $END = 0 ] || exit $END
trap 'exit 75' USR1
touch up
while true; do sleep 0.05; done""",
    "scontrol": '[ "$1" = requeue ] && echo $2 > requeued || echo head-node',
}


@pytest.fixture
def sbatch(tmp_path):
    """Start scripts/sbatch.sh with RECIPE as job 20123 on 4 GPUs; its run ends with `end`, or waits to be stopped."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def start(end=0):
        job = {"SLURM_JOB_ID": "20123", "SLURM_JOB_NODELIST": "head-node", "SLURM_GPUS_ON_NODE": "4", "END": str(end)}
        path = f"{tmp_path}:{os.environ['PATH']}"
        line = ["bash", str(ROOT / "scripts/sbatch.sh"), "RECIPE", "optim.lr=1e-3"]
        process = subprocess.Popen(line, cwd=tmp_path, env=os.environ | job | {"PATH": path}, stdout=subprocess.PIPE)
        while not end and not (tmp_path / "up").is_file():
            assert process.poll() is None
        return process

    return start


@pytest.mark.parametrize(("request_to_stop", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_sbatch_requeues_what_ran_out_of_time_not_what_was_cancelled(sbatch, tmp_path, request_to_stop, requeued):
    process = sbatch()
    process.send_signal(request_to_stop)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert (tmp_path / "requeued").is_file() == requeued


def test_sbatch_tells_launch_where_it_is_and_ends_with_its_code(sbatch, tmp_path):
    process = sbatch(end=3)
    process.communicate(timeout=30)
    assert process.returncode == 3 and not (tmp_path / "requeued").is_file()
    assert (tmp_path / "said").read_text().split() == [
        "launch", "--nodes", "slurm", "--main-address", "head-node", "--main-port", "10123",
        "--log-dir", "slurm-20123", "--processes-per-node", "4", "RECIPE", "optim.lr=1e-3",
    ]  # fmt: skip


def test_sbatch_outside_a_job_says_how_to_submit_it():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    line = ["bash", str(ROOT / "scripts/sbatch.sh"), "RECIPE"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "sbatch --nodes 4" in done.stderr
