# SPDX-License-Identifier: Apache-2.0
"""A second SAM 3 that the package does not know: registers its row, then runs verbs in this one process.

python tests/second_sam3.py '[["show", "recipe.yaml"], ...]'; the Hub's cache must be a folder of its own (HF_HOME).
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from effsam3.cli import main
from effsam3.models.chassis.tiny import Shape, tiny_config, vision_config
from effsam3.models.registry import SAM3, SAM3S, Counts, License, Sizes

HUB_ID = "made-up/sam3-second"
REVISION = "0" * 40
SHAPE = Shape(image_size=168, positions=84, trunk_width=48, width=192)


def second_sam3():
    """The row; its counts are those of the model that its config describes."""
    from effsam3.models.chassis.classes import empty_model

    model = empty_model(tiny_config(SHAPE))
    counted = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in {
            "total": model,
            "vision": model.detector_model.vision_encoder,
            "text": model.detector_model.text_encoder,
            "projection": model.detector_model.text_projection,
            "trunk": model.detector_model.vision_encoder.backbone,
            "neck": model.detector_model.vision_encoder.neck,
        }.items()
    }
    counted["text"] += counted.pop("projection")
    return replace(
        SAM3,
        label="SAM 3 the Second",
        hub_id=HUB_ID,
        sizes=Sizes.of(vision_config(SHAPE)),
        counts=Counts(transformers_total=counted["total"], **counted),
        config=partial(tiny_config, SHAPE),
        license=License(name="second-license", title="Second Licence", url="https://example.org/second"),
    )


def into_the_hubs_cache(row):
    """Lay the model, with random weights, where a download would have left it."""
    from effsam3.models.chassis.find import chassis_folder

    SAM3S["being-made"] = replace(row, hub_id=None)
    made = chassis_folder("being-made")
    del SAM3S["being-made"]
    repository = Path(os.environ["HF_HOME"]) / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(made, repository / "snapshots" / REVISION)
    (repository / "snapshots" / REVISION / "LICENSE").write_text("Second Licence\n")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


if __name__ == "__main__":
    row = second_sam3()
    into_the_hubs_cache(row)
    SAM3S[HUB_ID] = row
    for line in json.loads(sys.argv[1]):
        print(f"### {line[0]}", flush=True)
        if code := main(line):
            sys.exit(code)
