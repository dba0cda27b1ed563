# SPDX-License-Identifier: Apache-2.0
"""Frame k is the k-th that a player shows, for any codec, container and order of asking; or the file is refused."""

import io
import random
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from numbered_videos import COLUMNS, ROWS, numbered, remux, shown, trim, write_video
from PIL import Image

from effsam3.data.videos import decoder as video_decoder
from effsam3.data.videos.decoder import UnreadableVideo, seeks_agree
from effsam3.data.videos.extract_frames import extract_frames
from effsam3.data.videos.files import VideoFile
from effsam3.data.videos.frame_folder import FrameFolder


def check(path, numbers, seed=0):
    """Frames of a file, asked for in any order, show these numbers; returns whether seeks were found to agree."""
    rng, numbers = random.Random(seed), list(numbers)
    agree = seeks_agree(path)
    for seekable in {False, agree}:
        video = VideoFile(path, seekable)
        assert video.frames == len(numbers)
        for _ in range(6):
            asked = [rng.randrange(video.frames) for _ in range(rng.randint(1, 4))]
            assert shown(video.read(asked)) == [numbers[index] for index in asked], (asked, seekable)
        start = rng.randrange(video.frames)
        clip = list(range(start, video.frames, 4))[:8]
        for asked in (clip, clip[::-1]):
            assert shown(VideoFile(path, seekable).read(asked)) == [numbers[index] for index in asked]
        assert shown(np.concatenate([video.read([index]) for index in range(video.frames)])) == numbers
    return agree


# ---- drawn at random

CODECS = {  # codec: containers, what options are drawn from
    "libx264": (("mp4", "mov", "mkv", "avi", "ts", "flv"), lambda r: {"x264-params": _x264(r), "preset": "veryfast"}),
    "libx265": (("mp4", "mkv", "ts"), lambda r: {"x265-params": _x265(r), "preset": "ultrafast"}),
    "mpeg4": (("mp4", "avi", "mkv"), lambda r: {"g": str(r.randint(1, 20)), "bf": str(r.randint(0, 3))}),
    "mpeg2video": (("mpg", "ts", "mkv"), lambda r: {"g": str(r.randint(1, 20)), "bf": str(r.randint(0, 3))}),
    "libvpx-vp9": (("webm", "mkv", "mp4"), lambda r: _vpx(r) | {"deadline": "realtime", "cpu-used": "8"}),
    "libvpx": (("webm",), lambda r: _vpx(r) | {"deadline": "realtime", "cpu-used": "8"}),
    "libsvtav1": (("mp4", "mkv"), lambda r: {"g": str(r.randint(2, 20)), "preset": "12", "svtav1-params": "lp=1"}),
    "mjpeg": (("avi", "mov"), lambda r: {}),
    "wmv2": (("wmv",), lambda r: {"g": str(r.randint(1, 20))}),
}


def _x264(r):
    return (
        f"keyint={r.randint(1, 30)}:bframes={r.randint(0, 5)}:open-gop={r.randint(0, 1)}:"
        f"b-pyramid={r.randint(0, 2)}:intra-refresh={int(r.random() < 0.2)}:scenecut={r.choice((0, 40))}"
    )


def _x265(r):
    return (
        f"keyint={r.randint(2, 30)}:bframes={r.randint(0, 5)}:open-gop={r.randint(0, 1)}:"
        "log-level=none:pools=none:frame-threads=1"
    )


def _vpx(r):
    return {"g": str(r.randint(1, 30)), "auto-alt-ref": str(r.randint(0, 1)), "lag-in-frames": str(r.choice((0, 8)))}


def drawn(seed, folder, codec=None):
    """Write a random video; returns the file and the numbers that it shows."""
    r = random.Random(seed)
    codec = codec or r.choice(list(CODECS))
    containers, options = CODECS[codec]
    container, frames = r.choice(containers), r.randint(1, 50)
    varying = container in ("mp4", "mkv", "webm", "mov") and r.random() < 0.4
    times = np.cumsum([r.randint(1, 120) for _ in range(frames)]).tolist() if varying else None
    pix_fmt = {"mjpeg": "yuvj420p", "libx265": r.choice(("yuv420p", "yuv420p10le"))}.get(codec, "yuv420p")
    path = folder / f"{codec}_{seed}.{container}"
    write_video(path, frames, codec, options(r), pix_fmt, times)
    return path, range(frames)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_videos(codec, seed, tmp_path):
    check(*drawn(seed, tmp_path, codec), seed)


# ---- kinds that other readers get wrong

KINDS = {  # label: suffix, codec, options
    "HEVC with leading frames": (".mp4", "libx265", {"x265-params": "keyint=12:log-level=none:pools=none"}),
    "open GOP": (".mp4", "libx264", {"x264-params": "keyint=12:bframes=3:open-gop=1"}),
    "B-frames in MPEG-4": (".mp4", "mpeg4", {"g": "12", "bf": "2"}),
    "AVI": (".avi", "libx264", {"x264-params": "keyint=12:bframes=0"}),
    "AV1": (".mp4", "libsvtav1", {"g": "12", "preset": "12"}),
    "transport stream": (".ts", "libx264", {"x264-params": "keyint=12:bframes=3"}),
    "intra refresh": (".mp4", "libx264", {"x264-params": "keyint=12:intra-refresh=1"}),
}


@pytest.mark.parametrize("label", KINDS)
def test_kinds_that_other_readers_seek_wrongly_in(label, tmp_path):
    suffix, codec, options = KINDS[label]
    write_video(tmp_path / f"video{suffix}", 40, codec, options)
    agree = check(tmp_path / f"video{suffix}", range(40))
    assert agree != (label == "intra refresh"), "a key frame is whole only when the refresh has passed over it"
    extract_frames([tmp_path / f"video{suffix}"], tmp_path / "out", every=4, workers=1, progress=False)
    folder = FrameFolder(tmp_path / "out" / "video")
    assert folder.numbers == shown(folder.read(range(folder.frames))) == list(range(0, 40, 4))


@pytest.mark.parametrize("seconds", [Fraction(1, 4), Fraction(15, 24)])
def test_frames_that_an_edit_list_hides_are_not_there(seconds, tmp_path):
    write_video(tmp_path / "whole.mp4", 36, encoder={"x264-params": "keyint=250:bframes=3:scenecut=0"})
    trim(tmp_path / "whole.mp4", tmp_path / "trimmed.mp4", seconds)
    first = int(24 * seconds)
    with av.open(str(tmp_path / "trimmed.mp4")) as container:
        assert container.streams.video[0].frames == 36, "the header counts them"
    assert check(tmp_path / "trimmed.mp4", range(first, 36))
    data = bytearray((tmp_path / "trimmed.mp4").read_bytes())
    place = data.find(b"elst") + 12
    (length,) = struct.unpack(">I", data[place : place + 4])
    data[place : place + 4] = struct.pack(">I", length // 2)  # and the end is cut off as well
    (tmp_path / "both.mp4").write_bytes(data)
    check(tmp_path / "both.mp4", range(first, first + (36 - first + 1) // 2))


def test_what_is_cut_off_in_front_of_a_key_frame_is_not_shown(tmp_path):
    write_video(tmp_path / "whole.mp4", 40, "libx265", KINDS["HEVC with leading frames"][2])
    remux(tmp_path / "whole.mp4", tmp_path / "cut.mkv", keep=lambda packet, keys: keys > 2)
    first = shown(VideoFile(tmp_path / "cut.mkv").read([0]))[0]
    assert first > 12 and not check(tmp_path / "cut.mkv", range(first, 40)), "its packets list more"


def test_files_whose_times_are_wrong_are_counted_from_their_beginning(tmp_path):
    write_video(tmp_path / "b.avi", 40, encoder={"x264-params": "keyint=12:bframes=3"})  # AVI has no times
    write_video(tmp_path / "same.mkv", 40, encoder={"x264-params": "keyint=12:bframes=3"}, rate=3000)  # whole ms
    for path in (tmp_path / "b.avi", tmp_path / "same.mkv"):
        assert not check(path, range(40))


@pytest.mark.parametrize(
    ("codec", "encoder"),
    [("mpeg4", {"g": "12", "bf": "0"}), ("libx265", {"x265-params": "keyint=12:log-level=none:pools=none"})],
)
def test_key_frames_that_are_none_are_found_out(codec, encoder, tmp_path):
    write_video(tmp_path / "true.mp4", 40, codec, encoder)
    data = (tmp_path / "true.mp4").read_bytes()
    assert data.count(b"stss") == 1  # the list of key frames; without it, all are
    (tmp_path / "lie.mp4").write_bytes(data.replace(b"stss", b"free"))
    assert check(tmp_path / "true.mp4", range(40)) and not check(tmp_path / "lie.mp4", range(40))


def test_times_may_begin_anywhere(tmp_path):
    def later(packet):
        shift = int(7 / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift

    write_video(tmp_path / "zero.mp4", 30, encoder={"x264-params": "keyint=12:bframes=3"})
    for name in ("late.mp4", "late.mkv", "late.ts"):
        remux(tmp_path / "zero.mp4", tmp_path / name, change=later)
        assert check(tmp_path / name, range(30))


def test_a_cover_picture_is_no_video(tmp_path):
    cover = io.BytesIO()
    Image.fromarray(numbered(99)).save(cover, "PNG")
    with av.open(str(tmp_path / "cover.mkv"), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = COLUMNS, ROWS, "yuv420p"
        out.add_attachment("cover.png", "image/png", cover.getvalue())
        for number in range(20):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        out.mux(stream.encode())
    with av.open(str(tmp_path / "cover.mkv")) as container:
        assert len(container.streams.video) == 2
    check(tmp_path / "cover.mkv", range(20))


# ---- how pictures are shown


def with_matrix(path, a, b, c, d):
    """Write a video that is shown by a display matrix."""
    write_video(path, 3, encoder={"crf": "10"})
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    numbers = [round(number * 65536) for number in (a, b, 0, c, d, 0, 0, 0)]
    data[place : place + 36] = struct.pack(">9i", *numbers, 1 << 30)
    path.write_bytes(data)


MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES)
def test_pictures_are_turned_and_mirrored_as_they_are_shown(matrix, tmp_path):
    path = tmp_path / "turned.mp4"
    with_matrix(path, *matrix)
    a, b, c, d = matrix
    rows, columns = (ROWS, COLUMNS) if a else (COLUMNS, ROWS)
    expected_HW3 = np.zeros((rows, columns, 3), np.uint8)
    for q in range(ROWS):  # ISO 14496-12: to column a p + c q and row b p + d q, moved so that none is below 0
        for p in range(COLUMNS):
            x, y = a * p + c * q, b * p + d * q
            expected_HW3[y + (rows - 1) * (b + d < 0), x + (columns - 1) * (a + c < 0)] = numbered(1)[q, p]
    assert VideoFile(path).size == (rows, columns)
    image_HW3 = VideoFile(path).read([1])[0].transpose(1, 2, 0)
    assert np.abs(image_HW3.astype(int) - expected_HW3).mean() < 8
    extract_frames([path], tmp_path / "out", every=1, workers=1, progress=False)
    assert (
        np.abs(FrameFolder(tmp_path / "out" / "turned").read([1])[0].transpose(1, 2, 0) - 1.0 * expected_HW3).mean()
        < 10
    )


def test_a_picture_at_an_angle_is_refused(tmp_path):
    with_matrix(tmp_path / "skewed.mp4", 0.7, 0.7, -0.7, 0.7)
    with pytest.raises(UnreadableVideo, match="'skewed.mp4': skewed .*45.* degrees; multiples of 90"):
        VideoFile(tmp_path / "skewed.mp4").read([0])


@pytest.mark.parametrize("matrix", ["ITU601", "ITU709"])
@pytest.mark.parametrize("value_range", ["MPEG", "JPEG"])
def test_colours_are_those_that_the_file_names(matrix, value_range, tmp_path):
    colours = np.random.default_rng(0).integers(20, 236, (ROWS // 16, COLUMNS // 16, 3), dtype=np.uint8)
    image_HW3 = np.kron(colours, np.ones((16, 16, 1), np.uint8))
    space, kind = av.video.reformatter.Colorspace[matrix], av.video.reformatter.ColorRange[value_range]
    with av.open(str(tmp_path / "colours.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = COLUMNS, ROWS, "yuv420p"
        stream.codec_context.colorspace = {"ITU601": 6, "ITU709": 1}[matrix]  # by H.273
        stream.codec_context.color_range = {"MPEG": 1, "JPEG": 2}[value_range]
        frame = av.VideoFrame.from_ndarray(image_HW3, format="rgb24")
        out.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=kind)))
        out.mux(stream.encode())
    read_HW3 = VideoFile(tmp_path / "colours.mp4").read([0])[0].transpose(1, 2, 0)
    inner = (np.arange(16) % 16 > 3) & (np.arange(16) < 12)
    inner_HW = np.kron(np.ones(colours.shape[:2], bool), np.outer(inner, inner))
    assert np.abs(read_HW3.astype(int) - image_HW3)[inner_HW].max() <= 6


# ---- damage


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mkv", "libx264"), (".webm", "libvpx-vp9"), (".avi", "mpeg4"), (".avi", "mjpeg"), (".mp4", "libx264")],
)
def test_a_file_without_its_end_is_refused(suffix, codec, tmp_path):
    path, pix_fmt = tmp_path / f"whole{suffix}", "yuvj420p" if codec == "mjpeg" else "yuv420p"
    opening = {"options": {"movflags": "+faststart"}} if suffix == ".mp4" else {}
    write_video(path, 40, codec, {"g": "12"}, pix_fmt, **opening)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for label, end in (("between", places[30][0]), ("within", sum(places[30]) - 5)):
        cut = tmp_path / f"{label}{suffix}"
        cut.write_bytes(path.read_bytes()[:end])
        for call in (
            lambda cut=cut: VideoFile(cut).frames,
            lambda cut=cut: list(video_decoder.pictures_in_a_row(cut)),
        ):
            with pytest.raises(UnreadableVideo, match=f"'{cut.name}': truncated") as caught:
                call()
            assert caught.value.reason == "truncated"


def test_what_holds_no_video_or_a_torn_picture_is_named(tmp_path):
    cover = io.BytesIO()
    Image.fromarray(numbered(99)).save(cover, "PNG")
    with av.open(str(tmp_path / "song.mkv"), "w") as out:
        out.add_attachment("cover.png", "image/png", cover.getvalue())
        stream = out.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.rate = 8000
        out.mux(stream.encode(silence))
    with pytest.raises(UnreadableVideo, match="'song.mkv': corrupt .*no video"):
        VideoFile(tmp_path / "song.mkv").read([0])
    write_video(tmp_path / "whole.flv", 40, "flv", {"g": "12"})
    with av.open(str(tmp_path / "whole.flv")) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    (tmp_path / "torn.flv").write_bytes((tmp_path / "whole.flv").read_bytes()[: sum(places[30]) - 5])
    with pytest.raises(UnreadableVideo, match="'torn.flv': truncated .*a packet is not whole"):
        VideoFile(tmp_path / "torn.flv").read([0])


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mp4", "libx264"), (".mkv", "mpeg4"), (".avi", "mjpeg"), (".webm", "libvpx-vp9"), (".ts", "mpeg2video")],
)
def test_damaged_bytes_cost_a_file_and_nothing_else(suffix, codec, tmp_path):
    path, rng = tmp_path / f"video{suffix}", random.Random(0)
    write_video(path, 12, codec, {"g": "8"}, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    data, refused = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(rng.choice((400, len(damaged))))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            video = VideoFile(path)
            forwards = video.read(range(video.frames))
            backwards = [video.read([index])[0] for index in reversed(range(video.frames))]
            assert (forwards[::-1] == backwards).all()
        except UnreadableVideo as error:
            refused += 1
            assert error.reason in ("corrupt", "truncated", "size_mismatch", "skewed")
    assert refused


def test_titles_may_be_in_any_encoding(tmp_path):
    write_video(tmp_path / "a.mkv", 5)
    with av.open(str(tmp_path / "a.mkv")) as old, av.open(str(tmp_path / "b.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        new.metadata["title"] = "caffee"
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    data = (tmp_path / "b.mkv").read_bytes()
    assert data.count(b"caffee") == 1
    (tmp_path / "b.mkv").write_bytes(data.replace(b"caffee", "caff\u00e9s".encode("latin-1")))
    assert check(tmp_path / "b.mkv", range(5))


def test_a_video_of_two_sizes_is_named(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as out:
        stream = out.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = COLUMNS, ROWS, "yuvj420p"
        for number in range(12):
            size = (ROWS, COLUMNS) if number < 7 else (ROWS, ROWS)
            picture = io.BytesIO()
            Image.fromarray(numbered(number, *size)).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 24), True
            packet.pts = packet.dts = number
            out.mux(packet)
    with pytest.raises(UnreadableVideo, match=r"'a.avi': size_mismatch .*are \(64, 128\), and \(64, 64\) from 0.29"):
        VideoFile(tmp_path / "a.avi").read([0])


def test_a_file_that_has_changed_since_it_was_listed_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", 30, encoder={"g": "12", "bf": "0"})
    video = VideoFile(tmp_path / "a.mp4")
    assert video.frames == 30
    write_video(tmp_path / "b.mp4", 30, encoder={"g": "12", "bf": "0", "crf": "40"})
    (tmp_path / "b.mp4").replace(tmp_path / "a.mp4")
    video._decoder._begin()
    with pytest.raises(UnreadableVideo, match="'a.mp4': changed .*frame 15 is not what it was"):
        video.read([15])
