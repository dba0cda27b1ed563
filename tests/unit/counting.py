# SPDX-License-Identifier: Apache-2.0
"""A made-up stage, whole and tiny: how many apples are in a basket. Its folder is not in the package.

The student counts its own forward passes in training, so that a run's number of micro-batches decides what a
validation finds (`data.found`), whether it was resumed or not.
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from effsam3 import stages

FACTS = '''
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from effsam3.errors import UserError
from effsam3.recipe.common import Data, Merge, Optim, Sam3, StageRecipe, Train
from effsam3.recipe.push import Push
from effsam3.recipe.rules import FileName, PositiveInt, Section


@dataclass(frozen=True, kw_only=True)
class CountingData(Data):
    apples: PositiveInt  # to count
    found: tuple[float, ...] = ()  # what a validation reports after so many micro-batches, again and again
    rotten: int | None = None  # the micro-batch whose gradient does not fit float16
    source: Literal["basket"] = "basket"
    workers: int = 0
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class CountingEvaluate(Section):
    scales: PositiveInt = 1  # to weigh on


@dataclass(frozen=True, kw_only=True)
class CountingRecipe(StageRecipe):
    """How many apples are in a basket."""

    why_no_more = "apples are counted as they lie: begin with train"
    metric = "val/apples"
    draws = compiles = True
    metrics = {"val/apples": "higher", "val/error": "lower"}

    stage: Literal["counting"]
    name: FileName
    hardware: FileName = "cpu"
    student: str
    student_init: str = "random"
    sam3: Sam3 = Sam3(checkpoint="tiny")
    data: CountingData
    optim: Optim
    train: Train
    evaluate: CountingEvaluate = CountingEvaluate()
    merge: Merge = Merge()
    push: Push = Push()

    def derived(self) -> dict[str, Callable[[], str]]:
        return {"apples": lambda: f"{self.data.apples:,} in the basket", "pears": self._pears_line}

    def _pears_line(self) -> str:
        raise UserError("nobody has brought any")


RECIPE = CountingRecipe
'''

TRAINING = """
import torch
from PIL import Image
from torch import nn

from effsam3.errors import UserError
from effsam3.stages.base import StageBase


def few_apples(recipe):
    if recipe.data.apples > 100:
        raise UserError(f"data.apples: {recipe.data.apples} do not fit into the basket")


NEEDS = (few_apples,)


def untrained(recipe):
    return torch.nn.Linear(1, 1)


class Apples:
    def __init__(self, count):
        self.x_N4 = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))

    def __len__(self):
        return len(self.x_N4)

    def __getitems__(self, positions):
        return {"x": self.x_N4[positions], "numbers": list(positions), "unreadable": []}


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x_B4):
        self.seen += self.training
        return self.head(torch.tanh(self.body(x_B4)))


class CountingStage(StageBase):
    files = "baskets"

    def __init__(self, recipe, place):
        super().__init__(recipe, place)
        torch.manual_seed(recipe.train.seed)
        self.student, self.facts, self.student_parameters, self.frozen = Counter(), {}, 25, []
        self.train_data, self.val_data = Apples(recipe.data.apples), Apples(recipe.train.eval_samples)

    @classmethod
    def from_recipe(cls, recipe, report, accelerator):
        return cls(recipe, accelerator)

    def describe(self):
        return {"data": f"{self.recipe.data.apples} apples"}

    def samples(self, batch):
        return [f"apple {number}" for number in batch["numbers"]]

    def loss(self, student, batch):
        with self.place.autocast():
            error_B1 = student(batch["x"]).float() - batch["x"].sum(1, keepdim=True)
        square = error_B1.square().mean() / 100  # so that its gradient fits float16 at first
        rotten = self.place.unwrap_model(student).seen == self.recipe.data.rotten
        return {"loss": square * (1e6 if rotten else 1.0), "square": square.detach()}

    @torch.no_grad()
    def validate(self, student, batch):
        found, seen = self.recipe.data.found, self.place.unwrap_model(student).seen
        apples = torch.tensor(found[int(seen) % len(found)], dtype=torch.double)
        apples = apples / (apples >= 0)  # a number below 0 cannot be computed with
        return {name: apples * len(batch["x"]) for name in ("apples", "error")} | {
            "positions": torch.tensor(len(batch["x"]))
        }

    def pictures(self, student, batch):
        frames = [Image.new("RGB", (64, 32), (200, 30 * time, 0)) for time in range(3)]
        return [[(f"apple {number}", frame) for frame in frames] for number in batch["numbers"]]

    def conclude(self, start, best):
        return f"{start['val/apples']} apples at the start, {best['val/apples']} at step {best['step']}"


STAGE = CountingStage
"""

MEASURING = """
def few_scales(recipe):
    return "there are no scales"


NEEDS = (few_scales,)
"""

MERGING = """
from effsam3.errors import UserError


def untrained_part(recipe, config, about):
    raise UserError("apples are not merged")
"""

RECIPE = """\
stage: counting
name: basket
student: abacus
data: {apples: 1000}
optim: {lr: 1.0e-3, min_lr: 0, warmup_lr: 0, weight_decay: 0, clip_grad_norm: 1, warmup_steps: 0}
train: {steps: 10, global_batch_size: 4, micro_batch_size: 2, eval_every: 5, save_every: 5}
"""


def made_up_stage(tmp_path: Path, monkeypatch):
    """Yield a recipe of the stage `counting`: what a fixture of that name does."""
    folder = tmp_path / "stages" / "counting"
    folder.mkdir(parents=True)
    texts = {"__init__": "", "facts": FACTS, "training": TRAINING, "measuring": MEASURING, "merging": MERGING}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(folder.parent)])
    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES, "counting"))
    path = tmp_path / "basket.yaml"
    path.write_text(RECIPE)
    yield path
    for module in [name for name in sys.modules if name.startswith("effsam3.stages.counting")]:
        del sys.modules[module]


def one_process() -> None:
    """Forget the accelerator of an earlier run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
