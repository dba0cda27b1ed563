#!/usr/bin/env bash
# Grey masks of object ids, written as lossless H.264, come back without the ids 1 to 16 and with others: x264 keeps
# every value of the luma, but the decoder calls the grey video yuv420p, whose luma is taken to begin at 16. Lossless
# H.265 and FFV1 bring the same masks back as they were.
#
# Versions:  av 18.1.0 (with its FFmpeg, x264 and x265), numpy 2.4.6
# Behaviour: pix_fmt "gray", ids 0 to 255. From H.264 with qp 0, `to_ndarray(format="gray")` has 220 different values:
#            ids 0 to 16 are 0, 17 is 1, 100 is 98, 235 and all above are 255. The plane of the decoded frame holds the ids.
#            So 0 and 255 survive: a test with one binary mask sees nothing.
# A guess:   lossless is lossless: what goes in as gray comes out as gray, whatever the codec.
# Seen:      libx264: yuv420p, 220 of 256 ids, [1, 16, 17, 100, 235] -> [0, 0, 1, 98, 255], in the plane [1, 16, 17, 100, 235]
#            libx265: gray, 256 of 256 ids, [1, 16, 17, 100, 235] -> [1, 16, 17, 100, 235], in the plane [1, 16, 17, 100, 235]
#            ffv1: gray, 256 of 256 ids, [1, 16, 17, 100, 235] -> [1, 16, 17, 100, 235], in the plane [1, 16, 17, 100, 235]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import av
import numpy as np

IDS = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(8, 0).repeat(8, 1)  # squares of 8 by 8 pixels
LOOKED_AT = [1, 16, 17, 100, 235]


def decoded(codec, container, options):
    """Write the ids as three frames and return the first one, decoded."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as video:
        stream = video.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = *IDS.shape, "gray"
        for _ in range(3):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(IDS, format="gray")))
        video.mux(stream.encode())
    file.seek(0)
    with av.open(file) as video:
        return next(video.decode(video=0))


found = {}
for codec, container, options in (
    ("libx264", "mp4", {"qp": "0"}),
    ("libx265", "mp4", {"x265-params": "lossless=1:log-level=none"}),
    ("ffv1", "matroska", {}),
):
    frame = decoded(codec, container, options)
    gray = frame.to_ndarray(format="gray")
    plane = np.frombuffer(frame.planes[0], np.uint8).reshape(-1, frame.planes[0].line_size)[: len(IDS), : len(IDS)]
    assert (plane == IDS).all()
    to = {number: int(gray[IDS == number][0]) for number in range(256)}
    found[codec] = [to[number] for number in LOOKED_AT]
    kept, inside = len(np.unique(gray)), [int(plane[IDS == number][0]) for number in LOOKED_AT]
    print(f"{codec}: {frame.format.name}, {kept} of 256 ids, {LOOKED_AT} -> {found[codec]}, in the plane {inside}")
sys.exit(found["libx264"] != [0, 0, 1, 98, 255] or found["libx265"] != LOOKED_AT or found["ffv1"] != LOOKED_AT)
PYTHON
