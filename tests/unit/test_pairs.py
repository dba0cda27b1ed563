"""Images with masks of one's own: each layout read right, each fault named by its file."""

import json
from dataclasses import replace

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from pycocotools import mask as coco_mask
from run_folders import RECIPES

from effsam3.data.images.pair_batches import PairBatches, divide, resize_mask
from effsam3.data.images.pairs import open_pairs, recognise
from effsam3.data.unreadable import UnreadableAnnotations
from effsam3.errors import UserError
from effsam3.recipe.reader import load_recipe
from effsam3.stages.adapt.images import images_that_can_be_read, own_images, readable, ready_images
from effsam3.stages.adapt.training import AdaptStage

H, W = 20, 30
DISC = np.zeros((H, W), bool)
DISC[5:12, 4:14] = True
OTHER = np.zeros((H, W), bool)
OTHER[14:18, 20:28] = True


def save(array, path, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette([0, 0, 0, 200, 30, 30, 30, 200, 30])
    image.save(path)


def photograph(path, size=(H, W)):
    save(np.full((*size, 3), 90, np.uint8), path)


def rle(mask, compressed=True):
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if compressed:
        return {"size": [H, W], "counts": found["counts"].decode()}
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0, append=2)), prepend=0)
    return {"size": [H, W], "counts": [int(run) for run in runs]}


def write_coco(folder, images, annotations, categories=((7, "cell"), (9, "vessel"))):
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories],
    }
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def row(number, **more):
    return {"id": number, "file_name": f"{number}.png", "height": H, "width": W, **more}


def test_coco_reads_polygons_and_both_kinds_of_rle_crowds_too(tmp_path):
    for number in (0, 1):
        photograph(tmp_path / f"images/{number}.png")
    polygon = [[4, 5, 14, 5, 14, 12, 4, 12], [20, 14, 28, 14, 28, 18, 20, 18]]
    annotations = [
        {"id": 0, "image_id": 0, "category_id": 7, "segmentation": polygon, "iscrowd": 0},
        {"id": 1, "image_id": 0, "category_id": 9, "segmentation": rle(OTHER), "iscrowd": 1},
        {"id": 2, "image_id": 1, "category_id": 9, "segmentation": rle(DISC, compressed=False), "iscrowd": 1},
    ]
    file = write_coco(tmp_path, [row(1), row(0)], annotations)
    assert recognise(file) == recognise(tmp_path) == "COCO JSON of images"
    pairs, notes = open_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["0.png", "1.png"] and notes == []
    first, second = (pair.masks(H, W) for pair in pairs)
    assert [category for category, _ in first] == ["cell", "vessel"]
    assert (first[0][1] == (DISC | OTHER)).all() and (first[1][1] == OTHER).all()
    assert (second[0][1] == DISC).all()


def test_coco_names_what_it_leaves_out(tmp_path):
    photograph(tmp_path / "0.png")
    bad = [
        {"id": 4, "image_id": 0, "category_id": 7, "segmentation": []},
        {"id": 5, "image_id": 0, "category_id": 7, "segmentation": [[1, 1, 2, 2]]},
        {"id": 6, "image_id": 0, "category_id": 7, "segmentation": rle(np.zeros((H, W), bool))},
        {"id": 7, "image_id": 0, "category_id": 7, "segmentation": {"size": [W, H], "counts": [W * H]}},
        {"id": 8, "image_id": 99, "category_id": 7, "segmentation": rle(DISC)},
        {"id": 9, "image_id": 0, "category_id": 7, "segmentation": {"size": [H, W], "counts": [5]}},
        {"id": [1], "image_id": [3], "segmentation": rle(DISC)},
    ]
    pairs, notes = open_pairs(write_coco(tmp_path, [row(0), row(1)], bad))
    assert [pair.name for pair in pairs] == ["0.png"] and not pairs[0].sources
    told = {(note.reason, note.where.rpartition(" ")[2]) for note in notes}
    assert told == {
        ("no_mask", "4"), ("bad_mask", "5"), ("empty_mask", "6"), ("size_mismatch", "7"), ("no_image", "8"),
        ("bad_mask", "9"), ("no_image", "[1]"), ("missing_image", "1.png"), ("no_objects", "0.png"),
    }  # fmt: skip


def test_an_image_of_another_size_than_its_masks_is_named(tmp_path):
    photograph(tmp_path / "0.png", (W, H))
    segmentation = [{"id": 1, "image_id": 0, "category_id": 7, "segmentation": rle(DISC)}]
    (pair,), _ = open_pairs(write_coco(tmp_path, [row(0)], segmentation))
    with pytest.raises(UnreadableAnnotations, match="size_mismatch.*0.png"):
        pair.masks(*pair.image().shape[:2])


def test_sizes_that_a_tool_does_not_know_are_those_of_the_masks(tmp_path):
    photograph(tmp_path / "0.png")
    annotations = [
        {"id": 1, "image_id": 0, "category_id": 7, "segmentation": rle(DISC)},
        {"id": 2, "image_id": 0, "category_id": 7, "segmentation": [[1, 1, 5, 1, 5, 5]]},
    ]
    (pair,), (note,) = open_pairs(write_coco(tmp_path, [row(0, height=0, width=None)], annotations))
    assert (pair.masks(H, W)[0][1] == DISC).all() and note.where.endswith("annotation 2")


def test_folders_of_binary_palette_and_category_masks(tmp_path):
    for name in ("a", "sub/b", "c"):
        photograph(tmp_path / f"images/{name}.jpg")
    save(DISC.astype(np.uint8) * 255, tmp_path / "masks/a.png")
    save((DISC + 2 * OTHER).astype(np.uint8), tmp_path / "masks/sub/b.png", palette=True)
    save(DISC, tmp_path / "masks/cell/c.png")
    save(OTHER, tmp_path / "masks/vessel/c.png")
    assert recognise(tmp_path) == "images and masks in folders"
    pairs, notes = open_pairs(tmp_path)
    found = {pair.name: [(name, mask.tolist()) for name, mask in pair.masks(H, W)] for pair in pairs}
    assert notes == [] and found == {
        "a": [("", DISC.tolist())],
        "c": [("cell", DISC.tolist()), ("vessel", OTHER.tolist())],
        "sub/b": [("", DISC.tolist()), ("", OTHER.tolist())],
    }


def test_folders_name_missing_empty_grey_and_misfitting_masks(tmp_path):
    for name in ("alone", "empty", "grey", "small", "colour"):
        photograph(tmp_path / f"images/{name}.png")
    save(np.zeros((H, W), np.uint8), tmp_path / "masks/empty.png")
    save(np.arange(H * W, dtype=np.uint8).reshape(H, W), tmp_path / "masks/grey.png")
    save(DISC[:9].astype(np.uint8), tmp_path / "masks/small.png")
    photograph(tmp_path / "masks/colour.png")
    save(DISC, tmp_path / "masks/orphan.png")
    pairs, notes = open_pairs(tmp_path)
    assert {(note.reason, note.where.rpartition("/")[2]) for note in notes} == {
        ("no_objects", "alone.png"), ("no_image", "orphan.png"),
    }  # fmt: skip
    by_name = {pair.name: pair for pair in pairs}
    assert by_name["empty"].masks(H, W) == []
    for name, reason in (("grey", "grey_mask"), ("small", "size_mismatch"), ("colour", "colour_mask")):
        with pytest.raises(UnreadableAnnotations, match=f"{reason}.*{name}.png"):
            by_name[name].masks(H, W)


def test_views_are_a_column(tmp_path):
    for name in ("a", "b"):
        photograph(tmp_path / f"images/{name}.png")
        save(DISC, tmp_path / f"masks/{name}.png")
    (tmp_path / "images.csv").write_text("name,angle\na.png,left\nb,right\n")
    pairs, _ = open_pairs(tmp_path, view="angle")
    assert [pair.view for pair in pairs] == ["left", "right"]
    with pytest.raises(UserError, match="no column 'angel'; did you mean angle"):
        open_pairs(tmp_path, view="angel")
    (tmp_path / "images.csv").write_text("name,angle\na.png,left\n")
    with pytest.raises(UserError, match="b has no 'angle'"):
        open_pairs(tmp_path, view="angle")
    file = write_coco(tmp_path, [row("a", file_name="a.png", side=3)], [])
    assert open_pairs(file, view="side")[0][0].view == "3"
    with pytest.raises(UserError, match="has 'sid'; did you mean side"):
        open_pairs(file, view="sid")


def test_what_is_no_data_set_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no .*nowhere"):
        open_pairs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither layout.*COCO JSON.*images/NAME"):
        open_pairs(tmp_path)
    (tmp_path / "x.json").write_text("{")
    assert recognise(tmp_path) is None


# ---- to learn from


def test_images_none_of_which_can_be_used_are_told_of_before_training(tmp_path):
    for name in "abcd":
        photograph(tmp_path / f"images/{name}.png")
        save(DISC[:9].astype(np.uint8), tmp_path / f"masks/{name}.png")
    recipe = load_recipe(
        RECIPES / "smoke/lora.yaml", ["data.source=own", "data.synthetic_images=0", f"data.path={tmp_path}"]
    )
    told = (
        r"none of the 3 images to learn from can be used \(first: \w.png: size_mismatch: .*data check .* --as images"
    )
    for use in (images_that_can_be_read, lambda recipe: ready_images(recipe, Accelerator(cpu=True))):
        with pytest.raises(UserError, match=told):
            use(recipe)
    learnt = own_images(recipe).train
    save(DISC.astype(np.uint8), tmp_path / f"masks/{learnt[1].name}.png")
    images_that_can_be_read(recipe)
    # The guard of the teacher looks at images that can be read: blank ones would have the same features.
    assert readable(learnt, 2, str(tmp_path)) == [1]


def test_swapped_folders_are_told_of_by_the_stage(tmp_path):
    photograph(tmp_path / "masks/a.jpg")
    photograph(tmp_path / "masks/b.jpg")
    for name in "ab":
        save(DISC.astype(np.uint8), tmp_path / f"images/{name}.png")
    recipe = load_recipe(
        RECIPES / "smoke/lora.yaml",
        [
            "data.source=own",
            "data.synthetic_images=0",
            "data.phrase=x",
            f"data.path={tmp_path}",
            "prompts={box: 1, point: 0, text: 0, exemplar: 0, absent: 0}",
        ],
    )
    with pytest.raises(UserError, match="are the two swapped"):
        own_images(recipe)
    for name in "ab":
        save(DISC.astype(np.uint8), tmp_path / f"masks/{name}.png")  # pictures of masks may lie next to them
    assert open_pairs(tmp_path)[1] == []


# ---- batches


@pytest.fixture
def pairs(tmp_path):
    for number in range(6):
        photograph(tmp_path / f"images/{number}.png")
    annotations = [
        {"id": 2 * image + place, "image_id": image, "category_id": category, "segmentation": rle(mask)}
        for image in range(6)
        for place, (category, mask) in enumerate(((7, DISC), (9 if image else 7, OTHER)))
    ]
    return open_pairs(write_coco(tmp_path, [row(number) for number in range(6)], annotations))[0]


def test_shares_are_exact_and_go_by_name(pairs):
    parts = divide(pairs, 0.3)
    assert len(parts["val"]) == 2 and len(parts["train"]) == 4
    assert {pair.name for part in parts.values() for pair in part} == {pair.name for pair in pairs}
    assert divide(pairs[::-1], 0.3) == parts


def test_objects_are_shown_and_phrases_asked_for_by_number(pairs):
    shown = PairBatches(pairs, 40, objects=1, seed=3)
    batch = shown.__getitems__([(0, 11), (1, 12), -1])
    assert batch["texts"] == [None] * 3 and batch["valid"].tolist() == [[True], [True], [False]]
    assert batch["keys"] == ["0.png", "1.png", ""] and batch["unreadable"] == []
    again = shown.__getitems__([(1, 12), (0, 11)])
    assert (again["masks"] == batch["masks"][[1, 0]]).all()
    asked = PairBatches(pairs, 40, objects=1, text=1.0, categories=["cell", "vessel"])
    batch = asked.__getitems__([(0, number) for number in range(20)] + [(1, number) for number in range(20)])
    # On the first image both objects are cells: a phrase means all of its instances, however few are shown.
    assert set(batch["texts"][:20]) == {"cell"} and batch["valid"][:20].all()
    assert set(batch["texts"][20:]) == {"cell", "vessel"} and (batch["valid"][20:].sum(1) == 1).all()
    absent = PairBatches(pairs, 40, objects=1, text=1.0, absent=1.0, categories=["cell", "vessel"])
    batch = absent.__getitems__([(0, 1), (1, 1)])
    assert batch["texts"][0] == "vessel" and not batch["valid"][0].any()  # an image that has both lacks neither
    assert batch["texts"][1] in ("cell", "vessel") and batch["valid"][1].any()
    phrase = PairBatches(pairs, 40, objects=1, text=1.0, phrase="thing")
    batch = phrase.__getitems__([(1, 1)])
    assert batch["texts"] == ["thing"] and batch["valid"].sum() == 2


def test_objects_without_a_name_are_shown_or_left_out(pairs):
    nameless = [replace(pair, sources=tuple(replace(one, category="") for one in pair.sources)) for pair in pairs]
    for text, shown in ((0.999, 2), (1.0, 0)):
        batch = PairBatches(nameless, 40, objects=2, text=text, categories=["cell"]).__getitems__([(0, 1), (1, 2)])
        assert batch["texts"] == [None, None] and batch["valid"].sum(1).tolist() == [shown, shown]


def test_what_is_drawn_by_a_number_is_drawn_once(pairs):
    """Whether an image is asked for a phrase decides neither the kind of other prompts nor the example boxes."""
    wanted = "prompts={box: 0.25, point: 0.25, text: 0.5, exemplar: 0.5, absent: 0}"
    recipe = load_recipe(RECIPES / "smoke/lora.yaml", [wanted, "data.phrase=thing"])
    stage = AdaptStage.from_shapes(recipe, Accelerator(cpu=True))
    data = PairBatches(pairs[:1], 16, objects=1, text=0.5, phrase="thing", seed=recipe.train.seed)
    found = stage.inputs(data.__getitems__([(0, number) for number in range(300)]))
    assert 50 < found.kinds_O.count("box") < 100 and 50 < found.kinds_O.count("point") < 100
    assert 0.35 < (found.asked.box_labels_RN == 1).float().mean() < 0.65


def test_an_image_that_cannot_be_read_is_named_and_counts_nothing(pairs):
    pairs[0].file.write_bytes(b"")
    batch = PairBatches(pairs, 40, objects=2).__getitems__([0, 1])
    assert batch["unreadable"][0][0] == "0.png" and batch["valid"].any(1).tolist() == [False, True]


def test_thin_objects_fade_instead_of_vanishing():
    thin = np.zeros((400, 400), bool)
    thin[200] = True
    small = resize_mask(thin, (100, 100))
    assert small.any() and small.max() < 128 and abs(float(small.sum()) / 255 - 100 * 0.25) < 3
