# SPDX-License-Identifier: Apache-2.0
"""SAM 3.1: recognised wherever a checkpoint is taken, and imported but for its video tracker."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_folders import tiny_trunk
from safetensors.torch import save_file
from transformers import Sam3VideoModel

from effsam3 import cli, import_student
from effsam3.errors import ChassisError
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.foreign import what_foreign
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.tensors import TRUNK, read_config, read_tensors
from effsam3.models.image.teacher import Teacher
from effsam3.models.keymaps.sam3 import to_original
from effsam3.models.keymaps.upstream import image_to_upstream
from effsam3.models.merging.formats import IMAGE_PREFIX

# As its readers list them: https://github.com/facebookresearch/sam3/issues/506, 526; ultralytics/ultralytics#26144;
# SimonZeng7108/efficientsam3#40.
VISION = "detector.backbone.vision_backbone."
THEIRS = {
    f"{VISION}sam2_convs": f"{VISION}interactive_convs",
    "tracker.sam_prompt_encoder": "tracker.model.interactive_sam_prompt_encoder",
    "tracker.sam_mask_decoder": "tracker.model.interactive_sam_mask_decoder",
    "tracker.mask_downsample": "tracker.model.interactive_mask_downsample",
    "tracker.no_mem_embed": "tracker.model.interactivity_no_mem_embed",
}
MULTIPLEX = {
    f"{VISION}propagation_convs.0.conv_1x1.bias": torch.ones(256),
    "tracker.model.maskmem_tpos_enc": torch.ones(7, 1, 1, 256),
    "tracker.model.sam_mask_decoder.iou_token.weight": torch.ones(16, 256),
    "tracker.model.output_valid_embed": torch.ones(16, 256),
}
COARSEST = rf"{re.escape(VISION)}(convs|sam2_convs)\.3\."
CONVERTED = ("detector_model.vision_encoder.neck.propagation_convs.0.w", "tracker_model.interactive_sam_x.w")
STUDENTS = (
    f"{VISION}trunk.model.backbone.model.stem.0.weight",
    "detector.backbone.language_backbone.projector.weight",
)
HEADS = "prompt_encoder.", "mask_decoder.", "mask_downsample.", "no_memory_embedding"
RECIPE = str(Path(__file__).parents[2] / "recipes" / "smoke" / "image.yaml")


def sam3_names():
    """Names of the published sam3.pt."""

    def spread(name):
        listed = re.search(r"\[([\d,-]+)\]", name)
        if listed is None:
            return [name]
        ends = [part.split("-") for part in listed[1].split(",")]
        numbers = [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]
        return [whole for number in numbers for whole in spread(name.replace(listed[0], str(number), 1))]

    lines = (Path(__file__).parent / "sam3_names.txt").read_text().splitlines()
    return [name for line in lines if line and line[0] != "#" for name in spread(line.split()[0])]


def in_theirs(names):
    """SAM 3.1's name of each that it has of SAM 3's."""
    found = {}
    for name in names:
        ours = next((start for start in THEIRS if name.startswith(start)), None)
        if (ours is not None or name.startswith("detector.")) and not re.match(COARSEST, name):
            found[name] = name if ours is None else name.replace(ours, THEIRS[ours])
    return found


@pytest.fixture(scope="module")
def same():
    """The tiny SAM 3 by its own names, everything that SAM 3.1 has with other weights."""
    folder = chassis_folder("tiny")
    config = read_config(folder).detector_config.vision_config.backbone_config
    torch.manual_seed(31)
    tensors = to_original(read_tensors(folder), {}, config)
    other = in_theirs(tensors)
    return {n: t * (1 + 0.1 * torch.randn(t.shape)) if n in other and t.is_floating_point() else t
            for n, t in tensors.items()}  # fmt: skip


@pytest.fixture(scope="module")
def tensors(same):
    """A tiny SAM 3.1 by its own names."""
    return {theirs: same[name] for name, theirs in in_theirs(same).items()} | MULTIPLEX


@pytest.fixture
def file(tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(tensors, tmp_path / "sam3.1_multiplex.pt")
    return "sam3.1_multiplex.pt"


def test_the_table_gives_the_published_numbers_of_tensors():
    """1166 and 457, of the latter 17 and 131 in the prompt encoder and mask decoder."""
    names = sam3_names()
    assert len(names) == 1465 and not what_foreign(names)
    theirs = list(in_theirs(names).values())
    interactive = [name for name in theirs if ".interactive_convs." in name]
    assert sum(name.startswith("detector.") for name in theirs) + len(interactive) == 1166
    assert [sum(word in name for name in theirs) for word in ("prompt_encoder", "mask_decoder")] == [17, 131]
    for name in (*MULTIPLEX, *CONVERTED):
        assert what_foreign([*names, name]).startswith("is SAM 3.1 (27 March 2026), whose video tracker"), name
        assert what_foreign([*names, *STUDENTS, name]).startswith("is a student of EfficientSAM3 in SAM 3.1"), name


def test_import_gives_a_model_with_the_answers_of_its_parts(file, same, capsys):
    """As the same weights in SAM 3's own format give them, whatever the levels are that SAM 3.1 does not have."""
    folder = import_student.run(file, sam3="tiny")
    printed = capsys.readouterr().out
    assert (
        "left out: the video tracker (object multiplex)" in printed and "memory is SAM 3's, not SAM 3.1's" in printed
    )
    changed = {name: tensor + 1 if re.match(COARSEST, name) else tensor for name, tensor in same.items()}
    config = read_config(chassis_folder("tiny")).to_json_string()
    torch.save({"model": changed, "effsam3": json.dumps({"slots": {}, "config": json.loads(config)})}, "same.pt")
    models = [Sam3VideoModel.from_pretrained(place) for place in (folder, chassis_folder("same.pt"))]
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    answers = []
    for model in models:
        with torch.no_grad():
            found = model.eval().detector_model(pixel_values=pixels, input_ids=torch.tensor([[49406, 320, 49407]]))
            feat = model.detector_model.vision_encoder.backbone(pixels).last_hidden_state
            map_ = feat.transpose(1, 2).reshape(1, -1, 16, 16)
            levels = model.tracker_neck(map_)[0][:3]
        prompts = {n: t for n, t in model.tracker_model.state_dict().items() if n.startswith(HEADS)}
        answers.append([found.pred_masks, found.pred_logits, *levels, *prompts.values()])
    assert len(answers[0]) > 100
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)
    own = read_tensors(chassis_folder("tiny"))
    for name, tensor in read_tensors(folder).items():
        is_sam3s = re.search(r"memory_(att|enc)|fpn_layers\.3\.|object_pointer_proj", name)
        assert not is_sam3s or torch.equal(tensor, own[name]), name


def test_its_card_tells_which_tensors_are_whose(file):
    folder = import_student.run(file, sam3="tiny", to="models/x")
    card = json.loads((folder / CARD).read_text())
    (entry,) = card["adapted"]
    assert (entry["name"], entry["from"], card["chassis"], card["slots"]) == ("SAM 3.1", file, "tiny", {})
    before, after = read_tensors(chassis_folder("tiny")), read_tensors(folder)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed <= set(entry["tensors"]) and len(changed) > 0.8 * len(entry["tensors"])
    assert not any("memory_attention" in name or "fpn_layers.3" in name for name in entry["tensors"])


def test_it_teaches_and_is_merged_into(file):
    folder = import_student.run(file, sam3="tiny")
    teacher, sam3s = Teacher.from_folder(folder), Teacher.from_folder(chassis_folder("tiny"))
    assert teacher.fingerprint != sam3s.fingerprint
    assert cli.main(["show", RECIPE, f"sam3.checkpoint={folder}"]) == 0
    assert sam3_of(str(folder)).sizes == sam3_of("tiny").sizes


def test_a_student_in_it_is_imported(tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = tiny_trunk("efficientvit_b0", "stride32")
    image = {IMAGE_PREFIX + n: t for n, t in image_to_upstream(student.state_dict(), "efficientvit_b0").items()}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{VISION}trunk.")}
    torch.save({"model": rest | image}, "efficient_sam3p1.pt")
    folder = import_student.run("efficient_sam3p1.pt", sam3="tiny")
    card = json.loads((folder / CARD).read_text())
    assert card["slots"]["image"]["student"] == "efficientvit_b0" and card["adapted"][0]["name"] == "SAM 3.1"
    assert not any(name.startswith(TRUNK) for name in card["adapted"][0]["tensors"])


def test_what_it_lacks_is_named(file, capsys):
    assert cli.main(["import", file]) == 2
    told = capsys.readouterr().err
    assert "SAM 3.1 has a video tracker (object multiplex) in their place" in told and "--sam3 facebook/sam3" in told
    assert cli.main(["inspect", file]) == 0
    told = capsys.readouterr().out
    assert "SAM 3.1's own format" in told and re.search(r"video tracker \(object multiplex\) +\| float32 +\| +4", told)
    assert "memory attention" not in told and "mask decoder, the tracker's" in told and "effsam3 import" in told


@pytest.mark.parametrize("students", [False, True], ids=["sam3.1", "efficientsam3"])
def test_every_command_says_what_it_is(students, file, tensors, capsys):
    kind = "is a student of EfficientSAM3 in SAM 3.1" if students else "is SAM 3.1"
    torch.save({"model": tensors | dict.fromkeys(STUDENTS if students else (), torch.ones(2, 2))}, file)
    Image.new("RGB", (32, 32)).save("photo.png")
    assert cli.main(["predict", file, "photo.png", "--text", "a dog"]) == 2
    told = capsys.readouterr().err
    assert kind in told and "effsam3 import" in told and "--sam3 facebook/sam3" in told and told.count("\n") == 1, told
    assert cli.main(["show", RECIPE, f"sam3.checkpoint={file}"]) == 0
    assert kind in capsys.readouterr().out


def test_folders_files_and_names_on_the_hub(tensors, tmp_path):
    from effsam3.models.chassis.tensors import shard_of

    real = {name: tensor.contiguous() for name, tensor in tensors.items() if not tensor.is_complex()}
    save_file({name: tensor.clone() for name, tensor in real.items()}, tmp_path / "sam3.1_multiplex_fp16.safetensors")
    with pytest.raises(ChassisError, match="fp16.safetensors is SAM 3.1"):
        chassis_folder(str(tmp_path))
    with pytest.raises(ChassisError, match="fp16.safetensors is SAM 3.1"):
        chassis_folder(str(tmp_path / "sam3.1_multiplex_fp16.safetensors"))
    (tmp_path / "sam3.1_multiplex_fp16.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ChassisError, match="model.safetensors is SAM 3.1"):
        shard_of(tmp_path)
    for take in (chassis_folder, sam3_of):
        with pytest.raises(ChassisError, match=r"facebook/sam3\.1 is SAM 3\.1 .*`hf download facebook/sam3\.1 sam3"):
            take("facebook/sam3.1")
