# SPDX-License-Identifier: Apache-2.0
"""`image_size`: a student for smaller images, and SAM 3's heads on the grid that follows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import SMOKE, run_here
from run_folders import image_run, memory_run
from torchvision.transforms.v2 import functional
from transformers import Sam3Model, Sam3Processor, Sam3TrackerVideoProcessor

from effsam3 import merge
from effsam3.errors import RecipeError, UserError
from effsam3.hardware.accelerator import make_accelerator
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.chassis.tensors import read_config
from effsam3.models.inference.prompted import Prompts, load_tracker, tracked_masks
from effsam3.models.merging.slots import MergeError
from effsam3.predictor import Predictor
from effsam3.recipe.reader import load_recipe
from effsam3.stages.concepts.training import load_teacher
from effsam3.stages.image.training import ImageStage
from effsam3.training.report import Report

SIDE, GRID = 126, 9  # odd, and no multiple of any stride
HEIGHT, WIDTH = 90, 120
BOX = torch.tensor([20.0, 30.0, 70.0, 60.0])
PHOTO = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merged model of the tiny chassis, 224 px, with a student for images of `SIDE` px."""
    run = image_run(tmp_path_factory.mktemp("runs"), side=SIDE)
    return merge.run(load_recipe(run / "recipe.yaml", ["merge.formats=[sam3]"]))


# ---- the model


def test_all_that_reads_the_grid_is_told(merged):
    for folder in (merged, chassis_folder(str(merged / "sam3.pt"))):
        config = read_config(folder)
        detector, tracker = config.detector_config.vision_config, config.tracker_config
        sizes = {detector.backbone_config.image_size, tracker.image_size, tracker.prompt_encoder_config.image_size}
        assert sizes == {SIDE} and tracker.memory_attention_rope_feat_sizes == [GRID] * 2
        levels = [[scale * GRID] * 2 for scale in (4, 2, 1)]
        assert detector.backbone_feature_sizes == tracker.vision_config.backbone_feature_sizes == levels
        assert config.low_res_mask_size == 4 * GRID


@torch.no_grad()
def test_concepts_are_those_of_transformers(merged):
    """By its own classes and the folder's processor files; the box lets it encode geometry, as SAM 3 always does."""
    model, processor = Sam3Model.from_pretrained(merged).eval(), Sam3Processor.from_pretrained(merged)
    box = BOX.tolist()
    inputs = processor(PHOTO, "red ring", input_boxes=[[box]], input_boxes_labels=[[1]], return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (SIDE, SIDE)
    sizes = inputs.pop("original_sizes")
    outputs = model(**inputs)
    assert outputs.pred_masks.shape[-2:] == (4 * GRID, 4 * GRID)
    (expected,) = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=sizes.tolist())
    found = Predictor(merged, device="cpu").image(PHOTO, "red ring", box=[box], threshold=0.0)
    order, own = expected["scores"].argsort(), found.scores_O.argsort()
    torch.testing.assert_close(found.scores_O[own], expected["scores"][order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes_O4[own], expected["boxes"][order], rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_tracked_masks_are_those_of_transformers(merged):
    """A mask that is shown on the first frame, through the memory."""
    tracker, processor = load_tracker(merged), Sam3TrackerVideoProcessor.from_pretrained(merged)
    shown_1HW = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    shown_1HW[0, 20:60, 30:70] = True
    session = processor.init_video_session(video=[PHOTO, PHOTO[::-1].copy()])
    processor.add_inputs_to_inference_session(session, 0, 0, input_masks=[shown_1HW[0]])
    outputs = [tracker(session, frame_idx=index) for index in range(2)]
    pixels = [session.processed_frames[index] for index in range(2)]
    assert pixels[0].shape[-1] == SIDE and outputs[1].pred_masks.shape[-1] == 4 * GRID
    for index, masks_OHW, _ in tracked_masks(tracker, pixels, (HEIGHT, WIDTH), Prompts(masks_OHW=shown_1HW)):
        expected = processor.post_process_masks([outputs[index].pred_masks], [[HEIGHT, WIDTH]])[0][:, 0]
        assert (masks_OHW != expected).float().mean() < 1e-3
        assert index or (masks_OHW[0] & shown_1HW[0]).sum() > 0.8 * shown_1HW.sum()


# ---- the stage


def test_a_student_learns_the_teachers_features_averaged_to_its_grid(tmp_path):
    """Of pixels that are resized for it alone, with SAM 3's neck and heads on that grid where they are asked."""
    own = [
        "sam3.checkpoint=tiny_concepts", "image_size=100", "data.synthetic_images=16", "data.synthetic_side_px=96",
        f"data.index={tmp_path}/data/index.parquet", f"embed.to={tmp_path}/teacher", f"train.runs={tmp_path}",
        "embed.pixels=true", "train.eval_samples=4", "loss.neck=1", "train.monitor=val/heads",
    ]  # fmt: skip
    run_here(tmp_path, "embed", *own, recipe=SMOKE)
    recipe = load_recipe(SMOKE, own)
    stage = ImageStage.from_recipe(recipe, Report(recipe.folder), make_accelerator("cpu", "fp32"))
    batch = stage.val_data.__getitems__([0, 1])
    whole = batch["features"].float()
    assert whole.shape[-1] == 8 and batch["pixels"].shape[-1] == 160
    torch.testing.assert_close(stage.target(batch), functional.resize(whole, [5, 5], antialias=True))
    seen = []
    target = stage.target(batch)
    perfect = SimpleNamespace(last_hidden_state=target.flatten(2).transpose(1, 2))
    found = stage.summarise(stage.validate(lambda pixels: seen.append(pixels) or perfect, batch))
    pixels = batch["pixels"].float() / 127.5 - 1
    torch.testing.assert_close(seen[0], functional.resize(pixels, [100, 100], antialias=True), rtol=1e-4, atol=1e-4)
    assert found["val/heads"] == pytest.approx(1, abs=1e-5) and found["val/cosine"] == pytest.approx(1, abs=1e-5)
    loss = stage.loss(stage.student, batch)
    assert stage.predict(stage.student, batch).shape == target.shape and loss["neck"] > 0 and loss["loss"].isfinite()
    # Boxes are shown in pixels of the heads' images.
    assert stage.heads is not None and stage.heads.scale == 100 / 160


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["image_size=512"], r"512 px is no multiple of 14 px, .+; set 504 \(a grid of 36\) or 518 \(37\)"),
        (["image_size=1022"], "1022 px is more than SAM 3's own 1008"),
        (["image_size=504", "student_image_size=512"], "512 px is more than the 504 px that image_size names"),
        (["image_size=42"], "must be 64 px or more"),
    ],
)
def test_impossible_sizes_are_refused_with_what_would_be_right(options, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("stage1/image/es_rv_m", options)


def test_a_teacher_of_other_images_is_refused(merged):
    recipe = load_recipe("smoke/concepts", [f"sam3.checkpoint={merged}", "teacher.checkpoint=tiny", "loss.teacher=1"])
    with pytest.raises(UserError, match="teacher.checkpoint: its image_size is 224, that of sam3.checkpoint 126; .+"):
        load_teacher(recipe)


def test_a_memory_of_another_grid_is_refused(merged, tmp_path):
    memory_run(tmp_path)
    parts = [f"parts.image={merged}", f"parts.memory={tmp_path}/memory", "parts.text=null", "merge.formats=[sam3]"]
    release = load_recipe(SMOKE.with_name("release.yaml"), [f"runs={tmp_path}", *parts])
    with pytest.raises(MergeError, match=f"in the slot memory .+ has the image size 224, this SAM 3 {SIDE}"):
        merge.run(release)
