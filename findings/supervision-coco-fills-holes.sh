#!/usr/bin/env bash
# supervision reads run-length masks of a COCO file exactly, and writes them as polygons: holes are filled, and the area
# that is written beside them is that of the mask before. Written for YOLO, an object in two pieces becomes two objects.
#
# Versions:  supervision 0.31.2, opencv-python 5.0.0.93, pycocotools 2.0.11, numpy 2.4.6
# Behaviour: a file with two objects, iscrowd 0, as run-length encodings: a ring, and two rectangles that are one object.
#            DetectionDataset.from_coco gives both masks bit for bit. as_coco writes the ring as the polygon of its outer
#            edge, with the area of the ring, without a word. as_yolo writes a line for each rectangle, and from_yolo
#            finds three objects.
# A guess:   reading and writing one format keeps its masks, as run-length encodings or with their holes, and what was
#            one object stays one.
# Seen:      read 2 objects, pixels that differ: 0 0
#            written as COCO: ring of 2100 pixels now 2724, area 2100.0, said: nothing
#            written as YOLO and read again: 3 objects
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    supervision==0.31.2 opencv-python==5.0.0.93 pycocotools==2.0.11 numpy==2.4.6

cd "$folder"
venv/bin/python - <<'PYTHON'
import json
import os
import sys
import warnings

import cv2
import numpy as np
from pycocotools import mask as coco

warnings.simplefilter("ignore")
import supervision

HEIGHT, WIDTH = 100, 120
y, x = np.mgrid[:HEIGHT, :WIDTH]
away = (x - 40) ** 2 + (y - 50) ** 2
ring, pieces = (away < 30**2) & (away > 15**2), np.zeros((HEIGHT, WIDTH), bool)
pieces[10:20, 80:90] = pieces[60:80, 85:110] = True


def encoded(mask):
    runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return runs | {"counts": runs["counts"].decode()}


objects = [
    {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": int(mask.sum()),
     "bbox": coco.toBbox(encoded(mask)).tolist(), "segmentation": encoded(mask)}
    for number, mask in enumerate((ring, pieces), 1)
]
os.mkdir("images")
cv2.imwrite("images/a.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
about = {"images": [{"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}]}
with open("in.json", "w") as file:
    json.dump(about | {"categories": [{"id": 1, "name": "thing"}], "annotations": objects}, file)

read = supervision.DetectionDataset.from_coco("images", "in.json", force_masks=True)
[(_, _, found)] = list(read)
differing = [int((one != mask).sum()) for one, mask in zip(found.mask, (ring, pieces), strict=True)]
print("read", len(found), "objects, pixels that differ:", *differing)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    read.as_coco(annotations_path="out.json")
first = json.load(open("out.json"))["annotations"][0]
filled = int(coco.decode(coco.merge(coco.frPyObjects(first["segmentation"], HEIGHT, WIDTH))).sum())
told = [str(one.message) for one in said] or "nothing"
print(f"written as COCO: ring of {ring.sum()} pixels now {filled}, area {first['area']}, said: {told}")
places = {"images_directory_path": "yolo/images", "annotations_directory_path": "yolo/labels"}
read.as_yolo(**places, data_yaml_path="yolo/data.yaml")
[(_, _, again)] = list(supervision.DetectionDataset.from_yolo(**places, data_yaml_path="yolo/data.yaml", force_masks=True))
print("written as YOLO and read again:", len(again), "objects")
sys.exit((differing, filled, first["area"], told, len(again)) != ([0, 0], 2724, 2100.0, "nothing", 3))
PYTHON
