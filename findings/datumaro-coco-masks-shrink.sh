#!/usr/bin/env bash
# Datumaro writes an ordinary mask to COCO as the polygon through the centres of its outer pixels. Read back, the mask
# has lost a row and a column; one that is two pixels thin has no polygon left at all.
#
# Versions:  datumaro 1.13.12, pycocotools 2.0.11
# Behaviour: masks of 10, 3, 2 and 1 by 7 pixels (70, 21, 14, 7) come back as 54, 12, 0 and 0 pixels. The thin ones have
#            `segmentation: []` beside the right bbox and area. No warning. (With is_crowd set, RLE is written.)
# A guess:   a mask goes into COCO and comes out as it was, as RLE or as a polygon that covers the same pixels.
# Seen:      10 x 7: 70 pixels -> 54
#            3 x 7: 21 pixels -> 12
#            2 x 7: 14 pixels -> 0
#            1 x 7: 7 pixels -> 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datumaro==1.13.12 pycocotools==2.0.11

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import datumaro as dm
import numpy as np
from datumaro.components.annotation import Mask
from pycocotools import mask as coco

HEIGHT, WIDTH = 20, 30


def pixels_after(mask, folder):
    """How many pixels pycocotools finds in the file that Datumaro writes of one mask."""
    item = dm.DatasetItem(
        id="00000",
        media=dm.Image.from_numpy(np.zeros((HEIGHT, WIDTH, 3), np.uint8)),
        annotations=[Mask(mask, label=0, id=1, group=1, attributes={"is_crowd": False, "track_id": 4})],
    )
    dm.Dataset.from_iterable([item], categories=["dog"]).export(str(folder), "coco_instances")
    [file] = folder.glob("annotations/*.json")
    [annotation] = json.loads(file.read_text())["annotations"]
    polygons = annotation["segmentation"]
    return int(coco.area(coco.merge(coco.frPyObjects(polygons, HEIGHT, WIDTH)))) if polygons else 0


found = []
for width in (10, 3, 2, 1):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:12, 4 : 4 + width] = 1
    found.append(pixels_after(mask, Path(sys.argv[1]) / str(width)))
    print(f"{width} x 7: {mask.sum()} pixels -> {found[-1]}")
sys.exit(found != [54, 12, 0, 0])
PYTHON
