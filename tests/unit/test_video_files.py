# SPDX-License-Identifier: Apache-2.0
"""Reading frames by number: the right ones, from files and folders, after a fork, and every damage named."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from effsam3.data.videos.extract_frames import extract_frames
from effsam3.data.videos.files import UnreadableVideo, VideoFile, open_video
from effsam3.data.videos.frame_folder import FrameFolder
from effsam3.errors import UserError

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared" / "data"
FRAMES = 60


def write_mp4(path, gop):
    """Write FRAMES frames whose left part is white, wider in every frame; what is needed to read it comes first."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "12", "g": str(gop), "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 48, 128, "yuv420p"
        for index in range(FRAMES):
            image = np.zeros((48, 128, 3), np.uint8)
            image[:, : 2 * index + 4] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def shown(pixels_T3HW):
    """Return which frames of `write_mp4` these are."""
    assert pixels_T3HW.dtype == np.uint8 and pixels_T3HW.shape[1:] == (3, 48, 128)
    return (((pixels_T3HW[:, 0] > 128).sum(2).mean(1) - 4) / 2).round().astype(int).tolist()


def packets(path):
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


@pytest.fixture(scope="module", params=[1, 12, 250], ids=lambda gop: f"gop{gop}")
def clip(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_mp4(path, request.param)
    return path


def test_frames_are_those_asked_for(clip):
    video = open_video(clip)
    assert (video.frames, video.size) == (FRAMES, (48, 128))
    assert list(video.numbers) == list(range(FRAMES)) and video.names[9:11] == ["00009", "00010"]
    assert shown(video.read(range(FRAMES))) == list(range(FRAMES))
    for asked in ([59], [0], [31, 30, 7, 7, 58], [4, 8, 12, 16], [20, 16, 12]):
        assert shown(video.read(asked)) == asked
        assert shown(VideoFile(clip).read(asked)) == asked


def test_bframes_of_a_real_video_match_another_decoder():
    path = SAMPLES / "bedroom.mp4"
    if not path.is_file():
        pytest.skip("the sample videos are not in ../shared/data")
    wanted = [0, 37, 38, 120]
    with av.open(str(path)) as container:
        reference = {
            index: frame.to_ndarray(format="rgb24")
            for index, frame in zip(range(121), container.decode(video=0), strict=False)
            if index in wanted
        }
    video = open_video(path)
    assert video.frames == 200 and video.size == (540, 960)
    for index, image in zip(wanted, video.read(wanted), strict=True):
        assert np.abs(image.transpose(1, 2, 0).astype(int) - reference[index]).mean() < 0.5


class Frames(Dataset):
    def __init__(self, video):
        self.video = video

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return shown(self.video.read([7 * index]))[0]


def test_worker_processes_read_what_their_parent_has_open(clip):
    dataset = Frames(VideoFile(clip))
    assert dataset[1] == 7  # the parent's reader is open now
    for _ in range(2):
        numbers = DataLoader(dataset, num_workers=2, timeout=60, multiprocessing_context="fork")
        assert [int(number) for number in numbers] == [7 * index for index in range(8)]
    assert dataset[2] == 14
    copy = pickle.loads(pickle.dumps(dataset.video))
    assert copy.path == clip and shown(copy.read([3])) == [3]


def reason(call):
    with pytest.raises(UnreadableVideo) as caught:
        call()
    assert str(caught.value).startswith("video '")
    return caught.value.reason


def test_what_is_not_a_video_is_named(tmp_path):
    assert reason(lambda: open_video(tmp_path / "gone.mp4")) == "missing"
    assert reason(lambda: VideoFile(tmp_path / "gone.mp4").frames) == "missing"
    for name, data in (("empty.mp4", b""), ("text.mp4", b"<html>404</html>" * 50)):
        (tmp_path / name).write_bytes(data)
        assert reason(lambda name=name: open_video(tmp_path / name).frames) == "corrupt"


def test_damaged_videos_are_named(tmp_path):
    write_mp4(tmp_path / "whole.mp4", gop=12)
    data, places = (tmp_path / "whole.mp4").read_bytes(), packets(tmp_path / "whole.mp4")
    assert reason(lambda: VideoFile(tmp_path / "whole.mp4").read([FRAMES])) == "short"
    assert reason(lambda: VideoFile(tmp_path / "whole.mp4").read([-1])) == "short"

    start = places[40][0]
    damaged = {
        "middle": data[: start + places[40][1] // 2],
        "between two frames": data[:start],  # the header still claims 60
        "zeros": data[:start] + bytes(len(data) - start),
    }
    for label, content in damaged.items():
        (tmp_path / f"{label}.mp4").write_bytes(content)
        video = VideoFile(tmp_path / f"{label}.mp4")
        for _ in range(2):
            assert reason(lambda video=video: video.frames) == "truncated", label
    assert shown(VideoFile(tmp_path / "whole.mp4").read([59])) == [59]


# ---- folders


def save(path, value, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def test_a_folder_is_in_numeric_order(tmp_path):
    for number in (0, 1, 2, 9, 10, 11, 100):
        save(tmp_path / f"{number}.png", number)
    save(tmp_path / ".1.png", 255)
    (tmp_path / "notes.txt").touch()
    folder = open_video(tmp_path)
    assert isinstance(folder, FrameFolder) and (folder.frames, folder.size) == (7, (6, 8))
    assert folder.numbers == [0, 1, 2, 9, 10, 11, 100]
    pixels = folder.read([6, 4, 0])
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 3, 6, 8) and pixels[:, 0, 0, 0].tolist() == [100, 10, 0]


def test_names_with_words_are_ordered_by_their_last_number(tmp_path):
    for number in (2, 10):
        save(tmp_path / f"cam3_frame{number}.png", number)
    assert FrameFolder(tmp_path).numbers == [2, 10] and FrameFolder(tmp_path).names == ["cam3_frame2", "cam3_frame10"]


def test_bad_folders_are_named(tmp_path):
    assert reason(lambda: FrameFolder(tmp_path / "gone")) == "missing"
    (tmp_path / "empty").mkdir()
    assert reason(lambda: open_video(tmp_path / "empty")) == "missing"
    save(tmp_path / "words" / "first.png", 0)
    with pytest.raises(UserError, match="00012.jpg"):
        FrameFolder(tmp_path / "words")
    save(tmp_path / "twice" / "1.png", 0)
    save(tmp_path / "twice" / "01.png", 0)
    with pytest.raises(UserError, match="both are frame 1"):
        FrameFolder(tmp_path / "twice")
    for number in range(3):
        save(tmp_path / "bad" / f"{number}.png", number, size=(6, 8 + number))
    folder = FrameFolder(tmp_path / "bad")
    assert reason(lambda: folder.read([0, 1])) == "size_mismatch" and reason(lambda: folder.read([3])) == "short"
    (tmp_path / "bad" / "1.png").write_bytes(b"no image")
    assert reason(lambda: folder.read([1])) == "corrupt"
    (tmp_path / "bad" / "1.png").unlink()
    assert reason(lambda: folder.read([1])) == "missing_frame"


# ---- extraction


def test_extracted_frames_have_the_numbers_of_the_videos_frames(clip, tmp_path):
    out = tmp_path / "frames"
    assert extract_frames([clip], out, every=4, workers=1, progress=False) == (1, 0, [])
    folder = FrameFolder(out / "clip")
    assert folder.numbers == list(range(0, FRAMES, 4)) and folder.files[1].name == "00004.jpg"
    assert shown(folder.read(range(folder.frames))) == folder.numbers


def test_extraction_refuses_a_folder_of_other_frames(clip, tmp_path):
    out = tmp_path / "frames"
    extract_frames([clip], out, every=8, workers=1, progress=False)
    with pytest.raises(UserError, match="--out: .*'every': 8, .* asked for is .*'every': 4"):
        extract_frames([clip], out, every=4, workers=1, progress=False)
    assert extract_frames([clip], out, every=8, workers=1, progress=False) == (0, 1, [])


def test_extraction_goes_on_and_names_what_it_leaves_out(tmp_path):
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    write_mp4(tmp_path / "videos" / "deep" / "a.mp4", gop=12)
    whole = (tmp_path / "videos" / "deep" / "a.mp4").read_bytes()
    (tmp_path / "videos" / "b.mp4").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "frames"
    (out / ".a.partial").mkdir(parents=True)  # a run that was killed
    (out / ".a.partial" / "00000.jpg").write_bytes(b"half")
    command = [sys.executable, ROOT / "scripts" / "extract_frames.py", tmp_path / "videos", "--out", out]
    run = subprocess.run(
        [*command, "--every", "10", "--workers", "2"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 1 and "1 videos extracted" in run.stdout and "left out: video 'b.mp4'" in run.stderr
    assert sorted(path.name for path in out.iterdir()) == [".extracted.json", "a"]
    assert len(list((out / "a").iterdir())) == 6
    kept = (out / "a" / "00000.jpg").stat().st_mtime_ns
    extracted, there, bad = extract_frames([tmp_path / "videos"], out, every=10, workers=1, progress=False)
    assert (extracted, there, len(bad)) == (0, 1, 1) and (out / "a" / "00000.jpg").stat().st_mtime_ns == kept
    (tmp_path / "videos" / "a.mp4").write_bytes(whole)
    with pytest.raises(UserError, match="same folder"):
        extract_frames([tmp_path / "videos"], out)
    with pytest.raises(UserError, match="does not exist"):
        extract_frames([tmp_path / "nowhere"], out)
    with pytest.raises(UserError, match="--every 0"):
        extract_frames([tmp_path / "videos"], out, every=0)
