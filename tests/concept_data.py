# SPDX-License-Identifier: Apache-2.0
"""Drawn images with annotated concepts, as COCO's JSON, and a merged run whose recipe measures them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from run_folders import image_run

from effsam3 import merge
from effsam3.data.coco import rles_of
from effsam3.data.images.index import build_index
from effsam3.data.synthetic.images import make_synthetic_sa1b
from effsam3.recipe.reader import load_recipe

NAMES = {1: "red square", 2: "green square", 3: "blue_square"}
HEIGHT, WIDTH = 60, 80


def draw_concepts(folder: Path, images: int = 4) -> Path:
    """Write images of squares and `squares.json`; image n shows the colours whose bits n + 1 has. Returns the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations, rows = [], []
    for number in range(images):
        picture = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        for category in NAMES:
            if not (number + 1) >> (category - 1) & 1:
                continue
            mask = np.zeros((1, HEIGHT, WIDTH), bool)
            mask[0, 5 * category : 5 * category + 20, 22 * category - 18 : 22 * category + 2] = True
            picture[mask[0]] = np.eye(3, dtype=np.uint8)[category - 1] * 220
            (rle,) = rles_of(mask)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0, "area": 400}
                | {"bbox": [22 * category - 18, 5 * category, 20, 20]}
                | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}}
            )
        Image.fromarray(picture).save(folder / f"{number}.png")
        rows.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    path = folder / "squares.json"
    path.write_text(json.dumps({"images": rows, "annotations": annotations, "categories": categories}))
    return path


def merged_with_concepts(folder: Path) -> tuple[Path, list[str]]:
    """Return a merged run of stage image, and overrides by which it is measured on drawn concepts only."""
    concepts = draw_concepts(folder / "concepts")
    make_synthetic_sa1b(folder / "photos", 4)
    build_index([folder / "photos"], folder / "index.parquet", 0.5, workers=1, progress=False)
    run = image_run(folder / "runs")
    own = [f"data.index={folder}/index.parquet", f"evaluate.concepts={concepts}", "evaluate.benchmarks=[concepts]"]
    own += [f"train.runs={folder}/runs", "evaluate.pictures=0", "evaluate.concept_pictures=3"]
    merge.run(load_recipe(run / "recipe.yaml", own[:1]))
    return run, own
