# SPDX-License-Identifier: Apache-2.0
"""Releases: parts of several runs in one model, what does not belong together, the verbs that make sense."""

import json
import sys
from pathlib import Path

import pytest
import torch
from run_folders import image_run, text_run, tiny_text, tiny_trunk
from transformers import Sam3VideoModel

from effsam3 import evaluate, merge
from effsam3 import launch as launcher
from effsam3.cli import main
from effsam3.errors import RecipeError, UserError
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config, read_tensors
from effsam3.models.merging.slots import MergeError, part_of_model, start_from
from effsam3.models.text.tokens import Tokenizer
from effsam3.publish.release import unmeasured
from effsam3.recipe.reader import load_recipe
from effsam3.show import show

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "recipes" / "smoke" / "release.yaml"
ZOO = sorted((ROOT / "recipes" / "release").glob("es_*.yaml"))


def release_of(runs, *overrides):
    return load_recipe(
        SMOKE, [f"runs={runs}", f"parts={{image: {runs}/image, text: {runs}/text}}", "merge.formats=[transformers]"]
        + list(overrides),
    )  # fmt: skip


# ---- recipes


def test_the_zoo_joins_every_image_student_with_the_smallest_text_student():
    stage1 = ROOT / "recipes" / "stage1"
    runs = {load_recipe(path).name: load_recipe(path) for path in stage1.rglob("*.yaml") if path.name != "base.yaml"}
    parts = {path.stem: load_recipe(path).parts for path in ZOO}
    assert set(parts) == {f"es_{family}_{size}_mc_s" for family in ("rv", "tv", "ev") for size in "sml"}
    for name, part in parts.items():
        image, text = (runs[Path(folder).relative_to("runs").as_posix()] for folder in (part.image, part.text))
        assert (image.stage, image.name) == ("image", f"stage1-image-{name.removesuffix('_mc_s')}")
        assert (text.stage, text.student) == ("text", "mobileclip_s0")
        assert (Path(image.train.runs), image.sam3, text.sam3) == (Path("runs"), image.sam3, image.sam3)


def test_the_parts_of_the_small_video_model_are_trained_on_top_of_each_other():
    names = ("release/vision_es_rv_m_mc_s", "stage1/vision/es_rv_m", "stage1/text/es_mc_s")
    release, vision, text = (load_recipe(name) for name in names)
    memory = load_recipe("stage2/memory_vision_es_rv_m")
    filled = {"vision": vision.folder, "text": text.folder, "memory": memory.folder}
    assert release.sources() == filled and release.sam3.checkpoint == vision.sam3.checkpoint
    assert Path(memory.sam3.checkpoint) == vision.folder / "merged"


def test_a_release_without_parts():
    with pytest.raises(RecipeError, match="parts.image: no slot gets a part; name a run folder"):
        load_recipe(SMOKE, ["parts={image: null, text: null}"])


@pytest.mark.parametrize("verb", ["embed", "train"])
def test_a_release_learns_nothing(verb, capsys):
    for argv in ([verb, str(SMOKE)], ["launch", str(SMOKE), verb]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert f"error: {verb}: smoke-release is of stage release" in error and "has been trained already" in error
        assert "merge, evaluate, push" in error


def test_launch_merges_and_evaluates(monkeypatch, clone):
    lines = []
    monkeypatch.setattr(launcher, "_run", lambda command, environment: lines.append(command) or 0)
    assert main(["launch", "recipes/smoke/release.yaml"]) == 0
    assert lines == [
        [sys.executable, "-m", "effsam3", verb, "recipes/smoke/release.yaml"] for verb in ("merge", "evaluate")
    ]


def test_show_says_who_fills_the_slots(tmp_path):
    image_run(tmp_path)
    text = show(release_of(tmp_path))
    assert f"# image     {tmp_path}/image: tiny_convnext, 207,000 trunk + " in text
    assert f"# text      unknown yet: there is no run and no model in {tmp_path}/text" in text
    assert "# text      SAM 3's own" in show(release_of(tmp_path, "parts.text=null")) and "# vision" not in text
    assert "# image" not in show(release_of(tmp_path, "parts.image=null", f"parts.vision={tmp_path}/vision"))


# ---- merging


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A merged release of two run folders; the folder of the runs."""
    runs = tmp_path_factory.mktemp("runs")
    image_run(runs), text_run(runs)
    merge.run(release_of(runs))
    return runs


def test_both_students_and_the_rest_of_sam3(release):
    merged = read_tensors(release / "smoke-release" / "merged")
    parts = [part_of_model(slot, release / "smoke-release") for slot in ("image", "text")]
    owned = {name for part in parts for name in part.tensors}
    chassis = read_tensors(chassis_folder("tiny"))
    assert {part.student for part in parts} == {"tiny_convnext", "tiny_text_plain"}
    assert all(torch.equal(merged[name], chassis[name]) for name in merged.keys() - owned)
    for name, tensor in tiny_trunk().state_dict().items():
        assert torch.equal(parts[0].tensors["detector_model.vision_encoder.backbone." + name], tensor), name
    model, info = Sam3VideoModel.from_pretrained(release / "smoke-release" / "merged", output_loading_info=True)
    assert not any(info.values())
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    found = model.detector_model.vision_encoder.backbone(pixels).last_hidden_state
    torch.testing.assert_close(found, tiny_trunk()(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_the_releases_folder_is_shaped_like_a_run(release):
    folder = release / "smoke-release"
    assert load_recipe(folder / "recipe.yaml") == release_of(release)
    card = json.loads((folder / "merged" / CARD).read_text())
    assert (card["chassis"], card["slots"]["image"]["from"]) == ("tiny", "image/best-step-000007")
    assert json.loads((folder / "provenance.json").read_text())["slots"] == card["slots"]
    assert "| image " in (folder / "log.txt").read_text()


def test_a_released_model_is_a_part_itself(release):
    merged = merge.run(release_of(release, "name=again", f"parts.text={release}/smoke-release/merged"))
    before, after = read_tensors(release / "smoke-release" / "merged"), read_tensors(merged)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_one_part_alone(release):
    merged = merge.run(release_of(release, "name=text-only", "parts.image=null"))
    assert read_config(merged).detector_config.vision_config.backbone_config.model_type == "sam3_vit_model"
    assert list(json.loads((merged / CARD).read_text())["slots"]) == ["text"]


# ---- what does not belong together


def test_parts_of_another_sam3(tmp_path):
    image_run(tmp_path), text_run(tmp_path, teacher={"fingerprint": "0" * 32})
    message = r"tiny_text_plain in the slot text \(text/best-step-000007\) learned from tiny \(fingerprint 0{32}\)"
    with pytest.raises(MergeError, match=message):
        merge.run(release_of(tmp_path))


def test_parts_whose_teacher_has_no_fingerprint_go_by_its_name(tmp_path):
    image_run(tmp_path, teacher={"checkpoint": "unknown, the store does not say"})
    text_run(tmp_path)
    merge.run(release_of(tmp_path))
    for key, value in (("checkpoint: tiny", "checkpoint: facebook/sam3"), ("revision: null", "revision: v2")):
        file = tmp_path / "image" / "recipe.yaml"
        file.write_text(file.read_text().replace(key, value))
        with pytest.raises(MergeError, match=r"from .*, revision .*, the chassis is tiny, revision None; merge"):
            merge.run(release_of(tmp_path))


def test_parts_of_another_grid(tmp_path):
    image_run(tmp_path, image_size=1008), text_run(tmp_path)
    with pytest.raises(MergeError, match="images of 1008 px, this SAM 3 takes 224 px: their grids differ"):
        merge.run(release_of(tmp_path))


def test_a_model_of_another_grid_or_context_length(release, tmp_path):
    image, text = (part_of_model(slot, release / "smoke-release") for slot in ("image", "text"))
    config = read_config(chassis_folder("tiny"))
    rest = {"chassis": read_tensors(chassis_folder("tiny"))}
    image.config.image_size = 1008
    with pytest.raises(MergeError, match="has the image size 1008, this SAM 3 224"):
        merge.combine(config, rest, [image])
    text.config.max_position_embeddings = 77
    with pytest.raises(MergeError, match="has the context length 77, this SAM 3 32"):
        merge.combine(config, rest, [text])


def test_a_missing_part_and_one_that_is_not_trained(tmp_path):
    image_run(tmp_path)
    with pytest.raises(MergeError, match=r"slot text has no part: .* in .*/text; train one .* \(parts.text\)"):
        merge.run(release_of(tmp_path))
    text = text_run(tmp_path)
    (text / "checkpoints/best-step-000007").rename(text / "checkpoints/best-step-000007.partial")
    with pytest.raises(UserError, match="no checkpoint 'best' in .*/text/checkpoints; run `effsam3 train` first"):
        merge.run(release_of(tmp_path))
    with pytest.raises(MergeError, match="image is a run of stage image; the slot text needs one of stage text"):
        merge.run(release_of(tmp_path, f"parts.text={tmp_path}/image"))
    assert not (tmp_path / "smoke-release").exists()


def test_a_run_of_the_same_name_is_not_replaced(tmp_path):
    run = image_run(tmp_path, name="mine")
    before = (run / "recipe.yaml").read_bytes()
    with pytest.raises(MergeError, match="holds a run of stage image, which a release would replace"):
        merge.run(release_of(tmp_path, "name=mine", f"parts.image={run}", "parts.text=null"))
    assert (run / "recipe.yaml").read_bytes() == before


def test_a_model_without_a_student_in_the_slot(release, tmp_path):
    merge.run(release_of(release, "name=image-only", "parts.text=null"))
    with pytest.raises(MergeError, match="image-only/merged has no student in the slot text; it has image"):
        merge.run(release_of(release, f"parts.text={release}/image-only/merged"))
    with pytest.raises(MergeError, match="has no effsam3.json: it was neither merged nor imported"):
        merge.run(release_of(release, f"parts.text={chassis_folder('tiny')}"))


# ---- evaluating


def test_evaluate_takes_each_parts_own_recipe(release):
    recipe = release_of(release)
    assert {slot: own.name for slot, own in recipe.learned().items()} == {"image": "image", "text": "text"}
    assert unmeasured(recipe) == []
    recipe = release_of(release, f"parts.text={release}/smoke-release/merged")
    (line,) = unmeasured(recipe)
    assert list(recipe.learned()) == ["image"] and "parts.text: " in line and "name=smoke-release" in line


def test_evaluate_wants_the_student_that_it_measures(release):
    merge.run(release_of(release, "name=no-text", "parts.text=null"))
    recipe = load_recipe(release / "text" / "recipe.yaml", ["name=no-text"])
    with pytest.raises(UserError, match=r"no-text/merged has no student in the slot text \(it has image\)"):
        evaluate.run(recipe)
    with pytest.raises(UserError, match="never/merged is not there; run `effsam3 merge` first"):
        evaluate.run(release_of(release, "name=never"))


# ---- training on from a model


def test_an_image_student_goes_on_with_other_statistics(release):
    """New mean and deviation, the same features."""
    torch.manual_seed(3)
    student = tiny_trunk()
    for parameter in student.parameters():
        parameter.data.normal_()
    student.set_feature_statistics(torch.randn(64) * 5, torch.rand(64) + 0.1)
    mean = student.feature_mean.clone()
    start_from(student, "image", release / "smoke-release")
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        found, expected = (model(pixels).last_hidden_state for model in (student, tiny_trunk()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(student.feature_mean, mean)


@pytest.mark.parametrize("head", ["fused", "stride32"])
def test_the_last_layer_is_rescaled_whichever_head(head, tmp_path):
    runs = image_run(tmp_path, student="efficientvit_b0", head=head)
    merge.run(load_recipe(runs / "recipe.yaml"))
    torch.manual_seed(4)
    student = tiny_trunk("efficientvit_b0", head)
    student.set_feature_statistics(torch.randn(64), torch.rand(64) + 0.5)
    for parameter in student.parameters():
        parameter.data.zero_()
    start_from(student, "image", runs)
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        found, expected = (model(pixels).last_hidden_state for model in (student, tiny_trunk("efficientvit_b0", head)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_text_student_goes_on_with_other_statistics(release):
    student = tiny_text()
    for parameter in student.parameters():
        parameter.data.normal_()
    student.set_feature_statistics(torch.randn(128) * 3, torch.rand(128) + 0.2)
    start_from(student, "text", release / "smoke-release" / "merged")
    ids, mask = Tokenizer().encode(["a red ring", "two small dogs on a sofa"], 32)
    with torch.no_grad():
        found, expected = (model(ids, mask)[mask] for model in (student, tiny_text()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_another_student_does_not_go_on(release):
    with pytest.raises(MergeError, match=r"not those of the recipe's student \(student_init: it is tiny_convnext\)"):
        start_from(tiny_trunk("efficientvit_b0"), "image", release / "smoke-release")
    with pytest.raises(MergeError, match=r"not those of the recipe's student \(student_init: it is tiny_text_plain\)"):
        start_from(tiny_text("tiny_text"), "text", release / "smoke-release")
    with pytest.raises(MergeError, match="there is no model in .*nowhere: neither config.json nor merged/config.json"):
        start_from(tiny_text(), "text", release / "nowhere")


def test_student_init_names_a_folder():
    for recipe in ("image", "text"):
        path = ROOT / "recipes" / "smoke" / f"{recipe}.yaml"
        assert load_recipe(path, ["student_init=runs/x/merged"]).student_init == "runs/x/merged"
        with pytest.raises(RecipeError, match="nor a model's folder, such as runs/x/merged"):
            load_recipe(path, ["student_init=imagnet"])
