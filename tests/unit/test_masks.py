# SPDX-License-Identifier: Apache-2.0
"""Prompted masks and their scores, against transformers one prompt at a time and against counting pixels."""

import shutil

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from transformers import Sam3TrackerModel

from effsam3.benchmarks.masks import choose_annotations, iou_each, size_of
from effsam3.models.prompted import load_tracker, prompted_masks
from effsam3.models.sam3 import ChassisError, chassis_folder


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
    annotations = [{"area": area, "id": area} for area in range(100, 0, -1)]
    chosen = [annotation["area"] for annotation in choose_annotations(annotations, 5)]
    assert chosen == sorted(chosen) and chosen[0] == 1 and chosen[-1] == 100 and len(chosen) == 5
    assert len(choose_annotations(annotations[:3], 5)) == 3


def test_size_is_measured_in_grid_positions():
    assert size_of({"area": 3 * 100}, 160, 160, 16) == "small"
    assert size_of({"area": 4 * 100}, 160, 160, 16) == "medium"
    assert size_of({"area": 64 * 100}, 160, 160, 16) == "large"
