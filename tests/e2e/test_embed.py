# SPDX-License-Identifier: Apache-2.0
"""Embedding under fire: killed, resumed with other processes, bad images, other payloads; and training from
what is left."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from commands import ENVIRONMENT, SMOKE, command, fresh_state, metrics, run
from PIL import Image
from safetensors.torch import load_file

import effsam3.embed
import effsam3.merge
import effsam3.train
from effsam3.cli import main
from effsam3.data.images.features import stored_features
from effsam3.data.images.index import build_index
from effsam3.data.images.sa1b import load_index
from effsam3.data.store.format import StoreError, open_manifest
from effsam3.data.store.reader import StoreReader, verify_store
from effsam3.data.store.writer import repair_store
from effsam3.errors import UserError
from effsam3.recipe.reader import load_recipe

VERBS = {"embed": effsam3.embed.run, "train": effsam3.train.run, "merge": effsam3.merge.run}
SHORT = ("train.steps=4", "train.log_every=1", "train.eval_every=4", "optim.warmup_steps=1")


def call(verb: str, overrides, *more: str, recipe: Path = SMOKE, **options):
    """Run a verb in this process: seconds less than a fresh one."""
    with fresh_state():
        return VERBS[verb](load_recipe(recipe, [*overrides, *more]), **options)


@pytest.fixture
def own(shared, tmp_path, monkeypatch):
    """A copy of the drawn images and their index to spoil; the overrides that use it; nothing embedded yet."""
    folder, overrides = shared
    shutil.copytree(folder / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    kept = [item for item in overrides if not item.startswith(("data.index", "embed.to"))]
    return tmp_path, (*kept, f"data.index={tmp_path}/data/index.parquet", f"embed.to={tmp_path}/teacher")


def spoil(folder: Path, split: str) -> str:
    """Cut an image of a split short, after it was indexed; returns its key."""
    row = load_index(folder / "data/index.parquet", split)[0]
    path = folder / "data" / row["image_file"]
    path.write_bytes(path.read_bytes()[: row["image_bytes"] // 2])
    return row["key"]


def test_killed_and_resumed_with_another_number_of_processes(shared, own):
    reference = StoreReader(shared[0] / "teacher")
    folder, overrides = own
    slow = (*overrides, "embed.batch_size=1", "hardware=ddp_cpu")
    process = subprocess.Popen(
        command("embed", *slow, launch=True),
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300

    def written() -> int:
        return sum(len(path.read_bytes().splitlines()) for path in folder.glob("teacher/shard-*.tsv"))

    while written() < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:  # the launcher gives its ranks sessions of their own
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)
    repair_store(folder / "teacher")
    saved = set(StoreReader(folder / "teacher", allow_unfinished=True).keys)
    assert 0 < len(saved) < len(reference), "the kill came too late to prove anything"
    with pytest.raises(StoreError, match="run `effsam3 embed` again"):
        call("train", overrides, *SHORT)
    before = {path.name: path.read_bytes() for path in folder.glob("teacher/*.bin")}
    call("embed", overrides)
    store = StoreReader(folder / "teacher")
    assert sorted(store.keys) == sorted(reference.keys) and not verify_store(folder / "teacher").bad
    assert saved <= set(store.keys)
    for name, content in before.items():
        assert (folder / "teacher" / name).read_bytes().startswith(content), "a saved record was made again"
    for key in reference.keys:
        ours, theirs = (stored_features(reader.read(reader.positions([key]))) for reader in (store, reference))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)  # kernels round by batch size


def test_an_image_that_went_bad_is_named_skipped_and_survived(own, capsys):
    folder, overrides = own
    trained, held_out = spoil(folder, "train"), spoil(folder, "val")
    call("embed", overrides)
    manifest = StoreReader(folder / "teacher").manifest
    assert {entry["key"].rpartition("@")[0] for entry in manifest.skipped} == {trained, held_out}
    assert all("when indexed" in entry["reason"] for entry in manifest.skipped)
    assert trained in capsys.readouterr().out
    call("train", overrides, *SHORT)
    assert metrics(folder / "runs/smoke-image")[4]["train/loss"] > 0


def test_an_image_that_goes_bad_during_training_is_counted_not_replaced(own, capsys):
    folder, overrides = own
    call("embed", overrides)
    key = spoil(folder, "train")
    # Every image is seen in 6 steps of 8.
    call("train", overrides, *SHORT, "train.steps=6")
    named = [json.loads(line) for line in (folder / "runs/smoke-image/unreadable.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in named} == {key}
    assert "unreadable.jsonl" in capsys.readouterr().out
    with pytest.raises(UserError, match="data.max_unreadable=0"):
        call("train", overrides, *SHORT, "train.steps=6", "data.max_unreadable=0", "name=strict")


def test_pixels_in_the_store_replace_the_photographs(own):
    folder, overrides = own
    call("embed", overrides)
    call("train", overrides, *SHORT)
    with_pixels = (*overrides, f"embed.to={folder}/with-pixels", "embed.pixels=true")
    call("embed", with_pixels)
    shutil.rmtree(folder / "data/images")
    call("train", with_pixels, *SHORT, "name=from-pixels")
    assert metrics(folder / "runs/from-pixels").keys() == {1, 2, 3, 4}
    for step, values in metrics(folder / "runs/smoke-image").items():
        assert metrics(folder / "runs/from-pixels")[step]["train/loss"] == pytest.approx(
            values["train/loss"], rel=1e-6
        )


def test_int8_halves_the_store_and_hardly_changes_the_loss(own):
    folder, overrides = own
    call("embed", overrides)
    call("train", overrides, *SHORT)
    int8 = (*overrides, f"embed.to={folder}/int8", "embed.dtype=int8")
    call("embed", int8)
    size = {name: sum(path.stat().st_size for path in (folder / name).glob("*.bin")) for name in ("teacher", "int8")}
    assert size["int8"] < 0.6 * size["teacher"]
    call("train", int8, *SHORT, "name=int8")
    for step, values in metrics(folder / "runs/smoke-image").items():
        assert metrics(folder / "runs/int8")[step]["train/loss"] == pytest.approx(values["train/loss"], rel=1e-2)


def test_check_recomputes(shared, capsys):
    _, overrides = shared
    call("embed", overrides, check=3)
    printed = capsys.readouterr().out
    assert "3 of 48 records recomputed; lowest cosine 0.9999" in printed or "lowest cosine 1.0" in printed
    with pytest.raises(StoreError, match="does not hold this teacher's features"):
        call("embed", overrides, "data.resize=longest_side", check=3)


def test_another_preprocessing_does_not_go_into_the_same_store(shared):
    _, overrides = shared
    with pytest.raises(StoreError, match='resize: "square" -> "longest_side"'):
        call("embed", overrides, "data.resize=longest_side")
    with pytest.raises(StoreError, match="data.resize"):
        call("train", overrides, "data.resize=longest_side")


def test_letterbox_trains_with_the_padding_left_out(own):
    folder, overrides = own
    letterbox = (*overrides, "data.resize=longest_side")
    call("embed", letterbox)
    call("train", letterbox, *SHORT)
    assert (
        metrics(folder / "runs/smoke-image")[4]["train/loss"] < metrics(folder / "runs/smoke-image")[1]["train/loss"]
    )


def test_neck_features_train_but_do_not_merge(own):
    folder, overrides = own
    neck = (*overrides, "embed.tap=neck", "embed.grid=8")
    call("embed", neck)
    call("train", neck, *SHORT)
    assert StoreReader(folder / "teacher").manifest.fields[0].shape == (128, 8, 8)
    with pytest.raises(UserError, match="embed.tap=trunk to merge"):
        call("merge", neck, *SHORT)


def test_a_smaller_grid_still_merges(own):
    folder, overrides = own
    small = (*overrides, "embed.grid=8")
    call("embed", small)
    call("train", small, *SHORT)
    assert (call("merge", small, *SHORT) / "model.safetensors").is_file()
    with pytest.raises(UserError, match="loss.neck=0"):
        call("train", small, *SHORT, "loss.neck=1", "name=neck-loss")


def test_the_neck_loss_is_learned_from(own):
    folder, overrides = own
    call("embed", overrides)
    call("train", overrides, *SHORT, "loss.neck=1", "train.steps=10")
    losses = metrics(folder / "runs/smoke-image")
    assert losses[10]["train/neck"] < 0.8 * losses[1]["train/neck"]
    assert losses[1]["train/loss"] == pytest.approx(
        sum(losses[1][f"train/{name}"] for name in ("mse", "cosine", "neck"))
    )


def test_a_real_index_is_never_overwritten_by_drawings(own):
    folder, overrides = own
    (folder / "data/synthetic.json").unlink()
    before = (folder / "data/index.parquet").read_bytes()
    with pytest.raises(UserError, match="was not made from synthetic images"):
        call("embed", overrides)
    assert (folder / "data/index.parquet").read_bytes() == before


def test_a_store_of_another_teacher_is_refused(own):
    folder, overrides = own
    call("embed", overrides)
    call("train", overrides, *SHORT)
    with pytest.raises(StoreError, match="was made by tiny .*sam3.checkpoint=random"):
        call("train", overrides, *SHORT, "sam3.checkpoint=random", "name=other")
    with pytest.raises(StoreError, match="with fingerprint deadbeef"):
        call("train", overrides, *SHORT, "sam3.fingerprint=deadbeef", "name=other")
    # The chassis may have changed behind its name since: the merge looks at the weights.
    facts = folder / "runs/smoke-image/provenance.json"
    facts.write_text(facts.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(UserError, match=r"in the slot image .+ learned from tiny"):
        call("merge", overrides, *SHORT)


def test_most_photographs_gone_leaves_the_store_unfinished(own):
    folder, overrides = own
    for path in sorted((folder / "data/images").glob("*.jpg"))[::2]:
        path.unlink()
    with pytest.raises(StoreError, match="24 of 48 images could not be read, more than data.max_unreadable=3"):
        call("embed", overrides, "data.max_unreadable=3")
    assert not open_manifest(folder / "teacher").finished


def test_a_loss_that_is_not_finite_is_never_saved(own):
    folder, overrides = own
    call("embed", overrides)
    wild = ("train.steps=8", "train.log_every=100", "train.save_every=2", "train.eval_every=4", "optim.lr=1e25")
    with pytest.raises(UserError, match="not|nan|inf"):
        call("train", overrides, *SHORT, *wild)
    for saved in (folder / "runs/smoke-image/checkpoints").glob("*/student.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(saved).values()), saved


def test_online_statistics_are_not_another_runs(own):
    folder, overrides = own
    call("train", overrides, *SHORT, "teacher=online")
    path = folder / "runs/smoke-image/feature_statistics.json"
    first = json.loads(path.read_text())
    shutil.rmtree(folder / "runs/smoke-image/checkpoints")
    call("train", overrides, *SHORT, "teacher=online", "embed.tap=neck")
    second = json.loads(path.read_text())
    assert len(first["mean"]) == 64 and len(second["mean"]) == 128
    assert set(metrics(folder / "runs/smoke-image")) == {1, 2, 3, 4}  # of the second run alone


def test_the_command_line_reports_errors_without_a_traceback(shared):
    folder, overrides = shared
    printed = run(folder, "train", *overrides, "embed.to=nowhere", "name=lost", code=2)
    assert "nowhere" in printed and "embed" in printed and "Traceback" not in printed


# ---- images replaced under the same name


def replace_image(folder: Path, split: str, number: int = 0) -> str:
    """Put another drawing under an image's name, of another size in bytes, and index again; returns its key."""
    row = load_index(folder / "data/index.parquet", split)[number]
    path = folder / "data" / row["image_file"]
    pixels = np.random.default_rng(0).integers(0, 255, (row["height"], row["width"], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=90)
    build_index([folder / "data/images"], folder / "data/index.parquet", 0.2, workers=1, progress=False)
    return row["key"]


def test_a_replaced_image_is_named_and_it_alone_is_made_anew(own, capsys):
    folder, overrides = own
    call("embed", overrides)
    before = {key: features_of(folder, key) for key in StoreReader(folder / "teacher").keys}
    trained, held_out = replace_image(folder, "train"), replace_image(folder, "val")
    for verb, options in (("train", {}), ("embed", {"check": 2})):
        with pytest.raises(StoreError, match="other bytes under the same name") as error:
            call(verb, overrides, *SHORT, **options)
        assert trained in str(error.value) and "Run `effsam3 embed`" in str(error.value)
    assert not (folder / "runs/smoke-image/checkpoints").exists()
    assert main(["store", "verify", str(folder / "teacher"), "--index", str(folder / "data/index.parquet")]) == 1
    assert f"{held_out}: replaced since" in capsys.readouterr().out
    call("embed", overrides)
    printed = capsys.readouterr().out
    assert "2 of 48 records" in printed and "2 made now" in printed
    assert "2 of them for what was replaced since" in printed and held_out in printed
    after = {key: features_of(folder, key) for key in StoreReader(folder / "teacher").keys}
    assert all(torch.equal(after[key], features) for key, features in before.items()), "a stored record was touched"
    new = {key.rpartition("@")[0]: features for key, features in after.items() if key not in before}
    assert new.keys() == {trained, held_out}
    for key, features in before.items():
        assert not torch.equal(features, new.get(key.rpartition("@")[0], torch.zeros(1))), key
    call("train", overrides, *SHORT)
    assert main(["store", "verify", str(folder / "teacher"), "--index", str(folder / "data/index.parquet")]) == 0


def features_of(folder: Path, key: str) -> torch.Tensor:
    reader = StoreReader(folder / "teacher")
    return reader.read(reader.positions([key]))["features"]


def test_a_file_replaced_behind_the_index_is_noticed_when_it_is_read(own):
    folder, overrides = own
    call("embed", overrides)
    row = load_index(folder / "data/index.parquet", "train")[0]
    path = folder / "data" / row["image_file"]
    content = bytearray(path.read_bytes())
    content[-200] ^= 1  # the same size, and it may still decode
    path.write_bytes(content)
    call("train", overrides, *SHORT, "train.steps=6")
    (line,) = (folder / "runs/smoke-image/unreadable.jsonl").read_text().splitlines()
    assert row["key"] in line and "another file of the same size" in line
    assert main(["store", "verify", str(folder / "teacher"), "--index", str(folder / "data/index.parquet")]) == 1


def test_a_store_of_an_older_version_is_said_and_read(own, capsys):
    """Bare names as keys, and a manifest that does not tell what its features were made of."""
    folder, overrides = own
    call("embed", overrides)
    for path in (folder / "teacher").glob("*.tsv"):
        path.write_text(re.sub(r"@[0-9a-f]{16}\t", "\t", path.read_text()))
    manifest = json.loads((folder / "teacher/manifest.json").read_text())
    del manifest["description"]["inputs"]
    (folder / "teacher/manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    call("embed", overrides)
    printed = capsys.readouterr().out
    assert "0 made now" in printed and printed.count("older version") == 1
    call("train", overrides, *SHORT)
    assert capsys.readouterr().out.count("older version") == 1


def test_a_finished_store_grows_by_more_images_than_may_be_unreadable(own, capsys):
    folder, overrides = own
    call("embed", overrides, "data.limit=4", "data.max_unreadable=0")
    call("embed", overrides, "data.max_unreadable=0")
    assert "40 made now" in capsys.readouterr().out.replace(",", "") and len(StoreReader(folder / "teacher")) == 48


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(own):
    """48 records of 32 KiB on a file system of 1 MB, which Linux lets every user make; where not, the test is off."""
    folder, overrides = own
    (folder / "small").mkdir()
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m none {folder}/small"
    if subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    embed = command("embed", *overrides, f"embed.to={folder}/small/teacher")
    script = f"{mount} && {shlex.join(embed)}; code=$?; ls {folder}/small/teacher; exit $code"
    done = subprocess.run([*inside, script], env=ENVIRONMENT, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"48 records of 32,768 bytes will take 0.00157 GB in \S+teacher, where 0.001\d* GB are free; "
        r"embed.dtype=int8 takes half, data.limit=N takes fewer, teacher=online none; or name another disk with "
        "embed.to", done.stderr
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "manifest.json"  # which the next attempt resumes from
