# SPDX-License-Identifier: Apache-2.0
"""`data check` of annotated phrases: the same counts and names as training gives."""

import json

import numpy as np
from PIL import Image
from test_concept_files import A, annotation, entry, saco, write

from effsam3.cli import main
from effsam3.data.problems import meaning
from effsam3.data.synthetic.concepts import make_synthetic_concepts


def test_drawn_phrases_are_in_order(tmp_path, capsys):
    make_synthetic_concepts(tmp_path, images=6, held_out=1)
    assert main(["data", "check", str(tmp_path / "train.json")]) == 0
    printed = capsys.readouterr().out
    pairs = json.loads((tmp_path / "train.json").read_text())
    there, instances = len(pairs["images"]) // 2, len(pairs["annotations"])
    assert "images with annotated phrases" in printed and "6 images; pixels: 160 x 160 (6)" in printed
    assert f"{there} phrases that are there" in printed and f"{instances} instances), {there} that were" in printed
    assert "nothing is wrong with it" in printed


# What `data check` tells of what `write_all_faults` writes, and whether it hurts training.
HURTING = {"no_phrase", "bad_phrase", "other_phrase", "many_objects", "bad_name", "id_twice", "bad_entry"}
HARMLESS = {"no_box", "bad_box", "annotator_missing", "no_pairs", "no_annotations"}
HARMLESS |= {"no_such_pair", "no_such_image", "no_such_category", "no_such_annotation"}


def write_all_faults(folder):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "one.jpg")
    phrases = ["", "word " * 40, "cat", "dog", "bird", "many", "hen"]
    pairs = [entry(number, phrase) for number, phrase in enumerate(phrases)]
    pairs += [entry(20, "cat", file_name="/etc/x.jpg"), entry(6, "twice"), {"id": 21, "text_input": "no size"}]
    marked = [annotation(1, 2, bbox=[3.0, 3, 1, 1]), annotation(2, 3, bbox=None), annotation(3, 99)]
    marked += [annotation(10 + number, 5) for number in range(101)]
    name = "gold_x_merged_{}_release_test.json"
    write(folder, name.format("a"), saco(pairs, marked))
    pairs[4] = entry(4, "another bird")
    write(folder, name.format("b"), saco(pairs, marked))
    image = {"file_name": "one.jpg", "height": 20, "width": 30}
    own = {"segmentation": A, "bbox": [3, 2, 6, 6], "iscrowd": 0}
    content = {
        "images": [image | {"id": 1}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1} | own, {"id": 2, "image_id": 8} | own]
        + [{"id": 3, "image_id": 1, "category_id": 9} | own],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "nobody"}],
    }
    write(folder, "instances.json", content)
    looked = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    lvis = {"images": [image | {"id": number} | looked for number in (1, 2)]}
    write(folder, "lvis.json", content | lvis)
    references = [{"image_id": 1, "ann_id": one, "sentences": [{"sent": "the cat"}]} for one in (1, 70)]
    write(folder, "refcoco.json", content | {"refs": references})


def test_every_fault_is_named(tmp_path, capsys):
    write_all_faults(tmp_path)
    assert main(["data", "check", str(tmp_path), "--json", str(tmp_path / "report" / "out.json")]) == 1
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "out.json").read_text())
    found = {(one["reason"], one["hurts"]) for one in report["problems"]}
    assert found == {(reason, reason in HURTING) for reason in HURTING | HARMLESS}
    assert all(f" x {reason}: {meaning(reason)}" in printed for reason in HURTING | HARMLESS)


def test_faults_are_named(tmp_path, capsys):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "one.jpg")
    pairs = [entry(1, ""), entry(2, "word " * 40), entry(3, "cat"), entry(4, "dog", file_name="gone.jpg")]
    write(tmp_path, "silver.json", saco(pairs, [annotation(1, 3, bbox=[3.0, 3, 1, 1]), annotation(2, 4)]))
    assert main(["data", "check", str(tmp_path / "silver.json"), "--json", str(tmp_path / "report" / "out.json")]) == 1
    printed = capsys.readouterr().out
    for reason in ("no_phrase: phrases that are empty", "bad_phrase: phrases of more tokens", "bad_box: boxes"):
        assert f"1 x {reason}" in printed
    report = json.loads((tmp_path / "report" / "out.json").read_text())
    found = {(one["reason"], one["hurts"]) for one in report["problems"]}
    assert found == {("no_phrase", True), ("bad_phrase", True), ("bad_box", False), ("missing", True)}
    assert report["counts"]["phrases_there"] == 2
