# SPDX-License-Identifier: Apache-2.0
"""A stage is a folder: one that is made up here answers show, status, launch and needs without a word in a verb."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from effsam3 import launch as launcher
from effsam3 import stages
from effsam3.errors import RecipeError
from effsam3.recipe.reader import load_recipe, refuse_verb
from effsam3.show import show
from effsam3.stages import needs
from effsam3.status import as_text, examine
from effsam3.training.progress import Progress

PACKAGE = Path(stages.__file__).parent

FACTS = '''
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from effsam3.errors import UserError
from effsam3.recipe.common import Merge, Optim, Sam3, StageRecipe, Train
from effsam3.recipe.push import Push
from effsam3.recipe.rules import FileName, PositiveInt, Section


@dataclass(frozen=True, kw_only=True)
class CountingData(Section):
    apples: PositiveInt  # to count


@dataclass(frozen=True, kw_only=True)
class CountingRecipe(StageRecipe):
    """How many apples are in a basket."""

    why_no_more = "apples are counted as they lie: begin with train"
    metric = "val/apples"

    stage: Literal["counting"]
    name: FileName
    hardware: FileName = "cpu"
    student: str
    student_init: str = "random"
    sam3: Sam3 = Sam3(checkpoint="tiny")
    data: CountingData
    optim: Optim
    train: Train
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

from effsam3.errors import UserError


def few_apples(recipe):
    if recipe.data.apples > 100:
        raise UserError(f"data.apples: {recipe.data.apples} do not fit into the basket")


NEEDS = (few_apples,)


def untrained(recipe):
    return torch.nn.Linear(1, 1)
"""

MEASURING = """
def few_scales(recipe):
    return "there are no scales"


NEEDS = (few_scales,)
"""

RECIPE = """\
stage: counting
name: basket
student: abacus
data: {apples: 1000}
optim: {lr: 1.0e-3, min_lr: 0, warmup_lr: 0, weight_decay: 0, clip_grad_norm: 1, warmup_steps: 0}
train: {steps: 10, global_batch_size: 4, micro_batch_size: 2, eval_every: 5, save_every: 5}
"""


@pytest.fixture
def basket(tmp_path, monkeypatch):
    """A recipe of the stage `counting`, whose folder is not in the package."""
    folder = tmp_path / "stages" / "counting"
    folder.mkdir(parents=True)
    for name, text in {"__init__": "", "facts": FACTS, "training": TRAINING, "measuring": MEASURING}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(folder.parent)])
    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES, "counting"))
    path = tmp_path / "basket.yaml"
    path.write_text(RECIPE)
    yield path
    for module in [name for name in sys.modules if name.startswith("effsam3.stages.counting")]:
        del sys.modules[module]


def overrides(tmp_path, *more):
    return [f"train.runs={tmp_path}/runs", *more]


def test_its_keys_are_read_as_strictly(basket, tmp_path):
    assert load_recipe(basket).data.apples == 1000
    with pytest.raises(RecipeError, match=r"unknown key data.aples; did you mean data.apples\?"):
        load_recipe(basket, ["data.aples=3"])
    basket.write_text(RECIPE.replace("stage: counting", "stage: countin"))
    with pytest.raises(RecipeError, match="'countin' is not a stage; did you mean counting"):
        load_recipe(basket)


def test_show_has_its_lines(basket):
    lines = [line for line in show(load_recipe(basket)).splitlines() if line.startswith("#")]
    assert [line[2:].split(maxsplit=1)[0] for line in lines] == ["hardware", "batch", "apples", "pears"]
    assert lines[2:] == ["# apples    1,000 in the basket", "# pears     unknown yet: nobody has brought any"]


def test_status_knows_its_metric(basket, tmp_path):
    folder = tmp_path / "runs" / "basket"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    Progress(folder, True, "1 x cpu", 4).update("complete", 10, 10)
    lines = [{"step": step, "val/apples": apples} for step, apples in ((0, 0.1), (5, 0.9), (10, 0.7))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = examine(folder)
    assert (facts["student"], facts["metric"]) == ("abacus", "val/apples")
    assert "val/apples: start 0.1000, best 0.9000 at step 5, latest 0.7000 at step 10" in as_text(facts)


def test_launch_runs_its_verbs(basket, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(launcher, "_run", lambda command, environment: lines.append(command) or 0)
    asked = []
    monkeypatch.setattr(launcher, "ask_for_needs", lambda path, verbs, more: asked.extend(verbs))
    assert launcher.launch(str(basket), overrides(tmp_path)) == 0
    assert asked == ["train", "merge", "evaluate"] and len(lines) == 3
    for verb, line in zip(asked, lines, strict=True):
        assert any(word.endswith(f"{verb}.py") or word == verb for word in line)
    with pytest.raises(RecipeError, match="embed: basket is of stage counting, .*; apples are counted as they lie"):
        launcher.launch(str(basket), ["embed"])
    with pytest.raises(RecipeError, match="which knows train, merge, evaluate, push and show"):
        refuse_verb(load_recipe(basket), "embed")


def test_its_needs_are_asked_for(basket, tmp_path):
    recipe = load_recipe(basket, overrides(tmp_path))
    missing, remarks = needs.lacking(recipe, ["train", "evaluate"])
    assert missing == ["train: data.apples: 1000 do not fit into the basket"]
    assert remarks == ["evaluate: there are no scales"]
    assert needs.lacking(load_recipe(basket, overrides(tmp_path, "data.apples=3")), ["train"]) == ([], [])


@pytest.mark.parametrize("stage", stages.STAGES)
def test_facts_are_light_and_complete(stage):
    recipe = stages.recipe_class(stage)
    assert recipe.verbs and recipe.runs_key
    if "train" in recipe.verbs:
        assert recipe.metric and recipe.knobs and recipe.replaces
    code = f"import sys, effsam3.stages.{stage}.facts; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_verb_knows_a_stage_by_its_name():
    """What a stage is asked lies in its folder: its name stands there, in the list of stages and in that of slots."""
    verbs = [file for file in PACKAGE.parent.glob("*.py")] + [*(PACKAGE.parent / "publish").glob("*.py")]
    names = [f'"{stage}"' for stage in stages.STAGES]
    found = {(file.name, name) for file in verbs for name in names if f"stage == {name}" in file.read_text()}
    assert found == set()
    rooms = {PACKAGE / "memory", PACKAGE.parent / "models" / "memory"}  # the stage, and the module that it trains
    files = [file for file in PACKAGE.parent.rglob("*.py") if file.parent not in rooms]
    naming = {str(file.relative_to(PACKAGE.parent)) for file in files if '"memory"' in file.read_text()}
    assert naming == {
        "stages/__init__.py",
        "models/merging/slots.py",
        "benchmarks/tracking.py",  # an argument of transformers' memory attention
    }
