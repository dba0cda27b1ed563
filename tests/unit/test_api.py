# SPDX-License-Identifier: Apache-2.0
"""The public names: that they are imported late, what `Predictor` finds, and that documents and notebook run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from run_folders import merged_run

import effsam3
from effsam3 import Predictor, load_model
from effsam3.cli import main
from effsam3.data.synthetic.videos import mp4_bytes
from effsam3.errors import UserError
from effsam3.models.inference.concepts import ConceptModel

ROOT = Path(__file__).parents[2]
BOXES = [[20, 30, 120, 90], [5, 60, 50, 140]]


def python(code: str) -> str:
    """Run code in a fresh process and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def photo(tmp_path) -> np.ndarray:
    """An image, uint8 (H, W, 3), which lies in the working directory as photo.png and photo.jpg."""
    image_HW3 = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    for name in ("photo.png", "photo.jpg"):
        Image.fromarray(image_HW3).save(tmp_path / name)
    (tmp_path / "clip.mp4").write_bytes(mp4_bytes(np.stack([image_HW3] * 3)))
    return image_HW3


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor("tiny", device="cpu")


# ---- names


def test_names_are_imported_when_they_are_used():
    code = "import sys, effsam3; listed = set(dir(effsam3)) >= set(effsam3.__all__)\n"
    code += "effsam3.load_recipe('smoke/image'); print(listed, sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert python(code) == "True []\n"


def test_every_name_is_there_and_documented():
    document = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in effsam3.__all__:
        assert getattr(effsam3, name) is not None
        assert re.search(rf"`[^`]*\b{name}\b", document), name
    with pytest.raises(AttributeError, match="no attribute 'traim'"):
        _ = effsam3.traim


# ---- what a predictor finds


def test_a_file_a_picture_and_an_array_are_the_same(predictor, photo):
    found = [predictor.image(image, box=BOXES) for image in ("photo.png", Image.open("photo.png"), photo)]
    assert found[0].masks_OHW.shape == (2, 150, 200) and found[0].masks_OHW.dtype == torch.bool
    assert all(torch.equal(found[0].masks_OHW, other.masks_OHW) for other in found[1:])


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        ({"box": BOXES}, ["--box", "20,30,120,90", "--box", "5,60,50,140"]),
        ({"point": [[60, 40], [5, 5, 0]]}, ["--point", "60,40", "--point", "5,5,0"]),
        ({"text": ["a dog", "a ring"], "threshold": 0.0}, ["--text", "a dog", "--text", "a ring", "--threshold", "0"]),
    ],
)
def test_it_finds_what_the_verb_writes(predictor, photo, prompts, options):
    found = predictor.image("photo.png", **prompts)
    assert main(["predict", "tiny", "photo.png", *options, "--out", "out"]) == 0
    written = json.loads(Path("out/predictions.json").read_text())["instances"]
    assert [row["id"] for row in written] == found.ids
    assert [row["score"] for row in written] == [round(score, 4) for score in found.scores_O.tolist()]
    masks = np.stack([coco_mask.decode(row["segmentation"]) for row in written]).astype(bool)
    np.testing.assert_array_equal(masks, found.masks_OHW.numpy())


def test_nothing_is_written(predictor, photo, tmp_path):
    before = sorted(tmp_path.iterdir())
    predictor.image(photo, "a dog")
    frames = dict(predictor.video("clip.mp4", box=BOXES[0]))
    assert list(frames) == [0, 1, 2] and frames[2].masks_OHW.shape == (1, 150, 200)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "nothing to look for"),
        ({"box": [0, 0, 500, 10]}, "is not a box in an image of 200x150 px"),
        ({"box": [0, 0, 5]}, "expected 4 numbers in pixels"),
        ({"point": [[1, 2, 5]]}, "expected 2 numbers in pixels and, where wanted, a label 1 or 0"),
        ({"text": "a dog", "point": [1, 2]}, "give one or the other"),
    ],
)
def test_wrong_prompts_are_named(predictor, photo, prompts, message):
    with pytest.raises(UserError, match=message):
        predictor.image(photo, **prompts)


def test_wrong_images_and_models_are_named(predictor):
    with pytest.raises(UserError, match=r"there is no nothing.jpg"):
        predictor.image("nothing.jpg", "a dog")
    with pytest.raises(UserError, match=r"image is float64 of \(4, 4, 3\); expected uint8"):
        predictor.image(np.zeros((4, 4, 3)), "a dog")
    with pytest.raises(UserError, match="MODEL: "):
        Predictor("runs/nothing")


def test_the_loaded_model_encodes_geometry_as_the_predictors_does(predictor, photo):
    model, concepts = load_model("tiny"), predictor.concepts
    assert isinstance(concepts, ConceptModel)
    pixels = concepts.processor.image_processor(photo, return_tensors="pt").pixel_values
    tokens = concepts.processor.tokenizer("a dog", return_tensors="pt")
    with torch.no_grad():
        outputs = [one.detector_model(pixel_values=pixels, **tokens) for one in (model, concepts.model)]
    torch.testing.assert_close(outputs[0].pred_logits, outputs[1].pred_logits, rtol=0, atol=0)


# ---- documents


def test_the_notebook_runs(monkeypatch):
    notebook = json.loads((ROOT / "docs/first_masks.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert len([line for line in code.splitlines() if line]) <= 15
    names: dict = {}
    exec(code, names)
    assert names["shown"].masks_OHW.shape == (1, 240, 320) and names["found"].masks_OHW.shape[1:] == (240, 320)
    assert names["pixels"].shape == (240, 320, 3)


def test_every_block_of_the_document_runs(photo, tmp_path):
    (tmp_path / "merged").symlink_to(merged_run(tmp_path / "one", "image") / "merged")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 5
    python("\n".join(blocks))
    assert (tmp_path / "runs/smoke-image/merged/model.safetensors").is_file()
