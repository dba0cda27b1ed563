# SPDX-License-Identifier: Apache-2.0
"""Real runs of the real commands, in folders of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = REPOSITORY / "recipes/smoke/image.yaml"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


def command(verb: str, *overrides: str, recipe: Path = SMOKE, launch: bool = False) -> list[str]:
    """The command line of a verb: in one process, or, with `launch`, on the layout that the recipe names."""
    module = [sys.executable, "-m", "effsam3.cli"]
    return [*module, *(["launch", str(recipe), verb] if launch else [verb, str(recipe)]), *overrides]


def run(folder: Path, *arguments: str, code: int = 0, environment: dict | None = None, **options) -> str:
    """Run a verb in a folder and return what it printed; the exit code must be `code`."""
    done = subprocess.run(
        command(*arguments, **options),
        cwd=folder,
        env=environment or ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def metrics(folder: Path, key: str = "train/loss") -> dict[int, dict]:
    """{step: values} of a run folder's metrics.jsonl, lines that have `key`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if key in line]
    assert len({line["step"] for line in found}) == len(found), "a step was reported twice"
    return {line["step"]: line for line in found}


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A folder with drawn images and the teacher's features for them, and the overrides that use them."""
    folder = tmp_path_factory.mktemp("shared")
    overrides = (
        "data.synthetic_images=48",
        f"data.index={folder}/data/index.parquet",
        f"embed.to={folder}/teacher",
        "train.eval_samples=8",
        "train.loggers=[]",
        "evaluate.max_images=4",
        "evaluate.pictures=1",
    )
    run(folder, "embed", *overrides)
    return folder, overrides
