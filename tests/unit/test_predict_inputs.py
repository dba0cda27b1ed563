# SPDX-License-Identifier: Apache-2.0
"""`predict` on many images, on videos and webcams: what is read and written, and that memory does not grow with it."""

import json
import re
import shlex
import shutil
import sys
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from numbered_videos import write_video
from own_videos import write_frames
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.torch import load_file, save_file
from scipy.ndimage import binary_erosion as erode
from transformers import Sam3TrackerVideoModel

from effsam3 import Predictor
from effsam3.benchmarks.pictures import video_predictions
from effsam3.benchmarks.pictures.drawing import colour_of
from effsam3.cli import main
from effsam3.data.coco import text_rles
from effsam3.data.synthetic.videos import mp4_bytes
from effsam3.data.videos import webcam
from effsam3.data.videos.files import open_video
from effsam3.data.videos.mp4 import Mp4Writer
from effsam3.data.videos.vos import open_vos
from effsam3.errors import UserError
from effsam3.inputs import Frames, find_inputs
from effsam3.models.chassis.find import chassis_folder
from effsam3.models.inference.prompted import Prompts, load_tracker, tracked_masks
from effsam3.predictor import usable_device

HEIGHT, WIDTH = 91, 121  # odd: an mp4 has even sides
BOX = "20,30,100,85"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tiny chassis, made to believe that objects are visible: with its own weights they never are."""
    folder = shutil.copytree(chassis_folder("tiny"), tmp_path_factory.mktemp("model") / "chassis")
    tensors = load_file(folder / "model.safetensors")
    tensors["tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias"] += 5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def inputs(tmp_path) -> Path:
    """photos/{a,b}.png of two sizes, photos/torn.png, clip/ with five frames, videos/{one,two}.mp4."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    canvas = np.asarray(Image.fromarray(noise).resize((WIDTH + 40, HEIGHT), Image.Resampling.BICUBIC))
    frames = [canvas[:, 8 * t : 8 * t + WIDTH] for t in range(5)]
    for folder in ("photos", "clip", "videos"):
        Path(folder).mkdir()
    Image.fromarray(frames[0]).save("photos/a.png")
    Image.fromarray(canvas).save("photos/b.png")
    for index, image in enumerate(frames):
        Image.fromarray(image).save(f"clip/{index}.png")
    for name in ("one", "two"):
        Path(f"videos/{name}.mp4").write_bytes(mp4_bytes(np.stack([image[:90, :120] for image in frames[:2]])))
    return tmp_path


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


# ---- which inputs there are


def names(*sources, **options):
    return [(one.name, one.moves) for one in find_inputs(sources, **options)]


def test_files_folders_and_patterns_are_inputs(inputs):
    assert names("photos/*.png") == [("a", False), ("b", False)]
    assert names("photos", images=True) == [("a", False), ("b", False)]
    assert names("clip") == [("clip", True)]
    assert names("videos") == [("one", True), ("two", True)]
    assert names("videos/two.mp4", "*/a.png", "clip/1.png") == [("two", True), ("a", False), ("1", False)]
    assert names("0") == [("webcam0", True)]
    shutil.copy("photos/a.png", "0")
    assert names("0") == [("0", False)]  # a file of that name
    Path("photos/notes.txt").write_text("no image")
    assert names("photos/*", "photos/a.png") == [("a", False), ("b", False)]
    shutil.copy("photos/a.png", "videos/a.png")
    assert names("*/a.png") == [("a", False), ("a-2", False)]
    shutil.copy("photos/a.png", "photos/a-2.png")  # would write over the second a.png
    assert [name for name, _ in names("*/a.png", "photos/a-2.png")] == ["a", "a-2", "a-2-2"]


@pytest.mark.parametrize(
    ("source", "message"),
    [("none/*.png", "matches no image"), ("nothing.png", "there is no nothing.png"), ("videos", "no image .* in")],
)
def test_nothing_to_look_at_is_named(inputs, source, message):
    with pytest.raises(UserError, match=message):
        find_inputs([source], images=source == "videos")


# ---- many images


def test_many_images_are_one_coco_file(model, inputs, capsys):
    assert main(["predict", str(model), "photos/*.png", "--box", BOX, "--out", "out"]) == 0
    assert "2 instances in 2 images; see out/*/overlay.png" in capsys.readouterr().out
    coco = COCO("out/coco.json")
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["photos/a.png", "photos/b.png"]
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["object"]
    for name, annotation in zip("ab", coco.loadAnns(coco.getAnnIds()), strict=True):
        (instance,) = read(f"out/{name}/predictions.json")["instances"]
        mask = np.asarray(Image.open(f"out/{name}/mask_001.png")) > 0
        np.testing.assert_array_equal(coco.annToMask(annotation), mask)
        assert annotation["area"] == mask.sum() > 0 and annotation["score"] == instance["score"]
    assert len(coco.loadRes(read("out/coco.json")["annotations"]).anns) == 2


def test_texts_are_categories(inputs):
    assert main(["predict", "tiny", "photos/a.png", "--text", "a dog", "--text", "a cat", "--threshold", "0"]) == 0
    coco = COCO("predictions/a/coco.json")
    assert {category["id"]: category["name"] for category in coco.dataset["categories"]} == {1: "a dog", 2: "a cat"}
    told = [one["text"] for one in read("predictions/a/predictions.json")["instances"]]
    assert [coco.cats[one["category_id"]]["name"] for one in coco.dataset["annotations"]] == told


def test_inputs_that_do_not_fit_are_named_after_the_others(model, inputs, capsys):
    Path("photos/torn.png").write_bytes(Path("photos/a.png").read_bytes()[:300])
    assert main(["predict", str(model), "photos", "--images", "--box", "100,10,150,80", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert "2 of 3 inputs are left out" in error and "photos/torn.png: image" in error
    assert "photos/a.png: --box 100,10,150,80 is not a box in an image of 121x91 px" in error
    assert Path("out/b/overlay.png").is_file() and not Path("out/a").exists()


# ---- videos


def test_a_video_is_drawn_and_its_tracks_are_read_back(model, inputs):
    assert main(["predict", str(model), "clip", "--box", BOX, "--box", "5,60,50,88", "--out", "out"]) == 0
    frames = read("out/predictions.json")["frames"]
    with av.open("out/tracked.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        pictures = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    assert Path("out/tracked.mp4").read_bytes().index(b"moov") < 100  # plays before it has come as a whole
    np.testing.assert_allclose([time for time, _ in pictures], np.arange(5) / 24, atol=1e-4)
    for (_, picture), row in zip(pictures, frames, strict=True):
        assert picture.shape == (92, 122, 3)
        masks = {one["id"]: coco_mask.decode(one["segmentation"]).astype(bool) for one in row["instances"]}
        ids_HW = np.asarray(Image.open(f"out/masks/{row['frame']:05d}.png"))
        for number, mask in masks.items():
            others = np.logical_or.reduce([other for one, other in masks.items() if one != number])
            np.testing.assert_array_equal(ids_HW[~others] == number, mask[~others])


def test_tracks_are_youtube_vis_annotations(tmp_path):
    """An object that comes and goes, and one without a pixel, which is no object."""
    masks = np.zeros((4, 2, 48, 64), bool)
    masks[1, 0, 26:42, 24:48] = masks[3, 0, 26:42, 32:56] = True
    about, size = {"prompts": {}}, (48, 64)
    with video_predictions.video_predictions(tmp_path / "out", about, "walk", size) as written:
        for index, masks_OHW in enumerate(masks):
            rles = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks_OHW]
            rows = [
                {"id": 3 * place + 2, "text": "a dog", "score": 0.2 * index, "box": [0, 0, 0, 0], "segmentation": rle}
                for place, rle in enumerate({**rle, "counts": rle["counts"].decode()} for rle in rles)
            ]
            written.add(index, np.zeros((*size, 3), np.uint8), index / 24, rows)
    found = read("out/youtube_vis.json")
    assert found["videos"][0] | {"id": 0} == {
        "id": 0, "name": "walk", "length": 4, "width": 64, "height": 48,
        "file_names": ["walk/00000.jpg", "walk/00001.jpg", "walk/00002.jpg", "walk/00003.jpg"],
    }  # fmt: skip
    assert found["categories"] == [{"id": 1, "name": "a dog"}]
    (track,) = found["annotations"]
    assert (track["track_id"], track["score"]) == (2, 0.4)
    assert track["bboxes"] == [None, [24, 26, 24, 16], None, [32, 26, 24, 16]]
    assert track["areas"] == [None, 384, None, 384]
    for rle, mask in zip(track["segmentations"], masks[:, 0], strict=True):
        assert (rle is None) == (not mask.any())
        assert rle is None or np.array_equal(coco_mask.decode(rle), mask)
    with av.open("out/tracked.mp4") as container:
        for frame, mask in zip(container.decode(video=0), masks[:, 0], strict=True):
            inside = erode(mask)  # without the box around it
            away = np.abs(frame.to_ndarray(format="rgb24")[inside] - 0.55 * colour_of(2))
            assert len(away) == (14 * 22 if mask.any() else 0) and (away < 25).all()
    # The project's own reader takes it, next to frames of these names.
    write_frames(tmp_path / "out" / "walk", [f"{index:05d}.png" for index in range(4)], size)
    (video,) = open_vos("out/youtube_vis.json")
    assert video.categories == {2: "a dog"} and np.array_equal(video.masks(1)[2], masks[1, 0])


def test_an_error_leaves_what_was_there(model, inputs, monkeypatch):
    line = ["predict", str(model), "clip", "--box", BOX, "--out", "out"]
    assert main(line) == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    Path("clip/4.png").write_bytes(b"torn")
    assert main(line) == 2
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_pictures_keep_their_times(tmp_path):
    write_video("phone.mp4", 5, times=[0, 40, 120, 130, 500])
    video = open_video("phone.mp4")
    with closing(Mp4Writer(tmp_path / "copy")) as mp4:
        for index in range(5):
            mp4.add(video.read([index])[0].transpose(1, 2, 0), video.time_s(index))
    with av.open("copy") as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, [0, 0.04, 0.12, 0.13, 0.5], atol=1e-4)


@pytest.mark.parametrize("source", ["photos/a.png", "clip"])
def test_masks_of_others_are_not_written_over(inputs, capsys, source):
    own = Path("data/masks/00000.png")
    own.parent.mkdir(parents=True)
    own.write_bytes(b"annotated by hand")
    assert main(["predict", "tiny", source, "--box", "5,5,40,40", "--out", "data"]) == 2
    assert "data/masks/00000.png is there" in capsys.readouterr().err and own.read_bytes() == b"annotated by hand"


def test_only_so_many_frames(model, inputs):
    assert main(["predict", str(model), "clip", "--box", BOX, "--frames", "3", "--out", "out"]) == 0
    assert len(read("out/predictions.json")["frames"]) == 3


@pytest.fixture
def camera(monkeypatch):
    """A camera made of FFmpeg's test picture, which stops after a second."""
    monkeypatch.setitem(webcam.DEVICES, sys.platform, ("lavfi", "testsrc=size=64x48:rate=10:duration=1:decimals={}"))


@pytest.mark.parametrize(("options", "count"), [(["--frames", "4"], 4), ([], 10)])
def test_a_webcam_is_tracked_until_it_ends(model, inputs, camera, options, count):
    assert main(["predict", str(model), "0", "--box", "5,5,40,40", "--out", "out", *options]) == 0
    assert [row["frame"] for row in read("out/predictions.json")["frames"]] == list(range(count))
    with av.open("out/tracked.mp4") as container:
        assert len(list(container.decode(video=0))) == count


@pytest.mark.parametrize("frames", [3, 0])
def test_ctrl_c_ends_a_webcam_not_its_files(model, inputs, camera, monkeypatch, capsys, frames):
    add = video_predictions.VideoPredictions.add

    def stop(written, index, *arguments):
        if index == frames:
            raise KeyboardInterrupt
        add(written, index, *arguments)

    monkeypatch.setattr(video_predictions.VideoPredictions, "add", stop)
    code = main(["predict", str(model), "0", "--box", "5,5,40,40", "--out", "out"])
    if frames:
        assert code == 0 and len(read("out/predictions.json")["frames"]) == frames
    else:
        assert code == 2 and "webcam0 ended before" in capsys.readouterr().err and not list(Path("out").iterdir())


def test_a_camera_that_is_not_there_is_named(inputs, capsys):
    assert main(["predict", "tiny", "77", "--text", "a"]) == 2
    assert "webcam 77" in capsys.readouterr().err


# ---- memory


class Still:
    """A video of one picture, as long as it is said to be."""

    def __init__(self, frames: int):
        self.frames, self.size = frames, (48, 64)

    def read(self, indexes):
        return np.full((len(indexes), 3, *self.size), 90, np.uint8)

    def time_s(self, index):
        return index / 24


def test_a_frame_is_decoded_once_and_forgotten(model):
    frames = Frames(Still(9), 32)
    for index in range(9):
        assert frames[index].shape == (3, 32, 32) and frames[index].shape == (3, 32, 32)
        if index >= 3:  # a tracker that looks three frames ahead
            image_HW3, time_s = frames.take(index - 3)
            assert image_HW3.shape == (48, 64, 3) and time_s == (index - 3) / 24
        assert len(frames._waiting) <= 3


def test_what_is_written_is_not_kept(tmp_path):
    """2,000 frames of 64 x 48 px with three objects: pictures alone would be 18 MB."""
    rows = [
        {"id": number, "score": 0.5, "box": [1, 1, 9, 9], "segmentation": rle}
        for number, rle in enumerate(text_rles(np.random.default_rng(0).random((3, 48, 64)) < 0.5), 1)
    ]
    image_HW3, process, resident = np.zeros((48, 64, 3), np.uint8), psutil.Process(), []
    with video_predictions.video_predictions(tmp_path / "out", {"prompts": {}}, "long", (48, 64)) as written:
        for index in range(2000):
            written.add(index, image_HW3, index / 24, rows)
            if index in (500, 1999):
                resident.append(process.memory_info().rss)
        assert len(written._sheet) <= 2 * video_predictions.SHOWN
    assert resident[1] - resident[0] < 4e6
    assert len(read("out/predictions.json")["frames"]) == 2000 == len(list(Path("out/masks").iterdir()))


def test_a_stock_tracker_keeps_a_few_frames_and_predicts_the_same(model, monkeypatch):
    """By a session that keeps all, as transformers has it."""
    pixels = list(torch.rand(36, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    prompts = Prompts(boxes_O4=torch.tensor([[20.0, 30, 100, 85]]))
    tracker, plain = load_tracker(model), Sam3TrackerVideoModel.from_pretrained(model).eval()
    kept: dict[str, list[int]] = {"little": [], "all": []}
    for name, one in (("little", tracker), ("all", plain)):
        one.register_forward_hook(lambda _, args, __, name=name: kept[name].append(stored(args[0])))
    steps = (tracked_masks(one, pixels, (HEIGHT, WIDTH), prompts) for one in (tracker, plain))
    for (_, masks, scores), (_, masks_too, scores_too) in zip(*steps, strict=True):
        assert torch.equal(masks, masks_too) and torch.equal(scores, scores_too) and masks.any()
    # Pointers reach 16 frames on from the first frame and back from this one.
    assert kept["little"][-1] == kept["little"][32] < kept["all"][-1] / 3


def stored(session) -> int:
    """Bytes of all tensors that a session's outputs hold."""
    return sum(
        tensor.nbytes
        for outputs in session.output_dict_per_obj.values()
        for frames in outputs.values()
        for output in frames.values()
        for tensor in output.values()
        if isinstance(tensor, torch.Tensor)
    )


# ---- models and devices


def test_texts_and_boxes_share_one_model(model, inputs):
    alone = Predictor(model, device="cpu").image("photos/a.png", box=[20, 30, 100, 85])
    predictor = Predictor(model, device="cpu")
    first = predictor.image("photos/a.png", box=[20, 30, 100, 85])  # the tracker alone
    predictor.image("photos/a.png", "a dog")
    again = predictor.image("photos/a.png", box=[20, 30, 100, 85])  # the tracker within
    for found in (first, again):
        assert torch.equal(found.masks_OHW, alone.masks_OHW) and torch.equal(found.scores_O, alone.scores_O)
    whole = {tensor.data_ptr() for tensor in predictor.concepts.model.parameters()}
    assert {tensor.data_ptr() for tensor in predictor.tracker.parameters()} <= whole
    expected = load_tracker(model).state_dict()
    state = predictor.tracker.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")]
)
def test_the_device_is_the_best_one_there(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert usable_device().type == best
    if not mps:
        with pytest.raises(UserError, match="--device mps is not there; this machine has .*cpu"):
            usable_device("mps")


def test_a_wrong_device_is_named(inputs, capsys):
    assert main(["predict", "tiny", "photos/a.png", "--box", BOX, "--device", "gpu"]) == 2
    assert "--device gpu: expected one of cuda, mps, cpu" in capsys.readouterr().err


# ---- the document


def test_every_line_of_the_document_runs(model, inputs, camera):
    """What texts find is tested in test_concepts.py."""
    shutil.copy("photos/b.png", "photo.jpg")
    shutil.copy("photos/b.png", "photos/c.jpg")
    shutil.copy("videos/one.mp4", "clip.mp4")
    Path("runs").mkdir()
    Path("runs/stage1-image-es_rv_m").symlink_to(model)
    text = (Path(__file__).parents[2] / "docs/predict.md").read_text(encoding="utf-8")
    lines = re.search(r"```bash\n(.*?)```", text, re.S)[1].splitlines()
    assert len(lines) == 8
    for line in lines:
        name, *arguments = shlex.split(line.partition("#")[0])
        # The document's photograph is larger, and its camera has more than ten frames.
        small = [argument.replace("5,60,50,140,0", "5,60,50,90,0") for argument in arguments]
        assert name == "effsam3" and main([*small, *(["--frames", "2"] if "0" in small else [])]) == 0, line
    listed = set(re.findall(r"^\| `([a-z_]+[.0-9a-z/]*)`", text, re.M))
    for path in ("predictions.json", "overlay.png", "coco.json", "tracked.mp4", "youtube_vis.json"):
        assert path in listed and list(Path("predictions").rglob(path)), path
