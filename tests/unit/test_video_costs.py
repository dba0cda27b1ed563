# SPDX-License-Identifier: Apache-2.0
"""What reading a video costs: pictures decoded, files open, tables made; counted, not timed."""

import gc
from pathlib import Path

from numbered_videos import write_video

from effsam3.data.videos import decoder as video_decoder
from effsam3.data.videos.decoder import Source, seeks_agree
from effsam3.data.videos.files import VideoFile


def test_frames_in_a_row_are_decoded_once_and_a_clip_from_its_key_frame(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 60, encoder={"x264-params": "keyint=12:min-keyint=12:bframes=2:scenecut=0"})
    video = VideoFile(tmp_path / "a.mp4")
    assert video.frames == 60
    decoded, pictures = [], Source.pictures

    def counted(source):
        for frame in pictures(source):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(Source, "pictures", counted)
    video = VideoFile(tmp_path / "a.mp4")
    for index in range(60):
        video.read([index])
        video.read([index])  # the last frame is kept
    assert len(decoded) == 60
    decoded.clear()
    video.read([52, 50, 51])
    assert len(decoded) <= 8, "from frame 48 on, and frames in front of it"


def test_files_are_closed_at_once(tmp_path):
    write_video(tmp_path / "a.mp4", 20)
    gc.collect()
    gc.disable()
    before = len(list(Path("/proc/self/fd").iterdir()))
    try:
        for _ in range(5):
            VideoFile(tmp_path / "a.mp4").read([10, 3])
            seeks_agree(tmp_path / "a.mp4")
            next(video_decoder.pictures_in_a_row(tmp_path / "a.mp4"))
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    finally:
        gc.enable()


def test_a_table_is_made_once_in_a_process(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 20)
    made, decoded_table = [], video_decoder.decoded_table
    monkeypatch.setattr(video_decoder, "decoded_table", lambda path: made.append(path) or decoded_table(path))
    for _ in range(3):
        assert VideoFile(tmp_path / "a.mp4").frames == 20
    assert len(made) == 1
    write_video(tmp_path / "a.mp4", 21)
    assert VideoFile(tmp_path / "a.mp4").frames == 21, "another file of that name"
