# SPDX-License-Identifier: Apache-2.0
"""Recipes of one's own: whole ones by stage, and shipped ones under another name."""

import re
from pathlib import Path

import pytest

from effsam3 import shipped, stages
from effsam3.cli import main
from effsam3.recipe.reader import differing_keys, load_recipe


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_stage_s_recipe_is_whole_and_marked(stage, capsys):
    assert main(["new", "mine", "--stage", stage]) == 0
    assert "mine.yaml will run in runs/mine; change its lines marked YOURS" in capsys.readouterr().out
    starter, text = stages.recipe_class(stage).starter, Path("mine.yaml").read_text()
    assert "inherits" not in text and text.startswith(f"# Begun from {starter}.")
    assert [line.split()[0] for line in differing_keys(load_recipe(starter), load_recipe("mine.yaml"))] == ["name"]
    # Every comment of the recipe and of its parent, but for the parent's first lines, which are about its children.
    originals = [shipped.recipe_file(starter).read_text()]
    if parent := shipped.PARENT.search(originals[0]):
        parent = (shipped.recipe_file(starter).parent / parent[1]).read_text()
        originals.append(re.sub(r"\A(#.*\n)+", "", parent))
    said = [comment for original in originals for comment in re.findall(r"# (.*)", original)]
    assert said and all(comment in text for comment in said)
    # What is a place of the user's, and the machine, is marked; nothing else is.
    marked = {line.split(":")[0].strip() for line in text.splitlines() if "# YOURS" in line}
    places = re.findall(r"^ *([a-z_]+): \[?(?:data|runs)/", text, re.M)
    assert marked == {*places, "hardware"} and places
    assert main(["show", "mine.yaml"]) == 0
    assert "name: mine" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(shipped.texts()))
def test_a_shipped_recipe_under_a_name_of_its_own(name):
    assert main(["new", "mine", "--from", name, "--out", "own/mine.yaml"]) == 0
    differing = differing_keys(load_recipe(name), load_recipe("own/mine.yaml"))
    assert [line.split()[0] for line in differing] == ["name"]
    assert load_recipe("own/mine.yaml").name == "mine"


def test_nothing_is_overwritten(tmp_path, capsys):
    assert main(["new", "es_rv_m", "--from", "stage1/image/es_rv_m.yaml"]) == 0
    text = (tmp_path / "es_rv_m.yaml").read_text()
    assert "inherits: stage1/image/base\n" in text and "name: es_rv_m\n" in text and "# ES-RV-M" in text
    (tmp_path / "es_rv_m.yaml").write_text("mine")
    assert main(["new", "es_rv_m", "--stage", "image"]) == 2
    assert "es_rv_m.yaml is there already; nothing was written" in capsys.readouterr().err
    assert (tmp_path / "es_rv_m.yaml").read_text() == "mine"


@pytest.mark.parametrize(("options", "meant"), [
    (("mine", "--from", "stage1/image/es_rvm"),
     "no recipe called stage1/image/es_rvm comes with effsam3; did you mean stage1/image/es_rv_m?"),
    (("mine", "--stage", "imag"), "--stage: 'imag' is not a stage; did you mean image?"),
    (("mine",), "begin with --stage image|vision|text|"),
    (("mine", "--stage", "image", "--from", "stage2/memory"), "begin with --stage image|vision|text|"),
    (("my/own", "--stage", "image"), "'my/own' must be letters"),
])  # fmt: skip
def test_what_cannot_be_begun(options, meant, capsys, tmp_path):
    assert main(["new", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {meant}")
    assert not list(tmp_path.rglob("*.yaml"))
