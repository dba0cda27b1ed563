# SPDX-License-Identifier: Apache-2.0
"""The verb `inspect` on every kind of checkpoint, made for real."""

import json
import re
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Sam3VideoConfig, Sam3VideoModel

from effsam3.cli import main
from effsam3.inspect_model import BUFFERS, PARTS, InspectError, examine, inspect
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.pickled import PickledError
from effsam3.models.chassis.tensors import (
    ChassisError,
    fingerprint,
    map_tensors,
    quiet_transformers,
    read_config,
    read_tensors,
)
from effsam3.models.image.backbones import image_student
from effsam3.models.image.student import StudentTrunk, StudentTrunkConfig
from effsam3.models.image.teacher import Teacher
from effsam3.models.keymaps.sam3 import to_original
from effsam3.models.keymaps.upstream import image_to_upstream, text_to_upstream
from effsam3.models.memory.tracker import EfficientTrackerConfig
from effsam3.models.registry import IMAGE_STUDENTS, SAM3, TEXT_STUDENTS, TINY_TEXT_STUDENTS
from effsam3.models.text.student import TextTeacher, lite_text_config, lite_text_detector_config, text_student
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.stages.text.merging import describe
from effsam3.training.checkpoint import CheckpointError, read_weights

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke" / "image.yaml"
PARTS_OF_TINY = {  # attributes of a Sam3VideoModel, and of its detector and tracker
    "image trunk": lambda m: [m.detector_model.vision_encoder.backbone],
    "neck, the detector's": lambda m: [m.detector_model.vision_encoder.neck],
    "neck, the tracker's": lambda m: [m.tracker_neck],
    "text encoder": lambda m: [m.detector_model.text_encoder, m.detector_model.text_projection],
    "geometry encoder": lambda m: [m.detector_model.geometry_encoder],
    "DETR encoder": lambda m: [m.detector_model.detr_encoder],
    "DETR decoder": lambda m: [m.detector_model.detr_decoder, m.detector_model.dot_product_scoring],
    "mask decoder, the detector's": lambda m: [m.detector_model.mask_decoder],
    "prompt encoder": lambda m: [m.tracker_model.prompt_encoder, m.tracker_model.shared_image_embedding],
    "mask decoder, the tracker's": lambda m: [m.tracker_model.mask_decoder],
    "memory attention": lambda m: [m.tracker_model.memory_attention],
    "memory encoder": lambda m: [m.tracker_model.memory_encoder],
}


@pytest.fixture(scope="module")
def folder():
    return chassis_folder("tiny")


@pytest.fixture(scope="module")
def original(folder):
    """The tiny chassis in SAM 3's own format."""
    trunk = read_config(folder).detector_config.vision_config.backbone_config
    return to_original(read_tensors(folder), {}, trunk)


def with_students(config):
    """The tiny chassis' config with a student in every slot."""
    config = deepcopy(config)
    student = StudentTrunkConfig(timm_name="test_convnext", hidden_size=64, image_size=224)
    config.detector_config.vision_config.backbone_config = deepcopy(student)
    config.tracker_config.vision_config.backbone_config = deepcopy(student)
    config.detector_config = lite_text_detector_config(config.detector_config, lite_text_config("tiny_text", 32))
    values = {key: value for key, value in config.tracker_config.to_dict().items() if key != "model_type"}
    config.tracker_config = EfficientTrackerConfig(**values, memory_mode="latents")
    return config


@pytest.fixture(scope="module")
def merged(folder, tmp_path_factory):
    """A model folder with students in all slots, as a merge leaves it."""
    model = Sam3VideoModel(with_students(read_config(folder)))
    made = tmp_path_factory.mktemp("merged")
    with quiet_transformers():
        model.save_pretrained(made, save_original_format=False)
    card = {"slots": {"image": {"student": "tiny_convnext", "from": "my-run/best-step-000100"}}, "chassis": "tiny"}
    (made / "effsam3.json").write_text(json.dumps(card))
    return made


# ---- whole models


def test_parts_are_counted_as_the_model_itself_counts_them(folder):
    facts = examine(str(folder))
    with torch.device("meta"):
        model = Sam3VideoModel(read_config(folder))
    for title, modules in PARTS_OF_TINY.items():
        wanted = sum(parameter.numel() for module in modules(model) for parameter in module.parameters())
        assert facts["parts"][title]["parameters"] == wanted, title
        assert facts["parts"][title]["types"] == ["float32"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(part["parameters"] for part in facts["parts"].values()) == total
    assert sum(part["tensors"] for part in facts["parts"].values()) == len(model.state_dict())
    assert "unknown" not in facts["parts"] and facts["problem"] is None
    assert (facts["image_size"], facts["patch_size"], facts["grid"]) == (224, 14, 16)
    assert [slot["is"] for slot in facts["slots"].values()] == [
        "SAM 3's own, 4 layers, 64 channels",
        "SAM 3's own, 2 layers, 32 tokens",
        "SAM 3's own, 7 frames, 2 layers",
        "SAM 3's own necks",
    ]


def test_full_size_parameters_are_the_published_ones():
    with torch.device("meta"):
        state = Sam3VideoModel(Sam3VideoConfig()).state_dict()
    numbers = {title: 0 for title in PARTS}
    for name, tensor in state.items():
        title = next(title for title, begins in PARTS.items() if name.startswith(begins))
        numbers[title] += 0 if BUFFERS.search(name) else tensor.numel()
    assert numbers["image trunk"] == 446_236_672
    assert numbers["text encoder"] == 353_462_272 + 262_400
    assert sum(numbers.values()) == SAM3.counts.transformers_total


@pytest.mark.parametrize("name", ["tiny_convnext", "repvit_m0_9", "tiny_vit_5m", "efficientvit_b0"])
def test_buffers_of_image_students_are_no_parameters(name):
    for head in ("fused", "stride32"):
        student = StudentTrunk(StudentTrunkConfig(timm_name=image_student(name).timm_name, head=head))
        parameters = {name for name, _ in student.named_parameters()}
        assert {key for key in student.state_dict() if not BUFFERS.search(key)} == parameters


@pytest.mark.parametrize("name", [*TEXT_STUDENTS, *TINY_TEXT_STUDENTS])
def test_text_students_are_recognised(folder, name):
    with torch.device("meta"):
        student = text_student(name, 32, 128)
    assert {key for key in student.state_dict() if not BUFFERS.search(key)} == dict(student.named_parameters()).keys()
    config = read_config(folder)
    config.detector_config = lite_text_detector_config(config.detector_config, lite_text_config(name, 32))
    assert describe(config.detector_config.text_config)["student"] == name


def test_students_and_where_they_come_from(merged):
    facts = examine(str(merged))
    assert facts["slots"]["image"] == {
        "student": "tiny_convnext",
        "is": "tiny (tiny_convnext) with head fused, 64 channels",
        "from": "my-run/best-step-000100",
    }
    assert facts["slots"]["text"]["student"] == "tiny_text"
    assert facts["slots"]["memory"]["mode"] == "latents"
    assert facts["parts"]["memory resampler"]["parameters"] > 0
    model = Sam3VideoModel.from_pretrained(merged)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(part["parameters"] for part in facts["parts"].values()) == total
    text = inspect(str(merged))
    assert "slot image   tiny (tiny_convnext) with head fused, 64 channels; from my-run/best-step-000100\n" in text
    assert "of the student's tensors" in text and "chassis      tiny\n" in text


def test_fingerprints_are_those_that_recipes_and_stores_have(folder):
    found = examine(str(folder))["fingerprints"]
    assert found["trunk"] == Teacher.from_folder(folder).fingerprint
    assert found["text"] == TextTeacher.from_folder(folder).fingerprint
    assert found["model"] == fingerprint(read_tensors(folder))


def test_a_folder_that_lacks_tensors_says_so(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "broken")
    tensors = load_file(merged / "model.safetensors")
    del tensors["tracker_model.no_memory_embedding"]
    save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    assert "missing: 1 (tracker_model.no_memory_embedding)" in examine(str(tmp_path / "broken"))["problem"]
    assert "\nproblem      not a whole SAM 3" in inspect(str(tmp_path / "broken"))


# ---- files


@pytest.fixture
def saved(tmp_path):
    def save(content, name="model.pt"):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


def own_file(tensors, folder, slots=None, **others):
    card = {"config": read_config(folder).to_dict(), "slots": slots or {}}
    return {"model": tensors, "effsam3": json.dumps(card), **others}


def test_a_sam3_pt_is_the_folder_that_it_becomes(saved, original, folder):
    facts, wanted = examine(saved(own_file(original, folder, epoch=3))), examine(str(folder))
    assert facts["format"] == "SAM 3's own format"
    for key in ("fingerprints", "parts", "slots", "grid"):
        assert facts[key] == wanted[key], key
    assert facts["found"] == {"entry": "model", "averaged": False, "other_entries": ["effsam3", "epoch"]}
    assert len(facts["kept_extra"]) == 7


def test_a_sam3_pt_with_a_student_says_where_it_is_from(saved, merged):
    tensors = read_tensors(merged)
    shared = "tracker_model.shared_image_embedding.positional_embedding"
    tensors["tracker_model.prompt_encoder.shared_embedding.positional_embedding"] = tensors[shared]
    slots = {"image": {"student": "tiny_convnext", "from": "my-run/step-000100"}}
    path = saved(own_file(to_original(tensors, {}, None), merged, slots))
    facts = examine(path)
    assert facts["slots"]["image"]["from"] == "my-run/step-000100" and facts["problem"] is None
    for key in ("fingerprints", "parts", "slots"):
        assert examine(str(chassis_folder(path)))[key] == facts[key], key


def test_half_precision_and_averaged_weights_are_told(saved, original, folder):
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in original.items()}
    path = saved(own_file(original, folder, model_ema=halves))
    facts = examine(path)
    assert {kind for part in facts["parts"].values() for kind in part["types"]} == {"float16"}
    assert "\nfound        under model_ema, averaged weights; next to it effsam3, model\n" in inspect(path)
    # What is learned from is float32, and so is what is hashed.
    folder = chassis_folder(path)
    assert {tensor.dtype for tensor in map_tensors(folder).values()} == {torch.float32}
    assert facts["fingerprints"] == examine(str(folder))["fingerprints"]


def test_a_file_without_a_part_says_so(saved, original, folder):
    tensors = {name: tensor for name, tensor in original.items() if "geometry_encoder" not in name}
    facts = examine(saved(own_file(tensors, folder)))
    assert "geometry encoder" not in facts["parts"] and "missing: 42" in facts["problem"]


@pytest.mark.parametrize("format", ["alone", "merged", "with SAM 3's ViT", "saved after loading"])
def test_efficientsam3_is_recognised(saved, original, format):
    image = StudentTrunk(StudentTrunkConfig(timm_name="repvit_m0_9", head="stride32", hidden_size=1024))
    text = text_student("mobileclip_s0", 32, 256)
    tensors = {name: tensor for name, tensor in text.state_dict().items() if not name.startswith("feature_")}
    image_names, text_names = image_to_upstream(image.state_dict(), "repvit_m0_9"), text_to_upstream(tensors)
    trunk, language = "detector.backbone.vision_backbone.trunk.", "detector.backbone.language_backbone."
    rest = {name: tensor for name, tensor in original.items() if not name.startswith((trunk, language))}
    merged = rest | {f"{trunk}model.{name}": tensor for name, tensor in image_names.items()}
    merged |= {language + name: tensor for name, tensor in text_names.items()}
    begins = {"detector.": "", "tracker.": "inst_interactive_predictor.model."}  # after loading
    files = {
        "alone": image_names,
        "merged": merged,
        "with SAM 3's ViT": merged | {name: tensor for name, tensor in original.items() if name.startswith(trunk)},
        "saved after loading": {
            re.sub(r"^(detector|tracker)\.", lambda match: begins[match[0]], name): tensor
            for name, tensor in merged.items()
        },
    }
    path, whole = saved({"model": files[format]}), format != "alone"
    facts = examine(path)
    assert facts["format"] == "EfficientSAM3's format"
    assert facts["slots"]["image"]["student"] == "repvit_m0_9"
    assert facts["parts"]["image trunk"]["parameters"] == sum(p.numel() for p in image.parameters())
    assert facts["parts"]["image trunk"]["tensors"] == len(image_names)
    assert ("text" in facts["slots"]) == whole == ("memory encoder" in facts["parts"])
    assert ("SAM 3's own ViT, next to the student" in facts["parts"]) == (format == "with SAM 3's ViT")
    assert "unknown" not in facts["parts"]
    if whole:
        assert facts["slots"]["text"]["student"] == "mobileclip_s0"
        assert facts["slots"]["text"]["is"] == "ES-MC-S (mobileclip_s0), 32 tokens"
    assert f"\nuse          effsam3 import {path} makes a model of it\n" in inspect(path)


# ---- runs


@pytest.fixture
def run(tmp_path):
    """A run folder with one checkpoint, not merged."""
    folder = tmp_path / "runs" / "smoke-image"
    step = folder / "checkpoints" / "step-000006"
    step.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(SMOKE)))
    student = StudentTrunk(StudentTrunkConfig(timm_name=IMAGE_STUDENTS["tiny_convnext"].timm_name, hidden_size=64))
    save_file(dict(student.state_dict()), step / "student.safetensors")
    save_file({}, step / "optimizer.safetensors")
    (step / "trainer.json").write_text(json.dumps({"step": 6, "best": {"step": 3, "cosine": 0.51234}}))
    return folder


def test_a_run_folder(run, merged):
    text = inspect(str(run))
    assert "recipe       name smoke-image, stage image, student tiny_convnext, head fused\n" in text
    assert "checkpoints  step-000006\n" in text
    assert text.endswith(f"merged       not yet; effsam3 merge {run} makes it")
    shutil.copytree(merged, run / "merged")
    assert inspect(str(run)).endswith(inspect(str(run / "merged")))
    assert examine(str(run))["merged"] == examine(str(run / "merged"))


def test_a_training_checkpoint(run):
    step = run / "checkpoints" / "step-000006"
    facts, text = examine(str(step)), inspect(str(step))
    assert facts["recipe"]["student"] == "tiny_convnext" and facts["resumable"]
    assert facts["fingerprints"]["student"] == fingerprint(read_weights(step))
    assert "step         6\n" in text and "best so far  step 3: cosine 0.5123\n" in text
    shutil.copytree(step, run.parent / "elsewhere")
    (run.parent / "elsewhere" / "optimizer.safetensors").unlink()
    facts = examine(str(run.parent / "elsewhere"))
    assert facts["recipe"] is None and not facts["resumable"]


def test_damaged_and_unfinished_ones_are_named(run, folder, tmp_path):
    step = run / "checkpoints" / "step-000006"
    (step / "student.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read"):
        inspect(str(step))
    (step / "trainer.json").unlink()
    with pytest.raises(InspectError, match="was never finished"):
        inspect(str(step))
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ChassisError, match="model.safetensors cannot be read"):
        inspect(str(tmp_path / "cut"))


# ---- the command


def test_json_has_the_same_facts(folder, capsys):
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == examine(str(folder))


def test_made_up_weights_are_called_so(capsys):
    assert main(["inspect", "tiny"]) == 0
    assert capsys.readouterr().out.startswith("tiny\nformat       made up, random weights, ")


def test_what_is_no_checkpoint(saved, tmp_path, capsys):
    for path, match in (
        (str(tmp_path), "is not a checkpoint; expected"),
        ("/nowhere", "does not exist; expected"),
        (saved({"a": torch.ones(1)}), r"neither in SAM 3's own format nor in EfficientSAM3's: .*\(first: a\)"),
    ):
        with pytest.raises(InspectError, match=match):
            inspect(path)
    with pytest.raises(PickledError, match="cannot be read"):
        inspect("nowhere.pt")
    assert main(["inspect", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: /nowhere does not exist")
