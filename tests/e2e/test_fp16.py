# SPDX-License-Identifier: Apache-2.0
"""fp16 takes the same steps on any hardware, skipped ones among them."""

import json
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, run_line

STEPS = str(Path(__file__).with_name("fp16_steps.py"))


def six_steps(hardware: str) -> dict:
    """Take them and return what rank 0 has found."""
    line = [sys.executable, STEPS, hardware]
    if hardware != "cpu":
        config = REPOSITORY / f"accelerate_configs/{hardware}.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        line = [sys.executable, *launcher, STEPS, hardware]
    printed = run_line(Path.cwd(), line)
    return json.loads(next(line for line in printed.splitlines() if line.startswith('{"steps"')))


@pytest.mark.parametrize("hardware", ["ddp_cpu", "zero2_cpu"])
def test_the_same_steps(hardware):
    alone, divided = six_steps("cpu"), six_steps(hardware)
    assert [step["skipped"] for step in alone["steps"]] == [False, True, False, False, False, False]
    assert alone["loss_scale"] == divided["loss_scale"] == {"scale": 32768.0, "good_steps": 4, "skipped": 1}
    for ours, theirs in zip(divided["steps"], alone["steps"], strict=True):
        assert ours == {name: value and pytest.approx(value, rel=1e-3) for name, value in theirs.items()}
        assert ours["size"] == pytest.approx(theirs["size"], rel=1e-5)
    assert divided["moments"] == pytest.approx(alone["moments"], rel=1e-3)
