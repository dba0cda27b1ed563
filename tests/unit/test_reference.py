# SPDX-License-Identifier: Apache-2.0
"""The recipe reference and the JSON schemas: up to date, complete, and of one mind with the strict reader."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from effsam3.stages import STAGES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import write_reference  # noqa: E402

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def stage_of(file):
    """Return the stage that a recipe names, or inherits."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content["stage"] if "stage" in content else stage_of(file.parent / content["inherits"])


@pytest.mark.parametrize("file", list(write_reference.documents()), ids=lambda file: file.name)
def test_documents_are_up_to_date(file):
    assert file.read_text(encoding="utf-8") == write_reference.documents()[file], "run scripts/write_reference.py"


def test_every_key_has_a_meaning():
    def nameless(schema, place):
        for key, inner in schema.get("properties", {}).items():
            if not inner["description"]:
                yield f"{place}.{key}"
            yield from nameless(inner, f"{place}.{key}")

    assert [key for stage in STAGES for key in nameless(write_reference.recipe_schema(stage), stage)] == []


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT)))
def test_schemas_accept_every_recipe(file):
    schema = json.loads((ROOT / f"docs/schema/{stage_of(file)}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(file.read_text(encoding="utf-8")), schema)


@pytest.mark.parametrize(
    "wrong",
    [
        {"optim": {"lr": 0}},
        {"optim": {"learning_rate": 1e-3}},
        {"head": "fusd"},
        {"data": {"held_out": 1.0}},
        {"train": {"loggers": ["wandb", "wandb"]}},
        {"evaluate": {"benchmarks": []}},
        {"optim": {"betas": [0.9]}},
    ],
)
def test_schemas_refuse_what_the_reader_refuses(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, write_reference.recipe_schema("image"))
