# SPDX-License-Identifier: Apache-2.0
"""Videos whose frames show their own numbers, so that no second decoder is needed to know which frame was read."""

from fractions import Fraction

import av
import numpy as np

ROWS, COLUMNS, BITS = 64, 128, 8


def numbered(number, rows=ROWS, columns=COLUMNS):
    """Return RGB (H, W, 3): the number in white and black blocks, the highest bit on the left; below them it moves."""
    image = np.full((rows, columns, 3), 90, np.uint8)
    image[rows // 2 :, : columns // 2, 1] = 200
    image[rows // 2 :, :, 0] = 7 * number % 200
    for bit, block in enumerate(np.array_split(np.arange(columns), BITS)):
        image[: rows // 2, block] = 235 if number >> (BITS - 1 - bit) & 1 else 20
    return image


def shown(frames_T3HW):
    """Return the numbers that frames show."""
    assert frames_T3HW.dtype == np.uint8 and frames_T3HW.shape[1] == 3
    rows, columns = frames_T3HW.shape[2:]
    level_TW = frames_T3HW[:, 1, rows // 8 : rows * 3 // 8].mean(1)
    blocks = [block[2:-2] for block in np.array_split(np.arange(columns), BITS)]
    bits_TB = np.stack([level_TW[:, block].mean(1) > 128 for block in blocks], 1)
    return (bits_TB * 2 ** np.arange(BITS)[::-1]).sum(1).tolist()


def write_video(path, frames, codec="libx264", encoder=None, pix_fmt="yuv420p", times=None, rate=24, **opening):
    """Write frames 0, 1, 2 ...; `times` in milliseconds make their rate vary; `opening` goes to av.open."""
    with av.open(str(path), "w", **opening) as out:
        stream = out.add_stream(codec, rate=rate, options={"threads": "1"} | (encoder or {}))
        stream.width, stream.height, stream.pix_fmt = COLUMNS, ROWS, pix_fmt
        base = Fraction(1, rate if times is None else 1000)
        stream.codec_context.time_base = base
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def remux(source, target, keep=lambda packet, keys: True, change=lambda packet: None):
    """Copy the packets without encoding; `keep` also gets the number of key packets so far."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream, keys = new.add_stream_from_template(old.streams.video[0]), 0
        for packet in old.demux(video=0):
            if packet.size:
                assert packet.dts is not None, "copy from MP4: Matroska has no decoding times"
                keys += packet.is_keyframe
                if keep(packet, keys):
                    change(packet)
                    packet.stream = stream
                    new.mux(packet)


def trim(source, target, seconds):
    """Cut a video's beginning off as tools do that do not encode: an edit list hides frames that stay in the file."""

    def earlier(packet):
        shift = int(Fraction(seconds) / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift

    remux(source, target, change=earlier)
