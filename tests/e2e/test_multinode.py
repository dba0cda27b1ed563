# SPDX-License-Identifier: Apache-2.0
"""Two nodes learn what one process learns: started by hand in two network namespaces, and by scripts/sbatch.sh."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, REPOSITORY, SMOKE, command, metrics
from test_trajectories import SHORT, assert_same, reference, wait_for  # noqa: F401

NAMES = [f"effsam3-{os.getpid()}-{rank}" for rank in range(2)]
ADDRESSES = ["10.203.0.1", "10.203.0.2"]


def ip(*arguments: str) -> bool:
    """Run iproute2; whether that was possible and permitted."""
    try:
        return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def namespaces() -> bool:
    """Make two machines that see each other through one cable and nothing else; whether that is permitted here."""
    return (
        all(ip("netns", "add", name) for name in NAMES)
        and ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        and all(
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            and ip("-n", name, "link", "set", "eth0", "up")
            and ip("-n", name, "link", "set", "lo", "up")
            for name, address in zip(NAMES, ADDRESSES, strict=True)
        )
    )


def remove_namespaces() -> None:
    for name in NAMES:
        ip("netns", "delete", name)


WHERE = "two network namespaces" if namespaces() else "127.0.0.1, as namespaces are not permitted here"
remove_namespaces()


@pytest.fixture
def nodes():
    """What to put before a node's command, its additional environment, and node 0's address."""
    if WHERE.startswith("127"):
        yield [([], {})] * 2, "127.0.0.1"
        return
    assert namespaces()
    yield [(["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": "eth0"}) for name in NAMES], ADDRESSES[0]
    remove_namespaces()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("where", [WHERE])
def test_ddp_on_two_nodes(shared, reference, nodes, where):  # noqa: F811
    folder, overrides = shared
    machines, address = nodes
    flags = ("--main-address", address, "--main-port", str(free_port()))
    arguments = (*overrides, *SHORT, "hardware=multinode_ddp_cpu", "name=two-nodes", *flags)
    processes = [
        subprocess.Popen(
            [*prefix, *command("train", *arguments, "--node-rank", str(rank), launch=True)],
            cwd=folder, env=ENVIRONMENT | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, (prefix, more) in enumerate(machines)
    ]  # fmt: skip
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    assert "2 x cpu, DDP" in printed[0] and "held out" not in printed[1]
    assert_same(reference, metrics(folder / "runs/two-nodes"), 1e-4)


# The cluster's own programs, as far as scripts/sbatch.sh relies on them: srun starts one task per node with its place
# in the environment, writes its output where it was told, hands SIGUSR1 on to the tasks but is ended by SIGTERM, and
# ends with the highest code of its tasks.
SRUN = """#!{python}
import os, signal, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[sys.argv.index("effsam3"):]
(output,) = [option.partition("=")[2] for option in options if option.startswith("--output=")]
assert "--ntasks-per-node=1" in options
nodes = os.environ["SLURM_NNODES"]
tasks = [
    subprocess.Popen(
        command,
        env=os.environ | {{"SLURM_STEP_NUM_NODES": nodes, "SLURM_STEP_NUM_TASKS": nodes, "SLURM_NODEID": str(rank)}},
        stdout=open(output.replace("%n", str(rank)), "a"), stderr=subprocess.STDOUT, start_new_session=True,
    )
    for rank in range(int(nodes))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2" = "show hostnames" ] && {{ echo 127.0.0.1; echo 127.0.0.1; }}
[ "$1" = requeue ] && echo "$2" >> requeued
exit 0
"""


def test_sbatch_zero2_is_stopped_requeued_and_goes_on(shared, reference, tmp_path):  # noqa: F811
    folder, overrides = shared
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text.format(python=sys.executable))
        (programs / name).chmod(0o755)
    job = str(os.getpid())
    environment = ENVIRONMENT | {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}",
        "SLURM_JOB_ID": job, "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[0-1]",
    }  # fmt: skip
    arguments = ["train", *overrides, *SHORT, "hardware=multinode_zero2_cpu", "name=sbatch"]
    logs = folder / f"slurm-{job}"

    def sbatch() -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(REPOSITORY / "scripts/sbatch.sh"), str(SMOKE), *arguments],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    process = sbatch()
    wait_for(lambda: (folder / "runs/sbatch/checkpoints/step-000002").is_dir(), process)
    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=120)
    story = printed + (logs / "node-0.log").read_text() + (logs / "node-1.log").read_text()
    assert process.returncode == 75, story
    assert "asked to stop: saved at step" in story
    assert (folder / "requeued").read_text() == f"{job}\n"

    process = sbatch()  # as Slurm does then
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed + (logs / "node-0.log").read_text()
    assert (folder / "requeued").read_text() == f"{job}\n"
    assert "resuming from step" in (logs / "node-0.log").read_text()
    assert "2 x cpu, ZeRO-2" in (logs / "node-0.log").read_text()
    for rank in range(2):
        assert len(list((logs / f"node-{rank}").glob("*/attempt_0/0/stdout.log"))) == 2
    assert_same(reference, metrics(folder / "runs/sbatch"), 1e-4)
