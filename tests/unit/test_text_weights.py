# SPDX-License-Identifier: Apache-2.0
"""MobileCLIP's weights in the text students: open_clip's own towers, and Apple's format."""

import open_clip
import pytest
import torch
from apple_tower import AppleTower, randomise
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file

from effsam3.models.image.student import StudentError
from effsam3.models.registry import text_student_row
from effsam3.models.text.student import StudentText, lite_text_config, text_student
from effsam3.models.text.tokens import Tokenizer
from effsam3.models.text.weights import load_text_weights

LONG = "one two three " * 40  # fills any context: nothing is padded


def open_clip_tower(name, **changes):
    """(tower, checkpoint) as open_clip builds it from its own config, with random weights."""
    config = open_clip.get_model_config(name)
    torch.manual_seed(0)
    options = {"output_dim": config["embed_dim"], "output_tokens": True}
    tower = TextTransformer(**config["text_cfg"] | options | changes)
    randomise(tower)
    tensors = {"text." + key: tensor.clone() for key, tensor in tower.state_dict().items()}
    return tower.eval(), tensors | {"visual.trunk.stem.weight": torch.zeros(3), "logit_scale": torch.ones(())}


def apple_tower():
    """(tower, checkpoint) with random weights and statistics."""
    torch.manual_seed(0)
    tower = AppleTower()
    randomise(tower)
    tensors = {"text_encoder." + key: tensor.clone() for key, tensor in tower.state_dict().items()}
    return tower.eval(), tensors | {"image_encoder.model.head.proj": torch.zeros(3), "logit_scale": torch.ones(())}


def saved(tensors, path):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


@torch.no_grad()
def compare(tower, student):
    """Where both pad nothing, and where neither masks its padding, they compute the same."""
    tokenizer = Tokenizer()
    full_BL, mask_BL = tokenizer.encode([LONG, "a " + LONG], student.context_length)
    assert mask_BL.all()
    pooled_BD, hidden_BLD = tower(full_BL)
    found = student.text_encoder(input_ids=full_BL, attention_mask=mask_BL)
    torch.testing.assert_close(found.last_hidden_state, hidden_BLD, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.pooler_output, pooled_BD, rtol=1e-4, atol=1e-4)
    padded_BL = full_BL.clone()
    padded_BL[:, 9:] = 0
    found = student.text_encoder(input_ids=padded_BL).last_hidden_state
    torch.testing.assert_close(found, tower(padded_BL)[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("name", ["mobileclip_s1", "mobileclip2_l"])
def test_open_clips_towers(name, suffix, tmp_path):
    tower, tensors = open_clip_tower(text_student_row(name).weights, layers=2)
    config = lite_text_config(name, 77)
    config.num_hidden_layers = 2
    student = StudentText(config, 256).eval()
    projection = student.text_projection.weight.clone()
    report = load_text_weights(student, saved(tensors, tmp_path / f"tower{suffix}"))
    compare(tower, student)
    assert torch.equal(student.text_projection.weight, projection)
    check_report(report, student, tensors)
    assert set(report.dropped) == {"visual.trunk.stem.weight", "logit_scale"}


@pytest.mark.parametrize("name", ["mobileclip_s1", "mobileclip2_l"])
def test_students_have_their_towers_sizes(name):
    row, config = text_student_row(name), open_clip.get_model_config(text_student_row(name).weights)["text_cfg"]
    assert (row.hidden_size, row.num_attention_heads) == (config["width"], config["heads"])
    assert row.num_hidden_layers == config["layers"] and config["no_causal_mask"]
    with torch.device("meta"):
        tower = TextTransformer(**config, output_dim=row.hidden_size)
    assert row.encoder_params == sum(parameter.numel() for parameter in tower.parameters())


def check_report(report, student, tensors):
    """Every tensor of both sides is named once."""
    assert set(report.loaded) | set(report.initialised) == set(student.state_dict())
    assert not set(report.loaded) & set(report.initialised)
    used = {origin.split(",")[0] for origin in report.loaded.values()}
    assert used | set(report.dropped) == set(tensors) and not used & set(report.dropped)
    assert set(report.initialised) == {
        "text_projection.weight",
        "text_projection.bias",
        "feature_mean",
        "feature_scale",
    }
    assert "2 (projection to SAM 3's channels" in str(report) and "1 (image tower)" in str(report)


@pytest.mark.parametrize("context_length", [77, 32])
def test_apples_format_with_repmixer(context_length, tmp_path):
    tower, tensors = apple_tower()
    student = text_student("tiny_text", context_length, 256).eval()
    report = load_text_weights(student, saved(tensors, tmp_path / "mobileclip_s0.pt"))
    compare(tower, student)
    check_report(report, student, tensors)
    assert f"first {context_length} of 77 rows" in str(report)


def test_apples_format_is_open_clips_by_another_name(tmp_path):
    """An S1-like tower in Apple's names, which open_clip's own converter reads too."""
    tower, tensors = open_clip_tower("MobileCLIP-S1", width=32, heads=2, layers=2, output_dim=32)
    renamed = {}
    for name, tensor in tensors.items():
        for ours, apples in [
            ("text.transformer.resblocks.", "text_encoder.transformer."),
            ("text.text_projection", "text_encoder.projection_layer"),
            ("text.token_embedding", "text_encoder.embedding_layer"),
            ("text.positional_embedding", "text_encoder.positional_embedding.pos_embed.pos_embed"),
            ("text.ln_final", "text_encoder.final_layer_norm"),
            ("ln_1", "pre_norm_mha.0"),
            ("attn.in_proj_", "pre_norm_mha.1.qkv_proj."),
            ("attn.out_proj", "pre_norm_mha.1.out_proj"),
            ("ln_2", "pre_norm_ffn.0"),
            ("mlp.c_fc", "pre_norm_ffn.1"),
            ("mlp.c_proj", "pre_norm_ffn.4"),
            ("visual.", "image_encoder."),
        ]:
            name = name.replace(ours, apples)
        renamed[name] = tensor[None, None] if "pos_embed" in name else tensor
    first, second = (text_student("tiny_text_plain", 32, 256).eval() for _ in range(2))
    load_text_weights(first, saved(tensors, tmp_path / "open_clip.pt"))
    load_text_weights(second, saved(renamed, tmp_path / "apple.pt"))
    theirs, ours = first.text_encoder.state_dict(), second.text_encoder.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    compare(tower, first)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.update({"text_encoder.extra": torch.ones(2)}), "1 problems: text_encoder.extra is unknown"),
        (
            lambda t: t.pop("text_encoder.transformer.2.convffn.fc2.bias"),
            "text_encoder.layers.2.conv_feed_forward.mlp.fc2.bias is missing",
        ),
        (
            lambda t: t.update({"text_encoder.final_layer_norm.bias": torch.ones(31)}),
            r"final_layer_norm.bias is \(31,\) for text_encoder.final_layer_norm.bias, which is \(32,\)",
        ),
        (
            lambda t: t.update({"text_encoder.transformer.3.layer_scale": torch.ones(32, 1, 1)}),
            r"transformer.3.layer_scale has no place in the student \(text_encoder.layers.3.layer_scale\)",
        ),
        (lambda t: t.pop("text_encoder.embedding_layer.weight"), "is not a MobileCLIP checkpoint"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, complaint, tmp_path):
    _, tensors = apple_tower()
    change(tensors)
    student = text_student("tiny_text", 32, 128)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(StudentError, match=complaint):
        load_text_weights(student, saved(tensors, tmp_path / "spoiled.pt"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_another_students_weights_and_too_many_positions(tmp_path):
    _, tensors = apple_tower()
    path = saved(tensors, tmp_path / "s0.pt")
    with pytest.raises(StudentError, match="does not fit this student"):
        load_text_weights(text_student("tiny_text_plain", 32, 128), path)
    with pytest.raises(StudentError, match=r"is \(1, 1, 77, 32\) for .*, which is \(1, 1, 100, 32\)"):
        load_text_weights(text_student("tiny_text", 100, 128), path)


def test_files_that_hold_something_else(tmp_path):
    student = text_student("tiny_text", 32, 128)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "nested.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.pt")
    for name in ("text.pt", "text.safetensors", "nested.pt", "pickled.pt"):
        with pytest.raises(
            StudentError,
            match=f"{name} (is not a file of torch.save|holds an object|cannot be read|is not a MobileCLIP)",
        ):
            load_text_weights(student, str(tmp_path / name))


@pytest.mark.parametrize("weights", ["MobileCLIP-S1", "apple/MobileCLIP-S0/mobileclip_s0.pt"])
def test_the_hub_out_of_reach_says_what_to_do(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StudentError, match="cannot be downloaded from the Hub.*student_init=random"):
        load_text_weights(text_student("tiny_text", 32, 128), weights)


def test_weights_that_are_nowhere():
    with pytest.raises(StudentError, match="there is no file ./nowhere.pt"):
        load_text_weights(text_student("tiny_text", 32, 128), "./nowhere.pt")
