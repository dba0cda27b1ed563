# SPDX-License-Identifier: Apache-2.0
"""Operations of every part: by hand, by tables against counts at full size, in `show`; what `profile` counts."""

import json
import re

import pytest
import torch
from commands import REPOSITORY
from run_folders import merged_run, text_run
from transformers import Sam3LiteTextTextModel

from effsam3.benchmarks.flops import chassis_row, config_of, full_memory, part_gflop
from effsam3.benchmarks.parts import Counter, costs
from effsam3.cli import main
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.sizes import first_of, sam3_of
from effsam3.models.exporting.flow import flow
from effsam3.models.exporting.memory_parts import memory_parts
from effsam3.models.exporting.parts import parts_of
from effsam3.models.flops import PARTS, head_flops, memory_attention_gflop, text_gflop
from effsam3.models.image.backbones import build_trunk, feature_maps
from effsam3.models.image.student import HEADS
from effsam3.models.inference.concepts import load_model
from effsam3.models.memory.attention import memory_tokens
from effsam3.models.memory.config import MODES, EfficientTrackerConfig
from effsam3.models.memory.tracker import EfficientTracker
from effsam3.models.merging.slots import SLOTS
from effsam3.models.registry import IMAGE_STUDENTS, SAM3, SAM3S, TEXT_STUDENTS
from effsam3.models.text.student import lite_text_config
from effsam3.recipe.reader import load_recipe
from effsam3.show import flops, show

PUBLISHED = {name: row for name, row in IMAGE_STUDENTS.items() if row.published_millions is not None}


@pytest.fixture(scope="module")
def tiny():
    return part_gflop(SAM3S["tiny"].config())


def vit_flops(sizes):
    """By hand: a ViT of 4 layers with windows of 8 x 8 patches in two of them."""
    N, D, M = sizes.grid**2, sizes.hidden_size, sizes.intermediate_size
    patches = 2 * N * D * 3 * sizes.patch_size**2
    layers = 4 * 2 * N * (4 * D**2 + 2 * D * M)
    return patches + layers + 2 * 4 * N * (64 + N) * D


def test_a_trunk_counted_by_hand(tiny):
    assert tiny["trunk"] == pytest.approx(vit_flops(SAM3S["tiny"].sizes) / 1e9, rel=1e-9)


def test_sam3_as_in_the_registry():
    """At full size, 860 million parameters that nobody allocates."""
    counted = part_gflop(SAM3.config())
    assert {part: round(number, 2) for part, number in counted.items()} == SAM3.gflop
    assert tuple(counted) == PARTS


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_image_students_as_in_the_registry(name):
    row, side = PUBLISHED[name], SAM3.sizes.image_size
    with torch.device("meta"):
        with Counter() as counter:
            maps = feature_maps(build_trunk(row.timm_name, side).eval(), torch.zeros(1, 3, side, side))
        assert round(counter.flops / 1e9, 2) == row.trunk_gflop
        for name, head in HEADS.items():
            with Counter() as counter:
                head(row.channels, 1024).eval()(maps, (72, 72))
            assert counter.flops == head_flops(name, row, side, 72, 1024), name


@pytest.mark.parametrize("name", TEXT_STUDENTS)
def test_text_students_by_arithmetic(name):
    row = TEXT_STUDENTS[name]
    with torch.device("meta"), torch.no_grad():
        tower, projector = (
            Sam3LiteTextTextModel(lite_text_config(name, 32)).eval(),
            torch.nn.Linear(row.hidden_size, 256),
        )
        with Counter() as counter:
            projector(tower(input_ids=torch.zeros(1, 32, dtype=torch.long)).last_hidden_state)
    assert text_gflop(row, 32, 256) == pytest.approx(counter.flops / 1e9, rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_memory_attention_by_arithmetic(mode):
    config = SAM3.config()
    own = {name: value for name, value in config.tracker_config.to_dict().items() if name != "model_type"}
    config.tracker_config = EfficientTrackerConfig(**own, memory_mode=mode)
    with torch.device("meta"):
        tracker = EfficientTracker(config.tracker_config, remove_vision_encoder=True).eval()
    recall = memory_parts(type("Model", (), {"tracker_model": tracker}))[1]
    with Counter() as counter, torch.no_grad():
        for _ in flow([recall], full_memory(config.tracker_config), device="meta"):
            pass
    found = memory_attention_gflop(memory_tokens(config.tracker_config), SAM3)
    assert found == pytest.approx(counter.flops / 1e9, rel=1e-4)


def test_profile_counts_attention_too(tiny):
    """On a CPU, whose kernel torch's own counter passes over, and with real numbers."""
    model = load_model(chassis_folder("tiny"))
    parts = parts_of(model) + memory_parts(model)
    for example in flow(parts, full_memory(model.config.tracker_config)):
        assert costs(example)["gflop"] == pytest.approx(tiny[example.part.name], rel=1e-9), example.part.name


# ---- what people see


def numbers(line):
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]+\.\d+", line)]


def test_show_tells_of_all_parts_without_torch():
    line = next(line for line in show(load_recipe("stage1/image/es_rv_m")).splitlines() if "# flops" in line)
    image, phrase, shown, tracked = line.split("; ")
    ours, theirs, trunk, *necks = numbers(image)
    assert theirs == pytest.approx(5825.97, abs=0.1) and necks == [212.7, 214.7]
    assert trunk == pytest.approx(
        54.39 + head_flops("fused", IMAGE_STUDENTS["repvit_m1_1"], 1008, 72, 1024) / 1e9, abs=0.1
    )
    assert ours == pytest.approx(trunk + sum(necks), abs=0.2)
    assert [numbers(use)[0] for use in (phrase, shown, tracked)] == [443.8, 4.6, 970.6]
    text = show(load_recipe("stage1/text/es_mc_s"))
    assert "a phrase 425.4 instead of 443.8 (text encoder 1.1, detector 424.3)" in text and "image 5,826.0 (" in text
    assert "240.7 GFLOP per object and frame instead of 951.3" in show(load_recipe("stage2/memory"))


@pytest.mark.parametrize("change", ["sam3.checkpoint=tiny", "student_image_size=512", "student=tiny_convnext"])
def test_show_guesses_nothing(change):
    text = show(load_recipe("stage1/image/es_rv_m", [change, "student_init=random"]))
    assert re.search(r"# flops     unknown yet: .* not been counted.* --flops` counts every part", text)


def rows(text):
    """{row: its numbers} of a table."""
    lines = [line.strip("# ").split("|") for line in text.splitlines() if line.strip("# ").startswith("|")]
    return {cells[1].strip(): [float(cell.replace(",", "")) for cell in cells[2:-1]] for cells in lines[2:]}


def test_flops_are_those_of_the_model_that_will_be_merged(tiny, capsys):
    assert main(["show", "smoke/image", "--flops"]) == 0
    found = rows(capsys.readouterr().out)
    ours, theirs, times = found["an image: trunk"]
    assert theirs == pytest.approx(tiny["trunk"], rel=0.01) and times == round(theirs / ours, 1) and ours != theirs
    image = [found[f"an image: {part}"] for part in ("trunk", "detector's neck", "tracker's neck")]
    assert found["**an image**"][:2] == pytest.approx(
        [sum(column) for column in list(zip(*image, strict=True))[:2]], rel=0.01
    )
    assert found["**a phrase**"][2] == 1


def test_what_will_be_merged_is_known_before(tmp_path):
    """By stage, and of a release: students of runs and of models, each in its slot."""
    text, image = text_run(tmp_path / "a"), merged_run(tmp_path / "b", "image")
    parts = ["parts.memory=null", f"parts.text={text}", f"parts.image={image / 'merged'}"]
    merged = config_of(load_recipe("smoke/release", parts))
    assert SLOTS["text"].config_of(merged).model_type == "sam3_lite_text_text_model"
    assert SLOTS["image"].config_of(merged).timm_name == "test_convnext"
    assert SLOTS["memory"].config_of(merged).model_type == "sam3_tracker_video"
    memory = config_of(load_recipe("smoke/memory", ["sam3.checkpoint=tiny"]))
    assert SLOTS["memory"].config_of(memory).memory_mode == "hybrid"
    missing = load_recipe("smoke/release", [*parts[:2], f"parts.image={tmp_path}/nothing"])
    assert f"unknown yet: parts.image: there is neither a run nor a model in {tmp_path}/nothing" in flops(missing)
    # The SAM 3 that stands next to it is the one that a model began with.
    assert chassis_row(str(image)) is SAM3S["tiny"] and chassis_row("facebook/sam3") is SAM3
    on_student = show(load_recipe("smoke/memory", [f"sam3.checkpoint={image}"]))
    assert "# memory    hybrid: 184 tokens of 7 frames and 16 pointers, 1,824 when dense" in on_student
    card = json.loads((image / "merged/effsam3.json").read_text()) | {"chassis": str(image)}
    (image / "merged/effsam3.json").write_text(json.dumps(card))
    assert first_of(str(image)) == str(image)  # merged into itself, as it says


def test_the_page_of_the_small_model_says_what_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    import small_table

    name = "RV-M, two layers"
    cells = small_table.counts(small_table.whole("random", small_table.MODELS[name]))
    assert f"| **{name}** | {' | '.join(cells)} | |" in (REPOSITORY / "docs/small.md").read_text()


def test_a_local_sam3_is_known_and_one_with_students_is_not(tmp_path):
    (tmp_path / "config.json").write_text(SAM3.config().to_json_string(use_diff=False))
    assert sam3_of(str(tmp_path)).gflop == SAM3.gflop
    config = json.loads((tmp_path / "config.json").read_text())
    config["tracker_config"]["model_type"] = EfficientTrackerConfig.model_type
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not sam3_of(str(tmp_path)).gflop
