# SPDX-License-Identifier: Apache-2.0
"""The verb `report` on whatever there is of a run; what pictures tell of themselves, which its sliders go by."""

import json
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from run_folders import merged_run

from effsam3.benchmarks.jaccard import ObjectScore
from effsam3.benchmarks.pictures.drawing import Comparison, contact_sheet, read_comparisons, save_png, sheet_boxes
from effsam3.benchmarks.pictures.images import _comparisons
from effsam3.benchmarks.pictures.videos import ContactSheet
from effsam3.benchmarks.tracking import TrackedFrame
from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.report import PICTURES, report
from effsam3.training.progress import Progress
from effsam3.training.report import Report

RECIPES = Path(__file__).parents[2] / "recipes"
BAD = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What is in a page: {tag: its attributes, one after another}, and the texts."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: dict[str, list[dict]] = {}
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.setdefault(tag, []).append(dict(attributes))

    def handle_data(self, data):
        self.text += data

    def addresses(self) -> list[str]:
        found = [one.get(key) for all_of_it in self.tags.values() for one in all_of_it for key in ("src", "srcset")]
        return [address for address in found if address]


def begun(tmp_path: Path, name: str = "r") -> Path:
    """The folder of a run that has not taken a step."""
    recipe = load_recipe(RECIPES / "smoke/image.yaml", [f"name={name}", f"train.runs={tmp_path}"])
    recipe.folder.mkdir()
    (recipe.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return recipe.folder


def page_of(folder: Path, capsys) -> tuple[Page, str]:
    assert main(["report", str(folder)]) == 0
    return Page(folder / "report.html"), capsys.readouterr().out


def test_a_run_without_anything_says_what_is_missing_and_the_command(tmp_path, capsys):
    folder = begun(tmp_path)
    page, printed = page_of(folder, capsys)
    assert page.addresses() == [] and page.tags["h1"] and "tiny_convnext" in page.text
    for command in ("merge", "evaluate", "train"):
        assert f"effsam3 {command} {folder}" in page.text or f"effsam3 launch {folder} {command}" in page.text
    for lacking in ("holds no numbers yet", "nothing has been merged", "none has been drawn", "no provenance.json"):
        assert lacking in page.text and lacking in printed


def test_a_run_that_still_trains_has_curves_for_light_and_dark(tmp_path, capsys):
    folder = begun(tmp_path)
    progress, log = Progress(folder, True, "1 x cpu", 8), Report(folder)
    for step in range(0, 50, 10):
        progress.update("running", step, 200)
        log.metrics({"train/loss": 2.0 - step / 50, "train/lr": 1e-3}, step)
    log.metrics({"val/cosine": 0.75}, 40)
    log.write_json("provenance.json", {"python": "3.10", "versions": {"torch": "2.6"}, "dirty": False})
    page, printed = page_of(folder, capsys)
    assert "still training" in page.text and "40 of 200" in page.text
    curves = [one["alt"] for one in page.tags["img"]]
    assert curves[0] == "train/loss over steps, 1.2 at step 40" and len(curves) == 3
    assert [one["media"] for one in page.tags["source"]] == ["(prefers-color-scheme: dark)"] * 3
    assert len(set(page.addresses())) == 6  # each drawn for both
    assert "versions.torch" in page.text and "no provenance.json" not in page.text + printed


def test_what_comes_from_names_and_recipes_is_text(tmp_path, capsys):
    folder = begun(tmp_path)
    text = (folder / "recipe.yaml").read_text().replace("name: r\n", f"name: '{BAD}'\n")
    (folder / "recipe.yaml").write_text(text)
    (folder / "provenance.json").write_text(json.dumps({"command": BAD, BAD: {"</dl>": None}}))
    save_png(Image.new("RGB", (8, 4)), folder / "unused.png")
    (folder / "pictures/validation").mkdir(parents=True)
    two = {f'" onload="x{BAD}': (0, 0, 4, 4), "b": (4, 0, 8, 4)}
    save_png(Image.new("RGB", (8, 4)), folder / f"pictures/validation/{BAD[1:7]}'.png", [Comparison(BAD, two)])
    page, _ = page_of(folder, capsys)
    assert len(page.tags["script"]) == 1 and page.text.count(BAD) >= 5
    assert {key for one in page.tags["img"] for key in one} == {"src", "alt", "class"}
    assert page.tags["h1"] == [{}] and len(page.tags["dl"]) == 2


def test_a_merged_run_tells_of_its_model_and_asks_for_a_measurement(tmp_path, capsys):
    folder = merged_run(tmp_path, "image")
    page, _ = page_of(folder, capsys)
    assert "replaced by" in page.text and "has not been measured" in page.text and "Licence" not in page.text
    weights = json.loads((folder / "merged/effsam3.json").read_text())["weights"]
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    (folder / "eval").mkdir()
    (folder / "eval/masks.json").write_text(json.dumps({"provenance": {"started": started, "weights": weights}}))
    page, _ = page_of(folder, capsys)
    assert "evaluate has not come to its end, so far it has masks.json" in page.text
    (folder / "eval/summary.md").write_text(
        f"# title\n\n| {BAD} | b |\n|---|--:|\n| x | 1.5 |\n\n![a](http://b.c/d)\n"
    )
    (folder / "pictures").mkdir()
    for number in range(PICTURES + 1):
        save_png(Image.new("RGB", (2000, 30)), folder / f"pictures/{number:02d}.png")
    page, printed = page_of(folder, capsys)
    assert {"table", "th", "td"} <= page.tags.keys() and BAD in page.text and "eval/masks.json" in page.text
    assert len(page.tags["img"]) == PICTURES and "1 more pictures are in" in printed
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses())
    (folder / "eval/masks.json").write_text(json.dumps({"provenance": {"started": started, "weights": "other"}}))
    page, _ = page_of(folder, capsys)
    assert "what is in eval is of another merged model" in page.text and "img" not in page.tags


@pytest.mark.parametrize(
    ("out", "message"),
    [("page.txt", r"--out page.txt: .* ends in .html"), ("recipe.yaml/x.html", "cannot be written")],
)
def test_a_place_that_cannot_be_is_named(tmp_path, monkeypatch, out, message):
    folder = begun(tmp_path)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        report(str(folder), out)


def test_what_is_no_run_and_what_is_damaged_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no run: it has no recipe.yaml"):
        report(str(tmp_path / "empty"))
    folder = begun(tmp_path)
    (folder / "pictures/validation").mkdir(parents=True)
    path = folder / "pictures/validation/step-000010.png"
    save_png(Image.new("RGB", (90, 90)), path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"step-000010.png cannot be read .*draw it again, or delete it"):
        report(str(folder))


# ---- what pictures compare


def cut(path: Path) -> tuple[list[Comparison], dict[str, np.ndarray]]:
    with Image.open(path) as picture:
        found = read_comparisons(picture, path)
        sides = {title: box for one in found for title, box in one.sides.items()}
        return found, {title: np.asarray(picture.convert("RGB").crop(box)) for title, box in sides.items()}


def test_a_sheet_tells_where_its_pictures_are(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [(str(number), Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))) for number in range(6)]
    boxes = sheet_boxes(pictures)
    sides = {title: box for (title, _), box in zip(pictures, boxes, strict=True)}
    save_png(contact_sheet(pictures), tmp_path / "a.png", [Comparison("all", sides)])
    _, cuts = cut(tmp_path / "a.png")
    for title, picture in pictures:
        np.testing.assert_array_equal(cuts[title], np.asarray(picture))


def test_the_panels_of_a_figure_are_found(tmp_path):
    figure = Figure(figsize=(9, 3), layout="constrained", dpi=100)
    colours = {"image": 0.2, "teacher features": 0.4, "student features": 0.6, "agreement": 0.8}
    for axis, (title, grey) in zip(figure.subplots(1, 4).flat, colours.items(), strict=True):
        axis.imshow(np.full((16, 16, 3), grey))
        axis.set_title(title)
        axis.set_axis_off()
    found = _comparisons(figure, list(colours))
    assert [(one.title, list(one.sides)) for one in found] == [("features", ["teacher features", "student features"])]
    figure.savefig(tmp_path / "a.png", metadata={"comparisons": json.dumps([vars(found[0])])})
    read, cuts = cut(tmp_path / "a.png")
    assert read == found
    for title, pixels in cuts.items():
        assert min(pixels.shape[:2]) > 150
        assert np.abs(pixels[2:-2, 2:-2] / 255 - colours[title]).max() < 0.01


def test_a_videos_sheet_holds_each_tracker_against_the_first(tmp_path):
    sheet = ContactSheet(tmp_path / "a.png", "clip", [0, 4])
    names = ("teacher", "student")
    for index in (0, 4):
        image = np.full((40, 60, 3), 100 + index, np.uint8)
        masks = {name: {1: np.zeros((40, 60), bool)} for name in names}
        masks["student"][1][:, :30] = True
        sheet.add(TrackedFrame(index, image, {1: np.zeros((40, 60), bool)}, masks, frozenset()))
    score = ObjectScore(**dict.fromkeys(("J", "F", "J_recall", "F_recall", "J_decay", "F_decay"), 0.5), frames=2)
    sheet.finish({name: {1: score} for name in names})
    found, cuts = cut(tmp_path / "a.png")
    assert [one.title for one in found] == ["frame 0", "frame 4"]
    assert all(list(one.sides) == list(names) for one in found)
    assert len(np.unique(cuts["teacher"])) == 1  # only the image
    assert (cuts["student"][:, :30] != cuts["teacher"][:, :30]).any(-1).all()


def test_a_note_that_somebody_else_has_written_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.png, comparisons is damaged: .*draw it again"):
        picture = Image.new("RGB", (2, 2))
        picture.info["comparisons"] = '[{"title": 1}]'
        read_comparisons(picture, Path("a.png"))
