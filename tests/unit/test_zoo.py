# SPDX-License-Identifier: Apache-2.0
"""The verb `zoo`: what its rows are read from, and that the page of the documents is what it writes."""

import json
import shutil
from pathlib import Path

import pytest
from run_folders import merged_run
from safetensors.torch import load_file

from effsam3.benchmarks.flops import part_gflop
from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.models.chassis.tensors import read_config
from effsam3.zoo import HEADER, zoo

PAGE = Path(__file__).parents[2] / "docs/zoo.md"
RESULTS = {"masks": {"box": {"student": 0.612, "teacher": 0.725}, "images": 32}}


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    return merged_run(tmp_path_factory.mktemp("runs"), "image", "text")


@pytest.fixture
def release(merged, tmp_path) -> Path:
    """A release of two students, measured."""
    folder = Path(shutil.copytree(merged, tmp_path / "mine"))
    weights = json.loads((folder / "merged/effsam3.json").read_text())["weights"]
    made = {"started": "2026-11-29T04:00:00+0000", "weights": weights}
    (folder / "eval").mkdir()
    for name, result in RESULTS.items():
        (folder / f"eval/image_{name}.json").write_text(json.dumps(result | {"provenance": made}))
    return folder


def rows(page: str) -> list[dict[str, str]]:
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], one, strict=True)) for one in cells[1:]]


def test_a_row_is_read_from_the_folder(release):
    (row,) = rows(zoo([str(release)]))
    assert list(row) == HEADER
    assert row["model"] == f"`{release}`" and "tiny_convnext" in row["image"] and "tiny_text_plain" in row["text"]
    assert row["memory"] == "-"
    counted = part_gflop(read_config(release / "merged"))
    image = counted["trunk"] + counted["detector_neck"] + counted["tracker_neck"]
    assert float(row["GFLOP, an image"]) == pytest.approx(image, abs=0.006)
    assert float(row["GFLOP, a point or box"]) == pytest.approx(counted["mask_decoder"], abs=0.006)
    stored = sum(tensor.numel() for tensor in load_file(release / "merged/model.safetensors").values())
    assert float(row["parameters"].removesuffix(" M")) == pytest.approx(stored / 1e6, rel=0.01)  # buffers, too
    assert row["scores"] == "masks: box 61.2 (32 images)"
    assert row["formats"] == "transformers" and "random weights, a trial" in row["licence"]


def test_what_is_added_to_the_folder_is_in_its_row(release):
    (release / "merged/sam3.pt").write_bytes(b"x")
    recipe = (release / "recipe.yaml").read_text()
    assert "repo: null" in recipe
    (release / "recipe.yaml").write_text(recipe.replace("repo: null", "repo: my-team/small"))
    shutil.rmtree(release / "eval")
    (row,) = rows(zoo([str(release)]))
    assert (row["model"], row["scores"]) == ("`my-team/small`", "-")
    assert row["formats"] == "transformers, sam3.pt"


def test_what_is_no_release_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no run folder nothing"):
        zoo(["nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/merged is not there; run `effsam3 merge` first"):
        zoo([str(tmp_path / "empty")])


def test_the_page_of_the_documents_is_of_no_release(tmp_path, capsys):
    assert main(["zoo", "--out", "docs/zoo.md"]) == 0
    assert (
        (tmp_path / "docs/zoo.md").read_text() == PAGE.read_text() == capsys.readouterr().out[:-1]
    )  # print's line end
    assert "Nothing has been released yet" in PAGE.read_text()
