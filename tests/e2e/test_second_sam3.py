# SPDX-License-Identifier: Apache-2.0
"""A SAM 3 is a row of the registry: another one, which only this test knows, goes through the verbs."""

import json
import sys

import pytest
from commands import ENVIRONMENT, REPOSITORY, run_line
from second_sam3 import HUB_ID

from effsam3.models.chassis.tensors import read_config

VERBS = ("show", "embed", "train", "merge", "evaluate")
SHORT = (
    f"sam3.checkpoint={HUB_ID}", "train.runs=runs", "train.steps=2", "train.eval_every=2", "train.save_every=2",
    "train.log_every=1", "optim.warmup_steps=1", "train.eval_samples=4", "train.loggers=[]",
)  # fmt: skip
IMAGE = (
    "data.synthetic_images=20", "data.index=data/index.parquet", "embed.to=data/teacher", "loss.neck=0.1",
    "evaluate.max_images=2", "evaluate.pictures=1",
)  # fmt: skip
TEXT = (
    "teacher=stored", "data.synthetic_captions=200", "data.captions=data/recap", "data.phrases=[data/phrases.txt]",
    "embed.to=data/teacher-text", "evaluate.max_captions=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, what each verb printed: `image show` and so on)."""
    folder = tmp_path_factory.mktemp("second")
    lines = []
    for stage, own in (("image", IMAGE), ("text", TEXT)):
        recipe = str(REPOSITORY / f"recipes/smoke/{stage}.yaml")
        lines += [[verb, recipe, *SHORT, *own] for verb in VERBS]
    lines.append(["push", str(REPOSITORY / "recipes/smoke/image.yaml"), "--dry-run", *SHORT, *IMAGE])
    environment = ENVIRONMENT | {"HF_HOME": str(folder / "hub"), "EFFSAM3_CACHE": str(folder / "cache")}
    script = str(REPOSITORY / "tests" / "second_sam3.py")
    told = run_line(folder, [sys.executable, script, json.dumps(lines)], environment=environment)
    parts = told.split("### ")[1:]
    assert [part.split()[0] for part in parts] == [line[0] for line in lines]
    names = [f"{stage} {verb}" for stage in ("image", "text") for verb in VERBS]
    return folder, dict(zip([*names, "image push"], parts, strict=True))


def test_show_knows_its_sizes_and_counts(ran):
    _, told = ran
    assert "48 x 12 x 12" in told["image show"]
    assert "more than the 1,606,592 they replace" in told["text show"]


def test_its_students_are_merged_into_it(ran):
    folder, _ = ran
    for stage in ("image", "text"):
        merged = folder / "runs" / f"smoke-{stage}" / "merged"
        config = read_config(merged)
        assert config.detector_config.vision_config.backbone_config.image_size == 168
        assert config.detector_config.detr_encoder_config.hidden_size == 192
        card = json.loads((merged / "effsam3.json").read_text())
        assert card["chassis"] == HUB_ID and card["slots"].keys() == {stage}


def test_they_are_measured_against_it(ran):
    folder, _ = ran
    fidelity = json.loads((folder / "runs/smoke-image/eval/fidelity.json").read_text())
    assert fidelity["images"] == 2
    similarity = json.loads((folder / "runs/smoke-text/eval/similarity.json").read_text())
    assert similarity["captions"]["texts"] > 1


def test_the_card_names_it_and_its_licence(ran):
    folder, _ = ran
    card = (folder / "runs/smoke-image/merged/README.md").read_text()
    assert f"base_model: {HUB_ID}" in card and "license_name: second-license" in card
    assert f"[SAM 3 the Second](https://huggingface.co/{HUB_ID})" in card and "facebook/sam3" not in card
    assert "Second Licence" in (folder / "runs/smoke-image/merged/LICENSE").read_text()


def test_the_package_does_not_know_it():
    files = [*(REPOSITORY / "effsam3").rglob("*.py"), *(REPOSITORY / "recipes").rglob("*.yaml")]
    assert not [file for file in files if HUB_ID in file.read_text(encoding="utf-8")]


def test_only_the_registry_says_which_sam3_is_published():
    files = [file for file in (REPOSITORY / "effsam3").rglob("*.py") if "facebook/sam3" in file.read_text()]
    assert [file.name for file in files] == ["registry.py"]
