#!/usr/bin/env bash
# decord: reader[k] is another frame than frame k when it has to seek to it, in ordinary files; read in a row, all are right.
#
# Versions:  decord 0.6.0, av 18.1.0, numpy 2.4.6
# Behaviour: 120 frames that show their own numbers, as MP4. In a row, reader[0], reader[1] ... are right in all files. A
#            new reader for each k gives another frame, a few further on, without an error, for 79 of 120 in MPEG-4 with
#            B-frames (frame 1 is 3), for 20 in HEVC and 7 in H.264 with open GOPs; none in H.264 by x264's defaults.
#            So a check that reads a file to its end does not see it, and a loader that reads clips does.
# A guess:   decord is made for exact random access ("accurate seek"); frame k is frame k however it is asked for.
# Seen:      h264           in a row 0 wrong, each by itself   0 of 120
#            h264 open gop  in a row 0 wrong, each by itself   7 of 120, such as (22, 24), (23, 25), (24, 26)
#            hevc           in a row 0 wrong, each by itself  20 of 120, such as (21, 24), (22, 25), (23, 26)
#            mpeg4 b-frames in a row 0 wrong, each by itself  79 of 120, such as (1, 3), (2, 4), (3, 5)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check decord==0.6.0 av==18.1.0 numpy==2.4.6

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import av
import decord
import numpy as np

decord.logging.set_level(decord.logging.QUIET)
FRAMES = 120


def picture(number):
    """The number in eight blocks, white for a 1, the highest bit on the left; a stripe below changes in every frame."""
    image = np.full((64, 128, 3), 90, np.uint8)
    image[32:, :64, 1], image[32:, :, 0] = 200, 7 * number % 200
    for bit in range(8):
        image[:32, 16 * bit : 16 * bit + 16] = 235 if number >> (7 - bit) & 1 else 20
    return image


def number(frame):
    image = frame.asnumpy()
    return sum(int(image[8:24, 16 * bit + 3 : 16 * bit + 13].mean() > 128) << (7 - bit) for bit in range(8))


def write(path, codec, options):
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=24, options=options | {"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for k in range(FRAMES):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(k), format="rgb24")))
        out.mux(stream.encode())


wrong = {}
for label, codec, options in (
    ("h264", "libx264", {"x264-params": "keyint=24"}),
    ("h264 open gop", "libx264", {"x264-params": "keyint=24:open-gop=1"}),
    ("hevc", "libx265", {"x265-params": "keyint=24:log-level=none"}),
    ("mpeg4 b-frames", "mpeg4", {"g": "12", "bf": "2"}),
):
    path = f"{sys.argv[1]}/{label}.mp4"
    write(path, codec, options)
    reader = decord.VideoReader(path)
    row = [(k, number(reader[k])) for k in range(len(reader))]
    alone = [(k, number(decord.VideoReader(path)[k])) for k in range(FRAMES)]
    in_a_row = sum(k != seen for k, seen in row)
    others = [pair for pair in alone if pair[0] != pair[1]]
    wrong[label] = len(row), in_a_row, len(others)
    such = f", such as {', '.join(map(str, others[:3]))}" if others else ""
    print(f"{label:14} in a row {in_a_row} wrong, each by itself {len(others):3} of {FRAMES}{such}")
held = all(count == FRAMES and not in_a_row for count, in_a_row, _ in wrong.values())
sys.exit(not (held and not wrong["h264"][2] and wrong["hevc"][2] and wrong["mpeg4 b-frames"][2] > 60))
PYTHON
