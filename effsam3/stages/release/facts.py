# SPDX-License-Identifier: Apache-2.0
"""Recipes of a release: parts that were trained apart, put together into one SAM 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from effsam3.recipe.common import Chassis, Merge
from effsam3.recipe.push import Push
from effsam3.recipe.rules import FileName, Section


@dataclass(frozen=True, kw_only=True)
class Parts(Section):
    """Who fills which slot: a run folder, a merged or an imported model; null: SAM 3's own part stays."""

    image: str | None = None
    text: str | None = None
    memory: str | None = None

    def filled(self) -> dict[str, Path]:
        """Return the slots that get a part: {slot: where it is}."""
        return {slot: Path(folder) for slot, folder in vars(self).items() if folder is not None}

    def check(self) -> Iterator[str]:
        if not self.filled():
            yield "image: no slot gets a part; name a run folder, such as parts.image=runs/stage1-image-es_rv_m"


@dataclass(frozen=True, kw_only=True)
class ReleaseRecipe(Section):
    """A release: nothing is learned; parts are merged, measured together and published."""

    stage: Literal["release"]
    name: FileName  # of the release's folder, <runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; what `evaluate` runs on
    runs: str = "runs"  # folder of run folders
    sam3: Chassis = Chassis()
    parts: Parts
    merge: Merge = Merge()
    push: Push = Push()

    launched = ("merge", "evaluate")  # what `effsam3 launch` runs, in order

    @property
    def folder(self) -> Path:
        """The release's folder, shaped like a run folder."""
        return Path(self.runs) / self.name
