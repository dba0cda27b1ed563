# SPDX-License-Identifier: Apache-2.0
"""The model card: its code runs, its numbers are those of the files, its licence is that of what is inside."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from run_folders import image_run, merged_run
from safetensors.torch import load_file, save_file

from effsam3 import merge
from effsam3.benchmarks.flops import part_gflop
from effsam3.models.chassis.sizes import sam3_of
from effsam3.models.chassis.tensors import read_config
from effsam3.models.chassis.tiny import full_config
from effsam3.models.image.backbones import image_student
from effsam3.models.registry import SAM3, head_params
from effsam3.publish.card import counted_slots, licence, measurements, metadata, model_card, parameters
from effsam3.publish.release import ReleaseError, read_release
from effsam3.recipe.reader import dump_recipe, load_recipe
from effsam3.training import report

SLOTS = {
    "text": ("text",), "image": ("image",), "memory": ("memory",), "vision": ("vision",), "both": ("image", "text"),
}  # fmt: skip


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """{name: run folder} of one slot filled, of the other, of both."""
    runs = tmp_path_factory.mktemp("runs")
    return {name: merged_run(runs / name, *slots) for name, slots in SLOTS.items()}


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """An empty cache of the Hub in the place of the developer's, who may have SAM 3 and its licence."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def run(merged, tmp_path):
    """Return a copy of a merged run that a test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(merged[name], tmp_path / "run"))

    return copy


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n\n")[1].split("\n## ")[0].strip()


def card_of(folder: Path, **options) -> str:
    return model_card(read_release(folder), "team/model", **options)


# ---- how to use it


@pytest.mark.parametrize("name", SLOTS)
def test_every_code_block_runs(merged, name, tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    (tmp_path / "frames").mkdir()
    for file in ("photo.jpg", "frames/0.jpg", "frames/1.jpg"):
        Image.fromarray(generator.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / file)
    blocks = re.findall(r"```python\n(.*?)```", card_of(merged[name]), re.S)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names = []
    for block in blocks:
        names.append({})
        assert '"team/model"' in block
        block = block.replace('"team/model"', repr(str(merged[name] / "merged"))).replace("clip.mp4", "frames")
        exec(block.replace("threshold=0.5", "threshold=0.0"), names[-1])  # random weights are sure of nothing
        assert capsys.readouterr().out
    image, video, plain = names
    assert image["found"].masks_OHW.shape == (10, 90, 120)
    assert image["boxes"].masks_OHW.shape == (2, 90, 120) and image["points"].masks_OHW.shape == (1, 90, 120)
    assert video["frame"] == 1 and video["found"].masks_OHW.shape[1:] == (90, 120)
    # The weights that transformers loads by itself are those of the predictor's model.
    loaded, own = plain["model"].state_dict(), image["predictor"].concepts.model.state_dict()
    assert all(torch.equal(tensor.cpu(), own[key].cpu()) for key, tensor in loaded.items())
    # The predictor's tracker has the detector's trunk as its own, too: one model answers texts and boxes.
    assert all(key.startswith("tracker_model.vision_encoder.") for key in own.keys() - loaded.keys())


def test_another_branch_is_named_in_the_code(merged):
    assert card_of(merged["text"], revision="trial").count('("team/model", revision="trial")') == 3


# ---- a student of timm's


def test_a_backbone_of_timm_on_smaller_images(tmp_path):
    """Its page and licence as timm states them, its size, exact counts, and no published number."""
    folder = image_run(tmp_path, student="timm/mobilenetv3_small_050", seen=128)
    merge.run(load_recipe(folder / "recipe.yaml"))
    file = folder / "merged/effsam3.json"
    slots = json.loads(file.read_text())["slots"]
    slots["image"]["student_init"] = "imagenet"
    edit(file, slots=slots)
    card, source = card_of(folder), "https://huggingface.co/timm/mobilenetv3_small_050.lamb_in1k; apache-2.0"
    expected = f"mobilenetv3_small_050 (`timm/mobilenetv3_small_050`; {source}), which sees 128 px of the 224 |"
    assert expected in section(card, "Slots")
    assert f"timm's pretrained weights of `mobilenetv3_small_050` ({source})" in section(card, "Licence")
    student = image_student("timm/mobilenetv3_small_050", 128)
    here = student.trunk_params + head_params("fused", student.channels, 64)
    assert numbers(card, "vision trunk") == [here, sam3_of("tiny").sizes.trunk_params]
    assert "student sees, px" in section(card, "How it learned") and "ES-" not in section(card, "Slots")


# ---- numbers


def numbers(card: str, title: str) -> list[int]:
    row = next(line for line in section(card, "Parameters").splitlines() if line.startswith(f"| {title} "))
    return [int(cell.replace(",", "")) for cell in row.split("|")[2:4]]


def test_parameters_are_those_of_the_registry_and_of_the_file(merged):
    student = image_student("tiny_convnext")
    here = student.trunk_params + head_params("fused", student.channels, 64)
    card = card_of(merged["image"])
    assert numbers(card, "vision trunk") == [here, sam3_of("tiny").sizes.trunk_params]
    # No BatchNorm in this student and no other buffers than these: what the file holds besides are parameters.
    stored = load_file(merged["image"] / "merged/model.safetensors")
    buffers = ("feature_mean", "feature_scale", "embedding.positional_embedding")
    total = sum(tensor.numel() for name, tensor in stored.items() if not name.endswith(buffers))
    assert numbers(card, r"**whole model**")[0] == total
    assert numbers(card_of(merged["both"]), "vision trunk")[0] == here
    assert numbers(card_of(merged["both"]), "text encoder") == numbers(card_of(merged["text"]), "text encoder")


def test_operations_of_all_parts_are_told(merged):
    lines = section(card_of(merged["image"]), "Operations").splitlines()
    table = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines if line.startswith("|"))}
    ours, theirs = part_gflop(read_config(merged["image"] / "merged")), part_gflop(sam3_of("tiny").config())
    assert ours["trunk"] != theirs["trunk"]
    found = [float(cell) for cell in table["**an image**"][:2]]
    image = ("trunk", "detector_neck", "tracker_neck")
    assert found == pytest.approx([sum(of[part] for part in image) for of in (ours, theirs)], abs=0.005)
    assert len(table) == 14 and table["**a phrase**"][2].strip() == "1.0"


def test_a_vision_students_trunk_and_necks_are_one_row(merged):
    card = card_of(merged["vision"])
    assert "vision trunk |" not in card
    stored = load_file(merged["vision"] / "merged/model.safetensors").items()
    own = ("detector_model.vision_encoder.", "tracker_neck.")
    here = sum(value.numel() for name, value in stored if name.startswith(own) and "feature_" not in name)
    sizes = sam3_of("tiny").sizes
    assert numbers(card, "vision trunk and necks")[:2] == [here, sizes.trunk_params + 2 * sizes.neck_params]
    assert "students have taken the place of the vision trunk and necks" in card


def test_sam3_counts_as_published():
    counts = parameters(full_config(), counted_slots(()))
    assert counts["image"] == SAM3.sizes.trunk_params and counts["text"] == SAM3.counts.text
    assert counts["total"] == SAM3.counts.transformers_total


def evaluate(folder: Path, **changes) -> None:
    """Leave what `evaluate` leaves; `changes` are of its provenance."""
    merged = json.loads((folder / "merged/effsam3.json").read_text())
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    made_by = {"started": started, "weights": merged["weights"]} | changes
    (folder / "eval/fidelity.json").write_text(json.dumps({"cosine": 0.1234, "provenance": made_by}))
    (folder / "eval/summary.md").write_text("# tiny in the slot\n\n| cosine |\n|---:|\n| 0.1234 |\n")
    for number in range(6):
        Image.new("RGB", (8, 8)).save(folder / f"pictures/{number}.png")


def test_nothing_is_claimed_that_was_not_measured(merged):
    card = card_of(merged["image"])
    assert section(card, "Measured").startswith("Nothing")
    assert "has not been measured at all" in section(card, "Limitations")


def test_measurements_are_the_summary_and_four_pictures(run):
    folder = run("image")
    evaluate(folder)
    text = section(card_of(folder), "Measured")
    assert text.startswith("| cosine |\n|---:|\n| 0.1234 |\n\n") and "`eval/fidelity.json`" in text
    assert re.findall(r"!\[\d\]\((.+)\)", text) == [f"pictures/{number}.png" for number in range(4)]


def test_measurements_of_another_merged_model_are_left_out(run):
    folder = run("image")
    evaluate(folder, weights="another's")
    release = read_release(folder)
    assert release.measured == () and [path.name for path in release.stale] == ["fidelity.json"]
    assert release.pictures == () and measurements(release).startswith("Nothing")


def test_merging_the_same_weights_again_keeps_what_was_measured(tmp_path):
    """Other weights do not."""
    folder = merged_run(tmp_path, "image")
    evaluate(folder)
    before = card_of(folder)
    recipe = load_recipe(folder)
    time.sleep(1.1)  # provenance counts seconds
    merge.run(recipe)
    assert section(card_of(folder), "Measured") == section(before, "Measured") and "0.1234" in before
    weights = folder / "checkpoints/best-step-000007/student.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, weights)
    merge.run(recipe)
    assert section(card_of(folder), "Measured").startswith("Nothing")


def test_the_summary_of_an_earlier_evaluation_is_left_out(run):
    folder = run("image")
    evaluate(folder)
    later = time.time() + 60
    os.utime(folder / "eval/fidelity.json", (later, later))  # as when the next evaluation was stopped half-way
    assert measurements(read_release(folder)).startswith("Nothing")


def test_pictures_from_before_the_merge_are_left_out(run):
    folder = run("image")
    evaluate(folder)
    os.utime(folder / "pictures/1.png", (0, 0))
    assert [path.name for path in read_release(folder).pictures] == ["0.png", "2.png", "3.png", "4.png", "5.png"]


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://github.com/someone/effsam3.git", "https://github.com/someone/effsam3.git"),
        ("https://someone:secret@github.com/someone/effsam3", "https://github.com/someone/effsam3"),
        ("git@github.com:someone/effsam3.git", "https://github.com/someone/effsam3.git"),
        ("ssh://git@git.example.org:2222/group/effsam3.git", "https://git.example.org/group/effsam3.git"),
        ("/home/someone/effsam3", None),
        ("", None),
    ],
)
def test_the_card_says_where_the_package_is_to_be_had(merged, monkeypatch, origin, address):
    monkeypatch.setattr(report, "_git", lambda *arguments: origin or None)
    assert report.source() == address
    use = section(card_of(merged["image"]), "How to use it")
    assert "secret" not in use and "/home" not in use
    assert (f"pip install git+{address}\n" in use) if address else ("not on PyPI" in use)


# ---- who fills what, and how it learned


def test_slots_and_training_of_every_part(merged):
    card = card_of(merged["both"])
    assert re.search(r"`image` +\| vision trunk +\| .*`tiny_convnext`.* +\| `smoke-image/best-step-000007` +\|", card)
    assert re.search(r"`text` +\| text encoder +\| .*`tiny_text_plain`.* +\| `smoke-text/best-step-000007` +\|", card)
    assert re.search(r"\| steps +\| 200 +\| 200 +\|", section(card, "How it learned"))
    recipes = re.findall(r"```yaml\n(.*?)```", card, re.S)
    assert [yaml.safe_load(recipe)["stage"] for recipe in recipes] == ["image", "text"]
    assert section(card, "Limitations").count("learned from made-up data") == 2
    assert section(card, "Slots").count("not replaced") == 1
    memory = card_of(merged["memory"])
    assert section(memory, "Slots").count("not replaced") == 2 and "`hybrid memory`" in section(memory, "Slots")
    assert "\n\n" not in section(memory, "Licence")


def test_a_part_without_a_recipe_is_said_to_have_none(run, tmp_path):
    folder = run("both")
    recipe = load_recipe(folder / "recipe.yaml", [f"parts.text={tmp_path}"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    card = card_of(folder)
    assert "`text`: no recipe is known; it is from `smoke-text/best-step-000007`" in card
    assert len(re.findall(r"```yaml\n", card)) == 1


# ---- licence


def test_a_made_up_chassis_needs_no_licence_and_says_that_its_masks_mean_nothing(merged):
    release = read_release(merged["image"])
    assert release.license_file is None
    assert yaml.safe_load(card_of(merged["image"]).split("---\n")[1]) == metadata(release)
    assert metadata(release).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "No weights of SAM 3 are in this model" in licence(release)
    assert "The masks of random weights mean nothing." in card_of(merged["image"])


def test_sam3s_weights_bring_its_licence(run):
    folder = run("image")
    edit(folder / "merged/effsam3.json", chassis="facebook/sam3")
    release, card = read_release(folder), card_of(folder)
    link = metadata(release)["license_link"]
    assert metadata(release) == {
        "library_name": "transformers",
        "pipeline_tag": "mask-generation",
        "license": "other",
        "license_name": "sam-license",
        "license_link": link,
        "base_model": "facebook/sam3",
        "tags": ["effsam3", "sam3", "knowledge-distillation"],
    }
    assert link.startswith("https://") and "has still to be added" in licence(release)
    assert "mean nothing" not in card and "random weights" not in card
    assert numbers(card, "vision trunk")[1] == SAM3.sizes.trunk_params


def test_a_copy_beside_the_chassis_or_a_named_one_comes_along(run, tmp_path):
    folder, chassis = run("image"), tmp_path / "chassis"
    chassis.mkdir()
    edit(folder / "merged/effsam3.json", chassis=str(chassis))
    assert "has still to be added" in licence(read_release(folder))
    assert "base_model" not in metadata(read_release(folder))
    (chassis / "LICENSE").write_text("Apache License\n")
    assert read_release(folder).license_file is None
    (chassis / "LICENSE").write_text("SAM License\nLast Updated: today\n")
    assert read_release(folder).license_file == chassis / "LICENSE"
    assert metadata(read_release(folder))["license_link"] == "LICENSE"
    assert "Its full text is in `LICENSE`" in licence(read_release(folder))
    (tmp_path / "mine.txt").write_text("SAM License\n")
    assert read_release(folder, str(tmp_path / "mine.txt")).license_file == tmp_path / "mine.txt"


def test_a_copy_in_the_hubs_cache_comes_along(run, no_cache):
    folder = run("image")
    edit(folder / "merged/effsam3.json", chassis="facebook/sam3")
    assert read_release(folder).license_file is None
    cached = no_cache / "models--facebook--sam3"
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    (cached / "snapshots/abc/LICENSE").write_text("SAM License\n")
    assert read_release(folder).license_file == cached / "snapshots/abc/LICENSE"


def test_a_model_merged_into_a_merged_model_is_of_the_first_chassis(run, merged):
    folder = run("image")
    edit(folder / "merged/effsam3.json", chassis=str(merged["text"] / "merged"))
    release = read_release(folder)
    assert release.chassis == "tiny" and not release.has_sam3


def test_another_text_is_not_taken_for_the_licence(run, tmp_path):
    folder = run("image")
    edit(folder / "merged/effsam3.json", chassis="facebook/sam3")
    (tmp_path / "other.txt").write_text("The weights fall under the\nSAM License\n")
    with pytest.raises(ReleaseError, match="other.txt does not call itself the SAM License"):
        read_release(folder, str(tmp_path / "other.txt"))
    with pytest.raises(ReleaseError, match="absent.txt is not there"):
        read_release(folder, str(tmp_path / "absent.txt"))


@pytest.mark.parametrize(
    ("name", "student", "start", "said"),
    [
        ("text", "mobileclip_s0", "mobileclip", r"\*\*For research only.\*\*.+apple-amlr"),
        (
            "text",
            "mobileclip_s0",
            "/data/tower.pt",
            r"`tower.pt`, whose licence applies to it too\..+apple-amlr.+starts from",
        ),
        ("image", "repvit_m1_1", "imagenet", r"timm's pretrained weights of `repvit_m1_1` \(.+Apache-2.0\)"),
        ("image", "repvit_m1_1", "mine.safetensors", r"`mine.safetensors`, whose licence applies to it too\.$"),
    ],
)
def test_the_weights_a_student_began_with_are_named(run, name, student, start, said):
    folder = run(name)
    slots = json.loads((folder / "merged/effsam3.json").read_text())["slots"]
    slots[name] |= {"student": student, "student_init": start}
    edit(folder / "merged/effsam3.json", slots=slots)
    assert re.search(said, licence(read_release(folder)).split("\n\n", 1)[1], re.S)
    slots[name]["student_init"] = "random"
    edit(folder / "merged/effsam3.json", slots=slots)
    assert "\n\n" not in licence(read_release(folder))


def test_without_a_merged_model_there_is_no_card(tmp_path):
    with pytest.raises(ReleaseError, match="merged is not there; run `effsam3 merge` first"):
        read_release(tmp_path)
