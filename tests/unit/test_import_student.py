# SPDX-License-Identifier: Apache-2.0
"""Importing EfficientSAM3's checkpoints: the same features, by references of their own; files that cannot be used."""

import json
import re

import pytest
import torch
from run_folders import image_run, tiny_text, tiny_trunk
from transformers import Sam3VideoConfig, Sam3VideoModel
from upstream_text import POSITIONS, linear, masked_features, random_rows, upstream_text, zero_padded

from effsam3 import import_student, merge
from effsam3.benchmarks.text import load_text_features
from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.import_student import ImportedError, completed, find, stretched, students
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, read_config, read_tensors
from effsam3.models.image.student import StudentTrunk, StudentTrunkConfig
from effsam3.models.keymaps import KeyMapError
from effsam3.models.keymaps.sam3 import to_original
from effsam3.models.keymaps.upstream import image_to_upstream, text_to_upstream
from effsam3.models.merging.formats import IMAGE_PREFIX, TEXT_PREFIX
from effsam3.models.merging.slots import MergeError
from effsam3.models.registry import IMAGE_STUDENTS
from effsam3.models.text.padding import AttendedLiteTextModel
from effsam3.models.text.tokens import pad
from effsam3.recipe.reader import load_recipe

STUDENT = "efficientvit_b0"


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """`import` writes below the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def image():
    """EfficientSAM3's names of an image student for the tiny chassis."""
    return image_to_upstream(tiny_trunk(STUDENT, "stride32").state_dict(), STUDENT)


@pytest.fixture(scope="module")
def rest():
    """SAM 3's own names of the tiny chassis' other parts, its text encoder among them."""
    folder = chassis_folder("tiny")
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if not name.startswith(TRUNK)}
    return to_original(tensors, {}, None)


def text_file(student="tiny_text_plain", rows=32):
    """EfficientSAM3's names of a text student with so many positions."""
    model = tiny_text(student)
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("feature_")}
    own = text_to_upstream(tensors)
    torch.manual_seed(rows)
    own[POSITIONS] = torch.randn(1, 1, rows, model.text_projection.in_features)
    return own


def saved(folder, content, name="student.pt"):
    torch.save(content, folder / name)
    return str(folder / name)


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


# ---- image students


@pytest.mark.parametrize("format", ["alone", "wrapped", "merged", "without detector", "saved after loading"])
def test_an_image_student_gives_the_same_features(format, image, rest, somewhere):
    whole = prefixed(IMAGE_PREFIX, image) | rest
    bare = {name.removeprefix("detector."): tensor for name, tensor in whole.items()}
    content = {
        "alone": image,
        "wrapped": {"model": prefixed("module.student_trunk.", image), "epoch": 3},
        "merged": {"model": whole},
        "without detector": bare,
        "saved after loading": {
            re.sub(r"^tracker\.", "inst_interactive_predictor.model.", name): tensor for name, tensor in bare.items()
        },
    }[format]
    folder = import_student.run(saved(somewhere, content), sam3="tiny")
    model, info = Sam3VideoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        found = model.detector_model.vision_encoder.backbone(pixels).last_hidden_state
        expected = tiny_trunk(STUDENT, "stride32")(pixels).last_hidden_state  # whose statistics are not folded
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    chassis, tensors = read_tensors(chassis_folder("tiny")), read_tensors(folder)
    kept = {name for name in chassis if not name.startswith(TRUNK)}
    assert {name for name in tensors if not name.startswith(TRUNK)} == kept
    assert all(torch.equal(chassis[name], tensors[name]) for name in kept)


def test_the_files_own_parts_come_before_the_chassis(image, rest, somewhere):
    """A stage 3 file has other weights than SAM 3 in what it has."""
    content = prefixed(IMAGE_PREFIX, image) | {name: t + 1 for name, t in rest.items() if "geometry" not in name}
    content["detector.backbone.vision_backbone.trunk.pos_embed"] = torch.zeros(1, 65, 64)  # the teacher's, left over
    file = saved(somewhere, content)
    with pytest.raises(ImportedError, match=r"lacks 42 tensors of SAM 3 \(detector_model.geometry_encoder 42; "):
        import_student.completed(
            found := find(content, file), students(found, read_config(chassis_folder("tiny")), {"origin": "x"}),
            read_config(chassis_folder("tiny")), None, file,
        )  # fmt: skip
    tensors = read_tensors(import_student.run(file, sam3="tiny"))
    chassis = read_tensors(chassis_folder("tiny"))
    for name, tensor in chassis.items():
        if not name.startswith(TRUNK):
            assert torch.equal(tensors[name], tensor if "geometry_encoder" in name else tensor + 1), name


def test_half_precision_and_averaged_weights(image, somewhere, capsys):
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in image.items()}
    twice = {name: tensor * 2 for name, tensor in half.items()}
    folder = import_student.run(saved(somewhere, {"model": twice, "model_ema": half}), sam3="tiny")
    weights = read_tensors(folder, TRUNK)
    assert all(tensor.dtype != torch.float16 for tensor in weights.values())
    assert torch.equal(weights["head.3.weight"], half["head.3.weight"].float())
    printed = capsys.readouterr().out
    assert "averaged weights" in printed and "float16" in printed


def test_the_folder_says_where_it_comes_from(image, somewhere, capsys):
    file = saved(somewhere, image)
    card = json.loads((import_student.run(file, sam3="tiny", to="models/x") / CARD).read_text())
    slot = card["slots"]["image"]
    assert (slot["student"], slot["from"], card["imported"], card["chassis"]) == (STUDENT, "student.pt", file, "tiny")
    assert len(slot["content"]) == 16 and len(slot["fingerprint"]) == 32
    torch.save(image | {"head.3.bias": image["head.3.bias"] + 1}, somewhere / "other.pt")
    other = json.loads((import_student.run("other.pt", sam3="tiny") / CARD).read_text())["slots"]["image"]
    assert other["content"] != slot["content"] and other["fingerprint"] != slot["fingerprint"]
    assert "release it:   effsam3 merge RECIPE parts.image=models/x" in capsys.readouterr().out


def test_our_own_export_comes_back(somewhere):
    run = image_run(somewhere, student=STUDENT, head="stride32")
    merged = merge.run(load_recipe(run / "recipe.yaml", ["merge.formats=[efficientsam3]"]))
    folder = import_student.run(str(merged / "efficientsam3.pt"), sam3="tiny")
    before, after = read_tensors(merged), read_tensors(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {TRUNK + name for name in ("head.3.weight", "head.3.bias", "feature_mean", "feature_scale")}


# ---- text students


@pytest.mark.parametrize("student", ["tiny_text", "tiny_text_plain"])
@pytest.mark.parametrize("rows", [77, 32, 16])
def test_a_text_student_gives_what_it_gave_whatever_the_length_of_a_text(student, rows, somewhere, capsys):
    """For 2 to 32 tokens, filled up with EfficientSAM3's padding and in sight of it, as it was trained."""
    tensors = text_file(student, rows)
    folder = import_student.run(saved(somewhere, tensors), sam3="tiny")
    texts, theirs = zero_padded(random_rows(31))
    wanted = upstream_text(tensors, theirs, heads=2)
    ids, mask = pad(texts)
    assert not torch.equal(ids, theirs) and mask.sum(1).tolist() == list(range(2, 33))
    whole, info = Sam3VideoModel.from_pretrained(folder, output_loading_info=True)
    alone, information = AttendedLiteTextModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and not any(information.values())
    with torch.no_grad():
        for model in (whole.detector_model, alone):
            found = model.eval().get_text_features(input_ids=ids, attention_mask=mask.long()).pooler_output
            torch.testing.assert_close(found[mask], wanted[mask], atol=1e-4, rtol=0)
        measured = load_text_features(folder)
        for length in (2, 5, 17, 32):  # as `evaluate` has them, padded to the longest of a batch
            found = measured(ids[: length - 1, :length], mask[: length - 1, :length])
            torch.testing.assert_close(
                found[mask[: length - 1, :length]], wanted[: length - 1][mask[: length - 1]], atol=1e-4, rtol=0
            )
        # What masking it would give: the features of another model, but where there is nothing to mask.
        masked = masked_features(folder, ids, mask)
    assert (masked[:5] - wanted[:5])[mask[:5]].abs().max() > 0.1 and torch.allclose(masked[30], wanted[30], atol=1e-4)
    printed = capsys.readouterr().out
    assert f"text: {student}, {rows} positions" in printed and "(student_padding: attended)" in printed
    assert ("interpolated to 32" in printed) == (rows != 32)
    assert ("learned on 16 tokens" in printed) == (rows == 16)
    assert json.loads((folder / CARD).read_text())["slots"]["text"]["padding"] == "attended"


def test_the_table_is_stretched_like_transformers_stretches_it():
    """A table of 77 in transformers' own class gives for 32 tokens what the stored 32 rows give."""
    from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextTextPositionEmbedding

    for rows in (77, 16, 32):
        module = Sam3LiteTextTextPositionEmbedding(rows, 8)
        torch.nn.init.normal_(module.position_embedding)
        table = stretched(module.position_embedding.detach(), 32)
        torch.testing.assert_close(table[0], module(32).detach())
        torch.testing.assert_close(table[0, 0].numpy(), linear(module.position_embedding[0, 0].detach().numpy(), 32))


def test_both_students_of_one_file(image, rest, somewhere):
    own = {name: tensor for name, tensor in rest.items() if not name.startswith(TEXT_PREFIX)}
    content = prefixed(IMAGE_PREFIX, image) | prefixed(TEXT_PREFIX, text_file()) | own
    folder = import_student.run(saved(somewhere, {"model": content}), sam3="tiny")
    slots = json.loads((folder / CARD).read_text())["slots"]
    assert {slot: card["student"] for slot, card in slots.items()} == {"image": STUDENT, "text": "tiny_text_plain"}
    _, info = Sam3VideoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


# ---- without a chassis: SAM 3's published sizes


def test_a_whole_file_needs_no_chassis():
    """On tensors without numbers: 860 M of them would take minutes."""
    config = Sam3VideoConfig()
    with torch.device("meta"):
        original = to_original(
            Sam3VideoModel(config).state_dict(), {}, config.detector_config.vision_config.backbone_config
        )
        trunk = StudentTrunk(StudentTrunkConfig(timm_name=IMAGE_STUDENTS["repvit_m1_1"].timm_name, head="stride32"))
    image = prefixed(IMAGE_PREFIX, image_to_upstream(trunk.state_dict(), "repvit_m1_1"))
    content = image | {name: t for name, t in original.items() if ".vision_backbone.trunk." not in name}
    assert len(content) == 653 + 1045
    found = find(content, "x.pt")
    parts = students(found, config, {"origin": "x.pt"})
    merged, extra = completed(found, parts, config, None, "x.pt")
    assert parts[0].student == "repvit_m1_1" and len(extra) == 6
    assert sum(owner == "image" for owner in merged.owners.values()) == 655
    lacking = {name: tensor for name, tensor in content.items() if ".geometry_encoder." not in name}
    with pytest.raises(ImportedError, match=r"\(detector_model.geometry_encoder \d+; .*stage 3 files are known"):
        completed(find(lacking, "x.pt"), parts, config, None, "x.pt")
    with pytest.raises(ImportedError, match="x.pt only holds students; name the SAM 3 .* --sam3 facebook/sam3"):
        completed(find(image, "x.pt"), parts, config, None, "x.pt")


# ---- files that cannot be used


def test_dry_run_writes_nothing(image, somewhere, capsys):
    file = saved(somewhere, image)
    assert main(["import", file, "--sam3", "tiny", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "| image student | float32, int64 |     194 |" in printed and "ES-EV-S (efficientvit_b0)" in printed
    assert main(["import", file, "--dry-run"]) == 0  # what is in it can be said without the rest
    assert "The file only holds students: --sam3 names" in capsys.readouterr().out
    assert [path.name for path in somewhere.iterdir()] == ["student.pt"]


def test_a_tracker_that_is_there_twice_is_refused(image, rest, somewhere):
    twice = {name.replace("tracker.", "inst_interactive_predictor.model."): t for name, t in rest.items()}
    file = saved(somewhere, {IMAGE_PREFIX + name: t for name, t in image.items()} | rest | twice)
    with pytest.raises(UserError, match="the tracker is in the file twice"):
        import_student.run(file)


def test_what_is_there_is_not_overwritten(image, somewhere):
    file = saved(somewhere, image)
    (somewhere / "mine").mkdir()
    with pytest.raises(ImportedError, match="mine is there already; delete it, or name another folder"):
        import_student.run(file, to="mine", sam3="tiny")


def test_students_alone_need_a_chassis_of_their_own_size(image, somewhere):
    file = saved(somewhere, image)
    with pytest.raises(MergeError, match="gives 64 channels, the chassis' trunk 1024: it belongs to another SAM 3"):
        import_student.run(file)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda image: {"a.weight": torch.ones(3)}, ImportedError, "holds no student of EfficientSAM3 among its 1 te"),
        (lambda image: image | {"head.9.weight": torch.ones(3)}, KeyMapError, "head.9.weight"),
        (lambda image: {k: v for k, v in image.items() if k != "head.3.bias"}, MergeError, "head.3.bias"),
        (lambda image: image | {"head.3.bias": torch.ones(65)}, MergeError, r"1 tensors|2 tensors are not those of"),
        (lambda image: image | {"head.0.weight": torch.ones(64, 99, 1, 1)}, KeyMapError, "99"),
        (lambda image: {"optimizer": {}, "epoch": 3}, UserError, "epoch|optimizer|training"),
    ],
)
def test_what_is_not_a_student_is_named(change, error, message, image, somewhere):
    with pytest.raises(error, match=message):
        import_student.run(saved(somewhere, change(image)), sam3="tiny")
    assert not (somewhere / "runs").exists()


def test_sam3_itself_is_no_student(rest, somewhere, capsys):
    file = saved(somewhere, {"model": rest}, "sam3.pt")
    assert main(["import", file]) == 2
    assert "a sam3.pt of SAM 3 itself is used as it is, as sam3.checkpoint" in capsys.readouterr().err
