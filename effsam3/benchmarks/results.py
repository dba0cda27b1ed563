# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of one student find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effsam3.files import write_json


class Results:
    """Results by benchmark, each on the disk as soon as it is there: `<prefix><name>.json` in a folder.

    Attributes:
        pictures: what was drawn.
        left_out: sentences on what the data do not allow.
    """

    def __init__(self, folder: Path, prefix: str, provenance: dict[str, Any]):
        self.folder, self.prefix, self.provenance = folder, prefix, provenance
        self.by_name: dict[str, dict[str, Any]] = {}
        self.pictures: list[Path] = []
        self.left_out: list[str] = []

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keep the result of a benchmark."""
        self.by_name[name] = result
        write_json(self.folder / f"{self.prefix}{name}.json", result | {"provenance": self.provenance})
