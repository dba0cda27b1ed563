# SPDX-License-Identifier: Apache-2.0
"""A store of another stage's features, or one whose description is damaged, is named before anything is read of it."""

from types import SimpleNamespace

import pytest

from effsam3.data.store.format import Field, StoreError, create_store
from effsam3.data.store.reader import StoreReader
from effsam3.data.store.writer import finish_store
from effsam3.stages.base import open_store
from effsam3.stages.image.training import FACTS

FIELDS = {"image": Field("features", "float16", (4, 2, 2)), "text": Field("features", "float16", (32, 4))}


def store_of(root, kind: str, **facts) -> StoreReader:
    create_store(root, [FIELDS[kind]], {"kind": kind, "channels": 4} | facts)
    finish_store(root, [])
    return StoreReader(root)


def recipe_of(root, stage: str) -> SimpleNamespace:
    teacher = SimpleNamespace(checkpoint="tiny", fingerprint=None)
    data = SimpleNamespace(resize="square")
    return SimpleNamespace(stage=stage, embed=SimpleNamespace(to=str(root)), data=data, sam3=teacher)


@pytest.mark.parametrize(("stage", "kind"), [("image", "text"), ("text", "image")])
def test_features_of_another_stage_are_called_that(tmp_path, stage, kind):
    store_of(tmp_path, kind)
    with pytest.raises(StoreError, match=f"embed.to: .*{tmp_path} holds {kind} features, .* stage is {stage}"):
        open_store(recipe_of(tmp_path, stage), {"channels": int, "nothing that it has": str})


def test_the_image_stage_asks_before_it_reads_the_description(tmp_path):
    """`resize` is in no text store."""
    store_of(tmp_path, "text")
    with pytest.raises(StoreError, match="holds text features"):
        open_store(recipe_of(tmp_path, "image"), FACTS, "resize")


def test_a_damaged_description_is_named_with_its_file(tmp_path):
    store_of(tmp_path, "image")
    with pytest.raises(StoreError, match=f"{tmp_path}/manifest.json is damaged: its description, resize is missing"):
        open_store(recipe_of(tmp_path, "image"), {"resize": str})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"resize": "longest_side"}, "was made with resize=longest_side, .* data.resize=square; change data.resize"),
        (
            {"teacher": {"checkpoint": "other", "fingerprint": "f1"}},
            r"by other \(fingerprint f1\), .*=tiny; change",
        ),
        ({"teacher": {"checkpoint": "tiny", "fingerprint": "f1"}}, None),
        ({}, None),  # upstream's say of nobody that he made them
    ],
)
def test_features_made_otherwise_or_by_another_teacher(tmp_path, facts, message):
    store_of(tmp_path, "image", **{"resize": "square", "teacher": {}} | facts)
    recipe = recipe_of(tmp_path, "image")
    if message is None:
        assert open_store(recipe, {"resize": str}, "resize").manifest.description["resize"] == "square"
    else:
        with pytest.raises(StoreError, match=message):
            open_store(recipe, {"resize": str}, "resize")
