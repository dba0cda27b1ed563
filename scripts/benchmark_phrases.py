# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of `benchmark.py` that are about phrases which share an image."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers import Sam3Model

from effsam3.hardware.budget.dry_run import DryPlace
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import load_whole, read_config
from effsam3.models.heads.detector import PADDING, Asked, answer, ask, detector_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.image.student import student_config
from effsam3.models.inference.concepts import masks_of
from effsam3.models.registry import SAM3S
from effsam3.models.text.tokens import PromptTokenizer
from effsam3.recipe.reader import load_recipe
from effsam3.stages.concepts.phrases import draw_concepts, phrases_of
from effsam3.stages.concepts.training import MASK_SIDE, ConceptsStage

Sides = dict[str, Callable[[], object]]


def concept_step(device: torch.device, tiny: bool) -> Sides:
    """One training step on annotated phrases, four of each image and one of each image."""
    folder, count = tempfile.mkdtemp(prefix="effsam3-benchmark-"), 1 if tiny else 4
    atexit.register(shutil.rmtree, folder)
    checkpoint = "random" if device.type == "cuda" else "tiny_concepts"
    chassis = chassis_folder(checkpoint)

    def step_of(phrases: int) -> Callable[[], object]:
        options = [f"data.path={folder}/data", f"sam3.checkpoint={checkpoint}", "loss={annotations: 1, teacher: 0}"]
        drawn = ["data.synthetic_images=8", "data.synthetic_held_out=4", "model.trainable=[vision_encoder.backbone]"]
        recipe = load_recipe("smoke/concepts", [*options, *drawn, f"data.phrases={phrases}"])
        place = DryPlace("bf16" if device.type == "cuda" else "fp32")
        place.device = device
        stage = ConceptsStage(recipe, place, load_whole(model_class(read_config(chassis).model_type), chassis), None)
        for part in (stage.student, *stage.frozen):
            part.to(device)
        draw_concepts(recipe.data)
        data, _ = phrases_of(recipe, stage.image_size, MASK_SIDE * stage.grid)
        batch = data.__getitems__([(position, position) for position in range(count)])
        stage.student.train()

        def step() -> None:
            stage.loss(stage.student, batch)["loss"].backward()
            stage.student.zero_grad()

        return step

    return {"four phrases": step_of(4), "one phrase": step_of(1)}


def _side(device: torch.device, tiny: bool) -> int:
    """Return the side of the images in pixels."""
    return 112 if tiny else 1008 if device.type == "cuda" else 504


def _detector(device: torch.device, side: int, layers: int = 6) -> SimpleNamespace:
    """Make SAM 3's detector with random weights on the trunk of RepViT-M1.1, with a small text encoder."""
    config = SAM3S["random"].config().detector_config
    config.text_config.num_hidden_layers = 1
    config.detr_encoder_config.num_layers = layers
    trunk = config.vision_config.backbone_config
    sizes = {"hidden_size": trunk.hidden_size, "image_size": side, "patch_size": trunk.patch_size}
    config.vision_config.backbone_config = student_config("repvit_m1_1", "fused", None, **sizes)
    return SimpleNamespace(detector_model=Sam3Model(config).eval().requires_grad_(False).to(device))


def _asked(count: int, device: torch.device) -> Asked:
    """Ask for phrases of one image, as the text encoder has read them."""
    asked = ask(["x"] * count, torch.zeros(count, dtype=torch.int64, device=device), PromptTokenizer())
    return asked._replace(texts_RTC=torch.randn(count, 32, 256, device=device))


def slim_phrase(device: torch.device, tiny: bool) -> Sides:
    """Two phrases of an image that has been looked at, with every second layer of the encoder and coarse masks.

    On a CPU images have 504 px.
    """
    side, asked, found = _side(device, tiny), _asked(2, device), torch.arange(5, device=device).repeat(2, 1)

    def answering(layers: int, coarse_masks: bool) -> Callable[[], object]:
        model = _detector(device, side, layers)

        @torch.no_grad()
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                masks_of(levels, answer(model, levels, asked), found)

        with torch.no_grad():
            feat_1DGG = torch.randn(1, 1024, side // 14, side // 14, device=device)
            levels = detector_levels(model, feat_1DGG, coarse_masks=coarse_masks)
        return call

    return {
        "half the layers, coarse masks": answering(3, True),
        "as it is": answering(6, False),
        "half the layers": answering(3, False),
        "coarse masks": answering(6, True),
    }


def phrases_of_image(device: torch.device, tiny: bool) -> Sides:
    """Eight phrases on one image, together and in a call each, by SAM 3's detector on the trunk of RepViT-M1.1.

    The text encoder is a small one: what it makes of a phrase is remembered. On a CPU images have 504 px.
    """
    count, side = 2 if tiny else 8, _side(device, tiny)
    model, asked = _detector(device, side), _asked(count, device)
    detector, texts = model.detector_model, asked.texts_RTC
    pixels = torch.randn(1, 3, side, side, device=device)
    found = torch.arange(5, device=device)[None]  # the queries that find something

    @torch.no_grad()
    def call(rows: slice) -> None:
        some = asked.each(lambda own: own[rows])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            levels = detector_levels(model, trunk_features(model, pixels))
            answer(model, levels, some).masks_of(found.expand(len(some.image_R), -1))

    @torch.no_grad()
    def transformers_call(row: int) -> None:
        box = {"input_boxes": torch.zeros(1, 1, 4, device=device), "input_boxes_labels": torch.full((1, 1), PADDING)}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            detector(
                pixel_values=pixels,
                text_embeds=SimpleNamespace(pooler_output=texts[row : row + 1]),
                attention_mask=asked.attention_mask_RT[row : row + 1],
                **{name: tensor.to(device) for name, tensor in box.items()},
            )

    return {
        "together": lambda: call(slice(None)),
        "a call each": lambda: [call(slice(row, row + 1)) for row in range(count)],
        "a call each, transformers": lambda: [transformers_call(row) for row in range(count)],
    }
