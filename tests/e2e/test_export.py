# SPDX-License-Identifier: Apache-2.0
"""Whole exports, and the example that uses them where there is no PyTorch."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import REPOSITORY, run_here
from PIL import Image
from transformers import Sam3VideoModel

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_part, quiet_transformers, read_config, read_tensors
from effsam3.models.image.student import StudentTrunkConfig
from effsam3.models.memory.config import EfficientTrackerConfig
from effsam3.models.memory.tracker import efficient_tracker_tensors
from effsam3.models.text.student import lite_text_config, lite_text_detector_config
from effsam3.predictor import Predictor

# What `pip install numpy onnxruntime pillow tokenizers` brings.
LIBRARIES = ("numpy", "onnxruntime", "PIL", "pillow.libs", "tokenizers", "google", "packaging", "flatbuffers")
PARTS = (
    "trunk", "detector_neck", "text_encoder", "detector", "tracker_neck", "mask_decoder", "memory_encoder",
    "memory_attention",
)  # fmt: skip


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A model with a student in every slot: RepViT, a text tower with RepMixer, a hybrid memory; random weights."""
    chassis = chassis_folder("tiny")
    config = read_config(chassis)
    for vision in (config.detector_config.vision_config, config.tracker_config.vision_config):
        vision.backbone_config = StudentTrunkConfig(timm_name="repvit_m0_9", hidden_size=64, image_size=224)
    text = lite_text_config("mobileclip_s0", 32)
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.projection_dim = 32, 64, 2, 32
    config.detector_config = lite_text_detector_config(config.detector_config, text)
    values = {key: value for key, value in config.tracker_config.to_dict().items() if key != "model_type"}
    config.tracker_config = EfficientTrackerConfig(**values, memory_mode="hybrid")
    torch.manual_seed(0)
    model = Sam3VideoModel(config)
    own = read_tensors(chassis)
    tracker = {name[len("tracker_model.") :]: value for name, value in own.items() if name.startswith("tracker_model")}
    own |= {
        f"tracker_model.{name}": value
        for name, value in efficient_tracker_tensors(tracker, config.tracker_config).items()
    }
    own["tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias"] += 5  # else no object is ever there
    # Students' tensors are those of the new model: the chassis has none by these names.
    tensors = {name: own.get(name, value).clone() for name, value in model.state_dict().items()}
    load_part(model, tensors)
    folder = tmp_path_factory.mktemp("release")
    with quiet_transformers():
        model.save_pretrained(folder, save_original_format=False)
    return folder


@pytest.fixture(scope="module")
def exported(release, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    said = run_here(folder.parent, "export", "--out", str(folder), recipe=release)
    assert "BatchNorms folded" in said and "largest difference" in said
    return folder


def test_every_part_is_written_and_checked(exported):
    about = json.loads((exported / "export.json").read_text())
    assert tuple(about["parts"]) == PARTS
    for name, part in about["parts"].items():
        assert part["files"] == [f"{name}.onnx"] and (exported / f"{name}.onnx").is_file()
        assert all(0 <= share < 1e-4 for share in part["largest_difference"].values())
    assert about["folded"]["trunk"]["norms_after"] == 0 < about["folded"]["trunk"]["drift"] < 1e-4
    assert about["folded"]["text_encoder"]["norms_after"] == 0


PROMPTS = {
    "text": (["--text", "a Dog's ball", "--threshold", "0.01"], {"text": "a Dog's ball", "threshold": 0.01}),
    "boxes": (["--box", "20,30,100,85", "--box", "5,60,50,88"], {"box": [[20, 30, 100, 85], [5, 60, 50, 88]]}),
    "click": (["--point", "60,40"], {"point": [60, 40]}),
    "clicks in a box": (
        ["--point", "60,40", "--point", "5,5,0", "--box", "20,30,100,85"],
        {"point": [[60, 40, 1], [5, 5, 0]], "box": [20, 30, 100, 85]},
    ),
}


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> Path:
    """A folder with only the libraries that the example names."""
    folder = tmp_path_factory.mktemp("libraries")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.split("-")[0].removesuffix(".libs") in {name.removesuffix(".libs") for name in LIBRARIES}:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_example_finds_what_predict_finds_without_pytorch(prompt, release, exported, without_torch, tmp_path):
    options, asked = PROMPTS[prompt]
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    # -S: not what is installed, only what PYTHONPATH names.
    python = [sys.executable, "-S"]
    environment = {"PYTHONPATH": str(without_torch)}
    assert subprocess.run([*python, "-c", "import torch"], env=environment, capture_output=True).returncode == 1
    script = [str(REPOSITORY / "examples/onnx_predict.py"), str(exported), "image.png", "--out", "found", *options]
    done = subprocess.run([*python, *script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found/predictions.json").read_text())
    masks = [np.asarray(Image.open(tmp_path / "found" / one["mask"])) for one in found]

    wanted = Predictor(release, device="cpu").image(tmp_path / "image.png", **asked)
    assert len(found) == len(wanted.ids) > 0
    assert np.allclose([one["score"] for one in found], wanted.scores_O, atol=1e-3)
    assert np.mean(np.stack(masks) == wanted.masks_OHW.numpy()) > 0.99
    assert 0.01 < np.mean(masks) < 0.99
    if prompt == "text":
        assert np.allclose([one["box"] for one in found], wanted.boxes_O4, atol=0.5)
