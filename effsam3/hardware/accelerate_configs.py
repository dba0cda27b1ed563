# SPDX-License-Identifier: Apache-2.0
"""Finds accelerate's configs and reads what each starts, without importing accelerate."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Config:
    """What accelerate starts by one of its configs."""

    file: Path
    kind: str  # `distributed_type`: NO (one process), MULTI_GPU or DEEPSPEED
    processes: int  # over all machines
    nodes: int  # machines among which they are divided
    port: int  # on which the processes find each other; 0 is any free one
    use_cpu: bool
    on_cpu: bool  # no GPU is asked for, even where there are some
    deepspeed: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """What accelerate's launcher would put into the environment of a single process: to stay on the CPU."""
        return {"ACCELERATE_USE_CPU": "true"} if self.use_cpu else {}


def read_config(hardware: str | Path) -> Config:
    """Read a config by its file, or by the name that a recipe calls its `hardware`.

    Raises:
        UserError: there is none, or it is damaged: several processes are asked for and none is counted, say.
    """
    file = hardware if isinstance(hardware, Path) else config_file(hardware)
    # BaseLoader: NO stays text instead of becoming a boolean.
    form = {"distributed_type": str, "deepspeed_config?": {"zero_stage?": str}} | {f"{name}?": str for name in COUNTS}
    content = read_yaml(file, form, REMEDY, loader=yaml.BaseLoader)
    deepspeed = content.get("deepspeed_config", {})
    counts = {name: where[name] for where in (content, deepspeed) for name in (*COUNTS, "zero_stage") if name in where}
    if wrong := [name for name, count in counts.items() if not count.isdecimal()]:
        raise UserError(f"{file}: {wrong[0]} is {counts[wrong[0]]!r}, expected a number; {REMEDY}")
    count = 1 if content["distributed_type"] == "NO" else int(content.get("num_processes", 0))
    if count < 1:
        raise UserError(f"{file}: num_processes is not there or 0; it counts the processes on all machines; {REMEDY}")
    use_cpu = content.get("use_cpu") == "true"
    return Config(
        file=file,
        kind=content["distributed_type"],
        processes=count,
        nodes=int(content.get("num_machines", 1)),
        port=int(content.get("main_process_port", 29500)),  # accelerate's own default
        use_cpu=use_cpu,
        on_cpu=use_cpu or no_devices(content.get("gpu_ids", "")),
        deepspeed=deepspeed,
    )


def no_devices(devices: str) -> bool:
    """Return whether a list of devices, as in `gpu_ids` and CUDA_VISIBLE_DEVICES, asks for none."""
    return bool(devices) and set(devices.split(",")) == {"-1"}


def twin_on_cpu(hardware: str) -> str:
    """Return the CPU config that takes the place of another: the one with as many processes, or one process."""
    twin = config_file("cpu").with_name(f"{hardware}_cpu.yaml")
    return twin.stem if twin.is_file() else "cpu"
