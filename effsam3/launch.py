# SPDX-License-Identifier: Apache-2.0
"""The verb `launch`: run verbs of a recipe as processes, on the recipe's `hardware`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from effsam3.errors import RecipeError, UserError, did_you_mean
from effsam3.extras import refuse_missing_extras
from effsam3.files import refuse_unwritable
from effsam3.hardware.accelerate_configs import read_config
from effsam3.recipe.common import StageRecipe
from effsam3.recipe.concepts import measures_concepts
from effsam3.recipe.derived import accumulation
from effsam3.recipe.reader import load_recipe, refuse_verb
from effsam3.stopping import LAUNCHED, STOP, STOPPED
from effsam3.training.progress import read_progress

DISTRIBUTED = {"embed": True, "train": True, "merge": False, "evaluate": False}  # verb -> started by accelerate
LAUNCHER = "accelerate.commands.launch"
SLURM_STEP = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID")  # set by srun, not by salloc


@dataclass(frozen=True)
class Cluster:
    """The machines that processes are started on, and which of them this is."""

    nodes: int
    node_rank: int
    main_address: str | None  # None on one node
    main_port: int
    processes_per_node: int

    @property
    def processes(self) -> int:
        """On all nodes together."""
        return self.nodes * self.processes_per_node


@dataclass(frozen=True)
class Machines:
    """What `launch` is told of the machines; `resolve` fills in what is None from the hardware's config."""

    nodes: int | str | None = None  # `slurm`: number and rank are those of the job step
    node_rank: int | None = None  # of this machine, from 0
    main_address: str | None = None  # where the others find node 0
    main_port: int | None = None
    processes_per_node: int | None = None

    def resolve(self, hardware: str) -> Cluster:
        """Return the machines with every number known.

        Raises:
            UserError: the numbers contradict each other or the hardware, or several nodes could not find each other.
        """
        config = read_config(hardware)
        nodes, rank = slurm_step() if isinstance(self.nodes, str) else (self.nodes or config.nodes, 0)
        port = config.port if self.main_port is None else self.main_port
        per_node = self.processes_per_node or config.processes // config.nodes
        if config.kind == "NO" and nodes * per_node > 1:
            raise UserError(
                f"hardware: {hardware} is one process, --nodes and --processes-per-node ask for {nodes} x {per_node}; "
                "choose hardware of several, such as hardware=ddp"
            )
        if nodes > 1:
            example = f"--nodes {nodes} --node-rank 0 --main-address node-0.cluster --main-port 29500"
            if self.node_rank is None and self.nodes != "slurm":
                raise UserError(
                    f"{nodes} nodes: --node-rank is missing; give 0 to {nodes - 1}, another on each node: {example}"
                )
            if self.main_address is None:
                raise UserError(
                    f"{nodes} nodes: --main-address is missing; give node 0's name or IP address, the same on all "
                    f"nodes: {example}"
                )
            if port == 0:
                raise UserError(
                    f"{nodes} nodes: --main-port 0 (any free port) would be another port on each node; give one, the "
                    f"same on all nodes: {example}"
                )
        rank = rank if self.node_rank is None else self.node_rank
        if not 0 <= rank < nodes:
            raise UserError(f"--node-rank {rank}: of {nodes} nodes (--nodes) it must be 0 to {nodes - 1}")
        return Cluster(nodes, rank, self.main_address, port, per_node)


def slurm_step() -> tuple[int, int]:
    """Return the number of nodes of the Slurm job step that this process is a task of, and this node's rank.

    Raises:
        UserError: this is no job step, or it has several tasks on a node.
    """
    missing = [name for name in SLURM_STEP if name not in os.environ]
    if missing:
        raise UserError(
            f"--nodes slurm: {', '.join(missing)} not set, so this was not started by srun; write srun "
            "--ntasks-per-node=1 effsam3 launch ..., use scripts/sbatch.sh, or give --nodes, --node-rank and "
            "--main-address"
        )
    nodes, tasks, rank = (int(os.environ[name]) for name in SLURM_STEP)
    if tasks != nodes:
        raise UserError(
            f"--nodes slurm: srun started {tasks} tasks on {nodes} nodes, but the launcher starts the processes of "
            "its node itself; write srun --ntasks-per-node=1"
        )
    return nodes, rank


def launch(
    recipe_path: str,
    arguments: Sequence[str],
    machines: Machines = Machines(),
    log_dir: str | None = None,
    resume: str | None = None,
) -> int:
    """Run `[VERB] [key=value ...]` of a recipe, all verbs in order without one; return the first exit code not 0.

    `log_dir` is a folder for what each rank prints, in addition to the console; `resume` is what `train` is told.

    Raises:
        UserError: the recipe, the verb, the hardware or the machines are wrong; nothing has been started then.
    """
    verbs = [argument for argument in arguments[:1] if "=" not in argument]
    overrides = list(arguments[len(verbs) :])
    for verb in verbs:
        if verb not in DISTRIBUTED:
            raise UserError(f"{verb!r} cannot be launched{did_you_mean(verb, DISTRIBUTED)}")
    recipe = load_recipe(recipe_path, overrides)
    for verb in verbs:
        refuse_verb(recipe, verb)
    if not verbs:
        verbs = list(recipe.launched)
    refuse_unwritable(recipe.folder, recipe.runs_key)
    if "embed" in verbs:
        refuse_unwritable(Path(recipe.embed.to), "embed.to")
    cluster = machines.resolve(recipe.hardware)
    refuse_missing_extras(recipe, verbs, cluster.processes)
    if "train" in verbs:
        refuse_indivisible_batch(recipe, cluster)
    if len(verbs) > 1 and cluster.node_rank == 0 and (code := ask_for_needs(recipe_path, verbs, overrides)):
        return code
    inputs = [recipe_path, *overrides]
    own = {"train": ["--resume", resume]} if resume is not None else {}
    # All commands before the first is run: a verb that cannot be started should not be found out after a night.
    commands = {
        verb: command_of(verb, recipe.hardware, [*inputs, *own.get(verb, [])], cluster, log_dir) for verb in verbs
    }
    if "evaluate" in verbs and measures_concepts(recipe):  # the one benchmark that the processes of node 0 share
        alone = replace(cluster, nodes=1, node_rank=0, main_address=None)
        commands["evaluate"] = command_of("evaluate", recipe.hardware, inputs, alone, log_dir, divide=True)
    for verb, command in commands.items():
        if cluster.node_rank > 0 and not DISTRIBUTED[verb]:
            print(f"{verb} runs on node 0 only; this is node {cluster.node_rank}", flush=True)
            continue
        print(f"+ {shlex.join(command)}", flush=True)
        before = read_progress(recipe.folder)
        if code := _run(command, read_config(recipe.hardware).environment):
            # The launcher of several processes has one code of its own for every end. The file, which is compared
            # with itself because the clocks of two machines may differ, tells a saved run from a failed one. What was
            # asked to stop before its first heartbeat, or by a verb that keeps no such file, begins again.
            after = read_progress(recipe.folder) if verb == "train" else None
            state = after.state if after is not None and after != before else None
            if state == "stopped" or (STOP.asked and state != "failed"):
                print(f"{verb} has stopped as it was asked to; the same command resumes{_aside(command)}", flush=True)
                return STOPPED
            return code
        if STOP.asked and verb != verbs[-1]:
            print(f"asked to stop after {verb}; the same command resumes", flush=True)
            return STOPPED
    return 0


def ask_for_needs(recipe_path: str, verbs: Sequence[str], overrides: Sequence[str]) -> int:
    """Ask whether all that the verbs need is there, in a process that imports what this one does not; 0 when it is."""
    return subprocess.run(
        [sys.executable, "-m", "effsam3.stages.needs", recipe_path, ",".join(verbs), *overrides]
    ).returncode


def refuse_indivisible_batch(recipe: StageRecipe, cluster: Cluster) -> None:
    """Refuse now what every rank would refuse after it has started.

    Raises:
        UserError: the global batch cannot be divided over that number of processes.
    """
    try:
        accumulation(recipe, cluster.processes)
    except RecipeError as error:
        shape = f"--nodes {cluster.nodes} x --processes-per-node {cluster.processes_per_node}"
        raise UserError(f"{error}, which here is {shape}") from error


def command_of(
    verb: str, hardware: str, arguments: Sequence[str], cluster: Cluster, log_dir: str | None = None, divide=False
) -> list[str]:
    """Return the command line that runs a verb on hardware and (resolved) cluster.

    `divide` starts all processes for a verb that otherwise is one.

    Raises:
        UserError: there is no such hardware.
    """
    config, nodes, processes = read_config(hardware), cluster.nodes, cluster.processes
    # One process needs no launcher, which would come between it and the signals of a batch system.
    if not (DISTRIBUTED[verb] or divide) or processes == 1:
        return [sys.executable, "-m", "effsam3", verb, *arguments]
    options = ["--config_file", _short(config.file)]
    if nodes > 1 or processes != config.processes:
        options += ["--num_machines", str(nodes), "--num_processes", str(processes)]
    if nodes > 1:
        options += ["--machine_rank", str(cluster.node_rank), "--main_process_ip", str(cluster.main_address)]
        if config.kind == "DEEPSPEED":  # its default is pdsh: node 0 starts the others through ssh
            options += ["--deepspeed_multinode_launcher", "standard"]
    if cluster.main_port != config.port or nodes > 1:
        options += ["--main_process_port", str(cluster.main_port)]
    if log_dir is not None:
        options += ["--tee", "3", "--log_dir", f"{log_dir}/node-{cluster.node_rank}"]  # 3: stdout and stderr
    return [sys.executable, "-m", LAUNCHER, *options, "--module", "effsam3", verb, *arguments]


def _aside(command: list[str]) -> str:
    return " (a traceback above is how torch's launcher ends)" if LAUNCHER in command else ""


def _short(path: Path) -> str:
    """Return the path as seen from the working directory where it lies below that."""
    return str(path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path)


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end, passing on a request to stop; return its exit code, 128 + signal if one ended it."""
    process, told = None, False

    # Some batch systems signal this process only, and the run itself must hear it to save. Others signal all of them:
    # then the launcher of several processes hears it twice, and a third time would end its wait for the ranks.
    # SIGUSR1 is passed on as SIGTERM: that launcher forwards only the latter. Ctrl-C reaches everybody by itself.
    def pass_on(number):
        nonlocal told
        if process is not None and number != signal.SIGINT and not told:
            told = True
            process.terminate()

    with STOP.noted(pass_on):
        # The launcher kills ranks that have not ended 30 s after SIGTERM: too soon for a slow step and a checkpoint.
        own = {"PET_SHUTDOWN_TIMEOUT": os.environ.get("PET_SHUTDOWN_TIMEOUT", "120"), LAUNCHED: str(os.getpid())}
        process = subprocess.Popen(command, env=os.environ | own | environment)
        if STOP.asked:  # while it was being started
            pass_on(signal.SIGTERM)
        code = process.wait()
    return code if code >= 0 else 128 - code
