# SPDX-License-Identifier: Apache-2.0
"""Synthetic SA-1B: the released format, true masks, and files that depend on (seed, number) alone."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from effsam3.data.images.sa1b import mask_of, parse_annotations
from effsam3.data.synthetic.images import innermost_point, make_scene, make_synthetic_sa1b


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_have_the_released_form_and_the_masks_are_whole(tmp_path):
    make_synthetic_sa1b(tmp_path, 10, side_px=96)
    shapes = set()
    for number in range(1, 11):
        image = Image.open(tmp_path / f"sa_{number}.jpg")
        assert image.format == "JPEG" and image.mode == "RGB" and max(image.size) == 96
        shapes.add(image.size)
        record = json.loads((tmp_path / f"sa_{number}.json").read_text())
        assert record["image"] == {
            "image_id": number, "width": image.width, "height": image.height, "file_name": f"sa_{number}.jpg",
        }  # fmt: skip
        annotations = parse_annotations((tmp_path / f"sa_{number}.json").read_bytes(), image.height, image.width)
        assert 3 <= len(annotations) <= 8
        covered = np.zeros((image.height, image.width), int)
        for annotation in annotations:
            assert set(annotation) == {
                "segmentation", "bbox", "area", "predicted_iou", "stability_score", "crop_box", "point_coords", "id",
            }  # fmt: skip
            assert isinstance(annotation["segmentation"]["counts"], str)
            mask = mask_of(annotation, image.height, image.width)
            covered += mask
            rows, columns = np.nonzero(mask)
            x, y = annotation["point_coords"][0]
            assert mask[int(y), int(x)] and annotation["area"] == mask.sum() >= 24
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == box == coco_mask.toBbox(annotation["segmentation"]).tolist()
            assert annotation["crop_box"] == [0, 0, image.width, image.height]
        assert covered.max() == 1, "visible regions do not overlap"
    assert len(shapes) > 3
    assert len({annotation["id"] for annotation in annotations}) == len(annotations)


def test_a_shape_has_its_own_look():
    # A mask that were not where its shape is would cut through surfaces: its border would show no edge.
    pixels, masks = make_scene(192, np.random.default_rng(3))
    steps = np.abs(np.diff(pixels.astype(float), axis=1)).sum(-1)
    border = (masks[:, :, 1:] != masks[:, :, :-1]).any(0)
    assert steps[border].mean() > 2 * steps[~border].mean()


def test_more_images_later_leave_the_first_as_they_are(tmp_path):
    make_synthetic_sa1b(tmp_path / "a", 3, side_px=64, seed=5)
    first = contents(tmp_path / "a")
    make_synthetic_sa1b(tmp_path / "a", 5, side_px=64, seed=5)
    make_synthetic_sa1b(tmp_path / "b", 5, side_px=64, seed=5)
    later = contents(tmp_path / "a")
    assert later == contents(tmp_path / "b") and first.items() <= later.items() and len(later) == 10


def test_a_half_written_pair_is_made_again_and_whole_ones_are_kept(tmp_path):
    make_synthetic_sa1b(tmp_path, 3, side_px=64)
    whole = contents(tmp_path)
    (tmp_path / "sa_2.json").unlink()
    kept = (tmp_path / "sa_1.jpg").stat().st_mtime_ns
    make_synthetic_sa1b(tmp_path, 3, side_px=64)
    assert contents(tmp_path) == whole and (tmp_path / "sa_1.jpg").stat().st_mtime_ns == kept


def test_innermost_point():
    mask = np.zeros((50, 60), bool)
    mask[10:31, 20:51] = True
    mask[0:3, 0:3] = True
    x, y = innermost_point(mask)
    assert y == 20 and 30 <= x <= 40
    single = np.zeros((9, 9), bool)
    single[8, 0] = True
    assert innermost_point(single) == [0.0, 8.0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((20, 20)) < 0.6
        x, y = innermost_point(mask)
        assert mask[int(y), int(x)]
