# SPDX-License-Identifier: Apache-2.0
"""The traps of YAML, through the reader of recipes: values become what their key declares and nothing else."""

from pathlib import Path

import pytest

from effsam3.recipe.reader import RecipeError, load_recipe

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke" / "image.yaml"
NOT_FLOATS = [".nan", "nan", ".inf", "-.inf", "inf", "1e999", "1:30", "0x1p3", "true", "'1.0'", "1,5", "012.5"]
NOT_INTEGERS = ["012", "0o12", "0x10", "7.0", "1e3", "true", "yes", "'7'", "1__0", "null", "1:30", "seven"]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a recipe, by default one that inherits the smoke recipe, and returns its path."""

    def writer(text, inherits=True):
        path = tmp_path / "recipe.yaml"
        path.write_text((f"inherits: {SMOKE}\n" if inherits else "") + text, encoding="utf-8")
        return path

    return writer


def problems_of(path, overrides=()):
    """Return the lines of the error that loading raises, without the file's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E3", 1000.0), ("5", 5.0), (".5", 0.5), ("+2.", 2.0), ("1_000.5", 1000.5), ("0.001", 1e-3)],
)
def test_floats(text, value):
    read = load_recipe(SMOKE, [f"optim.clip_grad_norm={text}"]).optim.clip_grad_norm
    assert read == value and type(read) is float


@pytest.mark.parametrize("text", NOT_FLOATS)
def test_not_floats(text):
    assert problems_of(SMOKE, [f"optim.clip_grad_norm={text}"])[0].startswith("optim.clip_grad_norm: ")


@pytest.mark.parametrize(("text", "value"), [("10_000", 10_000), ("+7", 7), ("7", 7)])
def test_integers(text, value):
    read = load_recipe(SMOKE, [f"train.log_every={text}"]).train.log_every
    assert read == value and type(read) is int


@pytest.mark.parametrize("text", NOT_INTEGERS)
def test_not_integers(text):
    assert problems_of(SMOKE, [f"train.log_every={text}"])[0].startswith("train.log_every: ")


def test_a_leading_zero_is_explained():
    assert "octal" in problems_of(SMOKE, ["train.log_every=012"])[0]


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("yes", True), ("On", True), ("false", False), ("no", False), ("OFF", False)]
)
def test_booleans(text, value):
    assert load_recipe(SMOKE, [f"embed.pixels={text}"]).embed.pixels is value


@pytest.mark.parametrize("text", ["1", "0", "'true'", "y", "null"])
def test_not_booleans(text):
    assert problems_of(SMOKE, [f"embed.pixels={text}"])[0].startswith("embed.pixels: expected true or false")


@pytest.mark.parametrize("text", ["no", "on", "off", "1e-3", "012", "1:30", "2026-11-21", "true"])
def test_text_stays_as_it_is_written(text):
    recipe = load_recipe(SMOKE, [f"train.wandb_project={text}", f"sam3.revision={text}"])
    assert recipe.train.wandb_project == recipe.sam3.revision == text


def test_null_is_a_value_only_where_one_may_be_missing():
    assert load_recipe(SMOKE, ["sam3.revision=null"]).sam3.revision is None
    assert load_recipe(SMOKE, ["sam3.revision='null'"]).sam3.revision == "null"
    assert problems_of(SMOKE, ["sam3.checkpoint=null"])[0].startswith("sam3.checkpoint: expected text, got nothing")


def test_a_repeated_key(write):
    found = problems_of(write("train:\n  seed: 1\n  seed: 2\n"))
    assert found == ["key seed is given twice (recipe.yaml line 3, recipe.yaml line 4); keep one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a\n", r"recipe.yaml is not YAML: .* \(line \d+\)"),
        ("name: a\n---\nname: b\n", "is not YAML: expected a single document"),
        ("\tname: a\n", "is not YAML"),
        ("data: &x {index: *x}\n", "alias to the mapping or list it is in"),
        ("name: !!python/name:os.system\n", "is a YAML tag"),
        ("name: !include other.yaml\n", "is a YAML tag"),
        ("? [a, b]\n: 3\n", "a key must be one word"),
    ],
)
def test_what_yaml_can_do_and_recipes_do_not(write, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just text\n"])
def test_a_file_that_is_no_recipe(write, text):
    with pytest.raises(RecipeError, match="a recipe is made of lines `key: value`"):
        load_recipe(write(text, inherits=False))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RecipeError, match="not a text file in UTF-8"):
        load_recipe(tmp_path / "x.yaml")
