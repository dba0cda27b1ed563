# SPDX-License-Identifier: Apache-2.0
"""The benchmark `concepts`: its records, what presence loses, mask AP, and `evaluate` on the tiny chassis.

The tiny chassis' detector does not see images: what numbers mean is tested on hand-made answers.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from concept_data import HEIGHT, NAMES, WIDTH, draw_concepts, merged_with_concepts
from PIL import Image
from pycocotools import mask as coco_mask
from run_folders import merged_run

from effsam3 import evaluate
from effsam3.benchmarks import journal
from effsam3.benchmarks.concepts.mask_ap import mask_ap
from effsam3.benchmarks.concepts.recording import found_on, images_of, pair_key, read_found
from effsam3.benchmarks.concepts.report import (
    average,
    both_found,
    concept_tables,
    lost,
    shown_result,
    subset_result,
    write_pairs,
)
from effsam3.benchmarks.concepts.scoring import Detection
from effsam3.benchmarks.journal import Journal
from effsam3.benchmarks.pictures.concepts import worst_and_median
from effsam3.checked_files import DamagedFileError
from effsam3.data.concepts.files import open_concepts
from effsam3.data.concepts.pairs import ConceptObject, ConceptPair, Limits, Note, Subset
from effsam3.data.images.index import build_index
from effsam3.data.synthetic.images import make_synthetic_sa1b
from effsam3.errors import RecipeError, UserError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.inference.concepts import ConceptModel
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.stages import needs
from effsam3.stages.needs import lacking

SIZE = (40, 40)


def rle(y, x, side=10):
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    encoded = coco_mask.encode(mask)
    return {"size": list(SIZE), "counts": encoded["counts"].decode()}


A, B = rle(0, 0), rle(20, 20)


def truth(one, crowd=False):
    return ConceptObject(one, coco_mask.toBbox(one).tolist(), float(coco_mask.area(one)), crowd)


def pair(key, *objects, image="a.jpg", **about):
    return ConceptPair(key, image, SIZE, f"thing {key}", (tuple(map(truth, objects)),), **about)


def answer(presence, *queries):
    """A record: queries are (score without presence, RLE or None)."""
    rows = [{"score": score, "box": [0.0, 0.0, 10.0, 10.0], "mask": one and one["counts"]} for score, one in queries]
    return {"presence": presence, "queries": rows}


# ---- records


def test_records_of_several_processes_and_a_line_that_was_cut_off(tmp_path):
    kept = Journal(tmp_path, "found", {"key": str})
    for process in (0, 1):
        with kept.writer(process) as add:
            add({"key": f"{process}a"})
            add({"key": f"{process}b"})
    file = tmp_path / "found-1.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    assert [one["key"] for one in kept.read()] == ["0a", "0b", "1a"]
    with kept.writer(1) as add:
        add({"key": "again"})
    assert [one["key"] for one in kept.read()] == ["0a", "0b", "1a", "again"]
    file.write_text('{"key": 3}\n')
    with pytest.raises(DamagedFileError, match="found-1.jsonl, line 1 is damaged: key is 3, .*; delete it"):
        list(kept.read())


def test_records_of_another_model_are_not_taken(tmp_path):
    folder = tmp_path / "student"
    assert not journal.begin(folder, {"weights": "1"})
    with Journal(folder, "found", dict).writer(0) as add:
        add({})
    assert journal.begin(folder, {"weights": "1"}) and list(folder.glob("*.jsonl"))
    assert not journal.begin(folder, {"weights": "2"}) and not list(folder.glob("*.jsonl"))


@pytest.fixture(scope="module")
def model() -> ConceptModel:
    return ConceptModel(chassis_folder("tiny"))


def test_what_is_recorded_is_what_prediction_finds(model, tmp_path):
    """More phrases than go at once, on one image's features; the best of them all have masks."""
    (subset,) = open_concepts(draw_concepts(tmp_path), [], Limits(), "evaluate.concepts")
    name, pairs = list(subset.images().items())[2]
    pairs = [pairs[place % 3] for place in range(11)]
    image = subset.read_image(name, pairs[0].size)
    records = found_on(model, image, pairs, pooled=True)
    assert sum(query["mask"] is not None for one in records for query in one["queries"]) >= 100
    vision = model.look(image)
    for one, asked in zip(records, pairs, strict=True):
        wanted = model.find(vision, asked.size, asked.phrase, threshold=0)
        _, detections = read_found(one, asked.size)
        assert detections
        for detection in detections:
            place = int((wanted.scores_O - detection.query * one["presence"]).abs().argmin())
            assert float(wanted.scores_O[place]) == pytest.approx(detection.query * one["presence"], abs=1e-5)
            assert detection.box == pytest.approx(wanted.boxes_O4[place].tolist(), abs=1e-2)
            mask = torch.from_numpy(coco_mask.decode(detection.rle).astype(bool))
            assert (mask != wanted.masks_OHW[place]).float().mean() < 1e-3
    free = found_on(model, image, pairs[:3], pooled=False)
    assert all(query["score"] >= 0.5 for one in free for query in one["queries"])
    assert all((query["mask"] is not None) == asked.marked for one, asked in zip(free, pairs[:3], strict=True)
               for query in one["queries"])  # fmt: skip


# ---- what presence loses


def answered(subset, teacher, student):
    """What both models found, from records by pair."""
    records = {
        name: {pair_key(subset, one): rows[one.key] for one in subset.pairs}
        for name, rows in (("teacher", teacher), ("student", student))
    }
    return both_found(subset, records)


def hand_made():
    """Four pairs that the teacher can do; the student fails by its presence, by its masks, and on a negative."""
    pairs = [pair("shy", A), pair("blind", A), pair("bold"), pair("fine", A, B), pair("torn", A)]
    subset = Subset("own", pairs, [], [Note("no_box", "own.json, pair fine")])
    sure = [(0.9, A), (0.9, B)]
    teacher = {"shy": answer(0.9, (0.9, A)), "blind": answer(0.9, (0.9, A)), "bold": answer(0.1, (0.9, None))}
    student = {"shy": answer(0.2, (0.9, A)), "blind": answer(0.9, (0.4, A)), "bold": answer(0.8, (0.9, None))}
    teacher |= {"fine": answer(0.9, *sure), "torn": {"failed": "image 'a.jpg': missing"}}
    student |= {"fine": answer(0.9, *sure), "torn": answer(0.9)}
    return subset, *answered(subset, teacher, student)


def test_presence_and_masks_are_told_apart():
    subset, both, failed = hand_made()
    assert list(failed) == ["torn"] and [one.pair.key for one in both] == ["shy", "blind", "bold", "fine"]
    assert lost(both) == {"pairs": 3, "missed": 2, "imagined": 1, "by_presence": 2}
    result = subset_result(subset, both, failed, draws=20)
    rows = result["models"]
    assert rows["teacher"]["cgF1"] == pytest.approx(1, abs=1e-3)
    # The student: 1 of 3 positives found (2 of 4 objects), 1 of 1 negatives imagined.
    assert rows["student"]["IL_MCC"] == pytest.approx((0 * 1 - 1 * 2) / (2 * 3 * 1 * 2) ** 0.5, abs=1e-3)
    assert rows["student, teacher's presence"]["IL_MCC"] == pytest.approx((2 - 0) / (2 * 3 * 1 * 2) ** 0.5, abs=1e-3)
    assert rows["student, true presence"]["pmF1"] == pytest.approx(2 * 0.75 / 1.75, abs=1e-3)
    assert rows["teacher, student's presence"]["pmF1"] == pytest.approx(2 * 0.75 / 1.75, abs=1e-3)
    assert rows["teacher"]["presence"] == 1 and rows["student"]["presence"] == 0.5
    assert (rows["student"]["presence_positive"], rows["student"]["presence_negative"]) == (pytest.approx(2 / 3), 0)
    text = "\n".join(concept_tables({"subsets": {"own": result}}))
    assert "concepts, own: 3 positive, 1 negative pairs" in text and "| student, teacher's presence " in text
    assert "On 3 pairs the teacher is right" in text and "(2 missed, 1 imagined); 2 of them" in text
    assert "Left out: 1 pairs of images that cannot be read, such as pair torn: image 'a.jpg': missing." in text
    assert "The annotations have: 1 no_box; such as own.json, pair fine: no_box" in text


def test_what_the_student_started_from_has_a_row_of_its_own(tmp_path):
    subset, _, _ = hand_made()
    kept = [one for one in subset.pairs if one.key in ("shy", "bold")]
    found = {
        "teacher": {"shy": answer(0.9, (0.9, A)), "bold": answer(0.1)},
        "start": {"shy": answer(0.1, (0.9, A)), "bold": answer(0.1)},
        "student": {"shy": answer(0.9, (0.9, A)), "bold": answer(0.9)},
    }
    own = Subset("own", kept, [])
    records = {name: {pair_key(own, one): rows[one.key] for one in kept} for name, rows in found.items()}
    both, _ = both_found(own, records)
    result = subset_result(own, both, {}, draws=5)
    rows = result["models"]
    assert list(rows)[:3] == ["teacher", "start", "student"]
    assert (rows["start"]["cgF1"], rows["start"]["presence"]) == (0, 0.5) and rows["student"]["cgF1"] > 0.99
    assert "| start " in concept_tables({"subsets": {"own": result}})[0]
    write_pairs(tmp_path / "pairs.csv", {"own": both})
    lines = list(csv.DictReader((tmp_path / "pairs.csv").open()))
    assert [(one["model"], one["outcome"]) for one in lines[:3]] == [
        ("teacher", "TP"),
        ("start", "FN"),
        ("student", "TP"),
    ]

    def objects(box):
        return [{"key": "a", "objects": [{"area": 100.0, "box": box}]}]

    shown = shown_result({"teacher": objects(1.0), "start": objects(0.2), "student": objects(0.6)}, ("box",))
    assert shown["box"]["start"] == 0.2 and list(average({"own": result})) == list(rows)


def test_no_negatives_is_said():
    subset, both, _ = hand_made()
    text = "\n".join(concept_tables({"subsets": {"own": subset_result(subset, both[:2], {}, draws=5)}}))
    assert "There are no negatives, so IL_MCC and cgF1 are 0 whatever the models find: look at pmF1" in text
    unfinished = Subset("own", [pair("a", A, exhaustive=False)], [])
    both, _ = answered(unfinished, {"a": answer(0.9)}, {"a": answer(0.9)})
    text = "\n".join(concept_tables({"subsets": {"own": subset_result(unfinished, both, {}, draws=5)}}))
    assert "No pair is left to compute cgF1 on. Without 1 pairs of which not all instances were marked." in text


def test_the_worst_and_the_median_are_drawn(tmp_path):
    _, both, _ = hand_made()
    chosen = worst_and_median(both, 2)
    assert chosen["worst"][0].pair.key in ("shy", "blind", "bold") and len(chosen["median"]) == 1
    assert {len(group) for group in worst_and_median(both, 100).values()} == {4, 0}
    write_pairs(tmp_path / "pairs.csv", {"own": both})
    rows = list(csv.DictReader((tmp_path / "pairs.csv").open()))
    assert len(rows) == 8 and rows[1]["model"] == "student" and rows[1]["outcome"] == "FN"
    assert rows[4] | {} == rows[4] and (rows[5]["outcome"], rows[5]["detections"]) == ("FP", "1")


def test_shown_objects_by_their_size():
    def objects(box):
        return [{"key": "a", "objects": [{"area": 100.0, "box": box}, {"area": 5000.0, "box": 0.5}]}]

    records = {"teacher": objects(1.0) + [{"key": "b", "failed": "?"}], "student": objects(0.6) + objects(0.0)}
    result = shown_result(records, ("box",))["box"]
    assert (result["teacher"], result["student"], result["masks"]) == (0.75, pytest.approx(0.55), 2)
    assert result["by_size"]["small"]["student"] == 0.6 and result["by_size"]["medium"]["masks"] == 1


# ---- mask AP


def detection(score, one):
    return Detection(score, (0.0, 0.0, 10.0, 10.0), one)


def test_mask_ap_counts_false_ones_of_absent_categories():
    cat = pair("cat", A, category=1)
    no_dog, dog = pair("dog", category=2), pair("dog", B, image="b.jpg", category=2)
    good = [(cat, 1.0, [detection(0.9, A)]), (dog, 1.0, [detection(0.6, B)])]
    assert mask_ap([*good, (no_dog, 1.0, [])])["AP"] == pytest.approx(1)
    # A better false one on another image: precision 1/2 at every recall of dogs.
    found = mask_ap([*good, (no_dog, 1.0, [detection(0.8, B)])])
    assert found["AP"] == pytest.approx(0.75) and found["AP_positive"] == pytest.approx(1)
    assert found["AP_small"] == pytest.approx(0.75) and found["AP_large"] is None
    # With a presence that says no, it comes last and costs nothing.
    assert mask_ap([*good, (no_dog, 0.1, [detection(0.8, B)])])["AP"] == pytest.approx(1)
    assert mask_ap([(cat, 1.0, []), (no_dog, 1.0, [])])["AP"] == 0


def test_mask_ap_of_lvis_forgives_what_was_not_marked_to_the_end():
    cat = pair("cat", A, category=1, exhaustive=False)
    answers = [(cat, 1.0, [detection(0.9, B), detection(0.5, A)])]
    assert mask_ap(answers)["AP"] == pytest.approx(0.5)
    assert mask_ap(answers, federated=True)["AP"] == pytest.approx(1)


def test_mask_ap_takes_the_best_100_of_an_image():
    pairs = [pair("cat", A, category=1), pair("dog", category=2)]
    false = [detection(0.9 - number / 1000, B) for number in range(100)]
    assert mask_ap([(pairs[0], 1.0, [detection(0.5, A)]), (pairs[1], 1.0, false)])["AP"] == 0
    assert mask_ap([(pairs[0], 1.0, [detection(0.5, A)]), (pairs[1], 1.0, false[1:])])["AP"] == pytest.approx(1)


# ---- evaluate


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A merged run that has been evaluated once: its folder, the overrides, the results."""
    folder = tmp_path_factory.mktemp("measured")
    run, own = merged_with_concepts(folder)
    return run, own, evaluate.run(load_recipe(run / "recipe.yaml", own))["concepts"]


def lines(run: Path) -> dict[str, list[str]]:
    files = sorted((run / "eval/concepts").rglob("*.jsonl"))
    return {str(file.relative_to(run)): file.read_text().splitlines() for file in files}


def test_evaluate_writes_numbers_tables_and_pictures(measured):
    run, _, result = measured
    subset = result["subsets"]["squares"]
    assert (subset["positives"], subset["negatives"], subset["images"]) == (5, 7, 4)
    assert list(subset["models"])[:2] == ["teacher", "student"] and 0 <= subset["mask_ap"]["teacher"]["AP"] <= 1
    assert subset["shown"]["box"]["masks"] == 5 and set(subset["shown"]) == {"box", "point"}
    assert json.loads((run / "eval/concepts.json").read_text())["subsets"]["squares"] == subset
    assert len((run / "eval/concepts.csv").read_text().splitlines()) == 1 + 2 * 12
    assert "text-prompted mask AP, squares, 4 images" in (run / "eval/summary.md").read_text()
    pictures = sorted(path.name for path in (run / "pictures").glob("concepts_*.png"))
    assert pictures == [f"concepts_squares_{name}.png" for name in ("median_1", "worst_1", "worst_2")]
    with Image.open(run / "pictures" / pictures[0]) as picture:
        assert picture.width > 3 * 300
    assert {name: len(own) for name, own in lines(run).items()} == {
        f"eval/concepts/{model}/{kind}/{kind}-0.jsonl": count
        for model in ("student", "teacher") for kind, count in (("found", 12), ("shown", 4))
    }  # fmt: skip


def test_evaluate_resumes_and_only_makes_what_is_missing(measured):
    """A line that was cut off, one that is missing, and an image that is not there any more, then is again."""
    run, own, result = measured
    before = lines(run)
    student, teacher = (run / f"eval/concepts/{model}/found/found-0.jsonl" for model in ("student", "teacher"))
    student.write_text("\n".join(before[str(student.relative_to(run))][:-1])[:-5])
    teacher.write_text("\n".join(before[str(teacher.relative_to(run))][3:]) + "\n")  # without the first image
    image = next((run.parents[1] / "concepts").glob("0.png"))
    image.rename(image.with_suffix(".away"))
    recipe = load_recipe(run / "recipe.yaml", own)
    first = json.loads(before[str(teacher.relative_to(run))][0])["key"]
    gone = evaluate.run(recipe)["concepts"]["subsets"]["squares"]
    expected = 3 if "0.png" in first else 0
    assert gone["failed"] == expected and gone["pairs"] == 12 - expected
    image.with_suffix(".away").rename(image)
    assert evaluate.run(recipe)["concepts"] == result
    after = lines(run)
    assert after[str(student.relative_to(run))][:10] == before[str(student.relative_to(run))][:10]
    assert {line for own in before.values() for line in own} <= {line for own in after.values() for line in own}
    for made in after.values():
        keys = [one["key"] for one in map(json.loads, made) if "failed" not in one]
        assert len(keys) == len(set(keys)), "what was there is not made again"
    assert evaluate.run(recipe)["concepts"] == result and lines(run) == after, "there was nothing left to do"


def test_the_parts_of_a_release_ask_for_the_same_concepts_once(tmp_path):
    """Of an image and a text student in one model: the answers are shared, and so is the table of cgF1."""
    folder = merged_run(tmp_path / "runs", "image", "text")
    asked = [f"evaluate.concepts={draw_concepts(tmp_path, images=2)}", "evaluate.benchmarks=[concepts]"]
    asked += ["evaluate.concept_pictures=0"]
    make_synthetic_sa1b(tmp_path / "photos", 2)
    build_index([tmp_path / "photos"], tmp_path / "photos.parquet", 0.5, workers=1, progress=False)
    own = {"image": [f"data.index={tmp_path}/photos.parquet", "evaluate.pictures=0"], "text": []}
    for part, more in own.items():
        file = tmp_path / f"runs/smoke-{part}/recipe.yaml"
        file.write_text(dump_recipe(load_recipe(file, [*asked, *more])))
    results = evaluate.run(load_recipe(folder / "recipe.yaml"))
    image, text = (results[f"{part}_concepts"]["subsets"]["squares"] for part in own)
    assert image["models"] == text["models"] and "shown" in image and "shown" not in text
    assert {name: len(made) for name, made in lines(folder).items()} == {
        f"eval/concepts/{model}/{kind}/{kind}-0.jsonl": count
        for model in ("student", "teacher") for kind, count in (("found", 4), ("shown", 2))
    }  # fmt: skip
    assert (folder / "eval/summary.md").read_text().count("| student, true presence ") == 1
    assert (folder / "eval/text_concepts.csv").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["evaluate.concepts=null"], "concepts: the benchmark concepts needs pairs"),
        (["evaluate.benchmarks=[speed]"], "is given, but concepts is not among evaluate.benchmarks"),
    ],
)
@pytest.mark.parametrize("stage", ["image", "text"])
def test_a_recipe_names_the_pairs_and_the_benchmark(stage, changes, message):
    own = ["evaluate.concepts=pairs.json", "evaluate.benchmarks=[concepts]", *changes]
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"smoke/{stage}", own)


def test_what_evaluate_needs_is_asked_before_a_training(tmp_path):
    concepts = draw_concepts(tmp_path / "concepts")
    own = [f"evaluate.concepts={concepts}", "evaluate.benchmarks=[concepts]", f"train.runs={tmp_path}"]
    recipe = load_recipe("smoke/image", own)
    assert lacking(recipe, ["evaluate"]) == ([], [])
    content = json.loads(concepts.read_text())
    content["annotations"][0]["bbox"] = None
    concepts.write_text(json.dumps(content))
    _, (remark,) = lacking(recipe, ["evaluate"])
    assert remark.startswith("evaluate: evaluate.concepts: squares has 1 no_box; such as squares.json, image 0")
    for image in concepts.parent.glob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"none of the first 3 images of squares .*evaluate.concept_images=\[FOLDER\]"):
        needs.refuse(recipe, ["train", "evaluate"])
    concepts.write_text("{")
    assert "squares.json" in lacking(recipe, ["evaluate"])[0][0]


def test_drawn_concepts_are_what_their_names_say(tmp_path):
    (subset,) = open_concepts(draw_concepts(tmp_path), [], Limits(), "evaluate.concepts")
    for one in subset.pairs:
        image = subset.read_image(one.image, (HEIGHT, WIDTH))
        channel = [name.replace("_", " ") for name in NAMES.values()].index(one.phrase)
        bright = (image[..., channel] == 220).astype(np.uint8)
        assert bright.any() == one.there
        for truth_ in one.objects[0]:
            assert (coco_mask.decode(truth_.rle) == bright).all()
    assert len(images_of([subset])) == 4
