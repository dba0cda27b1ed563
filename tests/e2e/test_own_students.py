# SPDX-License-Identifier: Apache-2.0
"""Backbones of timm and smaller images, the whole way: training, merge, evaluation, prediction, a fresh process."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from commands import REPOSITORY, SMOKE
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional

from effsam3.cli import main
from effsam3.inspect_model import examine
from effsam3.models.image.backbones import feature_maps, image_student
from effsam3.models.image.student import StudentTrunk, student_config
from effsam3.models.registry import head_params
from effsam3.recipe.reader import load_recipe

# student, student_image_size, head, image_size: of every kind of backbone; 150 is a multiple of no stride
STUDENTS = {
    "resnet": ("timm/test_resnet", 128, "stride32", None),
    "mobilenet": ("timm/mobilenetv3_small_050", None, "fused", None),
    "vit": ("timm/test_vit", 112, "fused", None),
    "efficientvit": ("timm/efficientvit_m0", None, "fused", None),
    "convnext": ("tiny_convnext", 150, "fused", 196),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of every student, named by its key: trained, merged, evaluated."""
    folder = tmp_path_factory.mktemp("own")
    shared = [
        f"data.index={folder}/data/index.parquet", f"embed.to={folder}/teacher", f"train.runs={folder}",
        "data.synthetic_images=20", "train.loggers=[]", "train.steps=3", "optim.warmup_steps=1",
        "train.global_batch_size=4", "train.micro_batch_size=2", "train.eval_every=3", "train.save_every=3",
        "evaluate.pictures=0", "merge.formats=[sam3]",
    ]  # fmt: skip
    assert main(["embed", str(SMOKE), *shared]) == 0
    for name, (student, seen, head, side) in STUDENTS.items():
        own = [f"name={name}", f"student={student}", f"student_image_size={seen or 'null'}", f"head={head}"]
        own.append(f"image_size={side or 'null'}")
        for verb in ("train", "merge", "evaluate"):
            assert main([verb, str(SMOKE), *shared, *own]) == 0, (verb, name)
    return folder


def trained(run):
    """The student as training left it."""
    recipe = load_recipe(run / "recipe.yaml")
    sizes = dict(hidden_size=64, image_size=recipe.side, patch_size=14)
    student = StudentTrunk(student_config(recipe.student, recipe.head, recipe.student_image_size, **sizes))
    (best,) = (run / "checkpoints").glob("best-*")
    student.load_state_dict(load_file(best / "student.safetensors"))
    return student.eval()


@pytest.mark.parametrize("name", STUDENTS)
def test_it_is_measured_as_it_was_validated(runs, name):
    """The merged model computes of images of SAM 3's size, or of its own, what training computed of the same ones."""
    (trainer,) = (runs / name / "checkpoints").glob("best-*/trainer.json")
    best = json.loads(trainer.read_text())["best"]
    fidelity = json.loads((runs / name / "eval/fidelity.json").read_text())
    for key in ("cosine", "cosine_centred", "mse"):  # training compared with features stored in float16
        assert fidelity[key] == pytest.approx(best[f"val/{key}"], abs=1e-3), key


@pytest.mark.parametrize("name", STUDENTS)
def test_counts_and_sizes_are_told(runs, name):
    student, seen, head, side = STUDENTS[name]
    row = image_student(student, seen or side or 224)
    speed = json.loads((runs / name / "eval/speed.json").read_text())
    assert speed["student"]["trunk_parameters"] == row.trunk_params + head_params(head, row.channels, 64)
    assert speed["image_size"] == {"teacher": 224, "student": seen or side or 224}
    assert f"student, {seen or side or 224} px" in (runs / name / "eval/summary.md").read_text()
    config = json.loads((runs / name / "merged/config.json").read_text())
    trunk = config["detector_config"]["vision_config"]["backbone_config"]
    assert (trunk["student_image_size"], trunk["image_size"]) == (seen, side or 224)
    for path in (runs / name / "merged", runs / name / "merged/sam3.pt"):
        found = examine(str(path))["slots"]["image"]
        assert found["student"] == student and (f"sees {seen} px" in found["is"]) == (seen is not None)


@pytest.mark.parametrize("name", ["resnet", "vit", "convnext"])
def test_it_resizes_as_torchvision_does(runs, name):
    """Step by step: antialiased pixels, timm's maps, the head onto SAM 3's grid, the statistics."""
    student, seen = trained(runs / name), STUDENTS[name][1]
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        small = functional.resize(pixels, [seen, seen], antialias=True)
        feat = student.head(feature_maps(student.trunk, small), (16, 16)).flatten(2).transpose(1, 2)
        expected = feat * student.feature_scale + student.feature_mean
        torch.testing.assert_close(student(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_it_is_the_same_in_a_fresh_process(runs, tmp_path):
    """Out of both formats, with memory that is not empty, through the class that transformers finds."""
    torch.manual_seed(1)
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    torch.save(pixels, tmp_path / "pixels.pt")
    code = textwrap.dedent("""
        import sys
        from pathlib import Path

        import torch
        junk = [torch.full((size,), 3e37) for size in (64, 4096, 65536) for _ in range(200)]
        del junk
        import effsam3
        from effsam3.models.chassis.find import chassis_folder
        from transformers import AutoModel

        runs, work, *names = map(Path, sys.argv[1:])
        for name in names:
            for place in (runs / name / "merged", runs / name / "merged/sam3.pt"):
                model = AutoModel.from_pretrained(chassis_folder(str(place))).eval()
                with torch.no_grad():
                    trunk = model.detector_model.vision_encoder.backbone
                    found = trunk(torch.load(work / "pixels.pt")).last_hidden_state
                torch.save(found, work / f"{name}-{place.name}.out")
    """)
    command = [sys.executable, "-c", code, str(runs), str(tmp_path), *STUDENTS]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in STUDENTS:
        with torch.no_grad():
            expected = trained(runs / name)(pixels).last_hidden_state
        for place in ("merged", "sam3.pt"):
            torch.testing.assert_close(torch.load(tmp_path / f"{name}-{place}.out"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_it_predicts(runs, tmp_path, name):
    photo = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    arguments = ["predict", str(runs / name), str(tmp_path / "photo.png"), "--box", "10,10,80,60"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").rglob("*.png"))


def test_efficientsam3_cannot_hold_a_smaller_size(runs, tmp_path, capsys):
    folder = str(runs / "convnext")
    overrides = [f"train.runs={runs}", "name=convnext", "merge.formats=[efficientsam3]"]
    before = sorted((runs / "convnext/merged").iterdir())
    assert main(["merge", f"{folder}/recipe.yaml", *overrides]) == 2
    assert "sees 196 px, EfficientSAM3's builder gives its students SAM 3's own size" in capsys.readouterr().err
    assert main(["merge", f"{runs}/mobilenet/recipe.yaml", f"train.runs={runs}", "merge.formats=[efficientsam3]"]) == 2
    assert "EfficientSAM3 has no student with the trunk mobilenetv3_small_050" in capsys.readouterr().err
    assert sorted((runs / "convnext/merged").iterdir()) == before
