# SPDX-License-Identifier: Apache-2.0
"""Real runs of the real commands, in folders of their own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
SMOKE = REPOSITORY / "recipes/smoke/image.yaml"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
PROMPTLY_S = 120  # two ranks and their launcher, on a busy machine


def command(verb: str, *overrides: str, recipe: Path = SMOKE, launch: bool = False) -> list[str]:
    """The command line of a verb: in one process, or, with `launch`, on the hardware that the recipe names."""
    module = [sys.executable, "-m", "effsam3.cli"]
    return [*module, *(["launch", str(recipe), verb] if launch else [verb, str(recipe)]), *overrides]


def run(folder: Path, *arguments: str, code: int = 0, environment: dict | None = None, **options) -> str:
    """Run a verb in a folder and return what it printed; the exit code must be `code`."""
    return run_line(folder, command(*arguments, **options), code, environment)


@contextmanager
def fresh_state():
    """What a run leaves in its process, undone before and after: so that the next one finds none of it."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_here(folder: Path, verb: str, *arguments: str, recipe: Path = SMOKE, code: int = 0) -> str:
    """The same in this process, seconds less than a fresh one: for runs of which only the learning is looked at."""
    from effsam3.cli import main

    printed, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with fresh_state(), redirect_stdout(printed), redirect_stderr(printed):
            found = main([verb, str(recipe), *arguments])
    finally:
        os.chdir(before)
    assert found == code, f"exit code {found}\n{printed.getvalue()[-6000:]}"
    return printed.getvalue()


def run_line(folder: Path, line: list[str], code: int = 0, environment: dict | None = None) -> str:
    """Run any command line in a folder and return what it printed; the exit code must be `code`."""
    done = subprocess.run(
        line,
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


def step_of(folder: Path) -> int:
    """The last step that a run folder reports, 0 before there is one."""
    lines = metrics(folder) if (folder / "metrics.jsonl").is_file() else {}
    return max(lines, default=0)


class Family:
    """A command in a session of its own, with all that it starts."""

    def __init__(self, folder: Path, line: list[str]):
        self.process = subprocess.Popen(
            line, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def members(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def signal_group(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def signal_all(self, number: int) -> None:
        """As systemd and Slurm do, which know every process: also those in sessions of their own, as wandb's."""
        for member in self.members():
            with suppress(psutil.NoSuchProcess):
                member.send_signal(number)

    def wait_until(self, condition) -> None:
        while not condition():
            assert self.process.poll() is None, f"ended too early\n{self.process.stdout.read()[-3000:]}"
            time.sleep(0.002)

    def end(self) -> str:
        """Wait for the end, of all its processes, and return what was printed."""
        members = self.members()
        try:
            printed = self.process.communicate(timeout=PROMPTLY_S)[0]
            assert psutil.wait_procs(members, timeout=30)[1] == [], printed
            return printed
        finally:
            for member in members:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
