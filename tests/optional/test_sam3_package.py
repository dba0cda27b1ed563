# SPDX-License-Identifier: Apache-2.0
"""Concepts against the original: the package `sam3` (0.1.4 on PyPI, SAM License), a small model of it on the CPU.

It is no requirement of the project, and these tests are skipped where it is not installed:

    pip install --no-deps --target build/sam3 sam3==0.1.4 iopath portalocker
    PYTHONPATH=build/sam3 pytest tests/optional
"""

import numpy as np
import pytest
import torch
from open_clip.tokenizer import default_bpe
from torch.overrides import TorchFunctionMode
from transformers import Sam3VideoConfig, Sam3VideoModel

from effsam3.models.chassis.tensors import quiet_transformers
from effsam3.models.chassis.tiny import IMAGE_SIZE, tiny_config
from effsam3.models.inference.concepts import ConceptModel
from effsam3.models.keymaps.sam3 import to_transformers

builder = pytest.importorskip("sam3.model_builder")
image_processor = pytest.importorskip("sam3.model.sam3_image_processor")

TRUNK = {
    "img_size": IMAGE_SIZE,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "pretrain_img_size": IMAGE_SIZE // 2,
    "window_size": 8,
    "global_att_blocks": (1, 3),
}
BOXES = [(20.0, 30.0, 120.0, 90.0, True), (5.0, 60.0, 50.0, 140.0, False)]  # x1, y1, x2, y2, meant or not
TEXT = {"width": 32, "heads": 2, "layers": 2}


class OnTheCpu(TorchFunctionMode):
    """The package asks for CUDA in places, whatever the device."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        if function is torch.Tensor.pin_memory:
            return arguments[0]
        return function(*arguments, **named)


def smaller(module_class, **sizes):
    return lambda **given: module_class(**{**given, **sizes})


@pytest.fixture(scope="module")
def original():
    """The package's image model by its own builder, with a small trunk and text encoder and random weights."""
    with pytest.MonkeyPatch.context() as patch, OnTheCpu():
        patch.setattr(builder, "ViT", smaller(builder.ViT, **TRUNK))
        patch.setattr(builder, "VETextEncoder", smaller(builder.VETextEncoder, **TEXT))
        torch.manual_seed(0)
        model = builder.build_sam3_image_model(default_bpe(), device="cpu", load_from_HF=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("positional_embedding", "text_projection")) or not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


@pytest.fixture(scope="module")
def ours(original, tmp_path_factory) -> ConceptModel:
    """The same weights as a folder in transformers' format, loaded as `effsam3 predict` does."""
    made_up = tiny_config().to_dict()
    detector, tracker = made_up["detector_config"], made_up["tracker_config"]
    for part in ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config", "mask_decoder_config"):
        del detector[part]  # SAM 3's own sizes
    detector["vision_config"]["fpn_hidden_size"] = 256
    detector["text_config"] |= {"intermediate_size": 4 * TEXT["width"], "projection_dim": 512}
    model = Sam3VideoModel(Sam3VideoConfig(detector_config=detector, tracker_config=tracker))
    named = {f"detector.{name}": tensor for name, tensor in original.state_dict().items()}
    tensors, extra = to_transformers(named)
    assert all("points_" in name or name.endswith("class_row") for name in extra)
    wanted = {name for name in model.state_dict() if name.startswith("detector_model.")}
    assert tensors.keys() == wanted
    model.load_state_dict(model.state_dict() | tensors)
    folder = tmp_path_factory.mktemp("sam3")
    with quiet_transformers():
        model.save_pretrained(folder, save_original_format=False)
    return ConceptModel(folder)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    noise = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (150, 200), mode="bicubic")[0].clamp(0, 1)
    return (smooth * 255).byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("text", "boxes"), [("a dog", []), ("a dog", BOXES), (None, BOXES)])
def test_concepts_are_found_as_the_original_finds_them(original, ours, image, text, boxes):
    height, width = image.shape[:2]
    processor = image_processor.Sam3Processor(original, IMAGE_SIZE, device="cpu", confidence_threshold=0.0)
    with OnTheCpu():
        state = processor.set_image(torch.from_numpy(image).permute(2, 0, 1))
        if text is not None:
            processor.set_text_prompt(text, state)
        for x1, y1, x2, y2, positive in boxes:
            relative = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
            processor.add_geometric_prompt(relative, positive, state)
    examples = {}
    if boxes:
        examples["boxes_N4"] = torch.tensor([box[:4] for box in boxes])
        examples["positive_N"] = torch.tensor([box[4] for box in boxes])
    found = ours.find(ours.look(image), (height, width), text, threshold=0.0, **examples)

    # By their boxes: two scores may be too near to have an order.
    place = torch.cdist(found.boxes_O4, state["boxes"]).argmin(1)
    assert sorted(place.tolist()) == list(range(200))
    torch.testing.assert_close(found.scores_O, state["scores"][place], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.boxes_O4, state["boxes"][place], rtol=1e-4, atol=1e-2)
    masks_OHW = state["masks"][place, 0]
    assert 0.02 < masks_OHW.float().mean() < 0.98
    assert (found.masks_OHW != masks_OHW).float().mean() < 1e-4
