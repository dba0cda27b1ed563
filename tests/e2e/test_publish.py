# SPDX-License-Identifier: Apache-2.0
"""Push by the real command over a bad line, then load what arrived in another process."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
from commands import ENVIRONMENT, run
from fake_hub import FakeHub
from PIL import Image
from run_folders import merged_run

# Weights and outputs of the folder here and of the repository there, both read from files: the same bit for bit.
COMPARE = """
import sys
import effsam3.auto
import torch
from transformers import Sam3Model, Sam3Processor, Sam3VideoModel

weights, outputs = [], []
for source in sys.argv[1:3]:
    weights.append(Sam3VideoModel.from_pretrained(source).state_dict())
    processor = Sam3Processor.from_pretrained(source)
    pixels = torch.arange(3 * 224 * 224).reshape(1, 3, 224, 224) % 255 / 127.5 - 1
    text = processor(text="two red rings", return_tensors="pt")
    with torch.no_grad():
        outputs.append(Sam3Model.from_pretrained(source).eval()(pixel_values=pixels, **text))
assert weights[0].keys() == weights[1].keys()
assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
for name in ("pred_masks", "pred_boxes", "pred_logits"):
    assert torch.equal(outputs[0][name], outputs[1][name]), name
assert outputs[0].pred_masks.std() > 0
for block in open(sys.argv[3]).read().split("# next block\\n"):
    exec(block, {})
print("the same")
"""


def test_a_push_over_a_bad_line_is_the_model_that_lies_here(tmp_path):
    folder = merged_run(tmp_path / "runs", "image")
    with FakeHub(part_bytes=8_000_000) as hub:
        environment = ENVIRONMENT | hub.environment() | {"HF_HOME": str(tmp_path / "hf")}
        recipe, push = folder / "recipe.yaml", ("push", "push.repo=tester/model")
        printed = run(tmp_path, *push, code=2, recipe=recipe, environment=environment | {"HF_TOKEN": ""})
        assert printed.startswith("error: no token for") and "Traceback" not in printed and hub.requests == []

        hub.fail(r"/blobs/\w+/3$", "break")
        hub.fail("/commit/", 503)
        assert "answers 503" in run(tmp_path, *push, code=2, recipe=recipe, environment=environment)
        printed = run(tmp_path, *push, recipe=recipe, environment=environment)
        assert f"{hub.url}/tester/model" in printed
        assert len(hub.sent(r"PUT /blobs/\w+/3$")) == 2  # broken off, then again
        assert len(hub.sent(r"PUT /blobs/\w+/\d+$")) == 5  # four parts, one of them twice
        repository = hub.repositories["tester/model"]
        assert repository.private and len(repository.commits) == 1
        files = repository.branches["main"]
        assert files["model.safetensors"] == (folder / "merged/model.safetensors").read_bytes()

        (tmp_path / "frames").mkdir()
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
        for file in ("photo.jpg", "frames/0.jpg"):
            picture.save(tmp_path / file)
        blocks = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.S)
        assert len(blocks) == 3
        (tmp_path / "blocks.py").write_text("# next block\n".join(blocks).replace("clip.mp4", "frames"))
        done = subprocess.run(
            [sys.executable, "-c", COMPARE, str(folder / "merged"), "tester/model", "blocks.py"],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.endswith("the same\n"), done.stdout + done.stderr
        assert hub.sent("GET /tester/model/resolve/.+/model.safetensors")
