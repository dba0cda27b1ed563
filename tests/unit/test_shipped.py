# SPDX-License-Identifier: Apache-2.0
"""Recipes by short name, from any folder; tests/e2e/test_wheel.py does it without a clone."""

from pathlib import Path

import pytest

from effsam3 import shipped
from effsam3.cli import main
from effsam3.errors import RecipeError
from effsam3.recipe.reader import load_recipe

ROOT = Path(__file__).parents[2]


def test_a_short_name_is_the_recipes_path():
    names = shipped.short_names()
    assert names["stage1/image/es_rv_m"] == ROOT / "recipes/stage1/image/es_rv_m.yaml"
    assert len(names) == len(list((ROOT / "recipes").rglob("*.yaml")))


@pytest.mark.parametrize("name", ["stage1/image/es_rv_m", "stage1/image/es_rv_m.yaml", "recipes/stage1/image/es_rv_m"])
def test_short_names_work_anywhere(name):
    assert load_recipe(name, ["optim.lr=5e-4"]).optim.lr == 5e-4
    assert load_recipe(name) == load_recipe(ROOT / "recipes/stage1/image/es_rv_m.yaml")


def test_own_files_come_first(tmp_path):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/image.yaml").write_text("inherits: stage1/image/es_rv_m\nname: mine\n")
    assert load_recipe("smoke/image.yaml").name == "mine"
    assert load_recipe("smoke/image").name == "smoke-image"


def test_a_parent_by_short_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("inherits: stage1/image/es_rv_m\nname: mine\noptim: {lr: 2.0e-4}\n")
    mine, parent = load_recipe("mine.yaml"), load_recipe("stage1/image/es_rv_m")
    assert (mine.student, mine.optim.betas, mine.optim.lr) == (parent.student, parent.optim.betas, 2e-4)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stage1/image/es_rvm", "did you mean stage1/image/es_rv_m?"),
        ("es_rv_m", "did you mean stage1/image/es_rv_m?"),
        ("stage1/txt/es_mc_s", "did you mean stage1/text/es_mc_s?"),
        ("recipes/smoke/imag.yaml", "did you mean smoke/image?"),
        ("qqqqq", "`effsam3 recipes` lists those that come with effsam3"),
    ],
)
def test_an_unknown_name_suggests_another(name, meant):
    with pytest.raises(RecipeError) as refused:
        load_recipe(name)
    assert str(refused.value) == f"no recipe at {name}; {meant}"


def test_status_knows_short_names(capsys):
    assert main(["status", "smoke/image"]) == 2
    assert "there is no run folder runs/smoke-image" in capsys.readouterr().err


def test_every_listed_recipe_says_what_it_is_in_a_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"stage1/image/es_rv_m", "stage2/memory", "smoke/image"} <= set(names)
    assert not [name for name in names if name.endswith("/base")]  # it cannot be run
    for name, line in zip(names, lines, strict=True):
        said = line.removeprefix(name).strip()
        assert 20 < len(said) and said.endswith(".") and len(line) <= 119, line
        assert load_recipe(name)
