# SPDX-License-Identifier: Apache-2.0
"""Annotated concepts: SA-Co's and COCO's JSON as pairs of an image and a phrase, and every fault that files have."""

import copy
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from effsam3.data.concepts.files import open_concepts
from effsam3.data.concepts.pairs import Limits
from effsam3.data.unreadable import UnreadableImage
from effsam3.errors import UserError
from effsam3.models.text.tokens import Tokenizer

SIZE = (20, 30)


def rle(rows: slice, columns: slice, size=SIZE) -> dict:
    mask = np.zeros(size, np.uint8, order="F")
    mask[rows, columns] = 1
    encoded = coco_mask.encode(mask)
    return {"size": list(size), "counts": encoded["counts"].decode()}


A, B = rle(slice(2, 8), slice(3, 9)), rle(slice(10, 18), slice(15, 25))
BOX_A = [3 / 30, 2 / 20, 6 / 30, 6 / 20]


def entry(number: int, phrase="a cat", **changes) -> dict:
    exhaustive = {"is_instance_exhaustive": 1, "is_pixel_exhaustive": 1}
    return (
        {"id": number, "file_name": "one.jpg", "text_input": phrase, "width": 30, "height": 20} | exhaustive | changes
    )


def annotation(number: int, pair: int, **changes) -> dict:
    own = {"id": number, "image_id": pair, "bbox": BOX_A, "area": 0.06, "segmentation": A, "category_id": 1}
    return own | {"iscrowd": 0, "source": "manual"} | changes


def saco(images: list, annotations: list) -> dict:
    return {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}


def write(folder, name: str, content) -> None:
    (folder / name).write_text(json.dumps(content))


def read(folder, name="silver.json", **limits):
    (subset,) = open_concepts(folder / name, [], Limits(**limits), "evaluate.concepts")
    return subset


refuse = Tokenizer().why_not


def test_saco_pairs(tmp_path):
    images = [entry(5), entry(6, "a dog"), entry(9, "a bird", is_instance_exhaustive=0)]
    write(tmp_path, "silver.json", saco(images, [annotation(1, 5), annotation(2, 5, segmentation=B, bbox=None)]))
    subset = read(tmp_path)
    cat, dog, bird = subset.pairs
    assert (cat.key, cat.image, cat.size, cat.phrase) == ("5", "one.jpg", SIZE, "a cat")
    assert [len(one) for one in cat.objects] == [2] and cat.there and cat.exhaustive
    assert cat.objects[0][0].box == pytest.approx([3, 2, 6, 6]) and cat.objects[0][0].rle == A
    assert cat.objects[0][1].box == [15, 10, 10, 8], "made from the mask"
    assert not dog.there and dog.annotators == ((),) and not bird.exhaustive
    assert subset.reasons() == {"no_box": 1} and "pair 5, annotation 2" in subset.notes[0].where
    assert subset.images() == {"one.jpg": [cat, dog, bird]}


def test_gold_has_three_annotators_and_says_who_is_missing(tmp_path):
    name = "gold_food_merged_{}_release_test.json"
    shown = {"a": [annotation(1, 5)], "b": [], "c": [annotation(1, 5), annotation(2, 5, segmentation=B, bbox=None)]}
    for who, annotations in shown.items():
        write(tmp_path, name.format(who), saco([entry(5, is_instance_exhaustive=int(who != "b"))], annotations))
    (subset,) = open_concepts(tmp_path, [], Limits(), "evaluate.concepts")
    (pair,) = subset.pairs
    assert subset.name == "gold_food" and [len(one) for one in pair.annotators] == [1, 0, 2]
    assert pair.there and not pair.exhaustive, "it must be exhaustive in every file"
    for who in "bc":
        (tmp_path / name.format(who)).unlink()
    subset = read(tmp_path, name.format("a"))
    assert len(subset.pairs[0].annotators) == 1 and subset.reasons() == {"annotator_missing": 2}
    assert {note.where for note in subset.notes} == {name.format("b"), name.format("c")}


def test_two_annotators_lack_a_pair_or_have_another_phrase(tmp_path):
    name = "gold_food_merged_{}_release_test.json"
    write(tmp_path, name.format("a"), saco([entry(5), entry(6)], []))
    write(tmp_path, name.format("b"), saco([entry(6, "a fox")], []))
    write(tmp_path, name.format("c"), saco([entry(6)], []))
    subset = read(tmp_path, name.format("a"))
    assert [pair.key for pair in subset.pairs] == ["5"] and len(subset.pairs[0].annotators) == 1
    assert subset.reasons() == {"annotator_missing": 2, "other_phrase": 1}


FAULTS = [  # what is wrong, with pair 5 or its annotation; the reason it is counted by; whether the pair is left
    ({"text_input": "  "}, {}, "no_phrase", False),
    ({"text_input": None}, {}, "no_phrase", False),
    ({"text_input": "dog " * 40}, {}, "bad_phrase", False),
    ({"file_name": "../secret.jpg"}, {}, "bad_name", False),
    ({"width": 0}, {}, "bad_entry", False),
    ({}, {"bbox": None}, "no_box", True),
    ({}, {"bbox": [0.5, 0.5, 0.9, 0.2]}, "bad_box", True),
    ({}, {"bbox": [3, 2, 6, 6]}, "bad_box", True),
    ({}, {"bbox": "x"}, "bad_box", True),
    ({}, {"segmentation": rle(slice(0, 3), slice(0, 3), (30, 20))}, "size_mismatch", False),
    ({}, {"segmentation": {"size": [20, 30], "counts": "nonsense!"}}, "bad_mask", False),
    ({}, {"segmentation": rle(slice(0, 0), slice(0, 0))}, "bad_mask", False),
    ({}, {"segmentation": None}, "no_mask", False),
    ({}, {"segmentation": 7}, "bad_mask", False),
    ({}, {"image_id": 77}, "no_such_pair", True),
    ({}, {"image_id": [5]}, "no_such_pair", True),
    ({"id": 4}, {"image_id": 4}, "id_twice", True),
    ({"id": "5"}, {"image_id": 4}, "bad_entry", False),
]  # fmt: skip


@pytest.mark.parametrize(("pair", "instance", "reason", "kept"), FAULTS)
def test_a_fault_is_named_and_counted_and_ends_nothing(tmp_path, pair, instance, reason, kept):
    """Pair 4 is sound and stays, whatever its neighbour is."""
    images = [entry(4, "a dog"), entry(5) | pair]
    write(tmp_path, "silver.json", saco(images, [annotation(1, 5) | instance, annotation(2, 4)]))
    subset = read(tmp_path, refuse=refuse)
    assert subset.reasons() == {reason: 1}
    assert subset.notes[0].where.startswith("silver.json, ") and subset.notes[0].detail
    keys = [one.key for one in subset.pairs]
    assert keys == (["4", "5"] if kept and pair.get("id") != 4 else ["4"])


def test_500_objects_are_read_and_noted(tmp_path):
    write(tmp_path, "silver.json", saco([entry(5)], [annotation(number, 5) for number in range(500)]))
    subset = read(tmp_path, objects=200)
    assert len(subset.pairs[0].objects[0]) == 500 and subset.reasons() == {"many_objects": 1}
    assert "500 instances; the model finds 200" in subset.notes[0].detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("[]", "it must be an object"),
        ('{"images": 3, "annotations": [], "categories": []}', "images is 3"),
        ('{"images": [], "annotations": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": []}', "no pair of an image and a phrase"),
        ('{"video_np_pairs": [], "videos": []}', "annotates videos"),
        ('{"images": [{"id": 1, "text_input": "", "file_name": "a.jpg", "width": 3, "height": 3}]}', "no_phrase"),
    ],
)
def test_a_file_that_is_none_of_these_is_refused(tmp_path, content, message):
    (tmp_path / "silver.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert "evaluate.concepts: " in str(error.value) and "silver.json" in str(error.value)


def test_no_file_and_no_files(tmp_path):
    with pytest.raises(UserError, match="there is no .*silver.json; expected is JSON of SA-Co"):
        read(tmp_path)
    with pytest.raises(UserError, match="has no JSON files"):
        open_concepts(tmp_path, [], Limits(), "evaluate.concepts")


# ---- COCO and LVIS


def coco_json() -> dict:
    """Two images and three categories: a cat on the first, a crowd of dogs on the second, nobody ever saw a fox."""
    polygon = [[3, 2, 9, 2, 9, 8, 3, 8]]
    crowd = {"size": list(SIZE), "counts": [0, 100, 500]}
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 17, "bbox": [3, 2, 6, 6], "area": 35.5, "segmentation": polygon},
        {"id": 2, "image_id": 2, "category_id": 18, "bbox": [0, 0, 5, 20], "segmentation": crowd, "iscrowd": 1},
        {"id": 3, "image_id": 2, "category_id": 17, "bbox": [3, 2, 6, 6], "segmentation": A, "iscrowd": 0},
    ]
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 30, "height": 20} for number in (1, 2)]
    names = {17: "cat", 18: "dog", 19: "arctic_fox"}
    categories = [{"id": number, "name": name} for number, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_categories_are_phrases_and_absent_ones_negatives(tmp_path):
    write(tmp_path, "val.json", coco_json())
    subset = read(tmp_path, "val.json")
    found = {(pair.image, pair.phrase): (pair.there, pair.exhaustive) for pair in subset.pairs}
    assert found == {
        ("1.jpg", "cat"): (True, True),
        ("1.jpg", "dog"): (False, True),
        ("2.jpg", "cat"): (True, True),
        ("2.jpg", "dog"): (False, False),  # a crowd was not told apart
    }
    assert subset.reasons() == {"no_annotations": 1} and "arctic fox" in subset.notes[0].detail
    cat = subset.pairs[0].objects[0][0]
    assert cat.area == 35.5 and cat.box == [3, 2, 6, 6] and coco_mask.area(cat.rle) == 36
    assert subset.pairs[3].marked and subset.categories == {17: "cat", 18: "dog", 19: "arctic fox"}
    assert not subset.federated


def test_categories_of_one_name_are_one(tmp_path):
    content = coco_json()
    content["categories"].append({"id": 40, "name": "Cat"})
    content["annotations"][2] |= {"category_id": 40}
    content["annotations"].append(content["annotations"][0] | {"id": 4, "category_id": 40, "segmentation": B})
    content["annotations"][3].pop("bbox")
    write(tmp_path, "val.json", content)
    subset = read(tmp_path, "val.json")
    found = {(pair.image, pair.phrase): len(pair.objects[0]) for pair in subset.pairs}
    # Not asked twice, and not absent by one name where it is marked by the other.
    assert found == {("1.jpg", "cat"): 2, ("1.jpg", "dog"): 0, ("2.jpg", "cat"): 1, ("2.jpg", "dog"): 0}
    assert subset.categories == {17: "cat", 18: "dog", 19: "arctic fox"}
    assert subset.reasons() == {"name_twice": 1, "no_annotations": 1, "no_box": 1}
    for image in content["images"]:
        image |= {"neg_category_ids": [40, 18], "not_exhaustive_category_ids": [40]}
    write(tmp_path, "lvis.json", content)
    pairs = {(pair.image, pair.phrase): pair for pair in read(tmp_path, "lvis.json").pairs}
    assert pairs.keys() == found.keys() and not pairs["1.jpg", "cat"].exhaustive


def test_lvis_only_asks_for_what_was_looked_for(tmp_path):
    content = coco_json()
    for image, absent, unfinished in zip(content["images"], ([19], []), ([17], []), strict=True):
        image |= {"neg_category_ids": absent, "not_exhaustive_category_ids": unfinished}
        image["coco_url"] = f"http://images.example/val2017/{image.pop('file_name')}"
    content["images"].append(content["images"][1] | {"id": 3})
    write(tmp_path, "lvis.json", content)
    subset = read(tmp_path, "lvis.json")
    found = {(pair.image, pair.phrase): pair.exhaustive for pair in subset.pairs}
    assert found == {
        ("val2017/1.jpg", "cat"): False,
        ("val2017/1.jpg", "arctic fox"): True,
        ("val2017/2.jpg", "cat"): True,
        ("val2017/2.jpg", "dog"): False,
    }
    assert subset.federated and subset.reasons() == {"no_pairs": 1}
    assert subset.notes[0].where == "lvis.json, image 3"


@pytest.mark.parametrize(
    ("change", "reason", "pairs"),
    [
        (lambda one: one["annotations"][0].pop("segmentation"), "no_mask", 3),
        (lambda one: one["annotations"][0].update(segmentation=[[1, 2, 3]]), "bad_mask", 3),
        (lambda one: one["annotations"][0].update(segmentation=[[3, 2, 90, 2, 9, 8]]), "bad_mask", 3),
        (lambda one: one["annotations"][0].update(bbox=[3, 2, 60, 6]), "bad_box", 4),
        (lambda one: one["annotations"][1].update(category_id=99), "no_such_category", 2),
        (lambda one: one["annotations"][1].update(image_id=None), "no_such_image", 2),
        (lambda one: one["annotations"].append(3), "bad_entry", 4),
        (lambda one: one["categories"][1].update(name=""), "no_phrase", 2),
        (lambda one: one["images"][1].update(width="x"), "bad_entry", 1),
        (lambda one: one["images"].append(one["images"][0]), "id_twice", 4),
        (lambda one: one["images"].append({"id": 3, "width": 3, "height": 3}), "bad_name", 4),
    ],
)
def test_faults_of_coco_files(tmp_path, change, reason, pairs):
    content = copy.deepcopy(coco_json())
    change(content)
    write(tmp_path, "val.json", content)
    subset = read(tmp_path, "val.json")
    assert reason in subset.reasons() and len(subset.pairs) == pairs
    assert all(note.where.startswith("val.json") and note.detail for note in subset.notes)


def test_limits_take_whole_images_the_same_ones_every_time(tmp_path):
    images = [entry(number, f"thing {number}", file_name=f"{number // 3}.jpg") for number in range(60)]
    write(tmp_path, "silver.json", saco(images, []))
    few, more = (read(tmp_path, pairs=most).pairs for most in (10, 31))
    assert len(few) == 9 and len(more) == 30 and few == more[:9]
    assert [pair.key for pair in few] != [str(number) for number in range(9)], "not the first ones"
    assert len(read(tmp_path, pairs=2).pairs) == 3, "one image at least"
    write(tmp_path, "val.json", coco_json())
    assert [pair.phrase for pair in read(tmp_path, "val.json", absent=0).pairs] == ["cat", "cat", "dog"]


# ---- images


def test_images_are_searched_and_must_have_the_size_that_was_annotated(tmp_path):
    write(tmp_path, "silver.json", saco([entry(5)], []))
    (tmp_path / "photos").mkdir()
    folders = [tmp_path / "elsewhere", tmp_path / "photos"]
    (subset,) = open_concepts(tmp_path / "silver.json", folders, Limits(), "evaluate.concepts")
    with pytest.raises(UnreadableImage, match="missing .*elsewhere, .*photos"):
        subset.read_image("one.jpg", SIZE)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photos/one.jpg")
    assert subset.read_image("one.jpg", SIZE).shape == (20, 30, 3)
    Image.new("RGB", (31, 20), "red").save(tmp_path / "photos/one.jpg")
    with pytest.raises(UnreadableImage, match="size_mismatch .*it is 31x20 px, annotated was one of 30x20 px"):
        subset.read_image("one.jpg", SIZE)
