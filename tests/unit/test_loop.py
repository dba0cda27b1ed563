# SPDX-License-Identifier: Apache-2.0
"""The loop from start to end, on a made-up stage of 25 parameters; real students are in tests/e2e."""

import json
from pathlib import Path

import pytest
import torch
from counting import made_up_stage, one_process
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effsam3 import train
from effsam3.benchmarks.pictures.drawing import GAP, LINE
from effsam3.data.videos.decoder import pictures_in_a_row
from effsam3.errors import RecipeError, UserError
from effsam3.publish.release import Release
from effsam3.recipe.reader import differing_keys, load_recipe
from effsam3.status import as_text
from effsam3.training import checkpoint
from effsam3.training.checkpoint_folders import best_first, validation_of
from effsam3.training.curves import default_metrics
from effsam3.training.debug_run import CHANGES
from effsam3.training.resume import read_trainer
from effsam3.training.state import examine

SHORT = ("data.apples=40", "train.eval_samples=4", "train.eval_every=1", "train.log_every=1", "train.save_every=2")


@pytest.fixture
def basket(tmp_path, monkeypatch) -> Path:
    """A recipe of the stage `counting`."""
    yield from made_up_stage(tmp_path, monkeypatch)


def learn(basket: Path, *overrides: str, **options) -> Path:
    """Train in this process and return the run's folder."""
    one_process()
    recipe = load_recipe(basket, [*SHORT, *overrides])
    train.run(recipe, **options)
    return recipe.folder.with_name("basket-debug") if options.get("debug") else recipe.folder


def lines(folder: Path, key: str) -> dict[int, float]:
    """Return {step: value} of a run's numbers."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in found if key in line}


# ---- the best

FOUND = "data.found=[0, 0.5, 0.9, 0.7, 0.8, 0.2, 0.9]"  # by the step, with one micro-batch each
ONE = ("train.global_batch_size=4", "train.micro_batch_size=4", "train.steps=6", FOUND)


def test_the_best_ones_are_kept_best_first(basket):
    folder = learn(basket, *ONE, "train.keep_best=3", "train.keep_checkpoints=1")
    kept = best_first(folder / "checkpoints")
    # Step 6 is as good as step 2, which was first.
    assert [path.name for path in kept] == ["best-step-000002", "best-step-000006", "best-step-000004"]
    assert checkpoint.chosen(folder / "checkpoints", "best") == kept[0]
    assert [load_file(path / "student.safetensors")["seen"].item() for path in kept] == [2, 6, 4]
    facts = examine(folder)
    assert (facts["best_checkpoint"], facts["runners_up"]) == (kept[0].name, [path.name for path in kept[1:]])
    # What merge writes down is what was measured of the weights that it takes.
    assert [validation_of(read_trainer(path))["val/apples"] for path in kept] == [0.9, 0.9, 0.8]
    assert validation_of(read_trainer(folder / "checkpoints/step-000006"))["step"] == 6


def test_one_is_kept_unless_asked_otherwise(basket):
    folder = learn(basket, *ONE)
    assert [path.name for path in best_first(folder / "checkpoints")] == ["best-step-000002"]


def test_a_monitor_that_is_better_when_lower(basket):
    folder = learn(basket, *ONE, "train.monitor=val/error", "train.keep_best=2")
    assert [path.name for path in best_first(folder / "checkpoints")] == ["best-step-000005", "best-step-000001"]
    assert "val/error: start 0.0000, best 0.2000 at step 5, latest 0.9000 at step 6" in as_text(examine(folder))
    assert default_metrics([folder], ["val/apples", "val/error", "train/loss"])[:2] == ["train/loss", "val/error"]
    assert "0.2 at step 5" in (folder / "log.txt").read_text()


def test_patience_follows_the_monitor(basket):
    folder = learn(basket, *ONE, "train.monitor=val/error", "train.patience=2")
    assert checkpoint.latest(folder / "checkpoints").name == "step-000003"  # 0.5, then 0.9 and 0.7
    assert "no better for 2 validations in a row" in (folder / "log.txt").read_text()


def test_an_unknown_monitor_is_refused_with_the_recipe(basket):
    with pytest.raises(
        RecipeError, match=r"train.monitor: stage counting is not judged by val/eror; did you mean val/e"
    ):
        load_recipe(basket, ["train.monitor=val/eror"])


def test_a_resumed_run_ranks_on(basket, monkeypatch):
    """Also with another monitor, by which the ones that were kept are ranked anew."""
    folder = learn(basket, *ONE, "train.keep_best=2", "name=whole")
    stopped(basket, monkeypatch, 3, *ONE, "train.keep_best=2")
    resumed = learn(basket, *ONE, "train.keep_best=2")
    for run in (folder, resumed):
        assert [path.name for path in best_first(run / "checkpoints")] == ["best-step-000002", "best-step-000006"]
    stopped(basket, monkeypatch, 4, *ONE, "train.keep_best=2", "name=other")
    other = learn(basket, *ONE, "train.keep_best=2", "train.monitor=val/error", "name=other")
    assert [path.name for path in best_first(other / "checkpoints")] == ["best-step-000005", "best-step-000004"]


def stopped(basket: Path, monkeypatch, step: int, *overrides: str) -> None:
    """Train until a run is asked to stop in this step."""
    before = train.lr_at

    def lr_at(now, *rest):
        train.STOP.asked = now == step - 1
        return before(now, *rest)

    with monkeypatch.context() as context:
        context.setattr(train, "lr_at", lr_at)
        with pytest.raises(SystemExit) as ended:
            learn(basket, *overrides)
    train.STOP.asked = False
    assert ended.value.code == 75


def test_a_run_of_an_older_version_resumes(basket, monkeypatch):
    """It knows its best only, and not yet that there may be more."""
    stopped(basket, monkeypatch, 2, *ONE)
    for file in Path("runs/basket/checkpoints").glob("*/trainer.json"):
        trainer = json.loads(file.read_text())
        del trainer["runners_up"]
        file.write_text(json.dumps(trainer))
    folder = learn(basket, *ONE, "train.keep_best=2")
    assert [path.name for path in best_first(folder / "checkpoints")] == ["best-step-000002", "best-step-000006"]


def test_what_is_not_finite_is_not_the_best(basket):
    with pytest.raises(UserError, match="the held-out metric val/apples is -inf at step 2; nothing of this step"):
        learn(basket, *ONE, "data.found=[0, 0.5, -1]")


# ---- fp16

HALF = ("train.precision=fp16", "data.found=[0.5]", "train.steps=6", "optim.lr=0.01")


def test_an_overflow_skips_its_step_and_the_run_continues(basket):
    folder = learn(basket, *HALF, "data.rotten=6")  # of step 3, which accumulates two
    scales, norms = lines(folder, "train/loss_scale"), lines(folder, "train/grad_norm")
    assert list(scales.values()) == [65536.0] * 2 + [32768.0] * 4
    assert [step for step, norm in norms.items() if not torch.tensor(norm).isfinite()] == [3]
    assert read_trainer(folder / "checkpoints/step-000006")["loss_scale"]["skipped"] == 1
    assert not (folder / "not_finite.json").exists()


def test_fp16_is_close_to_fp32_and_not_the_same(basket):
    half, whole = learn(basket, *HALF), learn(basket, *HALF, "train.precision=fp32", "name=whole")
    ours, theirs = lines(half, "train/loss"), lines(whole, "train/loss")
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-2) and ours != theirs
    assert not lines(whole, "train/loss_scale")


def test_a_resumed_run_scales_as_before(basket, monkeypatch):
    options = (*HALF, "data.rotten=4")
    whole = learn(basket, *options, "name=whole")
    stopped(basket, monkeypatch, 4, *options)
    resumed = learn(basket, *options)
    for key in ("train/loss", "train/loss_scale", "train/grad_norm"):
        ours, theirs = lines(resumed, key), lines(whole, key)
        assert all(ours[step] == theirs[step] for step in (4, 5, 6)), key
    ends = [read_trainer(folder / "checkpoints/step-000006")["loss_scale"] for folder in (whole, resumed)]
    assert ends[0] == ends[1] == {"scale": 32768.0, "good_steps": 4, "skipped": 1}


def test_a_loss_that_is_not_finite_is_no_overflow(basket):
    with pytest.raises(UserError, match=r"the loss is (nan|inf) on rank 0 at step"):
        learn(basket, *HALF, "optim.lr=1e30", "optim.clip_grad_norm=1e30")


def test_a_gradient_that_never_fits_ends_the_run(basket, monkeypatch):
    """The scale was halved until it can be no reason any more."""
    monkeypatch.setattr("effsam3.training.loss_scale.SMALLEST", 40000.0)
    with pytest.raises(UserError, match="the gradient is not finite at step 3"):
        learn(basket, *HALF, "data.rotten=6")


# ---- --debug

LONG = ("train.epochs=9", "train.steps=null", "optim.warmup_epochs=3", "optim.warmup_steps=null", "data.found=[0.5]",
        "train.find_micro_batch=false", "train.patience=1", "train.loggers=[tensorboard]")  # fmt: skip


def test_a_debug_run_is_short_and_tells_more(basket, capsys):
    folder = learn(basket, *LONG, "optim.clip_grad_norm=0.01", debug=True)
    assert folder == Path("runs/basket-debug") and not Path("runs/basket").exists()
    printed = capsys.readouterr().out
    steps = [line for line in printed.splitlines() if line.startswith("step ") and " square " in line]
    looks = [line for line in printed.splitlines() if line.startswith("gradient by module: ")]
    assert len(steps) == len(looks) == 4 and all("; peak memory " in line for line in looks)
    norms = [[float(part.split()[1]) for part in line.split(": ")[1].split("; ")[0].split(", ")] for line in looks]
    whole = [norm for norm in lines(folder, "train/grad_norm").values()]
    # Whatever was clipped: the modules' norms make up that of the whole gradient.
    assert [(body**2 + head**2) ** 0.5 for body, head in norms] == pytest.approx(whole, rel=1e-2)
    assert list(lines(folder, "val/apples")) == [0, 2, 4] and not list(folder.glob("tensorboard*"))
    assert (folder / "checkpoints/step-000004").is_dir()
    differing = {line.split()[0] for line in differing_keys(load_recipe(basket, [*SHORT, *LONG]), load_recipe(folder))}
    assert differing <= {*CHANGES, "name", "optim.clip_grad_norm"}


def test_a_debug_run_takes_its_own_place_only(basket):
    folder = learn(basket, *LONG, debug=True)
    (folder / "left.txt").write_text("")
    learn(basket, *LONG, debug=True)
    assert not (folder / "left.txt").exists() and len(lines(folder, "train/loss")) == 4
    (folder / "debug.json").unlink()  # now it is a run of its own
    with pytest.raises(UserError, match="--debug would replace runs/basket-debug, which is no debug run"):
        learn(basket, *LONG, debug=True)
    assert (folder / "checkpoints").is_dir()
    with pytest.raises(UserError, match="leave --resume out"):
        learn(basket, *LONG, debug=True, resume="never")


# ---- pictures


def test_a_sheet_at_each_validation_and_for_tensorboard(basket):
    folder = learn(basket, *ONE, "train.pictures=3", "train.micro_batch_size=2", "train.loggers=[tensorboard]")
    sheets = sorted((folder / "pictures/validation").iterdir())
    assert [sheet.name for sheet in sheets] == [f"step-{step:06d}.png" for step in range(7)]
    columns, rows = 3 * (64 + GAP) + GAP, 3 * (32 + LINE + 2 * GAP)  # three frames of three samples
    image = Image.open(sheets[-1])
    assert image.size == (columns, rows) and image.getpixel((2 * (64 + GAP) + GAP + 32, 40)) == (200, 60, 0)
    board = EventAccumulator(str(folder / "tensorboard/effsam3"), {"images": 0}).Reload()
    assert [event.step for event in board.Images("val/pictures")] == list(range(7))
    # They show the user's data: nothing that a push uploads, or a card shows.
    release = Release(folder=folder, merged={}, chassis="", recipe_files={}, measured=(), since=None, stale=(),
                      license_file=None)  # fmt: skip
    assert release.pictures == ()


def test_a_film_instead(basket):
    folder = learn(basket, *ONE, "train.steps=1", "train.pictures=5", "train.pictures_as=mp4")
    films = sorted((folder / "pictures/validation").iterdir())
    assert [film.name for film in films] == ["step-000000.mp4", "step-000001.mp4"]
    frames = [frame for _, frame in pictures_in_a_row(films[0])]
    # Four samples are held out; each of three frames is shown for a quarter of a second.
    assert len(frames) == 3 * 6 and frames[0].shape[1] == 4 * (64 + GAP) + GAP
    assert abs(int(frames[-1][40, 32, 1]) - 60) < 5


def test_none_unless_asked(basket):
    assert not (learn(basket, *ONE, "train.steps=1") / "pictures").exists()
    with pytest.raises(RecipeError, match="train.pictures: stage image draws none while it trains; set it to 0"):
        load_recipe("smoke/image", ["train.pictures=2"])


def test_wandb_gets_the_sheet(basket):
    folder = learn(basket, *ONE, "train.steps=2", "train.pictures=1", "train.loggers=[wandb]")
    sent = sorted(folder.glob("wandb/offline-run-*/files/media/images/val/pictures_*.png"))
    assert [int(path.name.split("_")[1]) for path in sent] == [1, 2]  # from where its curves begin
    assert Image.open(sent[-1]).size == Image.open(folder / "pictures/validation/step-000002.png").size
