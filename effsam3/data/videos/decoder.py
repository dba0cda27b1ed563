# SPDX-License-Identifier: Apache-2.0
"""A video file decoded by PyAV: frame k is the k-th picture that a player shows.

Neither a file's header nor its packets tell which pictures these are: edit lists hide packets, packets can lack a
picture or a time, and a seek may land on another packet than asked for or on one whose picture needs earlier
ones. So a file is decoded once from beginning to end, and the time and a digest of every picture are noted
(`decoded_table`). A frame is then read from a key frame before it, found by its time and compared with its digest;
where it is another picture, from an earlier key frame, and in the end from the beginning of the file.

Files of which `seeks_agree` was true when they were indexed need no such pass: their packets list the times
(`listed_table`).

Letters: T frames, K key frames, H W rows and columns.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import xxhash

from effsam3.data.unreadable import Unreadable
from effsam3.data.videos.declared_length import declared_bytes

TABLES = 128  # of the files read last, kept by each process; 16 bytes a frame
FPS = 24  # of pictures without times, such as images in a folder
KEYS_TRIED = 2  # before a frame is looked for from the beginning of the file
# Titles that are not UTF-8 leave a video readable. From PyAV 19 on that needs no argument, and there is none.
METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class UnreadableVideo(Unreadable):
    """Reasons: missing, unreadable, corrupt, truncated, changed, skewed, short, missing_frame, size_mismatch."""

    what = "video"


@dataclass(frozen=True)
class FrameTable:
    """When the pictures of a file are shown.

    Attributes:
        frames: T.
        times_T: int64, ascending, in units of the stream's time base; None where some picture has no time or not a
            later one than the picture before it, so that frames can only be counted from the beginning.
        keys_K2: int64, presentation and decoding times of the packets that decoding can begin with, ascending.
        digests_T: uint64, of the pictures as RGB; None in a table that was listed from packets.
    """

    frames: int
    times_T: np.ndarray | None
    keys_K2: np.ndarray
    digests_T: np.ndarray | None

    def keys_before(self, index: int) -> np.ndarray:
        """Return the rows of `keys_K2` that a frame can be decoded from, the nearest first; none without times."""
        if self.times_T is None:
            return self.keys_K2[:0]
        # The nearest key frame is right for almost every file; broken ones need an earlier one, hence the whole list.
        return self.keys_K2[: np.searchsorted(self.keys_K2[:, 0], self.times_T[index], "right")][::-1]


def frame_table(path: Path, seekable: bool) -> FrameTable:
    """Return the table of a file, listed if it is `seekable` and decoded if not; once in a process for each file.

    Raises:
        UnreadableVideo: no such file, not a video, or one that does not decode to its end.
    """
    try:
        stat = path.stat()
    except OSError as fault:
        raise UnreadableVideo(path.name, "missing", f"{path}: {fault.strerror}") from fault
    # Size and time are part of the cache's key, so a file that is replaced while training gets a new table.
    return _kept_table(path, stat.st_size, stat.st_mtime_ns, seekable)


@functools.lru_cache(TABLES)
def _kept_table(path: Path, size: int, mtime_ns: int, seekable: bool) -> FrameTable:
    return listed_table(path) if seekable else decoded_table(path)


def decoded_table(path: Path) -> FrameTable:
    """Make a file's table by decoding it from beginning to end."""
    source = Source(path)
    times, digests = [], []
    for frame in source.pictures():
        times.append(frame.pts)
        # A digest of 8 bytes tells pictures apart without keeping them: a minute of video would be gigabytes.
        digests.append(digest(source.rgb(frame)))
    return _table(source, times, np.array(digests, np.uint64))


def listed_table(path: Path) -> FrameTable:
    """Make a file's table only from its packets: right if each that is not hidden holds one picture."""
    source = Source(path)
    times = [packet.pts for packet in source.packets() if packet.size and not packet.is_discard]
    known = [time for time in times if time is not None]
    return _table(source, sorted(known) if len(known) == len(times) else times, None)


def seeks_agree(path: Path) -> bool:
    """Say whether a file's packets list its pictures and a seek finds each of them, equal to the one decoded in a row.

    Raises:
        UnreadableVideo: it does not decode to its end.
    """
    truth, listed = frame_table(path, False), listed_table(path)
    if truth.times_T is None or listed.times_T is None or not np.array_equal(truth.times_T, listed.times_T):
        return False
    assert truth.digests_T is not None  # of a decoded table
    decoder = Decoder(path, listed)
    starts = np.unique([0, *np.searchsorted(truth.times_T, truth.keys_K2[:, 0])])
    # From the last key frame to the first, because a forward order would decode on without ever seeking.
    for start, stop in reversed(list(zip(starts, [*starts[1:], truth.frames], strict=True))):
        for index in range(start, stop):
            if digest(decoder.picture(index)) != truth.digests_T[index] or decoder.astray:
                return False
    return True


def pictures_in_a_row(path: Path, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, uint8 RGB (H, W, 3)) of frames 0, `every`, 2 `every` ..., decoding the file once.

    Raises:
        UnreadableVideo: no such file, not a video, or one that does not decode to its end.
    """
    source = Source(path)
    for number, frame in enumerate(source.pictures()):
        if number % every == 0:
            yield number, turned(source.rgb(frame), source.matrix(frame))


class Decoder:
    """Reads a file's frames by number; in order, each costs the decoding of one frame. For one process.

    Attributes:
        astray: whether some frame did not come from the key frame before it, but only from an earlier one.

    Raises:
        UnreadableVideo: on opening or reading, as listed in the class.
    """

    def __init__(self, path: Path, table: FrameTable):
        self.path, self.table, self.astray = path, table, False
        self._begin()
        self._shown: tuple[int, np.ndarray] | None = None  # index and picture of the frame read last

    def image(self, index: int) -> np.ndarray:
        """Return frame `index`, 0 to T - 1, turned as it is shown: uint8 RGB (H, W, 3)."""
        return turned(self.picture(index), self._matrix)

    def picture(self, index: int) -> np.ndarray:
        """Return the same as it is coded."""
        if self._shown is None or self._shown[0] != index:
            self._shown = index, self._find(index)
        return self._shown[1]

    def time_s(self, index: int) -> float:
        """Return when a frame is shown, in seconds from the first one."""
        times_T, base = self.table.times_T, self._source.stream.time_base
        if times_T is None or not base:  # one that is not known: None up to PyAV 18, 0 / 1 since
            return index / FPS
        return float((times_T[index] - times_T[0]) * base)

    def _find(self, index: int) -> np.ndarray:
        fault = None
        for way in self._ways(index):
            try:
                way()
                picture = self._reach(index)
            except UnreadableVideo as error:
                fault = error
            else:
                if picture is not None:
                    return picture
        detail = f"frame {index} is not what it was when decoded in a row; if an index has the file, build that again"
        raise fault or UnreadableVideo(self.path.name, "changed", detail)

    def _ways(self, index: int) -> Iterator:
        """Yield what to call before decoding on to a frame, the cheapest first."""
        keys_2 = self.table.keys_before(index)
        times_T = self.table.times_T
        # Decoding on is cheaper than a seek as long as no key frame lies between here and there.
        nearest = np.searchsorted(times_T, keys_2[0][0]) if times_T is not None and len(keys_2) else 0
        if self._next is not None and nearest <= self._next <= index:
            yield lambda: None
        for key_2 in keys_2[:KEYS_TRIED]:
            for time in dict.fromkeys(key_2.tolist()):  # containers seek by one of them
                yield functools.partial(self._seek, time)
            self.astray = True
        yield self._begin

    def _begin(self) -> None:
        self._source = Source(self.path)
        self._frames = self._source.pictures()
        self._next: int | None = 0  # number of the picture that comes next, None after a seek

    def _seek(self, time: int) -> None:
        self._frames = self._source.pictures_from(time)

    def _reach(self, index: int) -> np.ndarray | None:
        """Decode on to a frame; None if it does not come, or another in its place."""
        # Unknown until the frame is found: after a failure the decoder is somewhere in the file.
        place, self._next = self._next or 0, None
        for frame in self._frames:
            # Without usable times, frames can only be counted, which is right from the beginning of the file.
            if self.table.times_T is None:
                early, late = place < index, False
                place += 1
            else:
                early = frame.pts is None or frame.pts < self.table.times_T[index]
                late = not early and frame.pts > self.table.times_T[index]
            if late:
                return None
            if not early:
                picture, self._matrix = self._source.rgb(frame), self._source.matrix(frame)
                # A seek may land on a packet whose picture needs earlier ones: right time, wrong pixels.
                if self.table.digests_T is not None and digest(picture) != self.table.digests_T[index]:
                    return None
                self._next = index + 1
                return picture
        return None


class Source:
    """An open file and its video stream.

    Attributes:
        keys: (presentation time, decoding time) of the key packets that came so far.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UnreadableVideo(path.name, "missing", f"no file {path}")
        self.path = path
        self.keys: list[tuple[int, int]] = []
        self._last_dts: int | None = None
        self._size: tuple[int, int] | None = None
        try:
            # A playlist that is called .mp4 does not make us fetch what it lists.
            options = {"protocol_whitelist": "file"}
            self._container = av.open(str(path), options=options, **METADATA)
        except av.FFmpegError as fault:
            raise UnreadableVideo(path.name, "corrupt", str(fault.strerror)) from fault
        # PyAV's containers and streams hold each other: many would stay open until the garbage collector comes.
        weakref.finalize(self, self._container.close).atexit = False
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not streams:
            raise UnreadableVideo(path.name, "corrupt", "there is no video in it")
        self.stream = max(streams, key=lambda stream: bool(stream.disposition & av.stream.Disposition.default))
        if self.stream.codec_context is None:
            raise UnreadableVideo(path.name, "corrupt", "this build of FFmpeg has no decoder for it")
        # No threads: workers are many, and a forked one that frees a decoder of its parent would never end.
        self.stream.codec_context.thread_count = 1
        self._reformatter = av.video.reformatter.VideoReformatter()

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets from here to the end of the file, and an empty one at last.

        Raises:
            UnreadableVideo: the file ends too early.
        """
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as fault:
                raise self._truncated(str(fault.strerror)) from fault
            if packet is None:
                return
            if packet.is_corrupt:
                raise self._truncated("a packet is not whole")
            # Collected on the way, because not all containers have an index that can be trusted.
            if packet.is_keyframe and packet.pts is not None:
                self.keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            self._last_dts = packet.dts if packet.dts is not None else self._last_dts
            if packet.pts is packet.dts is None and not packet.size:  # the empty packet that ends every stream
                self._refuse_cut()
            elif not packet.size:  # AVI has them in place of frames that were dropped
                continue
            yield packet

    def pictures(self) -> Iterator[av.VideoFrame]:
        """Yield the pictures from the next key packet on.

        Raises:
            UnreadableVideo: a packet does not decode, or the file ends too early.
        """
        begun = False
        for packet in self.packets():
            # After a cut, files begin with packets whose references are gone; players skip them too.
            if not begun and not packet.is_keyframe:
                continue
            begun = True
            try:
                frames = packet.decode()
            except av.FFmpegError as fault:
                raise self._truncated(str(fault.strerror)) from fault
            yield from frames
        if not begun:
            raise self._truncated("no key frame")

    def pictures_from(self, time: int) -> Iterator[av.VideoFrame]:
        """Yield the same after a seek to a time."""
        try:
            self._container.seek(time, stream=self.stream)
        except av.FFmpegError:  # the container cannot seek
            return
        yield from self.pictures()

    def rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Return a picture as uint8 RGB (H, W, 3), by the colour matrix and range that the file names.

        Raises:
            UnreadableVideo: the decoder reports damage, or it has another size than those before it.
        """
        if frame.is_corrupt:
            raise self._truncated(f"the frame at {frame.time} s is damaged")
        size = frame.height, frame.width
        # Masks belong to one size, so a stream that changes it cannot be used at all.
        self._size = self._size or size
        if size != self._size:
            detail = f"(height, width) are {self._size}, and {size} from {frame.time} s on"
            raise UnreadableVideo(self.path.name, "size_mismatch", detail)
        return self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()

    def matrix(self, frame: av.VideoFrame) -> tuple[int, int, int, int]:
        """Return how a picture is turned and mirrored, see `turned`.

        Raises:
            UnreadableVideo: by an angle that is no multiple of 90 degrees.
        """
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return 1, 0, 0, 1
        a, b, _, c, d = (int(number) for number in np.sign(np.frombuffer(data, np.int32)[:5]))
        if (a or d) and (b or c):
            detail = f"shown turned by {frame.rotation} degrees; multiples of 90 can be read"
            raise UnreadableVideo(self.path.name, "skewed", detail)
        return (a, b, c, d) if a and d or b and c else (1, 0, 0, 1)  # some files have a matrix of zeros

    def _truncated(self, detail: str) -> UnreadableVideo:
        place = "at its beginning"
        if self._last_dts is not None and self.stream.time_base:
            place = f"{float(self._last_dts * self.stream.time_base):.3f} s"
        return UnreadableVideo(self.path.name, "truncated", f"does not decode to its end ({place}): {detail}")

    def _refuse_cut(self) -> None:
        """Raise UnreadableVideo at the end of a file that claims to have more."""
        with self.path.open("rb") as file:
            # FFmpeg ends a cut file without an error, so the containers' own lengths are compared.
            claimed = declared_bytes(file.read(4096))
        size = self.path.stat().st_size
        if claimed is not None and claimed > size:
            raise self._truncated(f"{size:,} bytes of {claimed:,}")
        entries = self.stream.index_entries
        if "mp4" in self._container.format.name and len(entries) and self._last_dts is not None:
            if entries[len(entries) - 1].timestamp > self._last_dts:
                raise self._truncated(f"its index lists {len(entries)} packets, the last ones are not there")


def turned(picture_HW3: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Return a picture as it is shown.

    The matrix a b c d puts what is coded at column p, row q at column a p + c q, row b p + d q (ISO 14496-12), but for
    a shift; its numbers are 0, 1 and -1.
    """
    a, b, c, d = matrix
    if b:
        # Views only: turning costs nothing until the pixels are copied into a clip.
        picture_HW3 = picture_HW3.transpose(1, 0, 2)
    if a + c < 0:
        picture_HW3 = picture_HW3[:, ::-1]
    if b + d < 0:
        picture_HW3 = picture_HW3[::-1]
    return picture_HW3


def digest(picture_HW3: np.ndarray) -> int:
    """Return a number that two pictures share only when they are equal."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(picture_HW3).data)


def _table(source: Source, times: Sequence[int | None], digests_T: np.ndarray | None) -> FrameTable:
    if not times:
        raise UnreadableVideo(source.path.name, "corrupt", "there is no picture in it")
    known = np.array([time for time in times if time is not None], np.int64)
    times_T = known if len(known) == len(times) and all(np.diff(known) > 0) else None
    keys_K2 = np.array(sorted(source.keys), np.int64).reshape(-1, 2)
    return FrameTable(len(times), times_T, keys_K2, digests_T)
