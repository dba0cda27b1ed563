# SPDX-License-Identifier: Apache-2.0
"""Images with masks of one's own: a COCO JSON, or a folder `images/` next to a folder `masks/`.

Nothing downstream knows which of them it was: all it sees are `Pair`s.

Letters: H W rows and columns of an image.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effsam3.data import coco
from effsam3.data.images.decoding import EXTENSIONS, decode_image
from effsam3.data.problems import Note, amount
from effsam3.data.unreadable import UnreadableAnnotations, UnreadableImage
from effsam3.data.videos.json_masks import ANNOTATION_FOLDERS, FrameFinder, size_of
from effsam3.data.videos.mask_pngs import VOID, read_png
from effsam3.errors import UserError, did_you_mean

IMAGES, MASKS, TABLE = "images", "masks", "images.csv"
MOST_IDS = 100  # values of a grey mask; smoothed edges have more, and would become objects
LAYOUTS = (
    "a COCO JSON (or a folder with exactly one, there or in its annotations/), or a folder with images/NAME.jpg and "
    "masks/NAME.png, or masks/CATEGORY/NAME.png"
)


@dataclass(frozen=True)
class Source:
    """One or more objects of one category: an RLE, or a PNG whose values are ids."""

    category: str  # "" where the data name none
    mask: dict | Path


@dataclass(frozen=True)
class Pair:
    """An image and the masks of its objects, which are read when they are asked for.

    Attributes:
        name: of the image, unique in its data set.
        file: of the image.
        size: (H, W) that the masks are said to have; None: that of the image.
        view: value of the column of views, "" without one.
    """

    name: str
    file: Path
    size: tuple[int, int] | None = None
    view: str = ""
    sources: tuple[Source, ...] = field(default=(), repr=False)

    @property
    def categories(self) -> list[str]:
        """Categories with a mask here, each once, in order of their names."""
        return sorted({source.category for source in self.sources})

    def image(self) -> np.ndarray:
        """Return the image, uint8 RGB [H, W, 3], upright. Raises UnreadableImage."""
        try:
            data = self.file.read_bytes()
        except OSError as fault:
            raise UnreadableImage(self.name, "unreadable", str(fault)) from fault
        return decode_image(data, key=self.name)[0]

    def masks(self, height: int, width: int) -> list[tuple[str, np.ndarray]]:
        """Return (category, mask) of every object, bool [H, W] and none of them empty, for an image of this size.

        Raises:
            UnreadableAnnotations: a file cannot be read, or is not of the image's size.
        """
        if self.size not in (None, (height, width)):
            detail = f"the masks of {self.file.name} are for {self.size} (rows, columns), it has {(height, width)}"
            raise UnreadableAnnotations(self.name, "size_mismatch", detail)
        found = []
        for source in self.sources:
            if isinstance(source.mask, Path):
                found += [(source.category, mask_HW) for mask_HW in _objects_of(source.mask, (height, width))]
            else:
                found.append((source.category, coco.decode(source.mask, height, width)))
        return found


def recognise(path: str | Path) -> str | None:
    """Say in words which of the layouts is at `path`, None for neither; nothing is read but a JSON."""
    found = _layout(Path(path))
    return None if found is None else found[0]


def open_pairs(
    path: str | Path, images: str | Path | None = None, view: str | None = None
) -> tuple[list[Pair], list[Note]]:
    """Return the images of a data set in order of their names, and what was left out or taken for granted.

    Args:
        images: COCO JSON only: the folder of its images; None: where tools put them, see `FrameFinder`.
        view: the column of views: a key of the JSON's `images[]`, or a column of `images.csv` in the folder.

    Raises:
        UserError: there is nothing, neither layout, no image, or an image without a view.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"data.path: there is no {path}; give {LAYOUTS}")
    if (found := _layout(path)) is None:
        raise UserError(f"data.path: {path} is neither layout of images with masks; give {LAYOUTS}")
    kind, place = found
    if place.is_dir():
        pairs, notes = _of_folder(place, view)
    else:
        pairs, notes = _of_coco(place, None if images is None else Path(images), view)
    if not pairs:
        raise UserError(f"data.path: {path} ({kind}) has no image; give {LAYOUTS}")
    return sorted(pairs, key=lambda pair: pair.name), notes


def _layout(path: Path) -> tuple[str, Path] | None:
    """Return the layout in words and its folder or JSON: the path, or the only one in it or in its annotations/."""
    if (path / IMAGES).is_dir() and (path / MASKS).is_dir():
        return "images and masks in folders", path
    places = [[path]] if path.is_file() else [[*(path / name).glob("*.json")] for name in ("", *ANNOTATION_FOLDERS)]
    files = (files[0] for files in places if len(files) == 1 and files[0].suffix == ".json")
    return next((("COCO JSON of images", file) for file in files if _is_coco(file)), None)


def _is_coco(file: Path) -> bool:
    try:
        content = coco.load_json(file.read_bytes())
    except coco.Malformed:
        return False
    return isinstance(content, dict) and "videos" not in content and {"images", "annotations"} <= content.keys()


# ---- a COCO JSON


def _of_coco(file: Path, images: Path | None, view: str | None) -> tuple[list[Pair], list[Note]]:
    """Read a COCO JSON. iscrowd is not looked at: tools mark masks with it that are masks like any other."""
    try:
        content = coco.load_json(file.read_bytes())
        rows = [coco.mapping(row, "an entry of images", ("id",)) for row in coco.listed(content["images"], "images")]
        annotations = coco.listed(content["annotations"], "annotations")
        listed = coco.listed(content.get("categories", []), "categories")
        categories = {
            str(row["id"]): str(row["name"]) for row in listed if coco.mapping(row, "a category", ("id", "name"))
        }
        # As texts: some tools write them so in one place only.
        sizes = {str(row["id"]): size_of(row, f"image {row['id']}") for row in rows}
        if len(sizes) < len(rows):
            twice = Counter(str(row["id"]) for row in rows).most_common(1)[0][0]
            raise coco.Malformed(f"two images have the id {twice}; whose the annotations are is not clear")
    except coco.Malformed as fault:
        raise UserError(f"data.path: {file}: {fault}") from fault
    if view is not None and rows and not any(view in row for row in rows):
        raise UserError(f"data.view: no image of {file} has {view!r}{did_you_mean(view, list(rows[0]))}")
    notes: list[Note] = []
    sources: dict[str, list[Source]] = {key: [] for key in sizes}
    for number, annotation in enumerate(annotations):
        where = f"{file.name}, annotation {annotation.get('id', number) if isinstance(annotation, dict) else number}"
        try:
            image = str(coco.mapping(annotation, "it", ("image_id",))["image_id"])
            if image not in sources:
                notes.append(Note("no_image", where, f"image_id {image} is not in images"))
                continue
            if not annotation.get("segmentation"):
                notes.append(Note("no_mask", where, "only a box; left out"))
                continue
            rle = _checked(annotation["segmentation"], sizes[image])
        except coco.Malformed as fault:
            notes.append(Note(fault.reason or "bad_mask", where, f"{fault}; left out"))
            continue
        if rle is None:
            notes.append(Note("empty_mask", where, "left out"))
            continue
        sources[image].append(Source(categories.get(str(annotation.get("category_id")), ""), rle))
    pairs: list[Pair] = []
    folders = FrameFinder(file).folders if images is None else [images]
    searched = " or ".join(map(str, folders))
    missing = []
    for row in rows:
        name = str(row.get("file_name") or row.get("path") or row["id"])
        place = _image_file(row, folders)
        if place is None:
            missing.append(Note("missing_image", name, f"it is not in {searched}"))
            continue
        if not sources[str(row["id"])]:
            notes.append(Note("no_objects", name, f"{file.name} has no mask of it"))
        key = str(row["id"])
        pairs.append(Pair(name, place, sizes[key], _view(row, view, name), tuple(sources[key])))
    if missing and not pairs:
        raise UserError(
            f"data.path: {file} lists {amount(len(missing), 'image')}, none of which is in {searched} (first: "
            f"{missing[0].where}); give their folder, data.images (--images of data check)"
        )
    _refuse_one_name(pairs, file)
    return pairs, notes + missing


def _checked(segmentation: Any, size: tuple[int, int] | None) -> dict | None:
    """Return a mask as an RLE of this size, or of its own; None for an empty one. Raises coco.Malformed."""
    if size is None:  # some tools know no size: an RLE brings its own, a polygon does not
        own = coco.mapping(segmentation, "a polygon of an image without width and height, it", ("size",))["size"]
        height, width = coco.numbers(own, "size", 2)
        size = coco.whole(height, "height"), coco.whole(width, "width")
    rle = coco.to_rle(segmentation, *size)
    return rle if coco.runs_of(rle)[1::2].sum() else None


def _image_file(row: dict, folders: list[Path]) -> Path | None:
    # `path` may be the address of a task in the tool that wrote it; then the file's name is all that there is.
    names = [str(row[key]) for key in ("path", "file_name") if row.get(key)]
    places = (folder / name.lstrip("/") for name in names for folder in folders)
    return next((place for place in places if place.is_file()), None)


def _refuse_one_name(pairs: list[Pair], file: Path) -> None:
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"data.path: {file} lists {twice} twice in images; list each image once")


# ---- folders of images and masks


def _of_folder(root: Path, view: str | None) -> tuple[list[Pair], list[Note]]:
    """Read `images/` and `masks/`. A mask has its image's path, or that path below a folder named by its category."""
    images = _files(root / IMAGES, EXTENSIONS)
    rows = _table(root / TABLE, view) if view is not None else {}
    sources: dict[str, list[Source]] = {name: [] for name in images}
    notes = []
    for name, file in _files(root / MASKS, (".png",)).items():
        category, _, below = name.partition("/")
        if name in sources:
            sources[name].append(Source("", file))
        elif below in sources:
            sources[below].append(Source(category, file))
        else:
            notes.append(Note("no_image", str(file), f"there is no image {name} in {root / IMAGES}"))
    # Only PNGs are read as masks: JPEG blurs what their values mean.
    others = _files(root / MASKS, tuple(ending for ending in EXTENSIONS if ending != ".png"))
    unread = [file for name, file in others.items() if sources.get(name, sources.get(name.partition("/")[2])) == []]
    if unread:
        detail = f"{MASKS}/ holds files named like {IMAGES}/'s: are the two swapped? Masks are PNGs ({unread[0].name})"
        notes.append(Note("no_png", str(root / MASKS), detail))
    pairs = []
    for name, file in images.items():
        if not sources[name]:
            notes.append(Note("no_objects", str(file), f"{root / MASKS} has no mask of it"))
        seen = _view(rows.get(name, {}), view, name)
        pairs.append(Pair(name, file, None, seen, tuple(sources[name])))
    return pairs, notes


def _files(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """Return {path below the folder, without its ending: file}."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in endings and not file.name.startswith(".") and file.is_file():
            other = found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
            if other != file:
                raise UserError(f"data.path: {other} and {file.name} have one name; rename one of them")
    return found


def _table(file: Path, view: str) -> dict[str, dict]:
    """Read the table of images: columns `name` (path below images/, with or without its ending) and the views'."""
    if not file.is_file():
        raise UserError(f"data.view: {view!r} is a column of {file}, which is not there; columns: name,{view}")
    with open(file, encoding="utf-8-sig", newline="") as stream:
        try:
            rows = list(csv.DictReader(stream))
        except (csv.Error, UnicodeDecodeError) as fault:
            raise UserError(f"data.view: {file} is not a table in UTF-8 ({fault})") from fault
    columns = list(rows[0]) if rows else []
    for column in ("name", view):
        if column not in columns:
            raise UserError(f"data.view: {file} has no column {column!r}{did_you_mean(column, columns)}")
    return {Path(row["name"]).with_suffix("").as_posix(): row for row in rows}


def _view(row: Mapping[str, Any], view: str | None, name: str) -> str:
    if view is None:
        return ""
    if row.get(view) in (None, ""):
        raise UserError(f"data.view: {name} has no {view!r}; give every image one")
    return str(row[view])


# ---- masks in PNGs


def _objects_of(file: Path, size: tuple[int, int]) -> list[np.ndarray]:
    """Return the masks of a PNG: one where it is binary, else one for each id. Raises UnreadableAnnotations."""
    values_HW = read_png(file, file.name)
    if values_HW.shape != size:
        detail = f"{file} has {values_HW.shape} (rows, columns), its image {size}"
        raise UnreadableAnnotations(file.name, "size_mismatch", detail)
    ids = np.unique(values_HW)
    ids = ids[ids != 0]
    if len(ids) > MOST_IDS:
        detail = f"{file} has {len(ids)} values above 0; a mask is binary, or holds the id of an object in each pixel"
        raise UnreadableAnnotations(file.name, "grey_mask", detail)
    if len(ids) > 1 and values_HW.dtype == np.uint8:  # next to ids it marks what nobody knows, as in DAVIS
        ids = ids[ids != VOID]
    return [values_HW == value for value in ids]
