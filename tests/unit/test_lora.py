"""Adapters on a SAM 3, against transformers' own inference and peft's own merge."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from effsam3.errors import ChassisError, UserError
from effsam3.losses.detection import box_distance, match, mean_of, of_queries, score_loss
from effsam3.models.chassis.classes import model_class
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import fingerprint, load_whole, read_config, read_tensors
from effsam3.models.heads.detector import answer, ask, detector_levels
from effsam3.models.heads.tracker import Shown, decode_shown, tracker_levels
from effsam3.models.heads.trunk import trunk_features
from effsam3.models.image.student import StudentTrunk, student_config
from effsam3.models.lora.adapter import AdapterError, load_adapter, share_kept, updates, write_adapter
from effsam3.models.lora.parts import PARTS
from effsam3.models.lora.student import Adapters, AdapterStudent, Targets, boxes_of, overlaps
from effsam3.models.lora.targets import target_modules, view_biases
from effsam3.models.memory.prompts import NO_POINT
from effsam3.models.text.tokens import PromptTokenizer

SIDE = 224
WEIGHTS = {name: 1.0 for name in ("bce", "dice", "iou", "score", "box", "semantic", "presence")}
BOXES = torch.tensor([[20.0, 30.0, 120.0, 150.0], [60.0, 10.0, 200.0, 90.0]])


@pytest.fixture(scope="module")
def folder():
    return chassis_folder("tiny")


def whole(folder):
    return load_whole(model_class(read_config(folder).model_type), folder)


@pytest.fixture
def model(folder):
    return whole(folder)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_student(model, parts=tuple(PARTS), views=0, dropout=0.0, recompute=False, weights=WEIGHTS):
    torch.manual_seed(0)
    adapters = Adapters(parts=parts, rank=4, alpha=8, dropout=dropout)
    return AdapterStudent(model, adapters, views, 128, weights, recompute)


def disturb(student):
    """Give the adapters an effect: they begin with none."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


def boxes_shown(image_O):
    labels = torch.tensor([[2, 3]] * len(image_O), dtype=torch.int32)
    return Shown(torch.tensor(image_O), BOXES[: len(image_O)].view(-1, 2, 2), labels)


def asked(image_R):
    return ask(["a dog"] * len(image_R), torch.tensor(image_R), PromptTokenizer())


def decode(model, feat, shown, view_BC=None):
    return list(decode_shown(model, tracker_levels(model, feat, view_BC), shown))


def find(model, feat, asked, view_BC=None):
    return answer(model, detector_levels(model, feat, view_BC), asked).masks_RQMM


def inputs(pixels):
    masks = torch.zeros(2, SIDE, SIDE)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    shown = Shown(
        torch.tensor([0, 0]),
        torch.stack([BOXES[0].view(2, 2), torch.tensor([[100.0, 40.0], [0.0, 0.0]])]),
        torch.tensor([[2, 3], [1, NO_POINT]], dtype=torch.int32),
    )
    targets = Targets(masks, torch.tensor([0.25, 0.25]), masks[None], torch.ones(1, 2).bool(), torch.tensor([0.5]))
    return pixels, torch.tensor([0, 1]), shown, asked([1]), targets


# ---- adapters


def test_parts_are_told_apart(model):
    found = {part: target_modules(model, [part]) for part in PARTS}
    assert {part: len(names) for part, names in found.items()} == {
        "trunk": 24, "text": 12, "detr": 73, "detector_mask_decoder": 7, "tracker_mask_decoder": 47,
    }  # fmt: skip
    assert len(target_modules(model, tuple(PARTS))) == len({name for names in found.values() for name in names})
    assert not [name for name in found["text"] if "text_projection" in name]
    assert [name for name in found["text"] if name.endswith("out_proj")]


@pytest.mark.parametrize("student", ["repvit_m0_9", "tiny_vit_5m"])
def test_students_are_adapted_at_their_1x1_convolutions(model, student):
    sizes = {"hidden_size": 64, "image_size": SIDE, "patch_size": 14}
    torch.manual_seed(0)
    trunk = StudentTrunk(student_config(student, "fused", None, **sizes))
    model.detector_model.vision_encoder.backbone = trunk.eval()
    names = target_modules(model, ["trunk"])
    layers = [model.get_submodule(name) for name in names]
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions and all(layer.groups == 1 and layer.kernel_size == (1, 1) for layer in convolutions)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = [name for name in own if "running_mean" in name]
    given = inputs(torch.rand(2, 3, SIDE, SIDE))[:3] + (None,)
    targets = inputs(torch.rand(2, 3, SIDE, SIDE))[4]
    adapted = make_student(model, ("trunk",), recompute=True)
    assert adapted.train().unreached(*given, targets) == []
    # BatchNorm is the model's: neither its statistics nor what it computes learns.
    assert statistics and all((model.state_dict()[name] == own[name]).all() for name in statistics)
    disturb(adapted).eval()
    with torch.no_grad():
        by_adapters = trunk_features(model, given[0])
        plain = dict(adapted.state_dict())
    changes = updates(plain, 8, 4)
    assert sorted(changes) == sorted(f"{name}.weight" for name in names)
    fresh = StudentTrunk(student_config(student, "fused", None, **sizes))
    prefix = "detector_model.vision_encoder.backbone."
    fresh.load_state_dict(
        {name.removeprefix(prefix): own[name] + changes.get(name, 0) for name in own if name.startswith(prefix)}
    )
    model.detector_model.vision_encoder.backbone = fresh.eval()
    with torch.no_grad():
        merged = trunk_features(model, given[0])
    assert torch.allclose(merged, by_adapters, atol=1e-4 * float(by_adapters.abs().max()))


def test_an_adapter_that_no_loss_reaches_is_found(model, pixels):
    student = make_student(model)
    given = inputs(pixels)
    assert student.train().unreached(*given) == []
    # Without phrases the detector does not run.
    idle = student.unreached(*given[:3], None, given[4])
    assert idle and all("detector_model" in name for name in idle) and not any("backbone" in name for name in idle)
    # A layer whose loss has no weight is as idle.
    student.weights = {name: 0.0 for name in WEIGHTS} | {"presence": 1.0}
    assert any("detector_model.mask_decoder" in name for name in student.unreached(*given))


def test_recomputing_gives_the_same_gradients(folder, pixels):
    found = []
    for recompute in (False, True):
        student = disturb(make_student(whole(folder), recompute=recompute)).train()
        assert bool(student.recomputed) == recompute
        student(*inputs(pixels))["loss"].backward()
        found.append({name: parameter.grad for name, parameter in student.named_parameters()})
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])
    assert all(gradient.any() for name, gradient in found[0].items() if "backbone" in name)


def test_only_adapters_drop_out_and_only_they_learn(model, pixels):
    student = make_student(model, dropout=0.5)
    disturb(student).train()
    assert not model.detector_model.training and all(layer.training for layer in student.dropouts)
    given = inputs(pixels)
    assert student(*given)["loss"] != student(*given)["loss"]
    with torch.no_grad():
        first, second = student.eval()(*given), student(*given)
    assert first["loss"] == second["loss"] and {"iou_O", "dice_O", "iou_R", "dice_R"} <= first.keys()
    frozen = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert frozen == []
    assert {id(p) for p in student.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


# ---- adapters alone, and merged


def test_peft_reads_the_folder_and_computes_what_the_merge_does(folder, model, pixels, tmp_path):
    student = disturb(make_student(model))
    weights = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
    own = read_tensors(folder)
    adapted = {f"{name}.weight": own[f"{name}.weight"] for name in student.modules_adapted}
    about = {
        "chassis": "tiny", "revision": None, "fingerprint": fingerprint(adapted), "modules": student.modules_adapted,
        "views": [],
    }  # fmt: skip
    write_adapter(tmp_path / "adapter", weights, student.config, about, None)
    written = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    assert json.loads(written["adapter_config.json"])["target_modules"] == student.modules_adapted

    changes = updates(weights, 8, 4)
    merged = whole(folder)
    merged.load_state_dict({name: own[name] + changes.get(name, 0) for name in own})
    by_peft = PeftModel.from_pretrained(whole(folder), tmp_path / "adapter").eval()
    by_us = load_adapter(whole(folder), tmp_path / "adapter").eval()
    outputs = []
    for one in (model.eval(), merged.eval(), by_peft.base_model.model, by_us.base_model.model):
        with torch.no_grad():
            feat = trunk_features(one, pixels)
            (shown,) = decode(one, feat, boxes_shown([0, 1]))
            outputs.append((shown.logits_NMLL, find(one, feat, asked([0]))))
    plain = whole(folder)
    with torch.no_grad():
        (before,) = decode(plain, trunk_features(plain, pixels), boxes_shown([0, 1]))
    assert not torch.allclose(before.logits_NMLL, outputs[0][0], atol=1e-2)
    for other in outputs[1:]:
        for one, same in zip(outputs[0], other, strict=True):
            assert torch.allclose(one, same, atol=1e-5 * max(1.0, float(one.abs().max())))
    # peft's own merge, for every layer.
    for name, tensor in by_peft.merge_and_unload().state_dict().items():
        assert torch.allclose(tensor, merged.state_dict()[name], atol=1e-6), name

    # ---- what does not fit is refused
    (tmp_path / "adapter/effsam3.json").write_text(json.dumps(about | {"fingerprint": "other"}))
    with pytest.raises(AdapterError, match="trained on other weights.*load tiny"):
        load_adapter(whole(folder), tmp_path / "adapter")
    (tmp_path / "adapter/effsam3.json").write_bytes(written["effsam3.json"])
    with pytest.raises(AdapterError, match="are not in this model"):
        load_adapter(whole(folder).detector_model, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.raises(AdapterError, match="do not agree about 1 tensors"):
        load_adapter(whole(folder), tmp_path / "adapter")


def test_a_view_folds_exactly_into_the_ends_of_the_necks(folder, model, pixels):
    student = disturb(make_student(model, views=2)).eval()
    with torch.no_grad():
        view_BC = student.views.weight[[1]].expand(2, -1)
        feat = trunk_features(model, pixels)
        (seen,) = decode(model, feat, boxes_shown([0, 1]), view_BC)
        found = find(model, feat, asked([0, 1]), view_BC)
        (plain,) = decode(model, feat, boxes_shown([0, 1]))
        names = list(view_biases(tracker=True, detector=True))
        for name in names:
            model.get_parameter(name).add_(view_BC[0])
        (folded,) = decode(model, feat, boxes_shown([0, 1]))
        again = find(model, feat, asked([0, 1]))
    assert len(names) == 6 and not torch.allclose(plain.logits_NMLL, seen.logits_NMLL, atol=1e-4)
    assert torch.allclose(folded.logits_NMLL, seen.logits_NMLL, atol=1e-5)
    assert torch.allclose(again, found, atol=1e-4 * float(found.abs().max()))


def test_how_much_of_an_update_survives_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    own = {"w": 0.02 * torch.randn(512, 512, generator=generator)}
    kept = {}
    for size in (1e-3, 5e-5, 5e-6):
        kept[size] = share_kept(own, {"w": size * torch.randn(512, 512, generator=generator)})
    assert kept[1e-3] > 0.95 and 0.3 < kept[5e-5] < 0.6 and kept[5e-6] < 0.1
    assert share_kept(own, {"w": torch.zeros(512, 512)}) == 1.0


# ---- losses of phrases


def test_losses_of_phrases_are_those_of_the_matched_queries():
    boxes = torch.tensor([[[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9], [0.0, 0.0, 1.0, 1.0]]])
    target = torch.tensor([[[0.5, 0.5, 0.9, 0.8], [0.1, 0.1, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]]])
    logits, valid = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[True, True, False]])
    query = match(logits, boxes, target, valid)
    assert query.tolist() == [[1, 0, -1]]
    # The centre is 0.05 off, the height 0.1.
    assert mean_of(box_distance(of_queries(boxes, query), target), query) == pytest.approx(0.15 / 2)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits[0], torch.tensor([1.0, 1.0, 0.0]))
    assert score_loss(logits, query) == pytest.approx(float(bce))
    masks = torch.zeros(1, 2, 10, 10)
    masks[0, 0, 2:5, 1:9] = 0.5
    assert torch.allclose(boxes_of(masks), torch.tensor([[[0.1, 0.2, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0]]]))


def test_overlaps_by_counting():
    mask, target = torch.zeros(2, 4, 4).bool(), torch.zeros(2, 4, 4).bool()
    mask[0, :2], target[0, 1:3] = True, True
    found = overlaps(mask, target)
    assert found["iou"].tolist() == pytest.approx([1 / 3, 1.0]) and found["dice"].tolist() == pytest.approx([0.5, 1.0])


def test_a_part_without_layers_is_refused(model):
    model.tracker_model.mask_decoder = torch.nn.Identity()
    with pytest.raises(UserError, match="tracker_mask_decoder has neither"):
        target_modules(model, ["tracker_mask_decoder"])
    assert issubclass(ChassisError, UserError)
