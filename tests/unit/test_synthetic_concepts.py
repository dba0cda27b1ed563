# SPDX-License-Identifier: Apache-2.0
"""Drawn concepts: SA-Co's JSON, true by construction, and as hard as they say."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from effsam3.data.concepts.files import open_concepts
from effsam3.data.concepts.pairs import Limits
from effsam3.data.synthetic.concepts import COLOURS, PHRASES, asked_of, draw_scene, make_synthetic_concepts

# Of an entry of SA-Co Gold's `images` and `annotations`.
PAIR = {"id", "file_name", "text_input", "width", "height", "queried_category", "is_instance_exhaustive"}
PAIR |= {"is_pixel_exhaustive"}
ANNOTATION = {"id", "image_id", "bbox", "area", "segmentation", "category_id", "iscrowd", "source"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    make_synthetic_concepts(folder, images=30, held_out=8)
    return folder


def test_files_are_saco_s(drawn):
    content = json.loads((drawn / "train.json").read_text())
    assert content.keys() == {"images", "annotations", "categories"} and content["categories"][0]["id"] == 1
    assert all(pair.keys() == PAIR for pair in content["images"])
    assert all(annotation.keys() == ANNOTATION for annotation in content["annotations"])
    by_id = {pair["id"]: pair for pair in content["images"]}
    for annotation in content["annotations"]:
        pair, rle = by_id[annotation["image_id"]], annotation["segmentation"]
        mask = coco_mask.decode(rle)
        rows, columns = np.nonzero(mask)
        x, y, width, height = np.array(annotation["bbox"]) * pair["width"]
        assert mask.shape == (160, 160) and annotation["area"] == pytest.approx(mask.mean())
        assert (x, y) == pytest.approx((columns.min(), rows.min()))
        assert (x + width, y + height) == pytest.approx((columns.max() + 1, rows.max() + 1))
        pixels = np.asarray(Image.open(drawn / pair["file_name"]))[mask > 0].mean(0)
        colours = np.array(list(COLOURS.values()))
        assert list(COLOURS)[abs(colours - pixels).sum(1).argmin()] == pair["text_input"].split()[0]


def test_the_benchmark_reads_them_without_a_remark(drawn):
    held_out, train = open_concepts(drawn, [], Limits(), "evaluate.concepts")
    assert (held_out.name, train.name) == ("held_out", "train") and not held_out.notes + train.notes
    assert (len(held_out.images()), len(train.images())) == (8, 30)
    for name, pairs in train.images().items():
        assert train.read_image(name, (160, 160)).std() > 0
        there = [pair.there for pair in pairs]
        assert sum(there) == len(there) / 2 and len({pair.phrase for pair in pairs}) == len(pairs)


def test_every_file_follows_from_the_seed(drawn, tmp_path):
    make_synthetic_concepts(tmp_path / "same", images=30, held_out=8)
    make_synthetic_concepts(tmp_path / "fewer", images=2, held_out=8)
    make_synthetic_concepts(tmp_path / "other", images=2, held_out=1, seed=1)
    assert contents(tmp_path / "same") == contents(drawn)
    fewer = contents(tmp_path / "fewer")
    assert fewer["held_out.json"] == contents(drawn)["held_out.json"]
    assert all(contents(drawn)[name] == content for name, content in fewer.items() if name.endswith(".png"))
    images = Counter(content for name, content in contents(drawn).items() if name.endswith(".png"))
    images.update(content for name, content in contents(tmp_path / "other").items() if name.endswith(".png"))
    assert max(images.values()) == 1  # neither subset nor seed repeats another's


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_drawn_and_asked():
    rng = np.random.default_rng([5, 1])
    scenes = [draw_scene(160, rng) for _ in range(300)]
    assert Counter(len(scene.phrases) for scene in scenes).keys() == {1, 2, 3, 4}
    assert {phrase for scene in scenes for phrase in scene.phrases} == set(PHRASES)
    assert not any((scene.masks_NHW.sum(0) > 1).any() for scene in scenes)
    later = [one == before for scene in scenes for before, one in zip(scene.phrases, scene.phrases[1:], strict=False)]
    assert np.mean(later) == pytest.approx(0.4 + 0.6 / 12, abs=0.06)
    hard = []
    for scene in scenes:
        words = {word for phrase in scene.phrases for word in phrase.split()}
        absent = set(asked_of(scene, rng)) - set(scene.phrases)
        hard += [bool(words & set(phrase.split())) for phrase in absent]
    assert 0.7 < np.mean(hard) < 0.95  # .6 on purpose, and by chance many of the others
