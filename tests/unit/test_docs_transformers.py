# SPDX-License-Identifier: Apache-2.0
"""docs/transformers.md: every block of Python runs as it stands, on models merged with the real verb."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import merged_run

from effsam3.data.synthetic.videos import mp4_bytes

DOCUMENT = Path(__file__).parents[2] / "docs/transformers.md"
HEIGHT, WIDTH = 150, 200


def blocks(language: str) -> dict[str, list[str]]:
    """{title of the section: its blocks of code}"""
    sections = DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]
    found = {
        section.partition("\n")[0]: re.findall(rf"```{language}\n(.*?)```", section, re.S) for section in sections
    }
    return {title: code for title, code in found.items() if code}


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> dict[str, Path]:
    """{filled slots: run folder with a merged model}"""
    runs = tmp_path_factory.mktemp("runs")
    release = merged_run(runs, "image", "text")
    return {"image": merged_run(runs / "alone", "image"), "image and text": release}


@pytest.fixture
def folder(merged, tmp_path, monkeypatch) -> Path:
    """A working directory with what the document speaks of: photo.jpg, clip.mp4 and a run."""
    frames = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(frames[0]).save(tmp_path / "photo.jpg")
    (tmp_path / "clip.mp4").write_bytes(mp4_bytes(frames))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/stage1-image-es_rv_m").symlink_to(merged["image"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_image_text(names):
    assert names["found"].masks_OHW.shape == (10, HEIGHT, WIDTH)
    assert names["inputs"]["input_boxes"].shape == (1, 2, 4)


def check_image_boxes(names):
    assert names["masks"].shape == (2, 1, HEIGHT, WIDTH) and names["masks"].dtype == torch.bool
    assert names["outputs"].object_ids == [1, 2, 3]


def check_video_text(names):
    assert names["outputs"].frame_idx == 2 and names["found"]["masks"].shape[1:] == (HEIGHT, WIDTH)


def check_video_clicks(names):
    assert names["outputs"].frame_idx == 2 and names["masks"].shape == (2, 1, HEIGHT, WIDTH)


CHECKS = {
    "Text prompts on an image": check_image_text,
    "Boxes and points on an image": check_image_boxes,
    "Text prompts in a video": check_video_text,
    "Box and point prompts in a video": check_video_clicks,
}


def test_every_section_with_code_is_checked():
    assert blocks("python").keys() == CHECKS.keys()


@pytest.mark.parametrize("title", CHECKS)
def test_every_block_runs(folder, merged, title, capsys):
    (folder / "merged").symlink_to(merged["image"] / "merged")
    names = {}
    for block in blocks("python")[title]:
        exec(block.replace("threshold=0.5", "threshold=0.0"), names)  # random weights are sure of nothing
    assert capsys.readouterr().out
    CHECKS[title](names)


def test_with_a_text_student_the_class_is_another(folder, merged):
    (folder / "merged").symlink_to(merged["image and text"] / "merged")
    title, names = "Text prompts on an image", {}
    for block in blocks("python")[title]:
        block = block.replace("Sam3Model", "Sam3LiteTextModel")
        exec(block.replace("threshold=0.5", "threshold=0.0"), names)
    CHECKS[title](names)
