# SPDX-License-Identifier: Apache-2.0
"""SAM 3.1's files are recognised by the names of their tensors wherever a checkpoint is taken."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from effsam3 import cli
from effsam3.errors import ChassisError
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.unsupported import what_unsupported

# As its readers list them: https://github.com/facebookresearch/sam3/issues/506, 526; ultralytics/ultralytics#26144;
# SimonZeng7108/efficientsam3#40.
NAMES = (
    "detector.backbone.vision_backbone.trunk.pos_embed",
    "detector.backbone.vision_backbone.convs.0.conv_1x1.weight",
    "detector.backbone.vision_backbone.interactive_convs.0.conv_1x1.weight",
    "detector.backbone.vision_backbone.propagation_convs.0.conv_1x1.weight",
    "tracker.model.maskmem_tpos_enc",
    "tracker.model.interactive_sam_mask_decoder.iou_token.weight",
    "tracker.model.sam_mask_decoder.iou_token.weight",
)
STUDENTS = (
    "detector.backbone.vision_backbone.trunk.model.backbone.model.stem.0.weight",
    "detector.backbone.language_backbone.projector.weight",
)
CONVERTED = ("detector_model.vision_encoder.neck.propagation_convs.0.w", "tracker_model.interactive_sam_x.w")
RECIPE = str(Path(__file__).parents[2] / "recipes" / "smoke" / "image.yaml")


def tensors(names=NAMES):
    return {name: torch.full((2, 2), float(number)) for number, name in enumerate(names)}


def test_names_of_sam3_are_not_taken_for_it():
    listed = (Path(__file__).parent / "sam3_names.txt").read_text().splitlines()
    names = [line.split()[0] for line in listed if line and not line.startswith("#")]
    assert len(names) > 100 and not what_unsupported(names)
    for name in (*NAMES[2:], *CONVERTED):
        assert what_unsupported([*names, name]).startswith("is SAM 3.1, whose video tracker (object multiplex)"), name
        assert what_unsupported([*names, *STUDENTS, name]).startswith("is a student of EfficientSAM3 in SAM 3.1"), name


@pytest.mark.parametrize("names", [NAMES, NAMES + STUDENTS], ids=["sam3.1", "efficientsam3"])
def test_every_command_says_what_it_is(names, tmp_path, capsys):
    path = tmp_path / "sam3.1_multiplex.pt"
    torch.save({"model": tensors(names)}, path)
    kind = "is a student of EfficientSAM3 in SAM 3.1" if names != NAMES else "is SAM 3.1"
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32)).save(photo)
    for arguments in (
        ["import", str(path)],
        ["import", str(path), "--dry-run"],
        ["predict", str(path), str(photo), "--text", "a dog"],
    ):
        assert cli.main(arguments) == 2, arguments
        told = capsys.readouterr().err
        assert kind in told and "facebook/sam3" in told and told.count("\n") == 1, (arguments, told)
    assert cli.main(["show", RECIPE, f"sam3.checkpoint={path}"]) == 0
    assert kind in capsys.readouterr().out
    assert cli.main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert "SAM 3.1's own format" in told and f"it {kind}" in told and "tracker.model" in told
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert kind in json.loads(capsys.readouterr().out)["problem"]


def test_folders_files_and_names_on_the_hub(tmp_path):
    from effsam3.models.chassis.find import chassis_folder
    from effsam3.models.chassis.tensors import shard_of

    save_file(tensors(), tmp_path / "sam3.1_multiplex_fp16.safetensors")
    with pytest.raises(ChassisError, match="fp16.safetensors is SAM 3.1"):
        chassis_folder(str(tmp_path))
    with pytest.raises(ChassisError, match="fp16.safetensors is SAM 3.1"):
        chassis_folder(str(tmp_path / "sam3.1_multiplex_fp16.safetensors"))
    (tmp_path / "sam3.1_multiplex_fp16.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ChassisError, match="model.safetensors is SAM 3.1"):
        shard_of(tmp_path)
    for take in (chassis_folder, sam3_of):
        with pytest.raises(ChassisError, match=r"facebook/sam3\.1 is SAM 3\.1, .* name a SAM 3"):
            take("facebook/sam3.1")
