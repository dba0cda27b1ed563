# SPDX-License-Identifier: Apache-2.0
"""Prompted masks and their scores, against transformers one prompt at a time and against counting pixels."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from transformers import Sam3TrackerModel

from effsam3.benchmarks.masks import choose_annotations, iou_each, prompted_mask_quality, size_of
from effsam3.benchmarks.models import Pair
from effsam3.benchmarks.pictures.images import draw
from effsam3.data.images.index import build_index
from effsam3.data.images.sa1b import load_index
from effsam3.data.synthetic.images import make_synthetic_sa1b
from effsam3.errors import UserError
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import ChassisError
from effsam3.models.image.student import StudentTrunk, StudentTrunkConfig
from effsam3.models.inference.prompted import load_tracker, prompted_masks


@pytest.fixture(scope="module")
def models():
    folder = chassis_folder("tiny")
    return load_tracker(folder), Sam3TrackerModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("prompt", ["box", "point"])
def test_many_prompts_at_once_equal_transformers_one_by_one(models, prompt):
    tracker, reference = models
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    points = torch.rand(4, 2) * 200
    boxes = torch.cat([points / 2, points / 2 + 60], 1)
    # transformers' image class (5.23) adds the "no memory" embedding to a level that it then drops; the video class is
    # right, as in the original. So both get the video class's embeddings.
    embeddings = tracker.get_image_embeddings(pixels)
    logits, iou = prompted_masks(
        tracker, embeddings, boxes if prompt == "box" else None, points if prompt == "point" else None
    )
    assert logits.shape == (4, 64, 64) and iou.shape == (4,)
    for number in range(4):
        with torch.no_grad():
            if prompt == "box":
                box = boxes[None, number : number + 1]
                alone = reference(image_embeddings=embeddings, input_boxes=box, multimask_output=False)
                best = 0
            else:
                alone = reference(image_embeddings=embeddings, input_points=points[None, number : number + 1, None])
                best = int(alone.iou_scores[0, 0].argmax())
        expected = alone.pred_masks[0, 0, best]
        assert (logits[number] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    shutil.copytree(chassis_folder("tiny"), tmp_path / "chassis")
    tensors = load_file(tmp_path / "chassis/model.safetensors")
    tensors.pop("tracker_model.mask_decoder.iou_token.weight")
    save_file(tensors, tmp_path / "chassis/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ChassisError, match="iou_token"):
        load_tracker(tmp_path / "chassis")


def test_iou_counts_pixels():
    rng = np.random.default_rng(0)
    masks, truths = rng.random((3, 20, 30)) > 0.5, rng.random((3, 20, 30)) > 0.5
    masks[2] = truths[2] = False
    rles = [coco_mask.encode(np.asfortranarray(truth.astype(np.uint8))) for truth in truths]
    values = iou_each(torch.from_numpy(masks), rles)
    for value, mask, truth in zip(values[:2], masks, truths, strict=False):
        assert value == pytest.approx((mask & truth).sum() / (mask | truth).sum())
    assert values[2] == 1.0


def test_annotations_are_chosen_over_all_sizes():
    annotations = [{"area": area} for area in range(100, 0, -1)]
    chosen = [annotation["area"] for annotation in choose_annotations(annotations, 5)]
    assert chosen == sorted(chosen) and chosen[0] == 1 and chosen[-1] == 100 and len(chosen) == 5
    assert len(choose_annotations(annotations[:3], 5)) == 3


def test_size_is_measured_in_grid_positions():
    assert size_of({"area": 3 * 100}, 160, 160, 16) == "small"
    assert size_of({"area": 4 * 100}, 160, 160, 16) == "medium"
    assert size_of({"area": 64 * 100}, 160, 160, 16) == "large"


@pytest.fixture(scope="module")
def pair(models):
    tracker, _ = models
    torch.manual_seed(0)
    student = StudentTrunk(StudentTrunkConfig(timm_name="test_convnext", hidden_size=64, image_size=224)).eval()
    other = copy.deepcopy(tracker)
    other.vision_encoder.backbone = student
    return Pair(tracker, other, torch.device("cpu"))


def test_pictures_with_masks(models, pair, tmp_path):
    """Two rows of four panels: the masks that are drawn are those of the annotations."""
    tracker, _ = models
    make_synthetic_sa1b(tmp_path / "images", 6)
    build_index([tmp_path / "images"], tmp_path / "index.parquet", 0.5, workers=1, progress=False)
    index = load_index(tmp_path / "index.parquet", "val")
    wide, tall = (
        draw(pair, index, tmp_path, 1, tmp_path / name, masks) for name, masks in (("a", False), ("b", True))
    )
    with Image.open(wide[0]) as without, Image.open(tall[0]) as with_masks:
        assert with_masks.width == without.width and with_masks.height > 1.8 * without.height
    # The masks that teacher and student share a prompt for are measured on every annotated image.
    result = prompted_mask_quality(pair, index, tmp_path, ("box",), 2, 3)
    assert result["images"] == 2 and 2 <= result["box"]["masks"] <= 6
    same = prompted_mask_quality(Pair(tracker, tracker, pair.device), index, tmp_path, ("point",), 2, 3)
    assert same["point"]["agreement"] == 1.0 and same["point"]["student"] == same["point"]["teacher"]


def test_all_that_was_indexed_can_be_measured(pair, tmp_path):
    """SAM's own mask generator writes no `id`, other tools no `area`, `bbox` or points: they come from the masks."""
    make_synthetic_sa1b(tmp_path / "whole", 2)
    (tmp_path / "sparse").mkdir()
    for file in (tmp_path / "whole").glob("sa_*.j*"):
        shutil.copy(file, tmp_path / "sparse")
    for file in (tmp_path / "sparse").glob("*.json"):
        masks = [one["segmentation"] for one in json.loads(file.read_text())["annotations"]]
        file.write_text(json.dumps([{"segmentation": mask} for mask in masks]))
    found = {}
    for name in ("whole", "sparse"):
        report = build_index([tmp_path / name], tmp_path / f"{name}.parquet", 0.0, workers=1, progress=False)
        assert not report["annotation_problems"] and report["masks"] >= 6
        index = load_index(tmp_path / f"{name}.parquet")
        found[name] = prompted_mask_quality(pair, index, tmp_path, ("box", "point"), 2, 4)
    assert found["sparse"]["box"] == found["whole"]["box"], "the boxes and areas are those that were left out"
    assert found["sparse"]["images"] == 2 and np.isfinite(found["sparse"]["point"]["teacher"])
    assert draw(pair, index, tmp_path, 1, tmp_path / "out", masks=True)

    # Files that are lost after they were indexed are named, and end it only when none is left.
    (tmp_path / "sparse/sa_1.json").unlink()
    left = prompted_mask_quality(pair, index, tmp_path, ("box",), 2, 4)
    assert left["images"] == 1 and "sa_1" in left["unreadable"][0]
    assert [path.name for path in draw(pair, index, tmp_path, 2, tmp_path / "left", masks=True)] == ["sa_2.png"]
    (tmp_path / "sparse/sa_2.json").unlink()
    with pytest.raises(UserError, match="masks cannot be measured: annotations of 'sa_1': unreadable"):
        prompted_mask_quality(pair, index, tmp_path, ("box",), 2, 4)
