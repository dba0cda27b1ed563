# SPDX-License-Identifier: Apache-2.0
"""Photographs of one's own: any folder, named by paths, divided by content, nothing replaced or left out unsaid."""

import json
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from effsam3.data.images.photographs import ready_photographs
from effsam3.data.images.sa1b import digest_of, load_index, read_image
from effsam3.data.splits import split_of
from effsam3.errors import UserError
from effsam3.recipe.reader import RecipeError, load_recipe
from effsam3.stages.image.facts import SOURCES, ImageData

SMOKE = Path(__file__).parents[2] / "recipes/smoke/image.yaml"


def photograph(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.fixture
def photos(tmp_path):
    """Twelve photographs in three folders under two names, a copy, and what is no photograph."""
    folder = tmp_path / "photos"
    for seed in range(12):
        photograph(
            folder / ("2023", "2024", "")[seed % 3] / f"img_{seed // 3}{('.jpg', '.png', '.webp')[seed % 3]}", seed
        )
    photograph(folder / "2025" / "img_0.jpg", 99)
    shutil.copy(folder / "2023/img_0.jpg", folder / "backup.jpg")
    photograph(folder / "Screenshot at 10.00\u202fAM.png", 100)  # as macOS calls them
    photograph(folder / "two\nlines.png", 101)
    (folder / "IMG_7.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "cut.jpg").write_bytes((folder / "2023/img_1.jpg").read_bytes()[:-300])
    (folder / "img_0.json").write_text("{}")  # of another program
    return folder


def test_any_folder_becomes_an_index(photos, tmp_path):
    index = tmp_path / "data/photos.parquet"
    said = ready_photographs(str(photos), index, 0.3, workers=1)
    rows = load_index(index)
    keys = rows["key"]
    assert len(keys) == 14 and {"2023/img_0.jpg", "2025/img_0.jpg", "2024/img_0.png", "img_0.webp"} <= set(keys)
    for row in rows:
        path = photos / row["key"]
        assert row["image_digest"] == digest_of(path.read_bytes()) and row["num_masks"] == 0
        assert row["split"] == split_of(row["image_digest"], 0.3)
        np.testing.assert_array_equal(read_image(row, index.parent), np.array(Image.open(path)))
    report = json.loads((tmp_path / "data/photos.report.json").read_text())
    assert {reason: found["count"] for reason, found in report["excluded"].items()} == {
        "copy": 1, "other_file": 1, "truncated": 1, "undecodable_name": 1,
    }  # fmt: skip
    assert "IMG_7.HEIC" in said and "backup.jpg" in said and "4 files left out, each with its reason in" in said
    assert ready_photographs(str(photos), index, 0.3) == ""


def test_the_split_follows_the_content(photos, tmp_path):
    ready_photographs(str(photos), tmp_path / "before.parquet", 0.3, workers=1)
    before = {row["image_digest"]: row["split"] for row in load_index(tmp_path / "before.parquet")}
    for number, path in enumerate(sorted(photos.rglob("*.webp"))):
        path.rename(photos / "2024" / f"renamed_{number}.webp")
    ready_photographs(str(photos), tmp_path / "after.parquet", 0.3, workers=1)
    after = {row["image_digest"]: row["split"] for row in load_index(tmp_path / "after.parquet")}
    assert after == before and set(after.values()) == {"train", "val"}


def test_one_is_held_out_of_however_few(tmp_path):
    for seed in range(2):
        photograph(tmp_path / "photos" / f"{seed}.png", seed)
    ready_photographs(str(tmp_path / "photos"), tmp_path / "index.parquet", 1e-9, workers=1)
    assert sorted(load_index(tmp_path / "index.parquet")["split"]) == ["train", "val"]


def test_a_single_one_is_refused_with_the_keys_of_the_recipe(tmp_path):
    """A copy of it is not a second one; asked again, the index that was made says the same."""
    photograph(tmp_path / "photos/a.png", 1)
    shutil.copy(tmp_path / "photos/a.png", tmp_path / "photos/b.png")
    index = tmp_path / "photos.parquet"
    for _ in range(2):
        with pytest.raises(UserError, match="data.folder: .* 1 are to learn from and 0 are held out; .* data"):
            ready_photographs(str(tmp_path / "photos"), index, 0.1, workers=1)
    photograph(tmp_path / "photos/c.png", 2)
    index.unlink()
    ready_photographs(str(tmp_path / "photos"), index, 0.1, workers=1)
    assert sorted(load_index(index)["split"]) == ["train", "val"]


def test_what_has_changed_since_is_said(photos, tmp_path):
    index = tmp_path / "photos.parquet"
    ready_photographs(str(photos), index, 0.3, workers=1)
    photograph(photos / "new.png", 7)
    (photos / "img_0.webp").unlink()
    with open(photos / "2025/img_0.jpg", "ab") as file:
        file.write(b"\0")
    said = ready_photographs(str(photos), index, 0.3)
    assert "1 new (new.png); 1 gone (img_0.webp); 1 of another size (2025/img_0.jpg); delete" in said
    assert len(load_index(index)) == 14  # the index itself stays


@pytest.mark.parametrize("damage", ["{", "[]", '{"sources": "photos", "val_fraction": 0.3, "excluded": {}}', "\0"])
def test_a_damaged_report_is_named(photos, tmp_path, damage):
    index = tmp_path / "photos.parquet"
    ready_photographs(str(photos), index, 0.3, workers=1)
    (tmp_path / "photos.report.json").write_text(damage)
    with pytest.raises(UserError, match="photos.report.json is damaged.*delete .*photos.parquet to index"):
        ready_photographs(str(photos), index, 0.3, workers=1)


def test_an_index_of_something_else_is_refused(photos, tmp_path):
    index = tmp_path / "photos.parquet"
    ready_photographs(str(photos), index, 0.3, workers=1)
    (tmp_path / "others").mkdir()
    with pytest.raises(UserError, match=r"data.index: .* is an index of .*photos, data.folder is .*others"):
        ready_photographs(str(tmp_path / "others"), index, 0.3)
    with pytest.raises(UserError, match=r"data.held_out: .* was made with 0.3, the recipe has 0.2"):
        ready_photographs(str(photos), index, 0.2)
    with pytest.raises(UserError, match="no folder .*nowhere"):
        ready_photographs(str(tmp_path / "nowhere"), tmp_path / "new.parquet", 0.3)
    with pytest.raises(UserError, match="no usable image"):
        ready_photographs(str(tmp_path / "others"), tmp_path / "new.parquet", 0.3, workers=1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.source=folder", "data.synthetic_images=0"], "data.folder: source folder needs to know where"),
        (["data.folder=/photos"], "data.folder: /photos is given, but source is synthetic"),
        (["data.source=folder", "data.synthetic_images=0", "data.folder=/p", "data.held_out=0"], "data.held_out: 0"),
    ],
)
def test_contradictions_are_recipe_errors(overrides, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(SMOKE, overrides)


def test_every_source_has_its_row():
    assert set(get_args(get_type_hints(ImageData)["source"])) == set(SOURCES)
    for row in SOURCES.values():
        assert "{" not in row.made_by.format(index="i", folder="f", synthetic_images=3)
