# SPDX-License-Identifier: Apache-2.0
"""Tracking and scoring of videos, against transformers' own propagation and against scores of the written PNGs."""

import csv
import json

import numpy as np
import pytest
import torch
from disc_videos import FRAMES, SIZE, Video, sure_tracker
from PIL import Image
from transformers import Sam3ImageProcessor, Sam3TrackerVideoModel, Sam3TrackerVideoProcessor
from transformers.models.sam2_video.video_processing_sam2_video import Sam2VideoVideoProcessor
from vos_folders import write_vos_trees

from effsam3.benchmarks.jaccard import DavisScorer, SavScorer
from effsam3.benchmarks.pictures.drawing import evenly
from effsam3.benchmarks.tracking import Showing, TrackerRun, TrackingError, track
from effsam3.benchmarks.vos import vos, vos_table, write_objects
from effsam3.data.videos.vos import open_vos
from effsam3.data.videos.writing import voc_palette
from effsam3.errors import UserError
from effsam3.models.memory.prompts import PromptStyle
from effsam3.models.memory.tracker import EfficientTracker, EfficientTrackerConfig
from effsam3.stages.memory.measuring import tables


@pytest.fixture(scope="module")
def tracker() -> Sam3TrackerVideoModel:
    return sure_tracker()


@pytest.fixture(scope="module")
def efficient(tracker) -> EfficientTracker:
    """A tracker that keeps 20 latents of every frame, of random weights but for the trunk."""
    torch.manual_seed(0)
    settings = tracker.config.to_dict() | {
        "model_type": "effsam3_tracker_video", "memory_mode": "latents",
        "memory_global_latents": 4, "memory_window_latents": 16,
    }  # fmt: skip
    model = EfficientTracker(EfficientTrackerConfig(**settings)).eval().requires_grad_(False)
    missing, unexpected = model.load_state_dict(tracker.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("memory_resampler.") for name in missing)
    return model


def reference(tracker, video, start, numbers):
    """Logits of transformers' own propagation from one frame on, the whole video in memory: {frame: (O, H, W)}."""
    side = {"height": 224, "width": 224}
    half = [0.5] * 3
    processor = Sam3TrackerVideoProcessor(
        Sam3ImageProcessor(size=side, image_mean=half, image_std=half),
        Sam2VideoVideoProcessor(size=side, image_mean=half, image_std=half),
    )
    frames = torch.from_numpy(video.read(range(video.frames)))
    session = processor.init_video_session(video=frames)
    prompts = [video.masks(start)[number] for number in numbers]
    processor.add_inputs_to_inference_session(session, start, list(numbers), input_masks=prompts)
    return {
        output.frame_idx: processor.post_process_masks([output.pred_masks], [SIZE], binarize=False)[0][:, 0]
        for output in tracker.propagate_in_video_iterator(session, start_frame_idx=start)
    }


def shown_by(tracker, video, number, **given):
    """Masks of transformers' propagation of an object that its processor is shown otherwise: {frame: (H, W)}."""
    side = {"height": 224, "width": 224}
    half = [0.5] * 3
    processor = Sam3TrackerVideoProcessor(
        Sam3ImageProcessor(size=side, image_mean=half, image_std=half),
        Sam2VideoVideoProcessor(size=side, image_mean=half, image_std=half),
    )
    session = processor.init_video_session(video=torch.from_numpy(video.read(range(video.frames))))
    processor.add_inputs_to_inference_session(session, 0, [number], **given)
    return {
        output.frame_idx: processor.post_process_masks([output.pred_masks], [SIZE])[0][0, 0].numpy()
        for output in tracker.propagate_in_video_iterator(session, start_frame_idx=0)
    }


@pytest.mark.parametrize("kind", ["box", "point", "mixed"])
def test_objects_are_shown_by_points_and_boxes(tracker, kind):
    """The same points by transformers' own processor, which takes them in pixels of the video."""
    video = Video(objects=(1,))
    run = TrackerRun(
        tracker, video.frames, SIZE, True, Showing(kind, PromptStyle(centre=True, jitter=0.0)), video.name
    )
    frames = list(track({"it": run}, video, False))
    given = run.sessions[0].point_inputs_per_obj[0][0]
    points_P2, labels = given["point_coords"][0, 0], given["point_labels"][0, 0].tolist()
    assert labels == {"box": [2, 3], "point": [1], "mixed": [2, 3, 1]}[kind]
    if kind != "box":  # the disc's centre, at the model's size
        assert points_P2[-1].tolist() == pytest.approx([30 * 224 / SIZE[1], 30 * 224 / SIZE[0]], abs=2)
    in_video = points_P2.double() * torch.tensor([SIZE[1] / 224, SIZE[0] / 224])
    shown = {"input_boxes": [[in_video[:2].flatten().tolist()]]} if kind != "point" else {}
    if kind != "box":
        shown |= {"input_points": [[[in_video[-1].tolist()]]], "input_labels": [[[1]]]}
    expected = shown_by(tracker, video, 1, **shown)
    for frame in frames:
        found = frame.masks["it"][1]
        assert (found != expected[frame.index]).mean() < 1e-3 and 0 < found.mean() < 1
    again = TrackerRun(tracker, video.frames, SIZE, True, Showing(kind, PromptStyle(points=2), seed=1), video.name)
    next(track({"it": again}, video, False))
    other = again.sessions[0].point_inputs_per_obj[0][0]["point_coords"]
    assert other.shape[2] == {"box": 2, "point": 2, "mixed": 4}[kind] and not torch.equal(other[0, 0], points_P2)


def test_a_thin_object_is_shown_by_what_it_touches(tracker):
    run = TrackerRun(tracker, 1, (2000, 2000), True, Showing("point"), "thin")
    mask = np.zeros((2000, 2000), bool)
    mask[1000, 900] = True  # a ninth of a pixel
    (point,) = run._points(0, 1, mask)["point_coords"][0, 0].tolist()
    assert point == [900 * 224 // 2000, 1000 * 224 // 2000]


def run_over(tracker, video, appearing_later=False, overlap=True):
    run = TrackerRun(tracker, video.frames, video.size, overlap)
    return run, list(track({"it": run}, video, appearing_later))


def test_masks_are_those_of_transformers(tracker):
    video = Video()
    expected = reference(tracker, video, 0, [1, 2])
    run, frames = run_over(tracker, video)
    assert [frame.index for frame in frames] == list(range(FRAMES)) == list(expected)
    for frame in frames:
        found = frame.masks["it"]
        assert list(found) == [1, 2]
        for number in (1, 2):
            assert (found[number] == (expected[frame.index][number - 1] > 0).numpy()).all()
            assert 0 < found[number].mean() < 1
        assert (frame.truths is not None) == (frame.index in video.annotated)
        assert frame.prompted == ({1, 2} if frame.index == 0 else set())
    assert len(run.seconds) == FRAMES - 1


def test_objects_that_appear_later_are_tracked_as_if_alone(tracker):
    video = Video(later=2)
    first, second = reference(tracker, video, 0, [1]), reference(tracker, video, 2, [2])
    encoded = []
    with tracker.vision_encoder.register_forward_hook(lambda *_: encoded.append(1)):
        _, frames = run_over(tracker, video, appearing_later=True)
    assert len(encoded) == FRAMES  # once for all objects
    for frame in frames:
        found = frame.masks["it"]
        assert list(found) == ([1] if frame.index < 2 else [1, 2])
        assert (found[1] == (first[frame.index][0] > 0).numpy()).all()
        if frame.index >= 2:
            assert (found[2] == (second[frame.index][0] > 0).numpy()).all()
    _, frames = run_over(tracker, video)
    assert all(list(frame.masks["it"]) == [1] for frame in frames)


def test_tracking_starts_on_the_first_annotated_frame(tracker):
    _, frames = run_over(tracker, Video(annotated=[2, 4]))
    assert [frame.index for frame in frames] == [2, 3, 4] and frames[0].prompted == {1, 2}
    with pytest.raises(TrackingError, match="discs: no object is annotated on frame 0"):
        run_over(tracker, Video(objects=(2,), later=2))
    _, frames = run_over(tracker, Video(objects=(2,), later=2), appearing_later=True)
    assert [list(frame.masks["it"]) for frame in frames] == [[], [], [2], [2], [2]]


def test_without_overlap_a_pixel_goes_to_the_highest_logit(tracker):
    video = Video()
    expected = reference(tracker, video, 0, [1, 2])
    _, frames = run_over(tracker, video, overlap=False)
    shared = 0
    for frame in frames:
        one, two = expected[frame.index].numpy()
        found = frame.masks["it"]
        assert (found[1] == ((one > 0) & (one >= two))).all() and (found[2] == ((two > 0) & (two > one))).all()
        shared += ((one > 0) & (two > 0)).sum()
    assert shared > 0


def test_stored_bytes_and_tokens_by_hand(tracker, efficient):
    """Frames and their features do not count, nor masks that are forgotten: what grows is the memory of frames."""
    prompt, low = 224 * 224 * 4, 64 * 64 * 4
    pointer, score, feature, encoding = 128 * 4, 4, 256 * 64 * 2, 256 * 64 * 4
    for frames in (3, 5):
        run, _ = run_over(tracker, Video(objects=(1,), frames=frames, annotated=[0, 2]))
        # The position encoding is one tensor for all frames; small masks stay of the prompted and the newest one.
        assert run.stored_bytes() == prompt + frames * (pointer + score + feature) + encoding + 2 * low
        assert run.object_frames == frames
        # The last frame attends to the others: 16 x 16 cells and a pointer, cut into two tokens, each.
        assert run.most_tokens == (frames - 1) * (16 * 16 + 2)
    run, _ = run_over(efficient, Video(objects=(1,)))
    assert run.most_tokens == (FRAMES - 1) * (20 + 2)
    assert run.stored_bytes() <= prompt + FRAMES * (20 * 64 * 2 + pointer + score) + 2 * low


def from_files(folder, video, per_object):
    """The masks of a prediction folder on the annotated frames."""
    found = []
    for index in video.annotated:
        if per_object:
            paths = {int(path.name): path / f"{index:05d}.png" for path in sorted(folder.iterdir())}
            found.append({number: np.array(Image.open(path)) > 0 for number, path in paths.items()})
        else:
            ids = np.array(Image.open(folder / f"{index:05d}.png"))
            found.append({int(number): ids == number for number in np.unique(ids) if number})
    return found


@pytest.mark.parametrize(("protocol", "scorer"), [("davis", DavisScorer), ("sav", SavScorer)])
def test_scores_are_those_of_the_written_masks(tracker, efficient, tmp_path, protocol, scorer):
    later = 0 if protocol == "davis" else 2
    videos = [Video(), Video("late", later)]
    result = vos(
        {"dense": tracker, "latents": efficient}, videos, protocol,
        appearing_later=protocol == "sav", predictions=tmp_path,
    )  # fmt: skip
    assert result["videos"] == 2 and result["failed"] == {} and result["appearing_later"] == 0
    assert len(result["objects"]) == 8
    for name in ("dense", "latents"):
        scores = []
        for video in videos:
            own = scorer(video.name)
            for index, masks in zip(
                video.annotated, from_files(tmp_path / name / video.name, video, protocol == "sav"), strict=True
            ):
                own.add(video.masks(index), masks)
            scores += own.scores().values()
        one = result["trackers"][name]
        assert one["J"] == pytest.approx(np.mean([score.J for score in scores]))
        assert one["J&F"] == pytest.approx(np.mean([(score.J + score.F) / 2 for score in scores]))
        assert 0 < one["J"] < 1 and one["objects"] == 4
    dense, latents = result["trackers"].values()
    both = [[from_files(tmp_path / name / video.name, video, protocol == "sav") for name in result["trackers"]]
            for video in videos]  # fmt: skip
    agreement = [
        (one[number] & other[number]).sum() / (one[number] | other[number]).sum()
        for video, pair in zip(videos, both, strict=True)
        for index, one, other in zip(video.annotated, *pair, strict=True)
        for number in (1, 2)
        if index > (video.later if number == 2 else 0)
    ]
    assert dense["agreement"] == 1 and latents["agreement"] == pytest.approx(np.mean(agreement))
    assert latents["agreement"] < 1 or protocol == "sav"  # where random weights find the same over all
    assert dense["memory_tokens"] > 5 * latents["memory_tokens"]
    assert dense["bytes_per_object_frame"] > 2 * latents["bytes_per_object_frame"]
    assert json.loads(json.dumps(result)) == result
    text = vos_table(result)
    assert text.count("\n") == 3 and f"{100 * latents['J&F']:.1f}" in text
    write_objects(result, tmp_path / "objects.csv")
    with open(tmp_path / "objects.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["tracker"], row["video"], row["object"]) for row in rows[:4]] == [
        ("dense", "discs", "1"), ("dense", "discs", "2"), ("dense", "late", "1"), ("dense", "late", "2"),
    ]  # fmt: skip
    assert float(rows[5]["F"]) == result["objects"][5]["F"]


def test_predictions_are_in_the_official_trees(tracker, tmp_path):
    vos({"it": tracker}, [Video()], "davis", predictions=tmp_path / "davis")
    vos({"it": tracker}, [Video(later=2)], "sav", appearing_later=True, predictions=tmp_path / "sav")
    names = [f"{index:05d}.png" for index in range(FRAMES)]
    assert sorted(path.name for path in (tmp_path / "davis/it/discs").iterdir()) == names
    assert sorted(str(path.relative_to(tmp_path / "sav")) for path in (tmp_path / "sav").rglob("*.png")) == [
        f"it/discs/{number}/{name}" for number in ("001", "002") for name in names
    ]
    ids = Image.open(tmp_path / "davis/it/discs/00000.png")
    assert ids.mode == "P" and ids.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert (np.array(ids) == sum(number * mask for number, mask in Video().masks(0).items())).mean() > 0.99
    late = [np.array(Image.open(tmp_path / f"sav/it/discs/002/{name}")) for name in names]
    assert [mask.any() for mask in late] == [False] * 2 + [True] * 3 and late[0].shape == SIZE
    # Colours of ids whose bits reach every step of the scheme.
    assert voc_palette()[3 * 22 : 3 * 23] == [0, 192, 128] and voc_palette()[-3:] == [224, 224, 192]


@pytest.mark.parametrize("protocol", ["davis", "sav"])
@pytest.mark.parametrize("first", ["00000001", "8"])  # LVOS; without padding, which is not in the order of text
def test_predictions_have_the_names_of_the_frames(tracker, tmp_path, protocol, first):
    names = tuple(f"{int(first) + index:0{len(first)}d}" for index in range(FRAMES))
    for folder, video in (("plain", Video(later=2)), ("named", Video(later=2, frame_names=names))):
        vos({"it": tracker}, [video], protocol, appearing_later=protocol == "sav", predictions=tmp_path / folder)
    for folder in ("001", "002") if protocol == "sav" else (".",):
        plain, named = (tmp_path / name / "it/discs" / folder for name in ("plain", "named"))
        assert {path.name for path in named.iterdir()} == {f"{name}.png" for name in names}
        for index, name in enumerate(names):
            assert (named / f"{name}.png").read_bytes() == (plain / f"{index:05d}.png").read_bytes()


def test_a_bad_video_is_named_and_the_rest_goes_on(tracker, tmp_path):
    videos = [Video("torn", broken=3), Video(), Video("blank", objects=(2,), later=2)]
    result = vos({"it": tracker}, videos, "sav", predictions=tmp_path, pictures=tmp_path / "pictures")
    alone = vos({"it": tracker}, [Video()], "sav")
    assert list(result["failed"]) == ["torn", "blank"] and result["failed"]["torn"] == "frame 3 of torn is not there"
    assert result["objects"] == alone["objects"] and result["videos"] == 1
    assert result["trackers"]["it"]["bytes_per_object"] == alone["trackers"]["it"]["bytes_per_object"]
    assert [path.name for path in (tmp_path / "it").iterdir()] == ["discs"]
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["discs.png"]
    assert "Left out: 2 videos (torn, blank)." in vos_table(result)
    assert "The first 3 of 9 videos" in tables({"vos": result | {"available": 9}})[1]
    assert len(tables({"vos": result | {"available": 3}})) == 1
    with pytest.raises(
        UserError, match="none of the 1 videos could be scored; the first: frame 3 of torn is not there"
    ):
        vos({"it": tracker}, videos[:1], "sav")
    with pytest.raises(UserError, match="protocol: there is no 'davis17'; did you mean davis?"):
        vos({"it": tracker}, videos, "davis17")


def test_videos_in_folders(tracker, tmp_path):
    """The same two videos in both folder trees; one of them has lost a frame."""
    write_vos_trees(tmp_path, 2, frames=9, side_px=64, objects=2)
    for tree, annotated in (("sav_val", 3), ("davis", 9)):
        videos = open_vos(tmp_path / tree)
        lost = sorted((tmp_path / tree).rglob(f"JPEG*/**/{videos[1].name}/*.jpg"))[5]  # has no masks in SA-V
        lost.unlink()
        result = vos({"it": tracker}, videos, tree.removesuffix("_val"), appearing_later=tree == "sav_val",
                     predictions=tmp_path / "predictions" / tree)  # fmt: skip
        assert len(videos[0].annotated) == annotated and result["videos"] == 1
        assert list(result["failed"]) == [videos[1].name] and "frame 5 is not in" in result["failed"][videos[1].name]
        assert {row["video"] for row in result["objects"]} == {videos[0].name}
        assert {row["frames"] for row in result["objects"]} <= {annotated - 2, annotated - 3}
        written = (tmp_path / "predictions" / tree / "it" / videos[0].name).rglob("*.png")
        assert len({path.name for path in written}) == 9


def test_videos_that_a_server_scores_keep_their_predictions(tracker, tmp_path):
    """MOSE and YouTube-VOS publish the first masks of their valid splits only."""
    write_vos_trees(tmp_path, 1, frames=9, side_px=64, objects=2)
    for mask in sorted((tmp_path / "davis" / "Annotations").rglob("*.png"))[1:]:
        mask.unlink()
    with pytest.raises(UserError, match="none of the 1 videos has the masks.*the predictions are in .*predictions"):
        vos({"it": tracker}, open_vos(tmp_path / "davis"), "davis", predictions=tmp_path / "predictions",
            pictures=tmp_path / "pictures")  # fmt: skip
    assert len(list((tmp_path / "predictions" / "it").rglob("*.png"))) == 9


def test_sav_scores_an_object_on_the_frames_that_have_its_mask(tracker, tmp_path):
    """As the official evaluator does, which lists the PNGs of every object's own folder."""
    write_vos_trees(tmp_path, 1, frames=21, side_px=64, objects=2)
    masks = next((tmp_path / "sav_val" / "Annotations_6fps").iterdir())
    for number in (8, 20):
        (masks / "001" / f"{number:05d}.png").unlink()
    (video,) = open_vos(tmp_path / "sav_val")
    result = vos({"it": tracker}, [video], "sav", appearing_later=True, predictions=tmp_path / "predictions")
    written, wanted = tmp_path / "predictions" / "it" / video.name, {}
    for number in (0, 1):
        scorer = SavScorer(video.name)
        for file in sorted((masks / f"{number:03d}").glob("*.png")):
            truth, found = (np.array(Image.open(path)) > 0 for path in (file, written / f"{number:03d}" / file.name))
            scorer.add({number: truth}, {number: found})
        wanted[number] = scorer.scores()[number]
    assert {number: score.frames for number, score in wanted.items()} == {0: 4, 1: 2}
    assert {row["object"]: (row["J"], row["F"], row["frames"]) for row in result["objects"]} == {
        number: (score.J, score.F, score.frames) for number, score in wanted.items()
    }


def test_objects_that_are_not_tracked_are_counted_and_not_scored(tracker):
    result = vos({"it": tracker}, [Video(later=2)], "sav")
    assert result["appearing_later"] == 1 and [row["object"] for row in result["objects"]] == [1]
    assert "Not tracked: 1 objects" in vos_table(result)
    # DAVIS has no place for them.
    with pytest.raises(UserError, match="predicted object 2, which the first annotated frame does not show"):
        vos({"it": tracker}, [Video(later=2)], "davis", appearing_later=True)


def test_a_video_with_a_new_object_on_every_frame_has_no_speed(tracker):
    video = Video(frames=3, annotated=[0, 1, 2], objects=(1, 2, 3))
    video.masks = lambda index: {n: video.disc(index, n) & (index >= n - 1) for n in video.objects}
    result = vos({"it": tracker}, [video], "sav", appearing_later=True)
    assert [row["object"] for row in result["objects"]] == [1, 2]
    assert np.isnan(result["trackers"]["it"]["frames_per_s"]) and " nan |" in vos_table(result)


def test_pictures_show_frames_and_objects(tracker, efficient, tmp_path):
    trackers = {"dense": tracker, "latents": efficient}
    vos(trackers, [Video(), Video("b")], "sav", pictures=tmp_path, max_pictures=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["discs.png"]
    with Image.open(tmp_path / "discs.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    # Three rows (annotated, two trackers) of four frames.
    assert pixels.shape[0] > 3 * SIZE[0] and pixels.shape[1] > 4 * SIZE[1]
    red = (pixels[..., 0] > pixels[..., 1] + 60) & (pixels[..., 0] > pixels[..., 2] + 30)
    assert red.sum() > 4 * Video().disc(0, 1).sum() / 2


def test_columns_are_spread_over_the_video():
    assert evenly(list(range(0, 100, 4)), 6) == [0, 20, 40, 56, 76, 96]
    assert evenly([3, 5], 6) == [3, 5]
