# SPDX-License-Identifier: Apache-2.0
"""The parts of an export compute what `predict` does, and a file that does not is seen. Whole exports: tests/e2e."""

import sys
from types import SimpleNamespace

import onnx
import pytest
import torch
from commands import ENVIRONMENT, run_line
from lively_trackers import SIDE, efficient, lively_tracker, moving_video, trained
from torch import nn
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextTextModel

from effsam3.cli import main
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.exporting.flow import SECOND, TRACED, Example, flow, run_part
from effsam3.models.exporting.fold import fold, norms
from effsam3.models.exporting.memory_parts import ABSENT, memory_parts
from effsam3.models.exporting.onnx_files import ExportError, OnnxPart, differences, refuse_difference, write_onnx
from effsam3.models.exporting.openvino_files import OpenVinoPart, write_openvino
from effsam3.models.exporting.parts import MaskDecoder, Part, TrackerNeck, Trunk, parts_of
from effsam3.models.exporting.precision import agreement, inputs_of, to_fp16, to_int8
from effsam3.models.exporting.tokenizer import portable_tokenizer
from effsam3.models.image.student import StudentTrunk, StudentTrunkConfig
from effsam3.models.inference.concepts import ConceptModel, load_model
from effsam3.models.inference.prompted import Prompts, shown_masks, tracked_masks
from effsam3.models.text.student import lite_text_config
from effsam3.models.text.tokens import Tokenizer

UPPER_LEFT, LOWER_RIGHT = 2, 3
BOX = [20.0, 30, 90, 100]


@pytest.fixture(scope="module")
def model():
    return load_model(chassis_folder("tiny"))


@pytest.fixture(scope="module")
def tracker():
    return lively_tracker()


def run(parts, name, known):
    part = next(part for part in parts if part.name == name)
    return known | dict(zip(part.outputs, run_part(part, [known[one] for one in part.inputs]), strict=True))


# ---- parts against what predict does


@pytest.mark.parametrize("boxes", [[], [[0.5, 0.5, 0.4, 0.3], [0.2, 0.3, 0.2, 0.2]]])
def test_concepts(boxes, model):
    concepts = ConceptModel(chassis_folder("tiny"))
    image = torch.randint(0, 256, (100, 140, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    labels = [1, 0][: len(boxes)] or [-10]
    boxes_124 = torch.tensor([boxes or [[0.0] * 4]])
    given = (boxes_124[0], torch.tensor(labels)) if boxes else ()
    wanted = concepts.detect(concepts.look(image), ["a red dog"], *given)

    pixels = concepts.processor.image_processor(image, return_tensors="pt").pixel_values
    tokens = dict(concepts.processor.tokenizer(["a red dog"], return_tensors="pt"))
    known = {"pixels": pixels, **tokens, "boxes": boxes_124, "box_labels": torch.tensor([labels])}
    parts = parts_of(model)
    for name in ("trunk", "detector_neck", "text_encoder", "detector"):
        known = run(parts, name, known)
    torch.testing.assert_close(known["concept_masks"], wanted.masks_RQMM, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(known["concept_boxes"], wanted.boxes_LRQ4[-1])
    torch.testing.assert_close(known["concept_scores"], wanted.scores_RQ)


CORNERS = [(*BOX[:2], UPPER_LEFT), (*BOX[2:], LOWER_RIGHT)]
SHOWN = {
    "point": ([(60, 70, 1)], Prompts(points_N2=torch.tensor([[60.0, 70]]), labels_N=torch.tensor([1]))),
    "points": (
        [(60, 70, 1), (5, 9, 0)],
        Prompts(points_N2=torch.tensor([[60.0, 70], [5, 9]]), labels_N=torch.tensor([1, 0])),
    ),
    "box": (CORNERS, Prompts(boxes_O4=torch.tensor([BOX]))),
    "point in a box": (
        [(60, 70, 1), *CORNERS],
        Prompts(torch.tensor([BOX]), torch.tensor([[60.0, 70]]), torch.tensor([1])),
    ),
}


def tracking_parts(tracker):
    """The parts of a tracker with its own vision encoder."""
    names = {name: "" for name in ("image_embedding", "fine_0", "fine_1", "points", "labels")}
    outputs = dict.fromkeys(("masks", "scores", "best", "object_logits", "object_pointers"), "")
    fine = dict.fromkeys(("fine_0", "fine_1", "top", "image_embedding"), "")
    return [
        Part("trunk", Trunk(tracker.vision_encoder), {"pixels": ""}, {"features": ""}),
        Part("tracker_neck", TrackerNeck(tracker.vision_encoder.neck, tracker), {"features": ""}, fine),
        Part("mask_decoder", MaskDecoder(tracker), names, outputs),
        *memory_parts(SimpleNamespace(tracker_model=tracker)),
    ]


def shown(parts, known, prompt):
    """Give a prompt [(x, y, label)] of one object."""
    prompt = torch.tensor([[prompt]]).float()
    return run(parts, "mask_decoder", known | {"points": prompt[..., :2], "labels": prompt[..., 2].long()})


@pytest.mark.parametrize("prompt", SHOWN)
@pytest.mark.parametrize("threshold", [0.0, 1.0])  # masks are never, or always, too unstable
def test_objects_that_are_shown(prompt, threshold, tracker, monkeypatch):
    monkeypatch.setattr(tracker.mask_decoder, "dynamic_multimask_stability_thresh", threshold)
    points, prompts = SHOWN[prompt]
    pixels = moving_video(1)
    wanted, iou = shown_masks(tracker, pixels[0], (4 * SIDE, 4 * SIDE), scaled(prompts, 4))
    parts = tracking_parts(tracker)
    known = run(parts, "tracker_neck", run(parts, "trunk", {"pixels": pixels}))
    known = shown(parts, known, points)
    best = known["best"][0, 0]
    logits = known["masks"][0, 0, best][None, None]
    found = nn.functional.interpolate(logits, (4 * SIDE, 4 * SIDE), mode="bilinear")[0] > 0
    assert torch.equal(found, wanted) and 0 < wanted.float().mean() < 1
    torch.testing.assert_close(known["scores"][0, 0, best][None], iou)


def scaled(prompts, factor):
    def times(value):
        return None if value is None else value * factor

    return Prompts(times(prompts.boxes_O4), times(prompts.points_N2), prompts.labels_N)


@pytest.mark.parametrize("mode", ["SAM 3's own", "dense", "pooled", "latents", "hybrid"])
def test_a_video_by_parts_is_what_a_session_tracks(mode, tracker):
    frames = 6
    whole = tracker if mode == "SAM 3's own" else trained(efficient(tracker, memory_mode=mode))
    pixels = moving_video(frames)
    session = tracked_masks(whole, list(pixels), (SIDE, SIDE), Prompts(boxes_O4=torch.tensor([BOX])))
    wanted = torch.cat([masks for _, masks, _ in session])

    parts = tracking_parts(whole)
    config = parts[-1].module.tracker.config
    kept, pointers, found = [], [], []
    for now in range(frames):
        known = run(parts, "tracker_neck", run(parts, "trunk", {"pixels": pixels[now : now + 1]}))
        if now:
            offsets = [0, *(back for back in range(config.num_maskmem - 1, 0, -1) if now - back > 0)]
            frame_of = [now - back if back else 0 for back in offsets]
            hot = [mode != "hybrid" or back <= config.memory_hot_frames for back in offsets]
            for name, read, one in (("map", "maps", "memory_map"), ("latent", "latents", "memory_latents")):
                of_map = name == "map"
                chosen = [
                    (back, kept[frame][one])
                    for back, frame, is_hot in zip(offsets, frame_of, hot, strict=True)
                    if one in kept[frame] and (mode != "hybrid" or is_hot == of_map)
                ]
                like = kept[0].get(one)
                if like is not None:
                    known[read] = torch.stack([value for _, value in chosen], 1) if chosen else like[:, None][:, :0]
                    known[f"{name}_offsets"] = torch.tensor([back for back, _ in chosen], dtype=torch.long)
            # The prompted frame's pointer first, then from the newest back.
            order = [0, *range(now - 1, 0, -1)]
            known["pointers"] = torch.stack([pointers[frame] for frame in order], 1)
            known["pointer_distances"] = torch.tensor([(now - frame) / (frames - 1) for frame in order])
            known = run(parts, "memory_attention", known)
            known["image_embedding"] = known["conditioned"]
        known = shown(parts, known, [(0, 0, -1)] if now else CORNERS)
        known["mask"] = known["masks"][0, 0, known["best"][0, 0]][None, None]
        known |= {"object_logit": known["object_logits"][0], "prompted": torch.tensor([now == 0])}
        found.append(torch.where(known["object_logit"][:, None, None] > 0, known["mask"][0], ABSENT))
        known = run(parts, "memory_encoder", known)
        # A session stores what it remembers in bfloat16.
        kept.append({name: known[name].bfloat16().float() for name in parts[-2].outputs})
        pointers.append(known["object_pointers"][0])
    found = nn.functional.interpolate(torch.stack(found), (SIDE, SIDE), mode="bilinear")[:, 0] > 0
    assert (found == wanted).float().mean() > 0.999
    assert 0.02 < wanted[1:].float().mean() < 0.98 and not torch.equal(wanted[0], wanted[-1])


def test_the_portable_tokenizer_gives_sam_3s_ids():
    portable, own = portable_tokenizer(), Tokenizer()
    texts = ["a dog", "the dog\u2019s  ball, don't", "\u8857\u4e0a\u7684\u72d7 \U0001f436", "I'LL 1,234.5 m\u00b2", ""]
    for text, wanted in zip(texts, own.tokenize_whole(texts), strict=True):
        found = portable.encode(text)
        assert found.ids[: len(wanted)] == wanted and len(found.ids) == 32
        assert found.attention_mask == [1] * len(wanted) + [0] * (32 - len(wanted))


# ---- folding


def test_branches_are_folded_and_the_drift_is_told(model):
    config = StudentTrunkConfig(timm_name="repvit_m0_9", hidden_size=64, image_size=224)
    torch.manual_seed(0)
    student = StudentTrunk(config).eval()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh ones fold into nothing
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    encoder = SimpleNamespace(backbone=student)
    text = lite_text_config("mobileclip_s0", 32)
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_hidden_layers = 32, 64, 2, 4
    detector = SimpleNamespace(vision_encoder=encoder, text_encoder=Sam3LiteTextTextModel(text).eval())
    found = fold(SimpleNamespace(detector_model=detector))
    assert found["trunk"].norms_before > 90 and found["trunk"].norms_after == norms(student) == 0
    assert found["text_encoder"].norms_before > 2 and found["text_encoder"].norms_after == 0
    assert all(0 < one.drift < 1e-4 for one in found.values())
    assert fold(model) == {}  # SAM 3 itself has nothing to fold


# ---- files


class Doubled(nn.Module):
    def forward(self, pixels):
        return pixels * 2


def test_a_file_is_compared_with_pytorch(tmp_path):
    part = Part("doubled", Doubled(), {"pixels": "images 3"}, {"features": "images 3"})
    example = example_of(part, TRACED)
    write_onnx(example, tmp_path / "doubled.onnx")
    file = OnnxPart(tmp_path / "doubled.onnx")
    assert differences(example, file(example.inputs)) == {"features": 0}
    second = example_of(part, SECOND)
    assert differences(second, file(second.inputs)) == {"features": 0}
    wrong = example._replace(outputs={"features": example.outputs["features"] + torch.eye(2, 3)})
    shares = differences(wrong, file(example.inputs))
    assert shares == {"features": pytest.approx(1 / 9)}  # of 0 to 10 but for what was added: a range of 9
    with pytest.raises(ExportError, match="doubled: features differs from PyTorch's by 1.1e-01 of its range"):
        refuse_difference("doubled", shares)
    with pytest.raises(ExportError, match=r"doubled.onnx does not run on pixels \(2, 4\)"):
        file({"pixels": torch.zeros(2, 4)})
    with pytest.raises(ExportError, match=r"doubled: features is \(2, 3\) in the file and \(1, 3\) in PyTorch"):
        differences(second, file(example.inputs))
    with pytest.raises(ExportError, match="no numbers"):
        differences(example, {"features": example.outputs["features"] / 0})


@pytest.fixture(scope="module")
def neck(model):
    """A convolutional part with its neighbours, an example of it, and images."""
    parts = parts_of(model)[:2]
    images = [torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(2)]
    return parts, list(flow(parts, SECOND))[1], images


def test_fewer_bits_are_nearly_the_same(neck, tmp_path):
    parts, example, images = neck
    path = tmp_path / "detector_neck.onnx"
    write_onnx(example, path)
    full, size = differences(example, OnnxPart(path)(example.inputs)), path.stat().st_size
    half = tmp_path / "half.onnx"
    half.write_bytes(path.read_bytes())
    to_fp16(half)
    at_half = differences(example, OnnxPart(half)(example.inputs))
    given = inputs_of(example.part, parts, images)
    assert torch.equal(given[1]["features"], run_part(parts[0], [images[1]])[0])
    to_int8(example.part, path, given)
    at_int8 = differences(example, OnnxPart(path)(example.inputs))
    assert half.stat().st_size < 0.6 * size and path.stat().st_size < 0.4 * size
    for name in example.outputs:
        assert full[name] < 1e-5 < at_half[name] < 5e-3 < at_int8[name] < 0.2, name


def test_openvino_computes_the_same(neck, tmp_path):
    _, example, _ = neck
    write_onnx(example, tmp_path / "neck.onnx")
    write_openvino(tmp_path / "neck.onnx", tmp_path / "neck.xml", half=False)
    (tmp_path / "neck.onnx").unlink()
    found = OpenVinoPart(tmp_path / "neck.xml")(example.inputs)
    assert max(differences(example, found).values()) < 1e-4


USED = """
import sys
from pathlib import Path
import torch
from effsam3.models.exporting.onnx_files import OnnxPart
from effsam3.models.exporting.openvino_files import OpenVinoPart, write_openvino
folder, inputs = Path(sys.argv[1]), {"x": torch.ones(2)}
write_openvino(folder / "double.onnx", folder / "double.xml", half=False)
for part in (OnnxPart(folder / "double.onnx"), OpenVinoPart(folder / "double.xml")):
    assert part(inputs)["y"].tolist() == [2, 2]
"""


def test_the_runtimes_tell_nobody_that_they_are_used(tmp_path):
    """Both would leave the number of this machine in the home folder first."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "double.onnx")
    home = tmp_path / "home"
    home.mkdir()
    silent = ("CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY")  # with these they tell nothing anyway
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in silent}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    run_line(tmp_path, [sys.executable, "-c", USED, str(tmp_path)], environment=environment)
    assert [path.name for path in home.rglob("*") if path.is_file()] == []


def test_agreement_counts_masks():
    images = [torch.zeros(1, 3, 30, 30)]

    def run(name, known, shift=0):
        if name != "mask_decoder":
            return known
        # A mask is its box, as drawn in pixels; of the four candidates the third is best.
        masks = torch.full((1, 9, 4, 30, 30), -1.0)
        for number, ((x1, y1), (x2, y2)) in enumerate(known["points"][0].int().tolist()):
            masks[0, number, 2, y1:y2, x1 + shift : x2 + shift] = 1
        return {"masks": masks, "best": torch.full((1, 9), 2)}

    assert agreement(run, run, images) == {"mean_iou": 1.0, "lowest_iou": 1.0, "masks": 9}
    found = agreement(run, lambda name, known: run(name, known, 2), images)
    # Of ten columns eight are shared by twelve; at the right end the image cuts two off: eight of ten.
    assert found["mean_iou"] == pytest.approx((6 * 8 / 12 + 3 * 8 / 10) / 9) and found["lowest_iou"] == pytest.approx(
        8 / 12
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "--precision int8 needs images to take its ranges from: --calibrate FOLDER"),
        (["--precision", "int8", "--to", "openvino", "--calibrate", "."], "--precision int8 is for --to onnx"),
        (["--calibrate", "."], "--calibrate .: no image"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "tiny", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def example_of(part, lengths):
    inputs = {"pixels": torch.arange(3.0 * lengths["images"]).reshape(-1, 3)}
    return Example(part, inputs, dict(zip(part.outputs, run_part(part, [*inputs.values()]), strict=True)))


def test_a_folder_of_other_files_is_not_replaced(tmp_path, capsys):
    (tmp_path / "masks.npy").write_bytes(b"mine")
    assert main(["export", "tiny", "--out", str(tmp_path)]) == 2
    assert "holds files of something else than an export" in capsys.readouterr().err
    assert (tmp_path / "masks.npy").read_bytes() == b"mine"
