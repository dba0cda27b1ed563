# SPDX-License-Identifier: Apache-2.0
"""The verb `predict`: what it writes for images and videos, prompts against transformers' own, mistakes by name."""

import json
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered_videos import shown, trim, write_video
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from transformers import Sam3TrackerModel, Sam3TrackerProcessor, Sam3TrackerVideoProcessor

from effsam3.benchmarks.pictures.video_predictions import SHOWN
from effsam3.cli import main
from effsam3.data.synthetic.videos import mp4_bytes
from effsam3.data.videos.files import open_video
from effsam3.inspect_model import examine
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.inference.prompted import Prompts, load_tracker, shown_masks, tracked_masks
from effsam3.predict import Summary

HEIGHT, WIDTH = 90, 120
BOXES = torch.tensor([[20.0, 30, 100, 85], [5, 60, 50, 88]])
POINTS, LABELS = torch.tensor([[60.0, 40], [5, 5]]), torch.tensor([1, 0])
PROMPTS = {
    "boxes": Prompts(boxes_O4=BOXES),
    "point": Prompts(points_N2=POINTS[:1], labels_N=LABELS[:1]),
    "points": Prompts(points_N2=POINTS, labels_N=LABELS),
    "points in a box": Prompts(boxes_O4=BOXES[:1], points_N2=POINTS, labels_N=LABELS),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tiny chassis, made to believe that objects are visible: with its own weights they never are."""
    folder = shutil.copytree(chassis_folder("tiny"), tmp_path_factory.mktemp("model") / "chassis")
    tensors = load_file(folder / "model.safetensors")
    tensors["tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias"] += 5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Four frames, uint8 RGB (T, H, W, 3): smooth noise that moves."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    canvas = np.asarray(Image.fromarray(noise).resize((WIDTH + 40, HEIGHT), Image.Resampling.BICUBIC))
    return np.stack([canvas[:, 8 * t : 8 * t + WIDTH] for t in range(4)])


@pytest.fixture
def inputs(tmp_path, frames, monkeypatch) -> Path:
    """A folder with photo.png, clip.mp4, clip/ (the same as images) and objects.png, made the working directory."""
    Image.fromarray(frames[0]).save(tmp_path / "photo.png")
    (tmp_path / "clip.mp4").write_bytes(mp4_bytes(frames))
    (tmp_path / "clip").mkdir()
    for index, image in enumerate(frames):
        Image.fromarray(image).save(tmp_path / "clip" / f"{index}.png")
    objects = np.zeros((HEIGHT, WIDTH), np.uint8)
    objects[20:60, 30:70], objects[50:80, 80:110] = 7, 2
    Image.fromarray(objects).save(tmp_path / "objects.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(*arguments) -> dict:
    """Run the verb; returns predictions.json of the folder `out`."""
    assert main(["predict", *map(str, arguments), "--out", "out"]) == 0
    return json.loads(Path("out/predictions.json").read_text())


def masks_in(instances: list[dict]) -> np.ndarray:
    return np.stack([coco_mask.decode(instance["segmentation"]) for instance in instances]).astype(bool)


# ---- prompts, against transformers


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
def test_shown_masks_are_transformers(model, frames, name):
    prompts, tracker = PROMPTS[name], load_tracker(model)
    reference = Sam3TrackerModel.from_pretrained(model).eval()
    processor = Sam3TrackerProcessor.from_pretrained(model)
    given = {}
    if prompts.boxes_O4 is not None:
        given["input_boxes"] = [prompts.boxes_O4.tolist()]
    if prompts.points_N2 is not None:
        given |= {"input_points": [[prompts.points_N2.tolist()]], "input_labels": [[prompts.labels_N.tolist()]]}
    inputs = processor(frames[0], return_tensors="pt", **given)
    # Not the image class's own embeddings: see test_masks.py.
    shown = {key: inputs[key] for key in inputs if key.startswith("input_")}
    embeddings = tracker.get_image_embeddings(inputs["pixel_values"])
    output = reference(image_embeddings=embeddings, multimask_output=name == "point", **shown)
    masks = processor.post_process_masks(output.pred_masks, inputs["original_sizes"])[0]
    best = output.iou_scores[0].argmax(-1)

    masks_OHW, iou_O = shown_masks(tracker, inputs["pixel_values"][0], (HEIGHT, WIDTH), prompts)
    assert len(masks_OHW) == prompts.objects == len(best)
    torch.testing.assert_close(iou_O, output.iou_scores[0].amax(-1))
    expected = torch.stack([mask[place] for mask, place in zip(masks, best, strict=True)])
    assert expected.any() and not expected.all()
    assert (masks_OHW != expected).float().mean() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", [*PROMPTS, "masks"])
def test_tracked_masks_are_those_of_a_session(model, frames, name):
    objects_OHW = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    objects_OHW[0, 20:60, 30:70] = objects_OHW[1, 50:80, 80:110] = True
    prompts = PROMPTS.get(name, Prompts(masks_OHW=objects_OHW))
    tracker, processor = load_tracker(model), Sam3TrackerVideoProcessor.from_pretrained(model)
    session = processor.init_video_session(video=list(frames))
    given = {} if prompts.masks_OHW is None else {"input_masks": list(prompts.masks_OHW)}
    if prompts.boxes_O4 is not None:
        given["input_boxes"] = [prompts.boxes_O4.tolist()]
    if prompts.points_N2 is not None:
        given |= {"input_points": [[prompts.points_N2.tolist()]], "input_labels": [[prompts.labels_N.tolist()]]}
    processor.add_inputs_to_inference_session(session, 0, list(range(prompts.objects)), **given)
    expected = [
        processor.post_process_masks([tracker(session, frame_idx=index).pred_masks], [[HEIGHT, WIDTH]])[0][:, 0]
        for index in range(4)
    ]
    pixels = [session.processed_frames[index] for index in range(4)]
    for index, masks_OHW, scores_O in tracked_masks(tracker, pixels, (HEIGHT, WIDTH), prompts):
        assert masks_OHW.shape == (prompts.objects, HEIGHT, WIDTH) and (scores_O > 0.9).all()
        assert masks_OHW.any() and not masks_OHW.all()
        assert (masks_OHW != expected[index]).float().mean() < 1e-3
    assert index == 3


# ---- what is written


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--text", "a dog", "--threshold", "0"], 10),
        (["--text", "a dog", "--text", "a cat", "--threshold", "0"], 20),
        (["--text", "a dog", "--box", "20,30,100,85", "--box", "5,60,50,88,0", "--threshold", "0"], 10),
        (["--text", "a dog"], 0),
        (["--box", "20,30,100,85", "--box", "5,60,50,88"], 2),
        (["--point", "60,40", "--point", "5,5,0"], 1),
        (["--point", "60,40", "--box", "20,30,100,85"], 1),
    ],
)
def test_an_image(model, inputs, arguments, count, capsys):
    Path("out").mkdir()
    for old in ("mask_999.png", "predictions.json"):
        Path("out", old).write_text("of an earlier run")
    found = predict(model, "photo.png", *arguments)
    assert found["size"] == [HEIGHT, WIDTH] and found["input"] == "photo.png"
    assert found["prompts"].get("threshold") == (0.0 if "--threshold" in arguments else None)
    instances = found["instances"]
    assert [instance["id"] for instance in instances] == list(range(1, count + 1))
    assert {path.name for path in Path("out").glob("mask_*")} == {instance["mask"] for instance in instances}
    for instance in instances:
        image = np.asarray(Image.open(f"out/{instance['mask']}"))
        assert image.shape == (HEIGHT, WIDTH) and set(np.unique(image)) <= {0, 255}
        np.testing.assert_array_equal(image > 0, masks_in([instance])[0])
        assert instance.get("text") in (["a dog", "a cat"] if "--text" in arguments else [None])
        if "--text" not in arguments:
            rows, columns = np.nonzero(image)
            assert instance["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    overlay = np.asarray(Image.open("out/overlay.png"))
    assert overlay.shape == (HEIGHT, WIDTH, 3)
    assert f"{count} instance" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["clip.mp4", "clip"])
def test_a_video_by_a_box(model, inputs, source):
    found = predict(model, source, "--box", "20,30,100,85", "--box", "5,60,50,88")
    assert [row["frame"] for row in found["frames"]] == [0, 1, 2, 3]
    tracker = load_tracker(model)
    processor = Sam3TrackerVideoProcessor.from_pretrained(model)
    clip = [np.asarray(Image.open(f"clip/{index}.png")) for index in range(4)]
    pixels = list(processor.init_video_session(video=clip).processed_frames.values())
    steps = tracked_masks(tracker, pixels, (HEIGHT, WIDTH), PROMPTS["boxes"])
    for row, (_, masks_OHW, _) in zip(found["frames"], steps, strict=True):
        assert [instance["id"] for instance in row["instances"]] == [1, 2]
        differing = (masks_in(row["instances"]) != masks_OHW.numpy()).mean()
        assert differing < (0.1 if source == "clip.mp4" else 1e-3)  # compression changes the pixels


def test_a_trimmed_video_has_the_frames_that_are_shown(model, inputs):
    write_video("whole.mp4", 8, encoder={"x264-params": "keyint=250:bframes=2:scenecut=0"})
    trim("whole.mp4", "clip.mp4", Fraction(5, 24))  # 8 are in the file
    found = predict(model, "clip.mp4", "--box", "20,10,60,50")
    assert [row["frame"] for row in found["frames"]] == [0, 1, 2]
    assert shown(open_video("clip.mp4").read(range(3))) == [5, 6, 7]


def test_a_video_by_a_mask_and_by_a_text(model, inputs):
    found = predict(model, "clip", "--mask", "objects.png")
    first = masks_in(found["frames"][0]["instances"])
    objects = np.asarray(Image.open("objects.png"))
    for mask, value in zip(first, (2, 7), strict=True):  # in order of the values
        truth = objects == value
        assert (mask & truth).sum() / (mask | truth).sum() > 0.8
    found = predict(model, "clip", "--text", "a dog", "--threshold", "0.25")
    assert len(found["frames"]) == 4
    assert {instance["text"] for row in found["frames"] for instance in row["instances"]} <= {"a dog"}


def test_a_sheet_shows_some_frames_of_a_long_video(model, inputs, frames, tmp_path):
    for index in range(4, SHOWN + 5):
        Image.fromarray(frames[index % 4]).save(f"clip/{index}.png")
    predict(model, "clip", "--point", "60,40")
    width, height = Image.open("out/overlay.png").size
    assert width == 4 * (WIDTH + 6) + 6 and height == 3 * (HEIGHT + 26) + 6


def test_random_weights_are_told(inputs, capsys):
    assert main(["predict", "tiny", "photo.png", "--box", "20,30,100,85"]) == 0
    assert "random weights" in capsys.readouterr().out
    assert Path("predictions/photo/predictions.json").is_file()


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.png"], "nothing to look for"),
        (["photo.png", "--text", "  "], "--text is empty"),
        (["photo.png", "--text", "word " * 40], "40 tokens long; SAM 3 reads 30"),
        (["photo.png", "--text", "a", "--point", "1,2"], "give one or the other"),
        (["photo.png", "--text", "a", "--text", "b", "--box", "1,2,3,4"], "give a single --text"),
        (["photo.png", "--text", "a", "--threshold", "1.5"], "a score is from 0 to 1"),
        (["photo.png", "--box", "1,2,3,4", "--threshold", "0.5"], "--threshold is for the instances"),
        (["photo.png", "--box", "1,2,3"], "--box 1,2,3: expected x1,y1,x2,y2"),
        (["photo.png", "--box", "1,2,3,x"], "--box 1,2,3,x: expected"),
        (["photo.png", "--box", "1,2,3,nan"], "--box 1,2,3,nan: expected"),
        (["photo.png", "--box", "1,2,3,4,2"], "a label 1 or 0"),
        (["photo.png", "--box", "1,2,3,4,0"], "without --text it has no meaning"),
        (["photo.png", "--box", "10,10,121,20"], "10,10,121,20 is not a box in an image of 120x90 px"),
        (["photo.png", "--box", "30,10,20,40"], "expected x1 < x2"),
        (["photo.png", "--point", "120,5"], "outside the image, which is 120x90 px"),
        (
            ["photo.png", "--box", "0.1,0.1,0.9,0.9"],
            "px that is --box 12,9,108,81",
        ),
        (["photo.png", "--text", "a", "--box", "0,0,1,1,0"], "that is --box 0,0,120,90,0"),
        (["clip", "--point", "0.5,0.5"], "expected pixels; as shares of an image of 120x90 px that is --point 60,45"),
        (["photo.png", "--box", "1,1,9,9", "--out", "/proc/x"], "--out: /proc/x cannot be written (/proc:"),
        (
            ["photo.png", "--box", "1,1,9,9", "--out", "torn.png"],
            "--out: torn.png cannot be written (torn.png: Not a directory)",
        ),
        (
            ["photo.png", "--box", "1,1,9,9", "--out", "torn.png/x"],
            "--out: torn.png/x cannot be written (",
        ),
        (["photo.png", "--point", "5,5,0"], "every point has label 0"),
        (["photo.png", "--point", "5,5", "--box", "1,1,9,9", "--box", "1,1,8,8"], "there can be one --box"),
        (["photo.png", "--mask", "objects.png"], "--mask shows objects on the first frame of a video"),
        (["clip", "--text", "a", "--box", "1,2,3,4"], "example boxes are for images"),
        (["clip", "--mask", "objects.png", "--box", "1,2,3,4"], "give it on its own"),
        (["clip", "--mask", "nothing.png"], "--mask nothing.png cannot be read"),
        (["clip", "--mask", "photo.png"], "--mask photo.png is RGB of 120x90 px"),
        (["clip", "--mask", "empty.png"], "--mask empty.png is empty"),
        (["nothing.png", "--text", "a"], "INPUT: there is no nothing.png"),
        (["torn.png", "--text", "a"], "torn.png"),
        (["text.txt", "--text", "a"], "text.txt"),
        (["torn.mp4", "--text", "a"], "torn.mp4"),
        (["bare", "--text", "a"], "no image in bare"),
        (["uneven", "--point", "1,1"], "frame 1 is 60x90 px, the first 120x90"),
    ],
)
def test_mistakes_are_named(inputs, arguments, message, capsys):
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save("empty.png")
    Path("torn.png").write_bytes(Path("photo.png").read_bytes()[:2000])
    Path("text.txt").write_text("no image")
    Path("torn.mp4").write_bytes(Path("clip.mp4").read_bytes()[:500])
    Path("bare").mkdir()
    Path("uneven").mkdir()
    shutil.copy("photo.png", "uneven/0.png")
    Image.fromarray(np.zeros((90, 60, 3), np.uint8)).save("uneven/1.png")
    assert main(["predict", "tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def damaged(model, tmp_path, name, value) -> Path:
    """The model with the first number of one tensor replaced."""
    folder = shutil.copytree(model, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


HEAD = "tracker_model.mask_decoder.iou_prediction_head.proj_out.bias"
SCORE = "detector_model.detr_decoder.presence_head.layer3.bias"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(model, inputs, tmp_path, value, capsys):
    folder = damaged(model, tmp_path, HEAD, value)
    for arguments in (["photo.png", "--text", "a"], ["clip", "--text", "a"], ["clip", "--box", "20,30,100,85"]):
        assert main(["predict", str(folder), *arguments]) == 2
        error = capsys.readouterr().err
        assert f"the tensor {HEAD} {'has NaN' if value != value else 'is infinite'} in 1 of" in error
    assert not Path("predictions").exists()
    assert f"the tensor {HEAD} " in examine(str(folder))["problem"]


def test_a_damaged_card_is_named_before_anything_is_found(model, inputs, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "carded")
    (folder / "effsam3.json").write_text('{"slots": []}')
    assert main(["predict", str(folder), "photo.png", "--text", "a"]) == 2
    told = capsys.readouterr()
    assert "effsam3.json is damaged: " in told.err and not told.out and not Path("predictions").exists()


def test_nan_that_finite_weights_make_is_no_empty_result(model, inputs, tmp_path, capsys):
    folder = damaged(model, tmp_path, HEAD, 0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layer_norm" in name and "neck" not in name:
            tensor.fill_(3e38)  # the next product overflows
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for arguments in (["photo.png", "--text", "a"], ["photo.png", "--box", "20,30,100,85"], ["clip", "--text", "a"]):
        assert main(["predict", str(folder), *arguments]) == 2
        assert "the model computes NaN of finite weights" in capsys.readouterr().err


def test_nothing_found_tells_the_best_score(model, inputs, capsys):
    for source, default in (("photo.png", "0.5"), ("clip", "0.7")):
        predict(model, source, "--text", "a dog")
        told = capsys.readouterr().out
        score = float(re.search(r"(?m)^0 instances.*: the best score is (0\.\d+), --threshold (\S+) asks", told)[1])
        assert f"--threshold {default} asks for more" in told
        found = predict(model, source, "--text", "a dog", "--threshold", str(max(0, score - 0.002)))
        instances = found.get("instances", found.get("frames", [{}])[0].get("instances"))
        assert abs(max(one["score"] for one in instances) - score) < 1e-3
        assert not capsys.readouterr().out.startswith("0 instances: ")


def test_an_empty_track_is_no_instance():
    size = {"size": [2, 2]}
    full, empty = ({**size, "counts": coco_mask.encode(np.full((2, 2), on, np.uint8, "F"))["counts"]} for on in (1, 0))

    def told(*masks):
        summary = Summary()
        for row in masks:
            summary.add("clip", [{"id": number, "segmentation": mask} for number, mask in enumerate(row)])
        return summary.text()

    assert told([empty], [empty]) == "0 instances in 2 frames (1 more has no pixel in any frame)"
    assert told([empty, full], [full, empty]) == "2 instances in 2 frames"
    assert told([empty, full, empty]) == "1 instance (2 more have no pixel in any frame)"
    assert Summary().text((0.31, 0.5)) == "0 instances: the best score is 0.310, --threshold 0.5 asks for more"


def test_swapped_arguments_are_told(model, inputs, capsys):
    assert main(["predict", "photo.png", str(model), "--text", "a"]) == 2
    expected = f"MODEL: photo.png is an image or a video; the model comes first: effsam3 predict {model} photo.png"
    assert expected in capsys.readouterr().err
    assert main(["predict", "clip", str(model), "--text", "a"]) == 2
    assert f"INPUT: {model} is a model, expected" in (error := capsys.readouterr().err)
    assert f"the model comes first: effsam3 predict {model} clip" in error
    assert main(["predict", str(model), "other.pt", "--text", "a"]) == 2
    assert "INPUT: other.pt is a model, expected an image" in capsys.readouterr().err


def test_wrong_prompts_do_not_wait_for_torch(inputs):
    code = (
        "import sys; from effsam3.cli import main\n"
        "codes = [main(['predict', 'tiny', 'photo.png', *a]) for a in ([], ['--box', '1,2,3'], ['--text', ' '])]\n"
        "codes += [main(['predict', 'photo.png', 'tiny', '--text', 'a'])]\n"
        "assert codes == [2] * 4 and 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_such_model_and_no_such_folder(inputs, capsys):
    assert main(["predict", "runs/nothing/here", "photo.png", "--text", "a"]) == 2
    assert "error: MODEL: there is no folder or file runs/nothing/here" in capsys.readouterr().err
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("")
    assert main(["predict", "run", "photo.png", "--text", "a"]) == 2
    assert "run `effsam3 merge`" in capsys.readouterr().err
    assert not Path("predictions").exists()
    assert main(["predict", "tiny", "photo.png", "--text", "a", "--out", "photo.png"]) == 2
    assert "--out: photo.png cannot be written" in capsys.readouterr().err
