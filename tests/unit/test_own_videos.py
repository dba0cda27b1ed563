# SPDX-License-Identifier: Apache-2.0
"""People's own videos in the files that tools write: each is read right, or what is wrong with it is named."""

import pytest
from own_videos import H, W, coco_video, moving, write_frames, write_json, youtube_vis

from effsam3.data.videos.vos import open_vos, recognise


def check(video, masks_TNHW, objects=(1, 2)):
    """The masks of every frame are these."""
    assert video.annotated == list(range(len(masks_TNHW))) and video.objects == list(objects)
    for k, masks_NHW in enumerate(masks_TNHW):
        found = video.masks(k)
        assert list(found) == list(objects)
        assert all((found[name] == mask_HW).all() for name, mask_HW in zip(objects, masks_NHW, strict=True))
        assert abs(int(video.read([k])[0, 0, 0, 0]) - (10 + 20 * k)) < 4


@pytest.mark.parametrize(("form", "make"), [("coco_video", coco_video), ("youtube_vis", youtube_vis)])
@pytest.mark.parametrize("place", ["videos.json", "annotations/instances_default.json"])
def test_a_json_next_to_its_frames(tmp_path, form, make, place):
    masks = moving()
    write_frames(tmp_path / "walk", [f"{k:05d}.jpg" for k in range(5)])
    file = write_json(tmp_path / place, make(masks))
    for path in (tmp_path, file):
        tree = recognise(path)
        assert tree.format == form and str(file) in tree.about
        (video,) = open_vos(path)
        assert video.name == "walk" and video.size == (H, W) and not video.notes
        assert video.object_names == {1: 1, 2: 2}
        check(video, masks)
