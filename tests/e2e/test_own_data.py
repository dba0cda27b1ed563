# SPDX-License-Identifier: Apache-2.0
"""docs/own_data.md from its first command to its last, on a tiny SAM 3 and in few steps."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

from commands import REPOSITORY, run_here

PAGE = REPOSITORY / "docs/own_data.md"
SHORT = [
    "hardware=cpu", "sam3.checkpoint=tiny", "data.workers=0", "train.precision=fp32", "train.recompute=false",
    "train.steps=4", "train.global_batch_size=2", "train.micro_batch_size=2", "train.eval_every=4",
    "train.save_every=4", "train.eval_samples=2", "optim.lr=1e-3", "optim.warmup_steps=1",
]  # fmt: skip
VIDEO = ["data.frames=3", "data.objects=1", "data.held_out=0.2", "loss.side_px=56", "evaluate.max_videos=1"]
IMAGES = ["train.epochs=null", "data.held_out=0.2", "evaluate.max_images=2"]
OVERRIDES = {  # what a reader would write at the lines marked YOURS, and what makes the run short
    "smoke/video": [*SHORT, *VIDEO],
    "mine.yaml": [*SHORT, *VIDEO, "data.path=data/mine"],
    "smoke/lora": [*SHORT, *IMAGES, "data.synthetic_images=10"],
    "domain.yaml": [*SHORT, *IMAGES, "data.path=runs/smoke-lora/data"],
}


def commands() -> list[list[str]]:
    """The page's command lines, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]


def run(verb: str, *arguments: str) -> str:
    from effsam3.cli import main

    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([verb, *arguments]) == 0, printed.getvalue()
    return printed.getvalue()


def test_the_page_from_beginning_to_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = {}
    for _, verb, *words in commands():
        overrides = OVERRIDES.get(words[0], [])
        if verb == "launch":  # its verbs, without a process of its own for each
            for one in ("train", "merge", "evaluate"):
                printed[words[0], one] = run_here(tmp_path, one, *overrides, recipe=Path(words[0]))
        elif verb == "train":
            printed[words[0], "debug"] = run_here(tmp_path, verb, *words[1:], *overrides, recipe=Path(words[0]))
        else:
            rest = ["--dry-run"] if verb == "push" else []
            printed[words[1] if verb == "data" else words[0], verb] = run(verb, *words, *overrides, *rest)
    assert "data/mine: DAVIS" in printed["data/mine", "data"] and "12 videos" in printed["data/mine", "data"]
    assert "images with masks" in printed["runs/smoke-lora/data", "data"]
    assert (tmp_path / "mine.png").is_file() and (tmp_path / "runs/mine-debug").is_dir()
    for name in ("mine", "domain"):
        card = json.loads((tmp_path / f"runs/{name}/merged/effsam3.json").read_text())
        assert [one["name"] for one in card["adapted"]] == [name]
        assert (tmp_path / f"runs/{name}/eval/summary.md").is_file()
    assert "1 videos" in printed["mine.yaml", "evaluate"] and "start" in printed["mine.yaml", "evaluate"]
    assert {file.name for file in (tmp_path / "runs/domain/adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert os.path.getsize(tmp_path / "runs/domain/adapter/adapter_model.safetensors") < 4e6
    push = printed["mine.yaml", "push"]
    assert "model.safetensors" in push and "README.md" in push
