# SPDX-License-Identifier: Apache-2.0
"""What tests/e2e/test_every_student.py runs in a process of its own: load merged models, run and evaluate them.

It reads from its input the folders of runs that have been merged, one a line.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Sam3VideoModel

from effsam3 import evaluate, import_student
from effsam3.benchmarks.text import MergedText
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.text.tokens import PROCESSOR_LENGTH, Tokenizer
from effsam3.recipe.reader import load_recipe

TEXTS = ["a red ring", "two small dogs on a sofa"]
OUTPUTS = "reloaded.safetensors"


def inputs(stage: str) -> tuple[Tensor, ...]:
    """What a student of a stage is called with: two images for the tiny chassis, or two texts and their mask."""
    if stage == "text":
        return Tokenizer().encode(TEXTS, PROCESSOR_LENGTH)
    return (torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1,)


@torch.no_grad()
def reloaded(stage: str, folder: Path) -> Tensor:
    """What the student of a folder in transformers' format puts out."""
    detector = Sam3VideoModel.from_pretrained(folder).eval().detector_model
    if stage == "text":
        ids_BL, mask_BL = inputs(stage)
        return MergedText(detector)(ids_BL, mask_BL)[mask_BL]  # features at padding are meaningless
    return detector.vision_encoder.backbone(*inputs(stage)).last_hidden_state


def main() -> None:
    """Write `OUTPUTS` into every run folder, {format: features}, evaluate it, and delete the models."""
    # `torch.empty` then gives NaN and the biggest integer, as memory that was used for something else may: what a load
    # leaves uninitialised is wrong every time. In new memory it is zero more often than not, and zeros may pass.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2).isnan().all()
    for line in sys.stdin:
        run = Path(line.rstrip("\n"))
        recipe, merged = load_recipe(run / "recipe.yaml"), run / "merged"
        folders = {"transformers": merged}
        if (file := merged / "sam3.pt").is_file():
            folders["sam3"] = chassis_folder(str(file))
        if (file := merged / "efficientsam3.pt").is_file():
            folders["efficientsam3"] = import_student.run(str(file), to=str(run / "imported"), sam3="tiny")
        found = {name: reloaded(recipe.stage, folder).contiguous() for name, folder in folders.items()}
        save_file(found, run / OUTPUTS)
        evaluate.run(recipe)
        for folder in folders.values():  # up to half a gigabyte each
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
