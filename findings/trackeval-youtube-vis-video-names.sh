#!/usr/bin/env bash
# TrackEval's YouTube-VIS reader takes the first folder of a video's frame names for the video's name. Videos that share
# that folder are one video to it: the last one. The others are never scored, without a word.
#
# Versions:  trackeval 1.3.0, pycocotools 2.0.11, numpy 2.4.6
# Behaviour: two videos, of which the tracker found the second and missed the first. With frames a/0.jpg and b/0.jpg the
#            mean HOTA is 0.707. With JPEGImages/a/0.jpg and JPEGImages/b/0.jpg, as YouTube-VIS and DAVIS folders lie on
#            disk, the same tracks score 1.0.
# A guess:   a video is its `id` in `videos`; the file names change nothing.
# Seen:      one folder a video: {'a': 0.0, 'b': 1.0, 'COMBINED_SEQ': 0.707}
#            one folder above:   {'JPEGImages': 1.0, 'COMBINED_SEQ': 1.0}
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trackeval==1.3.0 pycocotools==2.0.11 numpy==2.4.6

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import contextlib, io, json, sys
from pathlib import Path

import numpy as np
import trackeval
from pycocotools import mask as coco


def masks():
    """A square that moves to the right, in three frames."""
    for frame in range(3):
        mask = np.zeros((20, 30), np.uint8)
        mask[5:12, 4 + frame : 14 + frame] = 1
        yield mask


def uncompressed(mask):  # what this reader takes as truth
    flat = mask.ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    return {"size": list(mask.shape), "counts": np.diff(edges).tolist()}


def compressed(mask):  # and as results
    rle = coco.encode(np.asfortranarray(mask))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def hota(root, prefix):
    """Mean HOTA of each video; the tracker found the dog of video 2 only."""
    videos = [
        {"id": number, "width": 30, "height": 20, "length": 3, "file_names": [f"{prefix}{name}/{k}.jpg" for k in range(3)]}
        for number, name in ((1, "a"), (2, "b"))
    ]
    truth = [
        {
            "id": video["id"], "video_id": video["id"], "category_id": 1, "iscrowd": 0, "width": 30, "height": 20,
            "segmentations": [uncompressed(mask) for mask in masks()], "areas": [70] * 3,
        }
        for video in videos
    ]
    found = [{"video_id": 2, "category_id": 1, "score": 0.9, "segmentations": [compressed(mask) for mask in masks()]}]
    truth_folder, found_folder = root / "truth/youtube_vis_train_sub_split", root / "found/youtube_vis_train_sub_split/ours/data"
    for folder in (truth_folder, found_folder):
        folder.mkdir(parents=True)
    categories = [{"id": 1, "name": "dog"}]
    (truth_folder / "truth.json").write_text(json.dumps({"videos": videos, "annotations": truth, "categories": categories}))
    (found_folder / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        data = trackeval.datasets.YouTubeVIS(
            {"GT_FOLDER": f"{root}/truth/", "TRACKERS_FOLDER": f"{root}/found/", "PRINT_CONFIG": False}
        )
        evaluator = trackeval.Evaluator(
            {"PRINT_CONFIG": False, "PRINT_RESULTS": False, "OUTPUT_SUMMARY": False, "OUTPUT_DETAILED": False, "PLOT_CURVES": False}
        )
        scores, _ = evaluator.evaluate([data], [trackeval.metrics.HOTA()])
    videos = scores["YouTubeVIS"]["ours"]
    return {name: round(float(np.mean(video["dog"]["HOTA"]["HOTA"])), 3) for name, video in videos.items()}


root = Path(sys.argv[1])
apart, above = hota(root / "apart", ""), hota(root / "above", "JPEGImages/")
print("one folder a video:", apart)
print("one folder above:  ", above)
sys.exit(apart != {"a": 0.0, "b": 1.0, "COMBINED_SEQ": 0.707} or above != {"JPEGImages": 1.0, "COMBINED_SEQ": 1.0})
PYTHON
