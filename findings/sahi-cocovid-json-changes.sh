#!/usr/bin/env bash
# `CocoVid.json` of sahi is a property that changes what it shows: each read moves all instance ids on, and the frame
# numbers that were given are counted anew.
#
# Versions:  sahi 0.12.8
# Behaviour: track 7 of video a and track 1 of video b, on frames 10 and 20. The first read gives them the ids 8 and 3,
#            the second 9 and 5, the third 10 and 7; `frame_id` is 0 and 1 each time, the 10 and 20 are lost.
# A guess:   reading a property changes nothing; instance_id and frame_id come out as they went in.
# Seen:      [8, 8, 3, 3] frames [0, 1, 0, 1]
#            [9, 9, 5, 5] frames [0, 1, 0, 1]
#            [10, 10, 7, 7] frames [0, 1, 0, 1]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sahi==0.12.8

"$folder/venv/bin/python" - <<'PYTHON'
import sys

from sahi.utils.coco import CocoVid, CocoVidAnnotation, CocoVideo, CocoVidImage

walks = CocoVid(name="walks")
walks.add_categories_from_coco_category_list([{"id": 0, "name": "dog"}])
for name, track in (("a", 7), ("b", 1)):
    video = CocoVideo(name=name, fps=24, height=48, width=64)
    for frame in (10, 20):
        image = CocoVidImage(file_name=f"{name}/{frame:05d}.jpg", height=48, width=64, frame_id=frame)
        image.add_annotation(CocoVidAnnotation(category_id=0, category_name="dog", bbox=[3, 4, 10, 12], instance_id=track))
        video.add_cocovidimage(image)
    walks.add_video(video)

seen = []
for _ in range(3):
    content = walks.json
    seen.append([annotation["instance_id"] for annotation in content["annotations"]])
    frames = [image["frame_id"] for image in content["images"]]
    print(seen[-1], "frames", frames)
sys.exit(seen != [[8, 8, 3, 3], [9, 9, 5, 5], [10, 10, 7, 7]] or frames != [0, 1, 0, 1])
PYTHON
