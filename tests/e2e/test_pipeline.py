# SPDX-License-Identifier: Apache-2.0
"""The whole sequence as a user runs it: embed, train, merge, evaluate; then the merged model
in plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, REPOSITORY, SMOKE, metrics, run_here
from PIL import Image
from safetensors.torch import load_file

from effsam3.leaderboard import read_rows
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import TRUNK, read_tensors


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> tuple[Path, str]:
    """The smoke recipe through `scripts/run.sh`, shortened; its run folder and what it printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    overrides = [
        "data.synthetic_images=64", "train.steps=60", "train.eval_every=20", "train.save_every=20",
        "train.keep_checkpoints=2", "train.loggers=[tensorboard]", "evaluate.max_images=6", "evaluate.pictures=2",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    done = subprocess.run(
        ["bash", str(REPOSITORY / "scripts/run.sh"), str(SMOKE), *overrides],
        cwd=folder,
        env=ENVIRONMENT | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder / "runs/smoke-image", done.stdout


def test_the_student_learns(pipeline):
    """Clearly better than before training and than always predicting the mean, on images it has never seen."""
    run_folder, printed = pipeline
    held_out = metrics(run_folder, "val/cosine")
    untrained, trained = held_out[0], held_out[60]
    assert trained["val/cosine"] > untrained["val/cosine"] + 0.3
    assert trained["val/cosine"] > trained["val/cosine_of_mean"] + 0.3
    assert trained["val/cosine_centred"] > 0.5 and trained["val/mse"] < 0.7
    assert "student at the start" in printed and "mean of the features" in printed


def test_the_run_folder_explains_itself(pipeline):
    run_folder, _ = pipeline
    provenance = json.loads((run_folder / "provenance.json").read_text())
    assert provenance["versions"]["torch"] and provenance["hardware"].startswith("1 x cpu")
    assert provenance["features"]["teacher"]["checkpoint"] == "tiny"
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == [
        "best-step-000060",
        "step-000040",
        "step-000060",
    ]
    assert list((run_folder / "tensorboard").rglob("events*"))


def test_merge_accounts_for_every_tensor(pipeline):
    run_folder, printed = pipeline
    merged = read_tensors(run_folder / "merged")
    student = load_file(run_folder / "checkpoints/best-step-000060/student.safetensors")
    chassis = read_tensors(chassis_folder("tiny"))
    for name, tensor in merged.items():
        source = student[name.removeprefix(TRUNK)] if name.startswith(TRUNK) else chassis[name]
        assert torch.equal(tensor, source), name
    kept = {name for name in chassis if not name.startswith(TRUNK)}
    assert merged.keys() == kept | {TRUNK + name for name in student}
    assert "| image " in printed and "| dropped " in printed


LOAD = """
import sys, torch
import effsam3.models.image.student
from transformers import AutoModel, Sam3Model, Sam3TrackerModel, Sam3TrackerVideoModel
from transformers import Sam3VideoModel, Sam3VideoProcessor
torch.set_num_threads(1)
folder, out = sys.argv[1:]
for model_class in (Sam3VideoModel, Sam3Model, Sam3TrackerVideoModel, Sam3TrackerModel):
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (model_class, {kind: len(names) for kind, names in info.items()})
model = AutoModel.from_pretrained(folder)
assert type(model) is Sam3VideoModel
processor = Sam3VideoProcessor.from_pretrained(folder)
generator = torch.Generator().manual_seed(0)
pixels = torch.rand(1, 3, 224, 224, generator=generator) * 2 - 1
text = processor.tokenizer("a red ring", return_tensors="pt", padding="max_length", max_length=32)
detector = Sam3Model.from_pretrained(folder).eval()
with torch.no_grad():
    found = detector(pixel_values=pixels, input_ids=text["input_ids"], attention_mask=text["attention_mask"])
tracker = Sam3TrackerVideoModel.from_pretrained(folder).eval()
frame = tracker._single_frame_forward(pixel_values=pixels, input_points=torch.tensor([[[[100.0, 90.0]]]]))
tensors = {"trunk": detector.vision_encoder.backbone(pixels).last_hidden_state, "detector": found.pred_masks,
           "logits": found.pred_logits, "tracker": frame.pred_masks}
assert all(tensor.isfinite().all() for tensor in tensors.values())
torch.save({name: tensor.detach() for name, tensor in tensors.items()}, out)
"""


def test_plain_transformers_loads_it_and_runs_both_heads(pipeline, tmp_path):
    """Two fresh processes: all four SAM 3 classes load it whole, and detector and tracker heads give the same bits."""
    run_folder, _ = pipeline
    outputs = []
    for number in range(2):
        out = tmp_path / f"{number}.pt"
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(run_folder / "merged"), str(out)],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(torch.load(out))
    for name, tensor in outputs[0].items():
        assert torch.equal(tensor, outputs[1][name]), name
    assert outputs[0]["trunk"].shape == (1, 256, 64) and outputs[0]["tracker"].shape[-2:] == (64, 64)


def test_evaluation_numbers_and_pictures(pipeline):
    run_folder, printed = pipeline
    fidelity, masks, speed = (
        json.loads((run_folder / f"eval/{name}.json").read_text()) for name in ("fidelity", "masks", "speed")
    )
    assert fidelity["cosine"] > fidelity["cosine_of_mean"] + 0.3 and fidelity["images"] == 6
    for prompt in ("box", "point"):
        assert masks[prompt]["masks"] >= 12
        assert all(0 <= masks[prompt][name] <= 1 for name in ("student", "teacher", "agreement"))
        assert masks[prompt]["agreement"] > 0.5
    assert speed["student"]["trunk_parameters"] == 1_442_776 and speed["teacher"]["trunk_parameters"] == 175_744
    pictures = list((run_folder / "pictures").glob("*.png"))
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width > 800 and len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 100
    assert (run_folder / "eval/summary.md").read_text().strip() in printed
    boxes = {row.role: row.scores["box"] for row in read_rows(run_folder) if row.board == "masks"}
    assert boxes == {role: masks["box"][role] for role in ("teacher", "student")}


def test_a_second_run_goes_on_where_the_first_ended(pipeline):
    run_folder, _ = pipeline
    before = (run_folder / "metrics.jsonl").read_text()
    recipe = run_folder / "recipe.yaml"
    printed = run_here(run_folder.parents[1], "train", recipe=recipe)
    assert "this run is complete: 60 steps" in printed and (run_folder / "metrics.jsonl").read_text() == before
    printed = run_here(run_folder.parents[1], "train", "optim.lr=5e-4", "data.workers=1", recipe=recipe, code=2)
    assert "optim.lr 0.002 -> 0.0005" in printed and "workers" not in printed and "Traceback" not in printed
