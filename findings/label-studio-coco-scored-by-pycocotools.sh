#!/usr/bin/env bash
# Label Studio's COCO export counts annotations from 0. pycocotools takes 0 in its table of matches for "no match", so
# the first annotation of the export can never be found: perfect results do not score 1.
#
# Versions:  label-studio-sdk 2.1.2, pycocotools 2.0.11, hotcoco 1.3.0
# Behaviour: one photograph with 1, 2 or 4 outlined dogs, exported as BRUSH_TO_COCO, and its own masks as results. AP of
#            pycocotools is 0.0, 0.252 and 0.564; of hotcoco, which has the same interface, 1.0 each time. No warning.
# A guess:   any unique id will do, and results equal to the truth score 1.0 in every evaluator.
# Seen:      1 dog(s), ids [0]: pycocotools 0.000, hotcoco 1.000
#            2 dog(s), ids [0, 1]: pycocotools 0.252, hotcoco 1.000
#            4 dog(s), ids [0, 1, 2, 3]: pycocotools 0.564, hotcoco 1.000
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    label-studio-sdk==2.1.2 pycocotools==2.0.11 hotcoco==1.3.0

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import contextlib
import io
import json
import sys
from pathlib import Path

import hotcoco
import pycocotools.coco
import pycocotools.cocoeval
from label_studio_sdk.converter import Converter
from pycocotools import mask

WIDTH, HEIGHT = 200, 100
LABELS = (
    '<View><Image name="image" value="$image"/>'
    '<PolygonLabels name="label" toName="image"><Label value="dog"/></PolygonLabels></View>'
)


def task(dogs):
    """One photograph as Label Studio keeps it; outlines are in percent."""
    outlines = [[[x, 20], [x + 20, 20], [x + 20, 60], [x, 60]] for x in range(5, 5 + 25 * dogs, 25)]
    shapes = [
        {
            "id": f"dog{number}", "type": "polygonlabels", "from_name": "label", "to_name": "image", "image_rotation": 0,
            "original_width": WIDTH, "original_height": HEIGHT,
            "value": {"points": points, "polygonlabels": ["dog"], "closed": True},
        }
        for number, points in enumerate(outlines)
    ]
    person = {"id": 1, "email": "annotator@example.com"}
    return {
        "id": 1, "data": {"image": "/data/upload/1/photo.jpg"},
        "annotations": [{"id": 1, "completed_by": person, "result": shapes}],
    }


def ap(coco, evaluator, truth, found):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco(str(truth))
        load = truth.loadRes if isinstance(truth, pycocotools.coco.COCO) else truth.load_res
        evaluation = evaluator(truth, load(str(found)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(float(evaluation.stats[0]), 3)


scores = []
for dogs in (1, 2, 4):
    root = Path(sys.argv[1]) / str(dogs)
    root.mkdir()
    (root / "tasks.json").write_text(json.dumps([task(dogs)]))
    Converter(LABELS, project_dir=str(root)).convert(str(root / "tasks.json"), str(root), "BRUSH_TO_COCO", is_dir=False)
    truth = root / "result_coco.json"
    annotations = json.loads(truth.read_text())["annotations"]
    results = []
    for annotation in annotations:
        rle = mask.merge(mask.frPyObjects(annotation["segmentation"], HEIGHT, WIDTH))
        rle["counts"] = rle["counts"].decode()
        kept = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        results.append(kept | {"segmentation": rle, "score": 0.9})
    (root / "found.json").write_text(json.dumps(results))
    scores.append(
        (
            ap(pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval, truth, root / "found.json"),
            ap(hotcoco.COCO, hotcoco.COCOeval, truth, root / "found.json"),
        )
    )
    ids = [annotation["id"] for annotation in annotations]
    print(f"{dogs} dog(s), ids {ids}: pycocotools {scores[-1][0]:.3f}, hotcoco {scores[-1][1]:.3f}")
sys.exit(scores != [(0.0, 1.0), (0.252, 1.0), (0.564, 1.0)])
PYTHON
