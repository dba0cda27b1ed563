# SPDX-License-Identifier: Apache-2.0
"""The whole way on photographs of one's own: a folder and a recipe, down to the card of the released model."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from commands import ENVIRONMENT, SMOKE, run_here
from PIL import Image

from effsam3.data.images.photographs import ready_photographs
from effsam3.data.synthetic.images import make_synthetic_sa1b

RECIPE = """\
inherits: {base}
name: my-photographs
data: {{source: folder, folder: {folder}/photos, synthetic_images: 0, index: data/photos.parquet, held_out: 0.3}}
embed: {{to: data/teacher}}
optim: {{warmup_steps: 1}}
train: {{steps: 4, eval_every: 4, log_every: 2, eval_samples: 4, loggers: []}}
evaluate: {{max_images: 4, pictures: 1}}
push: {{repo: me/my-photographs}}
"""


def test_a_folder_of_photographs_becomes_a_released_model(tmp_path):
    drawn = tmp_path / "drawn"
    make_synthetic_sa1b(drawn, 16, side_px=64)
    for number, file in enumerate(sorted(drawn.glob("*.jpg"))):  # eight names in two folders, no JSON
        place = tmp_path / "photos" / ("summer", "winter")[number % 2] / f"IMG_{number // 2}.JPG"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    (tmp_path / "photos/IMG_9.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.format(base=SMOKE, folder=tmp_path))
    command = [sys.executable, "-m", "effsam3.cli", "launch", str(recipe)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # Before the first step: what was left out of the index, and what will not be measured.
    start, _, rest = done.stdout.partition("(untrained)")
    assert "16 images (" in start and "1 files left out" in start and "IMG_9.HEIC" in start
    assert "later    evaluate: The benchmark `masks` is left out: no held-out image of data/photos.parquet" in start
    summary = (tmp_path / "runs/my-photographs/eval/summary.md").read_text()
    assert "The benchmark `masks` is left out" in summary and "| speed on" in summary and "held-out images" in summary
    results = {path.name for path in (tmp_path / "runs/my-photographs/eval").glob("*.json")}
    assert results == {"fidelity.json", "speed.json"}
    (picture,) = (tmp_path / "runs/my-photographs/pictures").glob("*.png")
    assert picture.name.startswith("IMG_") and "/" not in picture.name.removesuffix(".png")
    printed = run_here(tmp_path, "push", "--dry-run", recipe=recipe)
    card = (tmp_path / "runs/my-photographs/merged/README.md").read_text()
    # Neither the card nor anything that was said on the way speaks of a data set that nobody used.
    for text in (done.stdout, done.stderr, printed, card, summary, run_here(tmp_path, "show", recipe=recipe)):
        assert "sa1b" not in text.lower() and "sa-1b" not in text.lower(), text
    assert "| data            | own photographs" in card

    # Another photograph under an old name: named, and it alone is made anew once the folder is indexed again.
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "photos/winter/IMG_3.JPG")
    printed = run_here(tmp_path, "embed", recipe=recipe)
    assert "photos has changed since it was indexed: 1 of another size (winter/IMG_3.JPG); delete" in printed
    (tmp_path / "data/photos.parquet").unlink()
    assert "replaced since it was made): winter/IMG_3.JPG" in run_here(
        tmp_path, "train", "name=again", recipe=recipe, code=2
    )
    assert "1 made now" in run_here(tmp_path, "embed", recipe=recipe)
    assert ready_photographs(str(tmp_path / "photos"), tmp_path / "data/photos.parquet", 0.3) == ""
    assert json.loads((tmp_path / "data/photos.report.json").read_text())["images"]["val"] > 0
