# SPDX-License-Identifier: Apache-2.0
"""Videos in COCO's JSON with one image for every frame, as annotation tools export them.

`images[]`: id, path or file_name, and where the tool has them video_id, order_in_video or frame_id, width, height.
`annotations[]`: image_id, segmentation (RLE or polygons), and the object's track_id, instance_id or
attributes.track_id; without any of them, its category_id. `videos[]` (id, name) is not needed.

An image of the file is an annotated frame: an object without an annotation on it is absent from it.
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

PATHS = ("path", "file_name")  # of an image; in Label Studio's files, the first is an address on its server
ORDERS = ("order_in_video", "frame_id")


def is_coco_video(content) -> bool:
    """Say whether a JSON has this form."""
    return isinstance(content, dict) and isinstance(content.get("images"), list) and "annotations" in content


def tells_of_videos(content: dict) -> bool:
    """Say whether a JSON of this form has frames of videos: a video, an order or tracks. Else it may be of images."""
    tables = (coco.listed(content[key], key) for key in ("images", "annotations"))
    images, annotations = ([row for row in table if isinstance(row, dict)] for table in tables)
    rows = [
        *images,
        *annotations,
        *(row["attributes"] for row in annotations if isinstance(row.get("attributes"), dict)),
    ]
    return any(row.get(key) is not None for row in rows for key in ("video_id", *ORDERS, *TRACKS))


def read_coco_video(content: dict, file: Path) -> list[VosVideo]:
    """Return the videos of a JSON.

    Raises:
        UserError: it has not this form, or does not say which frame of which video an image is.
    """
    try:
        return _videos(content, file)
    except coco.Malformed as fault:
        raise UserError(f"{file}: {fault}") from fault


def _videos(content: dict, file: Path) -> list[VosVideo]:
    images: dict = {}
    for place, image in enumerate(coco.listed(content["images"], "images")):
        coco.mapping(image, f"images[{place}]", ("id",))
        if images.setdefault(identifier(image["id"], f"id of images[{place}]"), image) is not image:
            raise coco.Malformed(f"{_called(images[image['id']])} and {_called(image)} have the id {image['id']}")
    annotations: dict = {key: [] for key in images}
    lost: list[Note] = []
    for place, annotation in enumerate(coco.listed(content["annotations"], "annotations")):
        coco.mapping(annotation, f"annotations[{place}]", ("image_id",))
        if identifier(annotation["image_id"], f"image_id of annotations[{place}]") in annotations:
            annotations[annotation["image_id"]].append((place, annotation))
        else:
            detail = f"its image {annotation['image_id']} is not in images; left out"
            lost.append(Note("no_image", f"annotations[{place}]", detail))
    records: dict[Hashable, dict] = {
        identifier(coco.mapping(record, "a video", ("id",))["id"], "id of a video"): record
        for record in coco.listed(content.get("videos") or [], "videos")
    }
    by_video: dict[Hashable, list[dict]] = {}
    for image in images.values():
        by_video.setdefault(_video_of(image), []).append(image)
    names = unique_names({key: _name(key, records, some[0]) for key, some in by_video.items()}, file)
    finder, known = FrameFinder(file), category_names(content)
    videos = []
    for key, some in by_video.items():
        reader = _Reader(names[key], some, annotations, known, list(lost))
        videos.append(reader.video(finder, records.get(key) or {}, alone=len(by_video) == 1))
        lost = []  # the first video's notes tell of them
    return videos


def _called(image: dict) -> str:
    return next((str(image[key]) for key in PATHS if image.get(key)), f"image {image['id']}")


def _folder(image: dict) -> str:
    named = next((posix(str(image[key])) for key in reversed(PATHS) if image.get(key)), "")
    folder = str(PurePosixPath(named).parent)
    return "" if folder == "." else folder


def _video_of(image: dict) -> Hashable:
    """The video that an image is of: its video_id, else the folder in its file name."""
    found = image.get("video_id")
    return _folder(image) if found is None else identifier(found, f"video_id of {_called(image)}")


def _name(key: Hashable, records: dict, image: dict) -> str:
    if image.get("video_id") is None:
        return PurePosixPath(str(key)).name
    return PurePosixPath(posix(str((records.get(key) or {}).get("name") or key))).name


class _Reader:
    """Reads one video of a file; `annotations` are those of all images, with their places in the file, and `known`
    the names of its categories."""

    def __init__(
        self, name: str, images: list[dict], annotations: dict, known: dict[Hashable, str], notes: list[Note]
    ):
        self.name, self.notes, self.annotations, self.known = name, notes, annotations, known
        self.images, self.numbers = self._in_order(images)

    def video(self, finder: FrameFinder, record: dict, alone: bool) -> VosVideo:
        names = [[posix(str(image[key])) for key in PATHS if image.get(key)] for image in self.images]
        files = [posix(str(record[key])) for key in ("file_name", "path") if record.get(key)]
        folder = PurePosixPath(_folder(self.images[0])).name
        frames, numbers = finder.frames(self.name, names, self.numbers, [*files, folder], alone)
        sizes = {number: size_of(image, _called(image)) for number, image in zip(numbers, self.images, strict=True)}
        if None in sizes.values():
            self.notes.append(Note("no_size", f"video {self.name}", "images without a size: taken from the frames"))
        masks = JsonMasks(self.name, frames, sizes, *self._segments(numbers), self.notes)
        return VosVideo(self.name, frames, masks)

    def _in_order(self, images: list[dict]) -> tuple[list[dict], list[int]]:
        """Return the images in the order of time, and the frame's number of each."""
        stems = [PurePosixPath(posix(_called(image))).stem for image in images]
        key = next((key for key in ORDERS if all(image.get(key) is not None for image in images)), None)
        try:
            by_name = number_names(stems) if len(set(stems)) == len(stems) else {}
        except UnclearNames as fault:
            if key is None:
                raise coco.Malformed(f"video {self.name!r}: {fault}; give each image order_in_video") from fault
            by_name = {}
        if key is not None:
            numbers = [coco.whole(image[key], f"{key} of {_called(image)}") for image in images]
        elif by_name:
            numbers = [by_name[stem] for stem in stems]
        else:
            first, second = _twice(images, stems)
            raise coco.Malformed(
                f"image {first['id']} ({_called(first)}) and image {second['id']} ({_called(second)}) cannot be told "
                "apart: give each image its video_id, and its place in the video as order_in_video"
            )
        if len(set(numbers)) < len(numbers):
            first, second = _twice(images, numbers)
            raise coco.Malformed(
                f"{_called(first)} and {_called(second)} of video {self.name!r} have one {key or 'number'}; are "
                "they of two videos? Then give each image its video_id"
            )
        note_gap(sorted(numbers), self.name, self.notes)
        ordered = sorted(zip(numbers, range(len(images)), strict=True))
        if by_name and [by_name[stems[at]] for _, at in ordered] != sorted(by_name.values()):
            self.notes.append(Note("order", f"video {self.name}", f"{key} gives another order than the files' names"))
        if key == "frame_id" and by_name:  # some tools count their images again from 0: only the name is the frame's
            return [images[at] for _, at in ordered], [by_name[stems[at]] for _, at in ordered]
        return [images[at] for _, at in ordered], [number for number, _ in ordered]

    def _segments(
        self, numbers: list[int]
    ) -> tuple[dict[int, dict[int, list[Segment]]], dict[int, str | int], dict[int, str]]:
        """Return the annotations of each frame by object, what the file calls the objects, and their categories."""
        found = [
            (number, f"annotations[{place}] ({_called(image)})", annotation, at)
            for number, image in zip(numbers, self.images, strict=True)
            for at, (place, annotation) in enumerate(self.annotations[image["id"]])
        ]
        kinds = {_identity(annotation, at)[0] for _, _, annotation, at in found}
        best = next((kind for kind in KINDS if kind in kinds), "")  # whose keys are the objects' own ids
        keyed: list[tuple[Hashable, int, Segment]] = []
        names: dict[Hashable, str | int] = {}
        categories: dict[Hashable, str] = {}
        taken: Counter[str] = Counter()
        for number, where, annotation, at in found:
            kind, key = _identity(annotation, at)
            # Tools write ordinary masks as crowds; a crowd as COCO means it is only told by having no track.
            if best == "track" != kind and annotation.get("iscrowd"):
                self.notes.append(Note("crowd", where, "a crowd without a track is no object; left out"))
                continue
            taken[kind] += 1
            identity: Hashable = key if kind == best else (kind, key)
            names.setdefault(identity, key if kind == "track" else f"{kind} {key}")
            if (category := category_of(annotation, self.known)) is not None:
                categories.setdefault(identity, category)
            if _attributes(annotation).get("outside") is True:
                self.notes.append(Note("outside", where, "marked as outside: taken as absent"))
                continue  # tools keep the last shape of a track that has left
            segment = segment_of(annotation.get("segmentation"), where, self.notes)
            keyed.append((identity, number, segment))
        for kind in KINDS[1:]:
            if taken[kind]:
                self.notes.append(Note(f"{kind}_as_track", f"video {self.name}", FALLBACKS[kind]))
        ids = number_objects(names)
        segments: dict[int, dict[int, list[Segment]]] = {number: {} for number in numbers}
        for identity, number, segment in keyed:
            others = segments[number].setdefault(ids[identity], [])
            others.append(segment)
            if len(others) == 2:
                detail = f"object {names[identity]} has several annotations on this frame: their union is taken"
                self.notes.append(Note("union", segment.where, detail))
        called = {ids[identity]: name for identity, name in names.items()}
        return segments, called, {ids[identity]: category for identity, category in categories.items()}


KINDS = ("track", "category", "place")  # of what tells objects apart, the best first
FALLBACKS = {
    "category": "annotations have no track_id: all of one category are taken for one object",
    "place": "annotations have neither track_id nor category_id: those of one place in their frames' lists are taken "
    "for one object",
}


def _attributes(annotation: dict) -> dict:
    return coco.mapping(annotation.get("attributes") or {}, "attributes of an annotation")


def _track_of(annotation: dict) -> str | int | None:
    """Return the object's id, wherever the tool puts it; 0 is one."""
    holders = [annotation.get(key) for key in TRACKS]
    holders.append(_attributes(annotation).get("track_id"))
    found = next((value for value in holders if value is not None), None)
    if found is None or isinstance(found, str):
        return found
    return coco.whole(found, "track_id", least=-coco.MOST)


def _identity(annotation: dict, place: int) -> tuple[str, str | int]:
    """Return which object an annotation is of, and how that is known: by track, category or place."""
    track = _track_of(annotation)
    if track is not None:
        return "track", track
    category = annotation.get("category_id")
    return ("place", place) if category is None else ("category", identifier(category, "category_id"))


def _twice(images: list[dict], values: list) -> tuple[dict, dict]:
    """Return two images that have one value."""
    seen: dict = {}
    for image, value in zip(images, values, strict=True):
        if value in seen:
            return seen[value], image
        seen[value] = image
    raise AssertionError(values)
