# SPDX-License-Identifier: Apache-2.0
"""A release as a user makes it: two runs, one model in three formats, and every format read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, REPOSITORY, run_here

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config, read_tensors
from effsam3.models.text.tokens import Tokenizer

TEXT = REPOSITORY / "recipes/smoke/text.yaml"
RELEASE = REPOSITORY / "recipes/smoke/release.yaml"
SHORT = ("train.steps=10", "train.eval_every=5", "train.save_every=5", "optim.warmup_steps=2")


@pytest.fixture(scope="module")
def release(shared, tmp_path_factory) -> tuple[Path, str]:
    """The release's folder and what `launch` printed; its image student is one that EfficientSAM3 has, too."""
    folder = tmp_path_factory.mktemp("release")
    _, overrides = shared
    run_here(folder, "train", *overrides, *SHORT, "student=efficientvit_b0", "head=stride32")
    captions = ("data.synthetic_captions=200", "evaluate.max_captions=40", "train.global_batch_size=32")
    run_here(folder, "train", *captions, *SHORT, "train.micro_batch_size=16", recipe=TEXT)
    formats = "merge.formats=[transformers,sam3,efficientsam3]"
    done = subprocess.run(
        [sys.executable, "-m", "effsam3.cli", "launch", str(RELEASE), formats, "merge.allow_padding_mismatch=true"],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder / "runs/smoke-release", done.stdout


def test_both_parts_are_merged_and_measured_in_one_model(release):
    folder, printed = release
    assert "| image   | efficientvit_b0, smoke-image/best-step-" in printed
    assert "| text    | tiny_text_plain, smoke-text/best-step-" in printed
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "eval").glob("*.json")}
    assert results.keys() == {"image_fidelity", "image_masks", "image_speed", "text_similarity", "text_speed"}
    assert results["image_fidelity"]["images"] == 4 and results["text_similarity"]["captions"]["texts"] > 10
    assert set(results["text_speed"]["provenance"]["slots"]) == {"image", "text"}
    assert (folder / "eval/summary.md").read_text().strip() in printed


def test_alone_and_together_the_parts_are_the_same(release):
    folder, _ = release
    for recipe, name in (("image", "smoke-image"), ("text", "smoke-text")):
        run_here(folder.parents[1], "merge", recipe=folder.parent / name / "recipe.yaml")
        alone, together = read_tensors(folder.parent / name / "merged"), read_tensors(folder / "merged")
        slot = {"image": "detector_model.vision_encoder.backbone.", "text": "detector_model.text_"}[recipe]
        part = {key: tensor for key, tensor in alone.items() if key.startswith(slot)}
        assert part and all(torch.equal(together[key], tensor) for key, tensor in part.items())


def test_sam3_pt_comes_back_bit_for_bit(release):
    folder, _ = release
    back, merged = chassis_folder(str(folder / "merged/sam3.pt")), folder / "merged"
    before, after = read_tensors(merged), read_tensors(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_config(back).to_dict() == read_config(merged).to_dict()


def outputs(folder: Path) -> dict[str, torch.Tensor]:
    """What the detector makes of a prompt that fills all tokens, and the tracker of a point."""
    from transformers import Sam3TrackerVideoModel

    from effsam3.models.text.padding import RULES, padding_of

    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    ids, mask = Tokenizer().encode(["a red ring and " * 20], 32)
    detector = RULES[padding_of(read_config(folder).detector_config)].detector.from_pretrained(folder).eval()
    tracker = Sam3TrackerVideoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = detector(
            pixel_values=pixels,
            input_ids=ids,
            attention_mask=mask.long(),
            input_boxes=torch.zeros(1, 1, 4),
            input_boxes_labels=torch.full((1, 1), -10),
        )
    frame = tracker._single_frame_forward(pixel_values=pixels, input_points=torch.tensor([[[[100.0, 90.0]]]]))
    return {"logits": found.pred_logits, "masks": found.pred_masks, "tracker": frame.pred_masks}


def test_efficientsam3_pt_is_imported_and_sees_the_same(release):
    folder, printed = release
    assert (
        "build_efficientsam3_image_model(checkpoint_path='efficientsam3.pt', backbone_type='efficientvit'" in printed
    )
    runs = folder.parents[1]
    file = folder / "merged/efficientsam3.pt"
    command = ["import", str(file), "--sam3", "tiny"]
    printed = run_plain(runs, *command)
    assert "| image student " in printed and "| text student " in printed
    assert "student_init=runs/efficientsam3/merged" in printed
    expected, found = outputs(folder / "merged"), outputs(runs / "runs/efficientsam3/merged")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def test_what_was_imported_is_measured_trained_on_and_released(release, shared):
    folder, _ = release
    runs, imported = folder.parents[1], "runs/efficientsam3/merged"
    _, overrides = shared
    student = ("student=efficientvit_b0", "head=stride32")
    run_here(runs, "evaluate", *overrides, *student, "name=efficientsam3")
    before, after = (
        json.loads((runs / "runs" / place).read_text())
        for place in ("smoke-release/eval/image_fidelity.json", "efficientsam3/eval/fidelity.json")
    )
    assert after["cosine"] == pytest.approx(before["cosine"], abs=1e-3)
    assert after["cosine_centred"] == pytest.approx(before["cosine_centred"], abs=0.1)  # statistics of other images
    onward = (*overrides, *student, *SHORT, "name=onward", f"student_init={imported}")
    printed = run_here(runs, "train", *onward)
    assert f"weights  those of {imported}, its last layer rescaled" in printed
    assert "(at the start)" in printed and "| student at the start " in printed and "untrained" not in printed
    start = json.loads((runs / "runs/onward/metrics.jsonl").read_text().splitlines()[0])
    assert start["val/cosine"] == pytest.approx(trained_cosine(runs / "runs/smoke-image"), abs=1e-3), printed
    parts = f"parts={{image: {imported}, text: runs/smoke-text}}"
    printed = run_here(runs, "merge", parts, "name=mixed", "merge.formats=[transformers]", recipe=RELEASE)
    assert "| image   | efficientvit_b0, efficientsam3.pt" in printed
    printed = run_here(runs, "train", *onward[:-1], "name=other", f"student_init={imported}", "head=fused", code=2)
    assert "not those of the recipe's student (student_init: it is efficientvit_b0)" in printed


def trained_cosine(run_folder: Path) -> float:
    """The validation of the weights that were merged."""
    best = sorted((run_folder / "checkpoints").glob("best-*"))[-1]
    return json.loads((best / "trainer.json").read_text())["best"]["val/cosine"]


def run_plain(folder: Path, *arguments: str) -> str:
    """Run a verb that takes no recipe and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "effsam3.cli", *arguments],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
