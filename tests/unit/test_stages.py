# SPDX-License-Identifier: Apache-2.0
"""A stage is a folder: one that is made up here answers show, status, launch and needs without a word in a verb."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from counting import RECIPE, made_up_stage

from effsam3 import launch as launcher
from effsam3 import stages
from effsam3.errors import RecipeError
from effsam3.recipe.reader import load_recipe, refuse_verb
from effsam3.shipped import texts
from effsam3.show import show
from effsam3.stages import needs
from effsam3.status import as_text
from effsam3.training.progress import Progress
from effsam3.training.state import examine

PACKAGE = Path(stages.__file__).parent


@pytest.fixture
def basket(tmp_path, monkeypatch):
    """A recipe of the stage `counting`."""
    yield from made_up_stage(tmp_path, monkeypatch)


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
    assert recipe.verbs and recipe.runs_key and recipe.starter in texts()
    if "train" in recipe.verbs:
        assert recipe.metric in recipe.metrics and recipe.knobs and recipe.replaces
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
    }
