# SPDX-License-Identifier: Apache-2.0
"""Recipes of a release: parts that were trained apart, put together into one SAM 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from effsam3.checked_files import read_json
from effsam3.errors import UserError
from effsam3.recipe.common import Chassis, Merge, Recipe, StageRecipe
from effsam3.recipe.push import Push
from effsam3.recipe.reader import load_recipe
from effsam3.recipe.rules import FileName, Section, each_once


@dataclass(frozen=True, kw_only=True)
class Parts(Section):
    """Who fills which slot: a run folder, a merged or an imported model; null: SAM 3's own part stays."""

    image: str | None = None  # who fills the vision trunk
    text: str | None = None  # who fills the text encoder
    memory: str | None = None  # who fills the tracker's memory
    vision: str | None = None  # who fills the vision trunk and both necks; instead of `image`
    adapted: Annotated[
        tuple[str, ...], each_once
    ] = ()  # runs that changed tensors in place, or folders of such tensors, see docs/formats.md

    def slots(self) -> dict[str, str | None]:
        """Return {slot: who fills it}."""
        return {slot: folder for slot, folder in vars(self).items() if slot != "adapted"}

    def filled(self) -> dict[str, Path]:
        """Return the slots that get a part: {slot: where it is}."""
        return {slot: Path(folder) for slot, folder in self.slots().items() if folder is not None}

    def check(self) -> Iterator[str]:
        if not self.filled() and not self.adapted:
            yield "image: no slot gets a part; name a run folder, such as parts.image=runs/stage1-image-es_rv_m"


@dataclass(frozen=True, kw_only=True)
class ReleaseRecipe(Recipe):
    """A release: nothing is learned; parts are merged, measured together and published."""

    starter = "release/es_rv_m_mc_s"
    verbs = ("merge", "evaluate")
    why_no_more = "it puts together what has been trained already: run this verb on the recipe of a part"
    runs_key = "runs"

    stage: Literal["release"]  # the folder of effsam3/stages that reads this recipe
    name: FileName  # name of the release's folder, <runs>/<name>
    hardware: FileName = "cpu"  # names accelerate_configs/<hardware>.yaml; what `evaluate` runs on
    runs: str = "runs"  # folder of run folders
    sam3: Chassis = Chassis()
    parts: Parts
    merge: Merge = Merge()
    push: Push = Push()

    @property
    def folder(self) -> Path:
        """The release's folder, shaped like a run folder."""
        return Path(self.runs) / self.name

    def sources(self) -> dict[str, Path]:
        return self.parts.filled()

    def adapted(self) -> tuple[Path, ...]:
        return tuple(Path(folder) for folder in self.parts.adapted)

    def learned(self) -> dict[str, StageRecipe]:
        folders = self.sources() | {folder.name: folder for folder in self.adapted()}
        files = {owner: folder / "recipe.yaml" for owner, folder in folders.items()}
        return {owner: load_recipe(file) for owner, file in files.items() if file.is_file()}

    def derived(self) -> dict[str, Callable[[], str]]:
        unused = "vision" if self.parts.vision is None else "image"  # a student of one takes the place of the other
        lines = {slot: partial(self._part_line, slot) for slot in self.parts.slots() if slot != unused}
        return lines | ({"adapted": lambda: ", ".join(self.parts.adapted)} if self.parts.adapted else {})

    def _part_line(self, slot: str) -> str:
        """Say who fills a slot, as far as that run or model is there."""
        folder = self.sources().get(slot)
        if folder is None:
            return "SAM 3's own"
        if (folder / "recipe.yaml").is_file():
            trained = load_recipe(folder / "recipe.yaml")
            return f"{folder}: {trained.student}, {trained.student_line()}"
        for made in (folder / "effsam3.json", folder / "merged" / "effsam3.json"):
            if made.is_file():
                slots = read_json(made, {"slots": {str: {"student": str}}}, "merge or import the model again")["slots"]
                return f"{made.parent}: {slots[slot]['student'] if slot in slots else 'no student in this slot'}"
        raise UserError(f"there is no run and no model in {folder}")


RECIPE = ReleaseRecipe
