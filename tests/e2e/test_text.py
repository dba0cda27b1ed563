# SPDX-License-Identifier: Apache-2.0
"""Stage 1, text: every verb, the same learning on any hardware, and the merged model in plain transformers."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, REPOSITORY, command, metrics, run, run_here
from test_trajectories import KEYS, wait_for
from transformers import Sam3LiteTextModel, Sam3TrackerVideoModel, Sam3VideoModel

from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_tensors
from effsam3.models.text.student import TEXT_ENCODER, TEXT_PROJECTION
from effsam3.models.text.tokens import PROCESSOR_LENGTH, Tokenizer, tokenizer_fingerprint

TEXT = REPOSITORY / "recipes/smoke/text.yaml"
SHORT = ("train.steps=10", "train.log_every=1", "train.eval_every=5", "train.save_every=2", "optim.warmup_steps=2",
         "train.global_batch_size=32", "train.micro_batch_size=16", "train.keep_checkpoints=9")  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A folder with made-up captions and phrases, and the overrides that use them."""
    folder = tmp_path_factory.mktemp("text")
    overrides = (
        "data.synthetic_captions=400",
        f"data.captions={folder}/data/recap",
        f"data.phrases=[{folder}/data/phrases.txt]",
        f"embed.to={folder}/teacher",
        "evaluate.max_captions=60",
    )
    run_here(folder, "train", *overrides, *SHORT, "name=reference", recipe=TEXT)
    return folder, overrides


def same(folder: Path, name: str, tolerance: float) -> None:
    expected, found = metrics(folder / "runs/reference"), metrics(folder / "runs" / name)
    assert expected.keys() == found.keys() == set(range(1, 11))
    for step, values in expected.items():
        for key in KEYS:
            assert found[step][key] == pytest.approx(values[key], rel=tolerance, abs=1e-9), (step, key)


def test_stored_features_give_the_same_trajectory(texts):
    folder, overrides = texts
    printed = run_here(folder, "embed", *overrides, "teacher=stored", recipe=TEXT)
    assert "different texts" in printed
    assert "lowest cosine 1.0000" in run_here(folder, "embed", *overrides, "--check", "3", recipe=TEXT)
    run_here(folder, "train", *overrides, *SHORT, "teacher=stored", "name=stored", recipe=TEXT)
    same(folder, "stored", 5e-3)
    other = (*overrides, *SHORT, "teacher=stored", "name=other", "sam3.fingerprint=deadbeef")
    assert "was made by tiny" in run_here(folder, "train", *other, recipe=TEXT, code=2)
    manifest = folder / "teacher/manifest.json"
    content = manifest.read_text()
    assert f"tokenizer {tokenizer_fingerprint()}" in content
    manifest.write_text(content.replace(tokenizer_fingerprint(), "0" * 16))
    another = (*overrides, *SHORT, "teacher=stored", "name=another")
    assert "was made with another tokenizer" in run_here(folder, "train", *another, recipe=TEXT, code=2)
    manifest.write_text(content)
    # A text that has changed has another key: said before the first step, not when its turn comes.
    phrases = folder / "data/phrases.txt"
    drawn = phrases.read_text()
    phrases.write_text(drawn.replace("\n", " and a kite\n", 1))
    printed = run_here(folder, "train", *another, recipe=TEXT, code=2)
    assert (
        "lacks 1 of" in printed
        and "Run `effsam3 embed`" in printed
        and not (folder / "runs/another/checkpoints").exists()
    )
    assert "1 made now" in run_here(folder, "embed", *overrides, "teacher=stored", recipe=TEXT)
    phrases.write_text(drawn)  # which the other tests read, too


def test_real_captions_are_never_overwritten(texts, tmp_path):
    folder, overrides = texts
    (tmp_path / "phrases.txt").write_text("a dog\n")
    mine = (*overrides, *SHORT, f"data.phrases=[{tmp_path}/phrases.txt]", "name=mine")
    assert "was not made from synthetic captions" in run_here(folder, "train", *mine, recipe=TEXT, code=2)
    assert (tmp_path / "phrases.txt").read_text() == "a dog\n"


@pytest.mark.parametrize("hardware", ["ddp_cpu", "zero3_cpu"])
def test_two_processes(texts, hardware):
    folder, overrides = texts
    run(folder, "train", *overrides, *SHORT, f"hardware={hardware}", f"name={hardware}", recipe=TEXT, launch=True)
    same(folder, hardware, 1e-4)


def test_killed_and_resumed_at_the_exact_sample(texts):
    folder, overrides = texts
    arguments = ("train", *overrides, *SHORT, "name=killed")
    checkpoints = folder / "runs/killed/checkpoints"
    process = subprocess.Popen(
        command(*arguments, recipe=TEXT),
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    wait_for(lambda: (checkpoints / "step-000002").is_dir(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for later in checkpoints.glob("*step-0000*"):  # as if the kill had come right after the first checkpoint
        if later.name != "step-000002":
            shutil.rmtree(later)
    assert "resuming from step 2" in run_here(folder, *arguments, recipe=TEXT)
    same(folder, "killed", 1e-12)


def test_the_student_learns_merges_and_is_measured(texts):
    folder, overrides = texts
    longer = ("train.steps=120", "train.eval_every=60", "name=learner")
    run_here(folder, "train", *overrides, *longer, recipe=TEXT)
    held_out = metrics(folder / "runs/learner", "val/cosine")
    assert held_out[120]["val/cosine"] > held_out[0]["val/cosine"] + 0.15
    assert held_out[120]["val/cosine"] > held_out[120]["val/cosine_of_mean"] + 0.1
    assert held_out[120]["val/cosine_centred"] > 0.4

    printed = run_here(folder, "merge", *overrides, *longer, recipe=TEXT)
    assert "| text " in printed and "slot text" in printed
    merged, chassis = read_tensors(folder / "runs/learner/merged"), read_tensors(chassis_folder("tiny"))
    slot = (TEXT_ENCODER, TEXT_PROJECTION)
    kept = {name for name in chassis if not name.startswith(slot)}
    assert {name for name in merged if not name.startswith(slot)} == kept
    assert all(torch.equal(merged[name], chassis[name]) for name in kept)
    for model_class in (Sam3VideoModel, Sam3LiteTextModel, Sam3TrackerVideoModel):
        _, info = model_class.from_pretrained(folder / "runs/learner/merged", output_loading_info=True)
        assert not any(info.values()), model_class
    model = Sam3LiteTextModel.from_pretrained(folder / "runs/learner/merged").eval()
    ids, mask = Tokenizer().encode(["a red ring", "two small dogs on a sofa"], PROCESSOR_LENGTH)
    pad = PROCESSOR_LENGTH - ids.shape[1]
    ids, mask = torch.nn.functional.pad(ids, (0, pad), value=49407), torch.nn.functional.pad(mask, (0, pad))
    with torch.no_grad():
        found = model(
            pixel_values=torch.zeros(2, 3, 224, 224),
            input_ids=ids,
            attention_mask=mask.long(),
            input_boxes=torch.zeros(2, 1, 4),  # the original always has a geometry token; so one that counts nowhere
            input_boxes_labels=torch.full((2, 1), -10),
        )
    assert found.pred_masks.isfinite().all() and not torch.equal(found.pred_masks[0], found.pred_masks[1])

    printed = run_here(folder, "evaluate", *overrides, *longer, recipe=TEXT)
    result = json.loads((folder / "runs/learner/eval/similarity.json").read_text())
    for texts_measured in ("captions", "phrases"):
        assert 0.5 < result[texts_measured]["cosine"] <= 1
    assert "same neighbour" in printed and (folder / "runs/learner/pictures/similarity.png").is_file()
