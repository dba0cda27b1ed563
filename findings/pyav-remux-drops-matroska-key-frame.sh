#!/usr/bin/env bash
# PyAV: the usual loop that copies packets leaves out packets without a decoding time, because those that flush have none.
# In Matroska and WebM the first packets of a video with B-frames have none either, the key frame among them: of a video
# with one key frame nothing is left, in an MP4 copied by the same loop all of it is.
#
# Versions:  av 18.1.0 (FFmpeg 8 in its wheel), numpy 2.4.6
# Behaviour: 100 frames of H.264, encoder's defaults (B-frames, a key frame every 250). Copied with `if packet.dts is None:
#            continue` from MKV: packets 0 and 1 are left out, and the copy has 98 packets at most and no frame that
#            decodes, without an error. Empty packets alone (`not packet.size`) are what has to be left out.
# A guess:   dts is None only for the empty packets at the end of demux(), so the loop copies everything.
# Seen:      mp4: packets without dts but with data: 0; frames after the copy: 100
#            mkv: packets without dts but with data: 2 (key frame: True); frames after the copy: 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import av
import numpy as np


def write(path):
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number in range(100):
            image = np.full((96, 160, 3), 2 * number, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def copy(source, target):
    """Return the packets that were left out although they hold data."""
    lost = []
    with av.open(source) as old, av.open(target, "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is None:
                lost += [packet] if packet.size else []
                continue
            packet.stream = stream
            new.mux(packet)
    return lost


def frames(path):
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


found = {}
for kind in ("mp4", "mkv"):
    source, target = f"{sys.argv[1]}/source.{kind}", f"{sys.argv[1]}/target.{kind}"
    write(source)
    lost = copy(source, target)
    key = f" (key frame: {lost[0].is_keyframe})" if lost else ""
    found[kind] = frames(source), frames(target), len(lost)
    print(f"{kind}: packets without dts but with data: {len(lost)}{key}; frames after the copy: {found[kind][1]}")
sys.exit(found != {"mp4": (100, 100, 0), "mkv": (100, 0, 2)})
PYTHON
