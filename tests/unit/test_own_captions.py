# SPDX-License-Identifier: Apache-2.0
"""Captions of one's own the whole way: recipe, training, merge, evaluation; with either padding rule."""

import json
import resource

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from run_folders import RECIPES

from effsam3.benchmarks.text import load_text_features
from effsam3.cli import main
from effsam3.errors import UserError
from effsam3.models.chassis.tensors import read_config
from effsam3.models.text.padding import padding_of
from effsam3.models.text.student import text_student
from effsam3.models.text.tokens import Tokenizer
from effsam3.recipe.reader import load_recipe
from effsam3.stages import needs
from effsam3.stages.text.training import captions_of
from effsam3.training import checkpoint

NOUNS, COLOURS = ("cat", "dog", "car", "tree", "house", "boat", "cup", "chair"), ("red", "blue", "green", "old", "big")
CAPTIONS = [f"a {colour} {noun} on the {other}" for colour in COLOURS for noun in NOUNS for other in NOUNS[:2]]


def caption_file(folder, kind):
    """A file of captions as a program of the owner's may have written it, and the keys of the recipe that it needs."""
    file = folder / f"captions{kind}"
    if kind == ".txt":
        file.write_bytes("\r\n".join(CAPTIONS).encode("utf-16"))
        return file, ()
    if kind == ".jsonl":
        file.write_text("".join(json.dumps({"file_name": "x.jpg", "Caption": text}) + "\n" for text in CAPTIONS))
        return file, ()
    if kind == ".csv":
        file.write_text("Datei;Beschreibung\n" + "".join(f"x.jpg;{text}\n" for text in CAPTIONS))
        return file, ("data.column=beschreibung",)
    parquet.write_table(pa.table({"TEXT": pa.array(CAPTIONS).dictionary_encode(), "n": range(len(CAPTIONS))}), file)
    return file, ()


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
def test_own_captions_are_trained_on_merged_and_measured(kind, tmp_path, capsys):
    file, keys = caption_file(tmp_path, kind)
    padding = "attended" if kind in (".txt", ".jsonl") else "masked"
    run = tmp_path / "runs/own"
    overrides = (
        "name=own", f"train.runs={tmp_path}/runs", "data.source=files", "data.synthetic_captions=0",
        f"data.captions={file}",
        "data.phrases=[]", "data.phrase_share=0", f"student_padding={padding}", "train.steps=12", "train.eval_every=6",
        "train.save_every=6", "train.global_batch_size=16", "train.micro_batch_size=16", "optim.warmup_steps=2",
        "train.eval_samples=10", *keys,
    )  # fmt: skip
    recipe = str(RECIPES / "smoke/text.yaml")
    assert main(["train", recipe, *overrides]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/mse"] for line in lines if "val/mse" in line]
    assert losses[-1] < losses[0]
    assert main(["merge", recipe, *overrides]) == 0 and main(["evaluate", recipe, *overrides]) == 0
    printed = capsys.readouterr().out
    assert f"padding {padding}" in printed
    column = {".txt": "", ".jsonl": " (Caption)", ".csv": " (Beschreibung)", ".parquet": " (TEXT)"}[kind]
    assert f"captions{column}, " in printed
    result = json.loads((run / "eval/similarity.json").read_text())["captions"]
    assert result["texts"] > 5 and 0 < result["cosine"] <= 1
    # What is merged computes what was trained, under the rule that it was trained with.
    assert padding_of(read_config(run / "merged").detector_config) == padding
    student = text_student("tiny_text_plain", 32, 128, padding)
    student.load_state_dict(checkpoint.read_weights(checkpoint.chosen(run / "checkpoints", "best")))
    ids, mask = Tokenizer().encode(CAPTIONS[:9], 32)
    with torch.no_grad():
        wanted = student.eval()(ids, mask)
    found = load_text_features(run / "merged")(ids, mask)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-5, atol=1e-5)
    if kind == ".jsonl":
        onward = ("name=onward", f"student_init={run}/merged", "student_padding=masked")
        assert main(["train", recipe, *overrides, *onward]) == 0
        printed = capsys.readouterr().out
        assert "it learned with padding attended, this run's is masked" in printed


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "there is no file"),
        ("id,name\n1,a cat\n", "Name one with evaluate.phrase_column"),
        ("phrase\na cat\ncaf\u00e9\n", "phrases.csv:3: the bytes e9 are not UTF-8"),
    ],
)
def test_phrases_to_measure_on_are_read_before_the_training(content, complaint, tmp_path):
    if content is not None:
        (tmp_path / "phrases.csv").write_bytes(content.encode("latin-1"))
    overrides = [f"evaluate.phrases={tmp_path}/phrases.csv", f"train.runs={tmp_path}/runs"]
    with pytest.raises(UserError, match=complaint):
        needs.refuse(load_recipe(RECIPES / "smoke/text.yaml", overrides), ["evaluate"])


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["data.column=caption"],
            "data.column: 'caption' is not one of re_caption, org_caption, mix, which source",
        ),
        (["data.column=recaption"], "did you mean re_caption"),
        (["student_padding=hidden"], "student_padding: 'hidden' is not one of masked, attended"),
    ],
)
def test_columns_and_rules_that_do_not_exist_are_refused_by_the_recipe(overrides, complaint, capsys):
    assert main(["show", str(RECIPES / "smoke/text.yaml"), *overrides]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (2, 1), (1, 2)])
def test_files_are_first_read_in_as_many_processes_as_the_recipe_says(tmp_path, workers, ranks, monkeypatch):
    """Those of the ranks that wait meanwhile are among them."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    for name in "ab":
        parquet.write_table(
            pa.table({"re_caption": [f"{name} {text}" for text in CAPTIONS]}), tmp_path / f"{name}.parquet"
        )
    own = (f"data.captions={tmp_path}", "data.source=files", "data.synthetic_captions=0", "data.phrases=[]")
    recipe = load_recipe(RECIPES / "smoke/text.yaml", [*own, "data.phrase_share=0", f"data.workers={workers}"])
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    captions = captions_of(recipe.data)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # starting one takes a tenth of a second
    assert len(captions.train) + len(captions.val) == 2 * len(CAPTIONS)
    assert (used > 0) == (workers * ranks > 1)
