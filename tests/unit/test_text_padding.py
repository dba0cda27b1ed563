# SPDX-License-Identifier: Apache-2.0
"""Padding rules of text students: trained, merged, reloaded, written for EfficientSAM3, by a reference of its own."""

import json

import pytest
import torch
from run_folders import image_run, merged_run, text_run, tiny_text
from transformers import AutoModel, Sam3LiteTextModel, Sam3VideoModel
from upstream_text import masked_features, random_rows, upstream_text, zero_padded

from effsam3 import merge
from effsam3.benchmarks.text import load_text_features
from effsam3.cli import main
from effsam3.errors import ChassisError
from effsam3.models.chassis.card import CARD
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config
from effsam3.models.inference import concepts
from effsam3.models.keymaps.upstream import text_to_upstream
from effsam3.models.merging.formats import TEXT_PREFIX
from effsam3.models.merging.slots import start_from
from effsam3.models.registry import TINY_TEXT_STUDENTS
from effsam3.models.text.padding import RULES, AttendedLiteTextModel, padding_of
from effsam3.models.text.tokens import PROCESSOR_LENGTH, Tokenizer, pad
from effsam3.publish.card import model_card
from effsam3.publish.release import read_release
from effsam3.recipe.reader import load_recipe

ROWS = random_rows(31)


def merged(runs, padding, student="tiny_text_plain", *overrides):
    run = text_run(runs, student=student, padding=padding)
    return merge.run(load_recipe(run / "recipe.yaml", overrides))


def own_features(student, padding):
    ids, mask = pad(ROWS)
    with torch.no_grad():
        return tiny_text(student, padding)(ids, mask)


@pytest.mark.parametrize("student", TINY_TEXT_STUDENTS)
def test_an_attended_student_sees_upstreams_padding_in_training_and_out(student):
    ids, mask = pad(ROWS)
    model = tiny_text(student, "attended")
    found = own_features(student, "attended")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("feature_")}
    wanted = upstream_text(text_to_upstream(tensors), zero_padded(ROWS)[1], heads=2)
    wanted = wanted * model.feature_scale + model.feature_mean
    torch.testing.assert_close(found[mask], wanted[mask], atol=1e-4, rtol=0)
    assert (found - own_features(student, "masked"))[mask].abs().max() > 0.05
    # The batch may be padded to less, or with anything.
    with torch.no_grad():
        short = model(ids[:4, :5], mask[:4, :5])
        other = model(torch.where(mask, ids, 1234), mask)
    torch.testing.assert_close(short[mask[:4, :5]], wanted[:4][mask[:4]], atol=1e-4, rtol=0)
    torch.testing.assert_close(other[mask], wanted[mask], atol=1e-4, rtol=0)
    model.train()(ids, mask)[mask].square().sum().backward()
    assert model.text_encoder.embeddings.token_embedding.weight.grad[0].any()  # the filling learns, too


@pytest.mark.parametrize("padding", RULES)
@pytest.mark.parametrize("student", TINY_TEXT_STUDENTS)
def test_merged_it_reloads_to_the_same_outputs(student, padding, tmp_path):
    folder = merged(tmp_path, padding, student, "merge.formats=[sam3]")
    wanted, (ids, mask) = own_features(student, padding), pad(ROWS)
    back = chassis_folder(str(folder / "sam3.pt"))
    assert read_config(back).to_dict() == read_config(folder).to_dict()
    for place in (folder, back):
        assert padding_of(read_config(place).detector_config) == padding
        whole = AutoModel.from_pretrained(place).eval().detector_model
        detector = RULES[padding].detector.from_pretrained(place).eval()
        assert type(whole) is type(detector)
        with torch.no_grad():
            for model in (whole, detector):
                found = model.get_text_features(input_ids=ids, attention_mask=mask.long()).pooler_output
                torch.testing.assert_close(found[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_text_features(folder)(ids, mask)[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    assert json.loads((folder / CARD).read_text())["slots"]["text"]["padding"] == padding


def test_a_masked_one_stays_plain_and_an_attended_one_is_not_taken_for_one(tmp_path):
    plain = json.loads((merged(tmp_path / "plain", "masked") / "config.json").read_text())
    assert plain["detector_config"]["model_type"] == "sam3_lite_text" and "effsam3" not in json.dumps(plain)
    attended = merged(tmp_path / "own", "attended")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Sam3LiteTextModel.from_pretrained(attended)
    content = json.loads((attended / "config.json").read_text())
    content["detector_config"]["text_config"] = content["detector_config"].pop("attended_text_config")
    (attended / "config.json").write_text(json.dumps(content))
    with pytest.raises(ChassisError, match="detector_config.attended_text_config is missing"):
        read_config(attended)


def test_the_detector_reads_no_padding_of_it(tmp_path):
    """Masks of a text are those of its tokens' features, by the detector that a masked student has."""
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids, mask = Tokenizer().encode(["a red car"] * 1, PROCESSOR_LENGTH)
    ids, mask = (torch.nn.functional.pad(t, (0, 32 - t.shape[1]), value=v) for t, v in ((ids, 49407), (mask, 0)))
    detector = AttendedLiteTextModel.from_pretrained(merged(tmp_path, "attended")).eval()
    concepts.encode_geometry_always(detector)
    with torch.no_grad():
        found = detector(pixel_values=image, input_ids=ids, attention_mask=mask.long())
        features = detector.get_text_features(input_ids=ids, attention_mask=mask.long())
        features.pooler_output = features.pooler_output.masked_fill(~mask[..., None], 5.0)
        same = detector(pixel_values=image, text_embeds=features, attention_mask=mask.long())
    torch.testing.assert_close(found.pred_masks, same.pred_masks, rtol=1e-4, atol=1e-4)


def test_parts_with_either_rule_replace_each_other(tmp_path):
    """A merged model is the chassis of the next merge; the text's rule is that of the student that came last."""
    attended = merged(tmp_path / "a", "attended")
    image = image_run(tmp_path)
    both = merge.run(load_recipe(image / "recipe.yaml", [f"sam3.checkpoint={attended}"]))
    assert padding_of(read_config(both).detector_config) == "attended"
    ids, mask = pad(ROWS)
    wanted = own_features("tiny_text_plain", "attended")
    torch.testing.assert_close(load_text_features(both)(ids, mask)[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    release = ["runs=" + str(tmp_path), f"parts.text={attended}", f"parts.image={image}", "parts.memory=null"]
    recipe = load_recipe(merge.__file__.replace("effsam3/merge.py", "recipes/smoke/release.yaml"), release)
    _, info = Sam3VideoModel.from_pretrained(merge.run(recipe), output_loading_info=True)
    assert not any(info.values())
    student = tiny_text("tiny_text_plain", "attended")
    start_from(student, "text", attended)
    with torch.no_grad():
        torch.testing.assert_close(student(ids, mask)[mask], wanted[mask], atol=1e-4, rtol=1e-4)


# ---- EfficientSAM3's format


def from_file(folder):
    """What EfficientSAM3 computes of efficientsam3.pt, for `ROWS`."""
    tensors = torch.load(folder / "efficientsam3.pt", weights_only=True)["model"]
    own = {name.removeprefix(TEXT_PREFIX): t for name, t in tensors.items() if name.startswith(TEXT_PREFIX)}
    return upstream_text(own, zero_padded(ROWS)[1], heads=2)


@pytest.mark.parametrize("student", TINY_TEXT_STUDENTS)
def test_efficientsam3_computes_what_an_attended_student_does(student, tmp_path, capsys):
    folder = merged(tmp_path, "attended", student, "merge.formats=[efficientsam3]")
    _, mask = pad(ROWS)
    wanted = own_features(student, "attended")
    torch.testing.assert_close(from_file(folder)[mask], wanted[mask], atol=1e-4, rtol=0)
    printed = capsys.readouterr().out
    assert "build_efficientsam3_image_model(" in printed and "it has other features" not in printed


def test_a_masked_student_is_refused_and_written_with_a_yes(tmp_path, capsys):
    run = text_run(tmp_path)
    assert main(["merge", str(run / "recipe.yaml"), "--format", "efficientsam3"]) == 2
    message = capsys.readouterr().err
    assert not list(run.glob("merged*"))
    assert "student_padding=attended" in message and "merge.allow_padding_mismatch=true" in message
    folder = merge.run(
        load_recipe(run / "recipe.yaml", ["merge.formats=[efficientsam3]", "merge.allow_padding_mismatch=true"])
    )
    warning = "it has other features for every text of less than 32 tokens"
    assert warning in message and warning in capsys.readouterr().out
    # So it is: by the reference, EfficientSAM3 makes other features of short texts, and the same of a full one.
    ids, mask = pad(ROWS)
    theirs, ours = from_file(folder), masked_features(folder, ids, mask)
    for row, valid in enumerate(mask):
        apart = (theirs[row] - ours[row])[valid].norm() / ours[row][valid].norm()
        assert (apart > 0.01) == (valid.sum() < 32), (row, apart)


def test_an_image_student_alone_asks_for_no_yes(tmp_path):
    run = image_run(tmp_path, student="efficientvit_b0", head="stride32")
    merge.run(load_recipe(run / "recipe.yaml", ["merge.formats=[efficientsam3]"]))


# ---- what is told


def test_the_card_says_how_to_load_it_and_what_it_sees(tmp_path):
    card = model_card(read_release(merged(tmp_path / "a", "attended").parent), "me/model")
    assert "from effsam3 import Predictor" in card and "attend to their padding" in card
    yes = ("merge.formats=[efficientsam3]", "merge.allow_padding_mismatch=true")
    card = model_card(read_release(merged(tmp_path / "m", "masked", "tiny_text_plain", *yes).parent), "me/model")
    assert "from effsam3 import Predictor" in card and "`efficientsam3.pt` gives short" in card
    card = model_card(read_release(merged_run(tmp_path / "x", "text")), "me/model")
    assert "padding" not in card.partition("<details>")[0]


@pytest.mark.parametrize("padding", RULES)
def test_inspect_says_the_rule(padding, tmp_path, capsys):
    assert main(["inspect", str(merged(tmp_path, padding))]) == 0
    assert f"padding {padding}" in capsys.readouterr().out
