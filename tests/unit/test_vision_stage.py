# SPDX-License-Identifier: Apache-2.0
"""Stage vision teaches what SAM 3's own models compute, from a store of stage image or next to the student."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from commands import SMOKE, run_here
from torchvision.transforms.v2 import functional
from transformers import Sam3TrackerVideoModel, Sam3VideoModel

from effsam3.data.store.format import StoreError
from effsam3.errors import RecipeError
from effsam3.hardware.accelerator import make_accelerator
from effsam3.losses.features import map_means
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.vision.training import MAPS
from effsam3.recipe.reader import load_recipe
from effsam3.stages.vision.training import VisionStage
from effsam3.training.report import Report

VISION = SMOKE.with_name("vision.yaml")


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> list[str]:
    """Overrides of both smoke recipes for drawn images and a store of stage image."""
    folder = tmp_path_factory.mktemp("vision")
    own = [
        "data.synthetic_images=12", f"data.index={folder}/data/index.parquet", f"embed.to={folder}/teacher",
        f"train.runs={folder}/runs",
    ]  # fmt: skip
    run_here(folder, "embed", *own, recipe=SMOKE)
    return own


def stage_of(own: list[str], *more: str) -> VisionStage:
    recipe = load_recipe(VISION, [*own, *more])
    report = Report(recipe.folder)
    return VisionStage.from_recipe(recipe, report, make_accelerator("cpu", "fp32"))


def test_it_teaches_the_maps_that_detector_and_tracker_read(own):
    """Next to SAM 3's own models on the same pixels; from a store within what float16 loses."""
    online = stage_of(own, "teacher=online", "name=online")
    stored = stage_of(own, "name=stored")
    folder = chassis_folder("tiny")
    detector = Sam3VideoModel.from_pretrained(folder).eval().detector_model
    tracker = Sam3TrackerVideoModel.from_pretrained(folder).eval()
    every = list(range(len(online.train_data)))
    batch = online.train_data.__getitems__(every)
    with torch.no_grad():
        wanted = detector.get_vision_features(online.pixels(batch)).fpn_hidden_states[:-1]
        wanted += tracker.vision_encoder(online.pixels(batch)).fpn_hidden_states[:-1]
    made, read = online.targets(batch), stored.targets(stored.train_data.__getitems__(every))
    for name, expected, one, other in zip(MAPS, wanted, made, read, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6, msg=name)
        assert F.cosine_similarity(other.flatten(), expected.flatten(), dim=0) > 0.9999
    # The statistics are those of each map: what the student puts out is of that size from the start.
    for layer, expected in zip(online.student.necks.layers, wanted, strict=True):
        torch.testing.assert_close(layer.feature_mean, expected.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.feature_scale, expected.std((0, 2, 3), correction=0), rtol=1e-3, atol=1e-5)
    loss = stored.loss(stored.student, stored.train_data.__getitems__([0, 1, 2, 3]))
    assert 0.5 < loss["mse"] < 3 and loss["loss"] == loss["mse"] + loss["cosine"] + loss["trunk"]


def test_maps_of_smaller_images_are_averaged(own):
    """`image_size: 126`: the teacher's necks read its whole features, what they make is brought to 36, 18 and 9."""
    whole, small = stage_of(own, "name=whole"), stage_of(own, "image_size=126", "name=small")
    batch = small.val_data.__getitems__([0, 1])
    found = small.targets(batch)
    for feat, target in zip(whole.targets(batch), found, strict=True):
        side = feat.shape[-1] * 9 // 16
        torch.testing.assert_close(target, functional.resize(feat, [side, side], antialias=True))
    assert [target.shape[-1] for target in found] == [36, 18, 9] * 2
    pixels = functional.resize(small.pixels(batch), [126, 126], antialias=True)
    torch.testing.assert_close(small.student_pixels(batch), pixels, rtol=1e-4, atol=1e-4)
    assert [feat.shape for feat in small.student(pixels)[1]] == [target.shape for target in found]
    assert small.loss(small.student, batch)["loss"].isfinite()


def test_a_perfect_student_is_told(own):
    """Validation of the teacher's own maps; those of a padded image do not count."""
    stage = stage_of(own, "name=perfect")
    batch = stage.val_data.__getitems__([0, 1])
    batch["sizes"][1] = 0
    maps = stage.targets(batch)
    for feat in maps:
        feat[1] = 7.0
    found = stage.summarise(stage.validate(lambda pixels: (None, maps), batch))
    assert found["val/cosine"] == pytest.approx(1, abs=1e-6) and found["val/mse"] == pytest.approx(0, abs=1e-9)
    assert {name for name in found if name.startswith("val/cosine_d")} == {
        f"val/cosine_{name}" for name in MAPS if name.startswith("detector")
    }


def test_a_run_begins_with_the_teachers_necks(own):
    """On the teacher's own components all terms of its loss are small; a resumed run learns the same components."""
    stage, again = stage_of(own, "name=begun"), stage_of(own, "name=begun", "train.seed=3")
    assert torch.equal(stage.components.rows_KC, again.components.rows_KC)
    batch = stage.train_data.__getitems__([0, 1, 2, 3])
    components = stage.components(stage.target(batch))
    found = stage.loss(lambda pixels: (components, stage.student.necks(components)), batch)
    assert found["trunk"] < 1e-6 and found["cosine"] < 0.2
    untrained = stage.loss(stage.student, batch)
    assert untrained["trunk"] > 0.9 and untrained["cosine"] > 0.5
    # As wide as the teacher's, the top level makes the teacher's very map.
    top = MAPS.index("tracker_top")
    torch.testing.assert_close(stage.student.necks(components)[top], stage.targets(batch)[top], rtol=1e-3, atol=1e-4)


def test_images_that_cannot_be_read_do_not_count_for_the_start(own, monkeypatch):
    """The first eight that can be read, of batches of three."""
    stage = stage_of(own, "name=few", "embed.batch_size=3")
    batches = list(stage.statistics_batches())
    batches[0]["sizes"][:] = 0
    monkeypatch.setattr(stage, "statistics_batches", lambda: iter(batches))
    feat, valid = stage.some_features()
    assert torch.equal(feat, torch.cat([stage.target(batch) for batch in batches[1:4]])) and len(valid) == len(feat)


def test_means_count_maps_alike():
    sums = {"a/x": torch.tensor(8.0), "a/positions": torch.tensor(4.0), "b/x": torch.tensor(1.0)}
    means, by_map = map_means(sums | {"b/positions": torch.tensor(1.0)})
    assert (means, by_map) == ({"x": 1.5}, {"a": {"x": 2.0}, "b": {"x": 1.0}})


def test_what_does_not_fit_is_said(own):
    for override in ("embed.tap=neck", "embed.grid=8"):
        with pytest.raises(RecipeError, match="embed.tap: SAM 3's necks run next to the student, on whole trunk maps"):
            load_recipe(VISION, [*own, override])
    with pytest.raises(RecipeError, match="mse: both weights .* are 0"):
        load_recipe(VISION, [*own, "loss={mse: 0, cosine: 0}"])
    with pytest.raises(StoreError, match="resize=square, the recipe has data.resize=longest_side"):
        stage_of(own, "data.resize=longest_side", "name=other")


def test_show_counts_all_that_it_replaces(own):
    recipe = load_recipe("stage1/vision/es_rv_m")
    line = recipe.student_line()
    assert line.startswith("7,774,864 trunk + 806,752 head + 582,848 necks = 9,164,464 parameters, 98.02 % fewer")
    assert line.endswith("than the 461,840,896 they replace")
    assert recipe.derived()["store"]().startswith("10,616,832 bytes per image (1024 x 72 x 72 float16)")
    assert replace(recipe, widths=(64, 32, 64, 128)).student_line() != line
