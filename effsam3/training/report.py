# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for people: its folder, console lines, log.txt, metrics.jsonl and provenance."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from effsam3.checked_files import mismatch
from effsam3.files import refuse_unwritable, write_json, write_text

VERSIONS = ("effsam3", "torch", "transformers", "timm", "accelerate", "deepspeed", "datasets", "numpy")


def provenance() -> dict:
    """Return where the results of this process come from: code, versions, machine, command."""
    return {
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: _version(name) for name in VERSIONS},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Ask git about the checkout that this package runs from; None when it is installed from a wheel."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source() -> str | None:
    """Where this package's repository is to be had, as an address for `git clone`; None where that is not known.

    What only this machine or this user could open, a local path or a login in the address, is left out.
    """
    address = _git("remote", "get-url", "origin")
    found = re.fullmatch(r"(?:https?://(?:[^@/]*@)?|ssh://[^@/]*@|[^@/:]+@)([^/:@]+)(?::\d+)?[:/](.+)", address or "")
    return f"https://{found[1]}/{found[2]}" if found else None


class Report:
    """Speaks for a run: on rank 0 to the console and the run folder, on other ranks not at all."""

    def __init__(self, folder: str | Path, is_main: bool = True):
        self.folder, self.is_main = Path(folder), is_main
        if is_main:
            refuse_unwritable(self.folder, "train.runs")
            self.folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str = "") -> None:
        """Print a line and keep it in log.txt."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)  # does not tear a progress bar
            sys.stdout.flush()
            with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
                log.write(text + "\n")

    def header(self, title: str, lines: dict[str, str]) -> None:
        """Print what the run is: a title and one line per fact, aligned."""
        self.say(f"\n{title}")
        for name, text in lines.items():
            self.say(f"{name:<8} {text}")
        self.say()

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Append one JSON object to metrics.jsonl."""
        if self.is_main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop metrics of steps that a resumed run will take again, and a line that a kill has cut off."""
        path = self.folder / "metrics.jsonl"
        found = read_metrics(path) if self.is_main else []
        if found:  # written even without any, because a kill may have cut the last line off
            lines = [line for line in found if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def write_json(self, name: str, content) -> None:
        """Write a JSON file into the run folder, rank 0 only."""
        if self.is_main:
            write_json(self.folder / name, content)


def read_lines(path: Path) -> list[dict]:
    """Read a .jsonl file that may be growing, [] if there is none; a line that a kill has cut off is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def read_metrics(path: Path) -> list[dict]:
    """Read a run's metrics.jsonl in the same way: only lines of a step and numbers."""
    return [line for line in read_lines(path) if not mismatch(line, {"step": int, str: float})]


def duration(seconds: float) -> str:
    """Say a length of time in its two largest units, such as 12 s, 3 min, 2 h 5 min, 1 d 4 h."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def table(rows: list[list[str]], header: list[str], text_columns: int = 1) -> str:
    """Format rows as an aligned Markdown table; the first `text_columns` to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: list[str]) -> str:
        padded = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rules = [
        "-" * (width + 2) if column < text_columns else "-" * (width + 1) + ":" for column, width in enumerate(widths)
    ]
    return "\n".join([line(header), "|" + "|".join(rules) + "|", *map(line, rows)])
