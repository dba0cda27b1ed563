# SPDX-License-Identifier: Apache-2.0
"""Videos in YouTube-VIS' JSON, which most trackers' tools write: an annotation is one object in all frames.

`videos[]`: id, file_names (frame by frame), width, height. `annotations[]`: id, video_id, segmentations: for every
frame an RLE, polygons, or null where the object is absent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from pathlib import Path, PurePosixPath

from effsam3.data import coco
from effsam3.data.problems import Note
from effsam3.data.videos.frame_numbers import UnclearNames, number_names
from effsam3.data.videos.json_masks import (
    TRACKS,
    FrameFinder,
    JsonMasks,
    Segment,
    category_names,
    category_of,
    identifier,
    note_gap,
    number_objects,
    posix,
    segment_of,
    size_of,
    unique_names,
)
from effsam3.data.videos.vos_video import VosVideo
from effsam3.errors import UserError


def is_youtube_vis(content) -> bool:
    """Say whether a JSON has this form."""
    if not isinstance(content, dict) or "images" in content or not isinstance(content.get("videos"), list):
        return False
    tracks = content.get("annotations") or []
    return any("file_names" in one or "length" in one for one in content["videos"] if isinstance(one, dict)) or any(
        "segmentations" in one for one in tracks if isinstance(one, dict)
    )


def read_youtube_vis(content: dict, file: Path) -> list[VosVideo]:
    """Return the videos of a JSON.

    Raises:
        UserError: it has not this form: says where.
    """
    try:
        return _videos(content, file)
    except coco.Malformed as fault:
        raise UserError(f"{file}: {fault}") from fault


def _videos(content: dict, file: Path) -> list[VosVideo]:
    records: dict = {}
    for place, record in enumerate(coco.listed(content["videos"], "videos")):
        coco.mapping(record, f"videos[{place}]", ("id",))
        if records.setdefault(identifier(record["id"], f"id of videos[{place}]"), record) is not record:
            raise coco.Malformed(f"two videos have the id {record['id']}")
    tracks: dict = {key: [] for key in records}
    # A file of results or of a test set has none: its videos have no objects.
    for place, track in enumerate(coco.listed(content.get("annotations") or [], "annotations")):
        coco.mapping(track, f"annotations[{place}]", ("video_id", "segmentations"))
        if identifier(track["video_id"], f"video_id of annotations[{place}]") not in tracks:
            raise coco.Malformed(f"annotations[{place}] is of video {track['video_id']}, which is not in videos")
        tracks[track["video_id"]].append(track)
    names = unique_names({key: _name(record) for key, record in records.items()}, file)
    finder = FrameFinder(file)
    known, alone = category_names(content), len(records) == 1
    return [_video(names[key], record, tracks[key], known, finder, alone) for key, record in records.items()]


def _name(record: dict) -> str:
    """The folder of its frames is what trackers' tools know a video by, else its name, else its id."""
    files = coco.listed(record.get("file_names") or [""], f"file_names of video {record['id']}")
    folder = PurePosixPath(posix(str(files[0]))).parent.name
    return folder or str(record.get("name") or record["id"])


def _video(
    name: str, record: dict, tracks: list[dict], known: dict[Hashable, str], finder: FrameFinder, alone: bool
) -> VosVideo:
    notes: list[Note] = []
    names = [posix(str(one)) for one in coco.listed(record.get("file_names") or [], f"file_names of video {name}")]
    count = len(names) or coco.whole(record.get("length"), f"length of video {name}", 1)
    numbers = _numbers(names, name, notes) if names else list(range(count))
    files = [posix(str(record[key])) for key in ("file_name", "path", "name") if record.get(key)]
    frames, numbers = finder.frames(name, [[one] for one in names] or [[]] * count, numbers, files, alone)
    segments: dict[int, dict[int, list[Segment]]] = {number: {} for number in numbers}
    called = _called(tracks, name)
    ids = number_objects(called)
    categories: dict[int, str] = {}
    for key, track in zip(called, tracks, strict=True):
        number = ids[key]
        if (category := category_of(track, known)) is not None:
            categories[number] = category
        values = coco.listed(track["segmentations"], f"segmentations of annotation {number}")
        if len(values) != count:
            raise coco.Malformed(
                f"annotation {number} has {len(values)} segmentations, its video {name} {count} frames", "frame_count"
            )
        boxes = track.get("bboxes") or [None] * count
        for frame, value, box in zip(numbers, values, boxes, strict=True):
            if value or box:  # without either it is absent
                segments[frame][number] = [segment_of(value, f"annotation {number}, frame {frame}", notes)]
    size = size_of(record, f"video {name}")
    if size is None:
        notes.append(Note("no_size", f"video {name}", "the file gives none: taken from the frames"))
    own = {ids[key]: key for key in called}
    masks = JsonMasks(name, frames, dict.fromkeys(numbers, size), segments, own, categories, notes)
    return VosVideo(name, frames, masks)


def _called(tracks: list[dict], video: str) -> list[str | int]:
    """Return what tells a video's objects apart: track_id or instance_id if each has its own, else the id."""
    for key in TRACKS:
        found = [track.get(key) for track in tracks]
        if None not in found and len(set(map(str, found))) == len(found):
            return [identifier(one, f"{key} of an annotation of video {video}") for one in found]
    ids = [
        coco.whole(track.get("id", place), f"id of an annotation of video {video}")
        for place, track in enumerate(tracks)
    ]
    twice = [number for number, count in Counter(ids).items() if count > 1]
    if twice:
        raise coco.Malformed(f"two annotations of video {video} have the id {twice[0]}", "object_ids")
    return list(ids)


def _numbers(names: list[str], video: str, notes: list[Note]) -> list[int]:
    """Return the numbers in the frames' names, or 0, 1 ... where they do not ascend, as segmentations do not."""
    stems = [PurePosixPath(name).stem for name in names]
    try:
        found = number_names(stems)
    except UnclearNames:
        found = {}
    numbers = [found.get(stem, -1) for stem in stems]
    if len(set(stems)) == len(stems) and list(found) == stems:
        note_gap(numbers, video, notes)
        return numbers
    notes.append(Note("order", f"video {video}", "its file_names do not ascend; their order in the list is taken"))
    return list(range(len(names)))
