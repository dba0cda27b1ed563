# SPDX-License-Identifier: Apache-2.0
"""Records that several processes make and no kill loses: lines of JSON, each process's in a file of its own.

A line is there as soon as it is whole. So whoever begins again, with any number of processes, reads all files and
makes what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effsam3.checked_files import parse_json, read_json
from effsam3.files import write_json

REMEDY = "delete it; what it held will be made again"


class Journal:
    """Records of one kind in a folder: `<name>-<process>.jsonl`."""

    def __init__(self, folder: Path, name: str, form: Any):
        """`form` of a record is as `checked_files` has it."""
        self.folder, self.name, self.form = folder, name, form

    def read(self) -> Iterator[dict]:
        """Yield all records; a last line that was cut off is none.

        Raises:
            DamagedFileError: a line is no such record.
        """
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.endswith(b"\n"):
                        text = line.decode("utf-8", "replace")
                        yield parse_json(text, self.form, f"{path}, line {number}", REMEDY)

    @contextmanager
    def writer(self, process: int) -> Iterator[Callable[[dict], None]]:
        """Yield a function that adds a record to this process's file."""
        path = self.folder / f"{self.name}-{process}.jsonl"
        with open(path, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # what a kill has cut off

            def add(record: dict) -> None:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()

            yield add


def begin(folder: Path, settings: dict[str, Any]) -> bool:
    """Make a folder of journals ready for records that are made with these settings; return whether some are there.

    Records that were made with other settings are deleted: they are of another model.
    """
    file = folder / "settings.json"
    if file.is_file() and read_json(file, dict, REMEDY) == settings:
        return any(folder.glob("*.jsonl"))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    write_json(file, settings)
    return False
