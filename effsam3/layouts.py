# SPDX-License-Identifier: Apache-2.0
"""Where accelerate's layouts lie and how many processes each starts, read without accelerate."""

from __future__ import annotations

from pathlib import Path

import yaml

from effsam3.errors import UserError, did_you_mean

REPOSITORY = Path(__file__).resolve().parent.parent


def layout_file(hardware: str) -> Path:
    """Return accelerate_configs/<hardware>.yaml of the working directory or, failing that, of the repository.

    Raises:
        UserError: neither has it.
    """
    folders = [Path("accelerate_configs"), REPOSITORY / "accelerate_configs"]
    for folder in folders:
        if (folder / f"{hardware}.yaml").is_file():
            return folder / f"{hardware}.yaml"
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise UserError(f"hardware: there is no accelerate_configs/{hardware}.yaml{did_you_mean(hardware, names)}")


def layout_processes(file: Path) -> int:
    """Return how many processes, over all machines, accelerate starts for a layout file."""
    # BaseLoader: NO stays text instead of becoming a boolean.
    layout = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    return 1 if layout["distributed_type"] == "NO" else int(layout["num_processes"])


def layout_environment(file: Path) -> dict[str, str]:
    """Return what accelerate's launcher would put into the environment of a single process: to stay on the CPU."""
    layout = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    return {"ACCELERATE_USE_CPU": "true"} if layout.get("use_cpu") == "true" else {}
