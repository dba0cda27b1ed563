# SPDX-License-Identifier: Apache-2.0
"""The verb `leaderboard`: whose numbers it joins, which rows can be compared, what it leaves out."""

import json
import shutil

import pytest
from PIL import Image
from run_folders import merged_run

from effsam3.benchmarks.boards import BOARDS, read_rows
from effsam3.benchmarks.published import PUBLISHED
from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.leaderboard import draw, leaderboard

MASKS = {"box": {"student": 0.61, "teacher": 0.725}, "point": {"student": 0.5, "teacher": 0.625}, "images": 32}
SPEED = {
    "teacher": {"model_ms": 900.0, "model_parameters": 840_000_000},
    "student": {"model_ms": 150.0, "model_parameters": 400_000_000},
}
CONCEPTS = {
    "subsets": {
        "drawn": {
            "pairs": 240,
            "models": {
                "teacher": {"cgF1": 0.341, "IL_MCC": 0.722, "pmF1": 0.473},
                "student": {"cgF1": 0.275, "IL_MCC": 0.689, "pmF1": 0.399},
            },
        }
    }
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return merged_run(tmp_path_factory.mktemp("runs"), "image")


@pytest.fixture
def runs(merged, tmp_path):
    """Two measured runs with the same teacher, on the same images; the second one also on phrases."""
    weights = json.loads((merged / "merged" / "effsam3.json").read_text())["weights"]

    def measured(name: str, **results: dict) -> str:
        folder = shutil.copytree(merged, tmp_path / name)
        (folder / "eval").mkdir()
        for stem, result in results.items():
            made = {"started": "2026-11-29T04:00:00+0000", "weights": weights}
            (folder / "eval" / f"{stem}.json").write_text(json.dumps(result | {"provenance": made}))
        return str(folder)

    better = MASKS | {"box": {"student": 0.7, "teacher": 0.725}}
    return measured("a", masks=MASKS, speed=SPEED), measured("b", masks=better, concepts=CONCEPTS)


def cells(text: str, title: str) -> list[list[str]]:
    """Return the rows of a board's table."""
    lines = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_runs_are_ranked_next_to_their_one_teacher_and_published_numbers(runs):
    rows = cells(leaderboard(runs), BOARDS["masks"].title)
    own = [row for row in rows if row[1] != "published"]
    assert [row[:7] for row in own] == [
        ["tiny", "teacher", "32 images", "72.5", "62.5", "840.00", "900.0"],
        ["b", "student", "32 images", "70.0", "50.0", "-", "-"],
        ["a", "student", "32 images", "61.0", "50.0", "400.00", "150.0"],
    ]
    published = rows[len(own) :]
    assert ["EfficientSAM3 ES-RV-M", "published", "COCO val2017, box of each object", "66.4"] in [
        row[:4] for row in published
    ]
    assert all(row[1] == "published" and "github.com/" in row[-1] for row in published) and len(published) == 9
    concepts = cells(leaderboard(runs), BOARDS["concepts"].title)
    assert concepts[1][:6] == ["b", "student", "drawn, 240 pairs", "27.5", "0.69", "39.9"]


def test_a_run_that_began_with_a_student_shows_both(runs, tmp_path):
    file = tmp_path / "a" / "eval" / "masks.json"
    made = json.loads(file.read_text())["provenance"]
    better = MASKS | {"box": {"student": 0.7, "teacher": 0.725}}
    file.write_text(json.dumps({"start": MASKS, "prompted": better, "provenance": made}))
    rows = cells(leaderboard(runs[:1]), BOARDS["masks"].title)
    assert [row[:4] for row in rows if row[1] != "published"] == [
        ["tiny", "teacher", "32 images", "72.5"],
        ["a", "student", "32 images", "70.0"],
        ["a: start", "student", "32 images", "61.0"],
    ]


def test_every_published_number_is_on_a_board_and_has_a_source():
    for one in PUBLISHED:
        assert one.scores.keys() <= BOARDS[one.board].columns.keys() and one.source.startswith("github.com/")
        assert all(-1 <= score <= 1 for score in one.scores.values())


def test_the_folder_has_tables_numbers_and_a_picture_of_what_was_timed(runs, tmp_path, capsys):
    out = tmp_path / "docs"
    assert main(["leaderboard", *runs, str(tmp_path / "nothing"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "left out:" in printed and "nothing" in printed.split("left out:")[1]
    page = (out / "leaderboard.md").read_text()
    assert page.startswith("# Leaderboard\n") and "(leaderboard.png)" in page and "left out" not in page
    assert {row["model"] for row in json.loads((out / "leaderboard.json").read_text())} >= {
        "a",
        "b",
        "tiny",
        "EdgeTAM",
    }
    assert Image.open(out / "leaderboard.png").width > 300
    (panel,) = draw([row for row in read_rows(tmp_path / "a") if row.image_ms]).axes
    points = {line.get_label(): line.get_xydata()[0].tolist() for line in panel.lines}
    assert points == {"tiny": [900.0, 0.725], "a": [150.0, 0.61]}


def test_a_stale_or_damaged_result_is_no_row(runs, tmp_path):
    file = tmp_path / "a" / "eval" / "masks.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"provenance": result["provenance"] | {"weights": "of another model"}}))
    with pytest.raises(UserError, match="no results of the merged model"):
        leaderboard(runs[:1])
    file.write_text(json.dumps({"box": {}, "images": 3, "provenance": result["provenance"]}))
    with pytest.raises(UserError, match="masks.json is not a result of masks .*evaluate"):
        leaderboard(runs[:1])
