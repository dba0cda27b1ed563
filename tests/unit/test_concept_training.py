# SPDX-License-Identifier: Apache-2.0
"""Phrases and instances of training batches: what is asked, of which kind, and what becomes of bad files."""

import json
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from test_concept_files import annotation, entry, refuse, rle, saco, write

from effsam3.data.concepts.asking import Asking, Choice
from effsam3.data.concepts.training import annotated_phrases, listed_phrases, open_asked, read_phrases
from effsam3.data.images.pair_batches import divide
from effsam3.data.sampler import PADDING
from effsam3.data.synthetic.concepts import PHRASES, make_synthetic_concepts
from effsam3.errors import UserError

KEY = "data.path"
RNG = np.random.default_rng([7, 1])


def opened(path, objects=40, folders=()):
    return open_asked(path, folders, refuse, objects, KEY)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    make_synthetic_concepts(folder, images=24, held_out=2)
    return folder / "train.json"


def batches(images, **choice):
    return annotated_phrases(images, Choice(**choice), image_size=80, mask_side=32, seed=3)


def test_a_batch_of_drawn_images(drawn):
    images, notes = opened(drawn)
    data = batches(images, phrases=3)
    batch = data.__getitems__([(4, 11), (0, 12), PADDING])
    assert not notes and not batch["unreadable"] and batch["positions"].tolist() == [4, 0, PADDING]
    assert batch["pixels"].shape == (3, 3, 80, 80) and batch["sizes"].tolist() == [[80, 80], [80, 80], [0, 0]]
    assert batch["image_R"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batch["annotated"].tolist() == [True] * 6 + [False] * 3 and not batch["valid"][6:].any()
    content = json.loads(drawn.read_text())
    for row, phrase in enumerate(batch["phrases"][:6]):
        name = images[(4, 0)[row // 3]].name
        ids = [pair["id"] for pair in content["images"] if (pair["file_name"], pair["text_input"]) == (name, phrase)]
        truth = [one for one in content["annotations"] if one["image_id"] in ids]
        assert batch["valid"][row].sum() == len(truth)
        for slot, one in enumerate(truth):
            x, y, width, height = one["bbox"]
            assert batch["boxes"][row, slot].tolist() == pytest.approx([x, y, x + width, y + height], abs=1e-6)
            found = batch["masks"][row, slot].float() / 255
            shrunk = coco_mask.decode(one["segmentation"]).reshape(32, 5, 32, 5).mean((1, 3))
            assert abs(found.numpy() - shrunk).mean() < 0.02 and found.mean() == pytest.approx(one["area"], abs=2e-3)
        assert not batch["boxes"][row, len(truth) :].any() and not batch["masks"][row, len(truth) :].any()


def test_what_is_drawn_follows_from_seed_and_number(drawn):
    images, _ = opened(drawn)
    data = batches(images)
    one, other = data.__getitems__([(2, 5), (2, 6)]), data.__getitems__([(2, 5)])
    assert one["phrases"][:4] == other["phrases"]
    draws = {tuple(data.__getitems__([(2, number)])["phrases"]) for number in range(20)}
    assert len(draws) > 10
    other_seed = annotated_phrases(images, Choice(), image_size=80, mask_side=32, seed=4)
    numbers = [(2, number) for number in range(8)]
    assert other_seed.__getitems__(numbers)["phrases"] != data.__getitems__(numbers)["phrases"]
    assert pickle.loads(pickle.dumps(data)).__getitems__(numbers)["phrases"] == data.__getitems__(numbers)["phrases"]


def test_shares_of_negatives_and_hard_ones(drawn):
    images, _ = opened(drawn)
    asking = Asking(images, Choice(phrases=2, negatives=0.5, hard=0.5))
    for image in images:
        there = {pair.phrase for pair in image.present}
        for _ in range(10):
            asked = asking.draw(image, RNG)
            assert [pair is None for _, pair in asked] == [False, True]
            assert all((pair is not None) == (phrase in there) for phrase, pair in asked)
    positive = [Asking(images, Choice(phrases=1, negatives=share)).draw(images[0], RNG)[0][1] for share in (0.0, 1.0)]
    assert positive[0] is not None and positive[1] is None
    third = Asking(images, Choice(phrases=1, negatives=1 / 3))
    assert np.mean([third.draw(images[0], RNG)[0][1] is None for _ in range(600)]) == pytest.approx(1 / 3, abs=0.06)

    def shares_a_word(hard):
        asking, found = Asking(images, Choice(phrases=1, negatives=1.0, hard=hard)), []
        for image in images * 20:
            words = {word for pair in image.present for word in pair.phrase.split()}
            found.append(bool(words & set(asking.draw(image, RNG)[0][0].split())))
        return np.mean(found)

    assert shares_a_word(1.0) > shares_a_word(0.0) + 0.2


def test_too_few_phrases_of_a_kind(drawn):
    images, _ = opened(drawn)
    single = next(image for image in images if len(image.present) == 1)
    asked = Asking(images, Choice(phrases=6)).draw(single, RNG)
    assert sum(pair is not None for _, pair in asked) == 1 and len({phrase for phrase, _ in asked}) == 6
    # Without negatives to fill up with it is asked once: in validation, twice would count twice.
    image = replace(single, absent=[], hard=[], free=False)
    assert Asking([image], Choice(phrases=4)).draw(image, RNG) == [(single.present[0].phrase, single.present[0])]
    batch = batches([image], phrases=4).__getitems__([(0, 0)])
    assert batch["phrases"] == [single.present[0].phrase, "", "", ""]
    assert batch["counted"].tolist() == batch["annotated"].tolist() == [True, False, False, False]
    assert batch["valid"][0].any() and not batch["valid"][1:].any()


def test_phrases_of_others_that_may_be_there_are_not_asked(tmp_path):
    names = (
        ("a.jpg", "dog"), ("b.jpg", "the brown dog"), ("c.jpg", "A dog's."), ("d.jpg", "black cat"),
        ("e.jpg", "white cat"),
    )  # fmt: skip
    pairs = [entry(number, phrase, file_name=name) for number, (name, phrase) in enumerate(names)]
    write(tmp_path, "silver.json", saco(pairs, [annotation(number, number) for number in range(5)]))
    images, _ = opened(tmp_path / "silver.json")
    asking = Asking(images, Choice(phrases=1, negatives=1.0))
    asked = {image.name: {asking.draw(image, RNG)[0][0] for _ in range(60)} for image in images}
    assert asked["a.jpg"] == asked["b.jpg"] == asked["c.jpg"] == {"black cat", "white cat"}
    hard = Asking(images, Choice(phrases=1, negatives=1.0, hard=1.0))
    assert {hard.draw(images[3], RNG)[0][0] for _ in range(20)} == {"white cat"}  # altered in one word


def test_what_was_not_marked_to_the_end_is_no_negative(tmp_path):
    pairs = [entry(1, "dog"), entry(2, "cat", is_instance_exhaustive=0), entry(3, "bus")]
    write(tmp_path, "silver.json", saco(pairs, [annotation(1, 1)]))
    (image,), _ = opened(tmp_path / "silver.json")
    assert (image.absent, image.other) == (["bus"], ["cat"])
    asking = Asking([image], Choice(phrases=1, negatives=1.0))
    assert {asking.draw(image, RNG)[0][0] for _ in range(20)} == {"bus"}


def coco_content():
    categories = [(1, "cat", "animal"), (2, "dog", "animal"), (3, "car", "vehicle"), (4, "bus", "vehicle")]
    marked = [(1, 1, 0), (2, 3, 0), (2, 2, 1), (3, 2, 0), (3, 4, 0)]  # image, category, crowd
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": 20, "width": 30} for number in (1, 2, 3, 4)],
        "annotations": [
            {"id": place, "image_id": image, "category_id": category, "iscrowd": crowd, "bbox": [3, 2, 6, 6]}
            | {"segmentation": rle(slice(2, 8), slice(3, 9))}
            for place, (image, category, crowd) in enumerate(marked)
        ],
        "categories": [{"id": one, "name": name, "supercategory": family} for one, name, family in categories],
    }


def test_negatives_of_coco_are_its_categories_and_hard_ones_of_one_family(tmp_path):
    write(tmp_path, "instances.json", coco_content())
    images, notes = opened(tmp_path / "instances.json")
    found = {image.name: (sorted(image.absent), image.hard, image.other) for image in images}
    assert found == {
        "1.jpg": (["bus", "car", "dog"], ["dog"], []),
        "2.jpg": (["bus", "cat"], ["bus"], ["dog"]),  # a crowd: there, but not to be learned from
        "3.jpg": (["car", "cat"], ["cat", "car"], []),
        "4.jpg": (["bus", "car", "cat", "dog"], [], []),  # nothing on it
    }
    assert not notes
    asking = Asking(images, Choice(phrases=2, negatives=1.0))
    for image in images:
        asked = {phrase for _ in range(40) for phrase, _ in asking.draw(image, RNG)}
        assert asked == set(image.absent)


def test_lvis_only_has_negatives_that_were_looked_for(tmp_path):
    content = coco_content()
    for image, negative in zip(content["images"], ([3], [], [], []), strict=True):
        image |= {"neg_category_ids": negative, "not_exhaustive_category_ids": []}
    write(tmp_path, "lvis.json", content)
    images, notes = opened(tmp_path / "lvis.json")
    assert {image.name: image.hard for image in images} == {"1.jpg": ["car"], "2.jpg": [], "3.jpg": []}
    assert Counter(note.reason for note in notes) == {"no_pairs": 2}  # by the reader, and as nothing is left
    asked = Asking(images, Choice(phrases=4)).draw(images[1], RNG)
    assert {phrase for phrase, _ in asked} == {"car"}  # nothing else is known of it


def test_expressions_mean_one_object(tmp_path):
    content = coco_content()
    references = [
        (1, 0, ["left cat", "cat"]),
        (3, 3, ["dog", "the animal"]),
        (3, 4, ["the animal", " "]),
        (9, 0, ["x"]),
    ]
    content["refs"] = [
        {"ref_id": place, "image_id": image, "ann_id": one, "sentences": [{"sent": text} for text in texts]}
        for place, (image, one, texts) in enumerate(references)
    ]
    content["refs"].append({"image_id": 1, "ann_id": 77, "sentences": []})
    write(tmp_path, "refcoco.json", {name: content[name] for name in ("images", "annotations", "refs")})
    images, notes = opened(tmp_path / "refcoco.json")
    found = {image.name: {pair.phrase: len(pair.objects[0]) for pair in image.present} for image in images}
    assert found == {"1.jpg": {"left cat": 1, "cat": 1}, "3.jpg": {"dog": 1, "the animal": 2}}
    assert Counter(note.reason for note in notes) == {"no_phrase": 1, "no_such_image": 1, "no_such_annotation": 1}
    asked = {
        phrase for _ in range(30) for phrase, pair in Asking(images, Choice()).draw(images[0], RNG) if pair is None
    }
    assert asked == {"dog", "the animal"}


def test_every_fault_is_named_and_nothing_stops(tmp_path):
    """What issue reports called bad input, all in one file, and a batch of all that is left."""
    Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(tmp_path / "one.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "other_size.png")
    files = ["one.png", "broken.png", "missing.png", "other_size.png"]
    phrases = ["", "word " * 40, "no box", "box outside", "mask of another size", "500 objects", "fine"]
    pairs = [entry(number, phrase, file_name="one.png") for number, phrase in enumerate(phrases)]
    pairs += [entry(10 + number, "cat", file_name=name) for number, name in enumerate(files)]
    pairs += [entry(20, "", file_name="lonely.png")]
    own = [annotation(1, 2, bbox=None), annotation(2, 3, bbox=[2.0, 2, 0.1, 0.1])]
    own += [annotation(3, 4, segmentation=rle(slice(1, 3), slice(1, 3), (40, 40)))]
    own += [annotation(100 + number, 5) for number in range(500)] + [annotation(5, 6), annotation(6, 11)]
    name = "gold_x_merged_{}_release_test.json"
    write(tmp_path, name.format("a"), saco(pairs, own))
    images, notes = opened(tmp_path)
    assert Counter(note.reason for note in notes) == {
        "no_phrase": 2, "bad_phrase": 1, "no_box": 1, "bad_box": 1, "size_mismatch": 1, "many_objects": 1,
        "annotator_missing": 2,
    }  # fmt: skip
    assert all(note.where and note.detail for note in notes)
    one = next(image for image in images if image.name == "one.png")
    assert sorted(pair.phrase for pair in one.present) == ["box outside", "fine", "no box"]
    data = batches(images, phrases=5)
    batch = data.__getitems__([*((place, place) for place in range(len(images))), PADDING])
    unread = {key: reason.partition(":")[0] for key, reason in batch["unreadable"]}
    assert unread == {"broken.png": "corrupt", "missing.png": "missing", "other_size.png": "size_mismatch"}
    assert len(batch["phrases"]) == 5 * (len(images) + 1) and batch["annotated"].sum() == 4  # all that is known
    assert "500 objects" not in batch["phrases"] and batch["valid"].shape[1] == 1


def test_an_image_whose_pairs_are_all_left_out_is_named(tmp_path):
    pairs = [entry(1, "many", file_name="many.png"), entry(2, "cat", file_name="one.png")]
    write(tmp_path, "silver.json", saco(pairs, [annotation(number, 1) for number in range(5)]))
    images, notes = opened(tmp_path / "silver.json", objects=4)
    assert [image.name for image in images] == ["one.png"]
    assert [(note.reason, note.where) for note in notes][1:] == [("no_pairs", "many.png")]
    write(tmp_path, "silver.json", saco(pairs[:1], [annotation(number, 1) for number in range(5)]))
    with pytest.raises(UserError, match=f"{KEY}: no image of .*silver.json has a phrase .*many_objects"):
        opened(tmp_path / "silver.json", objects=4)


def test_an_image_of_two_files_is_one(tmp_path):
    write(tmp_path, "a.json", saco([entry(1, "cat"), entry(2, "dog")], [annotation(1, 1)]))
    write(tmp_path, "b.json", saco([entry(1, "dog"), entry(2, "bird")], [annotation(1, 1)]))
    (image,), _ = opened(tmp_path)
    assert [pair.phrase for pair in image.present] == ["cat", "dog"] and image.absent == image.hard == ["bird"]


def test_most_annotators_decide(tmp_path):
    name = "gold_x_merged_{}_release_test.json"
    for who, marked in (("a", []), ("b", [1, 3]), ("c", [1])):
        pairs = [entry(number, phrase) for number, phrase in ((1, "cat"), (2, "dog"), (3, "bird"))]
        write(tmp_path, name.format(who), saco(pairs, [annotation(pair, pair) for pair in marked]))
    (image,), notes = opened(tmp_path)
    assert [pair.phrase for pair in image.present] == ["cat"] and not notes
    assert (image.absent, image.other) == (["dog"], ["bird"])  # of the bird one annotator is sure
    batch = batches([image], phrases=1, negatives=0.0)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "one.jpg")
    assert batch.__getitems__([0])["valid"].tolist() == [[True]]


def test_phrases_without_annotations(tmp_path, drawn):
    (tmp_path / "phrases.txt").write_text("red circle\n\n  a dog \nred circle\n" + "word " * 40 + "\nbird\n")
    phrases, notes = read_phrases(tmp_path / "phrases.txt", refuse, 3, "data.phrases_file")
    assert phrases == ["red circle", "a dog", "bird"] and [note.reason for note in notes] == ["bad_phrase"]
    assert "line 5" in notes[0].where
    images, _ = opened(drawn)
    data = listed_phrases(batches(images).images, phrases, count=2, mask_side=32)
    batch = data.__getitems__([(0, 1), (1, 2)])
    assert not batch["annotated"].any() and not batch["valid"].any() and batch["masks"].shape == (4, 1, 32, 32)
    assert set(batch["phrases"]) <= set(phrases) and len(set(batch["phrases"][:2])) == 2
    with pytest.raises(UserError, match="data.phrases_file: .* has 3 phrases, 4 are asked of an image"):
        read_phrases(tmp_path / "phrases.txt", refuse, 4, "data.phrases_file")
    with pytest.raises(UserError, match="nowhere.txt cannot be read"):
        read_phrases(tmp_path / "nowhere.txt", refuse, 1, "data.phrases_file")


def test_images_are_held_out_by_their_names(drawn):
    images, _ = opened(drawn)
    parts = divide(images, 0.25)
    assert (len(parts["train"]), len(parts["val"])) == (18, 6)
    data = annotated_phrases(parts["val"], Choice(), 80, 32, all_images=images)
    assert len(data) == 6 and set(data.__getitems__([0, 1])["phrases"]) <= set(PHRASES)
    assert torch.equal(data.__getitems__([3])["masks"], data.__getitems__([3])["masks"])
