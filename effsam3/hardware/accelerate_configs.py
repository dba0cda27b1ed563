# SPDX-License-Identifier: Apache-2.0
"""Finds accelerate's configs and reads what each starts, without importing accelerate."""

from __future__ import annotations

from pathlib import Path

import yaml

from effsam3.checked_files import read_yaml
from effsam3.errors import UserError, did_you_mean
from effsam3.shipped import shipped

# Elements that DeepSpeed reduces at a time; it allocates as many, however small the student.
REDUCE_BUCKET = 50_000_000
# What of a config is a number, and what to do where the file is damaged.
COUNTS = ("num_processes", "num_machines", "main_process_port")
REMEDY = "write it again with `accelerate config --config_file`, or name another (hardware)"


def config_file(hardware: str) -> Path:
    """Return accelerate_configs/<hardware>.yaml of the working directory or, failing that, the one shipped.

    Raises:
        UserError: neither has it.
    """
    folders = [Path("accelerate_configs"), shipped("accelerate_configs")]
    for folder in folders:
        if (folder / f"{hardware}.yaml").is_file():
            return folder / f"{hardware}.yaml"
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise UserError(f"hardware: there is no accelerate_configs/{hardware}.yaml{did_you_mean(hardware, names)}")


def config_kind(file: Path) -> str:
    """Return a config's `distributed_type`: NO (one process), MULTI_GPU or DEEPSPEED."""
    return _read(file)["distributed_type"]


def config_processes(file: Path) -> int:
    """Return how many processes, over all machines, accelerate starts for a config.

    Raises UserError where several processes are asked for and none is counted.
    """
    if config_kind(file) == "NO":
        return 1
    count = int(_read(file).get("num_processes", 0))
    if count < 1:
        raise UserError(f"{file}: num_processes is not there or 0; it counts the processes on all machines; {REMEDY}")
    return count


def config_nodes(file: Path) -> int:
    """Return over how many machines a config divides its processes."""
    return int(_read(file).get("num_machines", 1))


def config_port(file: Path) -> int:
    """Return the port on which the processes find each other; 0 is any free one."""
    return int(_read(file).get("main_process_port", 29500))  # accelerate's own default


def config_environment(file: Path) -> dict[str, str]:
    """Return what accelerate's launcher would put into the environment of a single process: to stay on the CPU."""
    return {"ACCELERATE_USE_CPU": "true"} if _read(file).get("use_cpu") == "true" else {}


def config_on_cpu(file: Path) -> bool:
    """Return whether a config asks for no GPU, even where there are some."""
    config = _read(file)
    return config.get("use_cpu") == "true" or no_devices(config.get("gpu_ids", ""))


def no_devices(devices: str) -> bool:
    """Return whether a list of devices, as in `gpu_ids` and CUDA_VISIBLE_DEVICES, asks for none."""
    return bool(devices) and set(devices.split(",")) == {"-1"}


def twin_on_cpu(hardware: str) -> str:
    """Return the CPU config that takes the place of another: the one with as many processes, or one process."""
    twin = config_file("cpu").with_name(f"{hardware}_cpu.yaml")
    return twin.stem if twin.is_file() else "cpu"


def _read(file: Path) -> dict:
    # BaseLoader: NO stays text instead of becoming a boolean.
    form = {"distributed_type": str} | {f"{name}?": str for name in COUNTS}
    content = read_yaml(file, form, REMEDY, loader=yaml.BaseLoader)
    if wrong := [name for name in COUNTS if not content.get(name, "0").isdecimal()]:
        raise UserError(f"{file}: {wrong[0]} is {content[wrong[0]]!r}, expected a number; {REMEDY}")
    return content
