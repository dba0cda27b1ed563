# SPDX-License-Identifier: Apache-2.0
"""The one door to videos with masks of objects, in every format that is known.

| format | frames | masks |
|---|---|---|
| `sav` (SA-V val and test) | JPEGImages_24fps/<video>/00000.jpg | Annotations_6fps/<video>/<object>/00000.png |
| `davis` (also MOSE, YouTube-VOS) | JPEGImages/[480p/]<video>/00000.jpg | Annotations/[480p/]<video>/00000.png |
| `sav_train` (SA-V train) | <video>.mp4, or a folder <video> of frames | <video>_manual.json, else _auto.json |
| `coco_video` | images that a JSON lists, or an mp4 | the JSON, see `coco_video` |
| `youtube_vis` | the same | the JSON, see `youtube_vis` |
| `folders` | frames/<video>/00000.jpg, or frames/<video>.mp4 | masks/<video>/00000.png or .../<object>/00000.png |
| the same, a folder for each video | <video>/frames/00000.jpg | <video>/masks/... |
| `frames` (no masks) | <video>/00000.jpg, or <video>.mp4 | `synthetic_masks` draws some, only where asked for |

Opening lists folders and reads a JSON's lists only; whatever is wrong with a video shows when it is read, as an error
that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from effsam3.data import coco
from effsam3.data.images.pairs import IMAGES, MASKS
from effsam3.data.videos.coco_video import is_coco_video, read_coco_video
from effsam3.data.videos.files import VIDEO_EXTENSIONS
from effsam3.data.videos.frame_list import images_in
from effsam3.data.videos.json_masks import ANNOTATION_FOLDERS
from effsam3.data.videos.mask_pngs import ObjectFolders, PaletteFrames, folders_in
from effsam3.data.videos.sav import KINDS, SavFile
from effsam3.data.videos.vos_video import NoMasks, VosVideo
from effsam3.data.videos.youtube_vis import is_youtube_vis, read_youtube_vis
from effsam3.errors import UserError

RESOLUTIONS = ("480p", "Full-Resolution")  # DAVIS' folders between JPEGImages and its videos; the first that is there
FORMATS = {
    "sav": "SA-V val or test: JPEGImages_24fps and Annotations_6fps",
    "davis": "DAVIS, MOSE or YouTube-VOS: JPEGImages and Annotations",
    "sav_train": "SA-V train: videos with *_manual.json or *_auto.json",
    "coco_video": "COCO-video JSON: an image for every frame",
    "youtube_vis": "YouTube-VIS JSON: an annotation for every object",
    "folders": "folders of frames and of mask PNGs",
    "frames": "frames or videos without masks",
}
JSON_FORMATS = {"youtube_vis": (is_youtube_vis, read_youtube_vis), "coco_video": (is_coco_video, read_coco_video)}


class SplitError(UserError):
    """A list of videos that is not there, or not one of these videos."""


@contextmanager
def named_by(path_key: str, split_key: str) -> Iterator[None]:
    """Put the key of a recipe that named a path, or a list of its videos, before what is wrong with it.

    Raises:
        UserError: as what runs in it.
    """
    try:
        yield
    except SplitError as fault:
        raise UserError(f"{split_key}: {fault}") from fault
    except UserError as fault:
        raise UserError(f"{path_key}: {fault}") from fault


@dataclass(frozen=True)
class Tree:
    """What `recognise` finds: `format` is a key of FORMATS, `about` a sentence; `path` a folder, JSON or video."""

    format: str
    path: Path
    content: dict = field(default_factory=dict, repr=False)  # of a JSON

    @property
    def about(self) -> str:
        return f"{self.path}: {FORMATS[self.format]}"


def open_vos(path: str | Path, split: str | None = None) -> list[VosVideo]:
    """Return the videos of a folder or JSON in order of their names.

    Args:
        split: a list of videos: <path>/<split>.txt, or DAVIS' ImageSets/2017/<split>.txt; None: all videos.

    Raises:
        SplitError: no such list, or one of other videos.
        UserError: no such folder or file, no known format, or no video with masks.
    """
    tree = recognise(path)
    root = tree.path if tree.path.is_dir() else tree.path.parent
    if tree.format == "frames":
        raise UserError(f"{tree.about}; put masks next to them, or ask for synthetic ones (data.masks: synthetic)")
    if tree.format in JSON_FORMATS:
        found = JSON_FORMATS[tree.format][1](tree.content, tree.path)
    elif tree.format == "sav_train":
        found = _sav_train(tree.path)
    else:
        found = _of_folders(tree)
    videos = {video.name: video for video in found}
    if split is not None:
        videos = {name: videos[name] for name in _names(root, split, videos)}
    if not videos:
        raise UserError(f"no video with masks in {tree.about}")
    return [videos[name] for name in sorted(videos)]


def open_frames(path: str | Path) -> list[VosVideo]:
    """Return the videos of a folder or file, whether anybody has annotated them or not, in order of their names.

    Raises:
        UserError: as `open_vos`.
    """
    tree = recognise(path)
    if tree.format != "frames":
        return open_vos(path)
    return [VosVideo(name, frames, NoMasks()) for name, frames in sorted(frame_sources(tree.path).items())]


def recognise(path: str | Path) -> Tree:
    """Say which format a folder or file has.

    Raises:
        UserError: there is none, it has no known format, or it holds several JSONs of videos.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() in VIDEO_EXTENSIONS:
            return Tree("frames", path)
        if path.stem.endswith(tuple(f"_{kind}" for kind in KINDS)):
            return Tree("sav_train", path)
        tree = _json(path)
        if tree is None:
            raise UserError(
                f"{path} is neither a video nor a JSON of videos: {FORMATS['coco_video']}, with `images` "
                f"and `annotations`, or {FORMATS['youtube_vis']}, with `videos` and `annotations`"
            )
        return tree
    if not path.is_dir():
        raise UserError(f"there is no folder or file {path}")
    if (path / "Annotations_6fps").is_dir():
        return Tree("sav", path)
    if (path / "Annotations").is_dir():
        return Tree("davis", path)
    jsons = [tree for file in _json_files(path) if (tree := _json(file)) is not None]
    if len(jsons) > 1:
        raise UserError(
            f"{path} has {len(jsons)} JSONs; give one of them: {', '.join(str(tree.path) for tree in jsons)}"
        )
    if jsons:
        return jsons[0]
    if _pairs(path):
        return Tree("folders", path)
    if any(next(path.rglob(f"*_{kind}.json"), None) for kind in KINDS):
        return Tree("sav_train", path)
    if all((path / name).is_dir() for name in (IMAGES, MASKS)):
        raise UserError(
            f"{path}: these are images with masks (stage adapt reads them); stage video and data convert take videos, "
            "whose frames are in frames/ next to masks/"
        )
    if frame_sources(path):
        return Tree("frames", path)
    raise UserError(
        f"{path} has no known folder tree: Annotations_6fps (SA-V val and test), Annotations (DAVIS, MOSE, "
        "YouTube-VOS: the folder of one split), files *_manual.json (SA-V train), a COCO-video or YouTube-VIS JSON, "
        "folders frames and masks, or frames. Stage adapt reads images with masks, too: images/ next to masks/, or a "
        "COCO JSON"
    )


def _json_files(root: Path) -> list[Path]:
    kinds = tuple(f"_{kind}.json" for kind in KINDS)
    files = [file for name in ("", *ANNOTATION_FOLDERS) for file in (root / name).glob("*.json")]
    return sorted(file for file in files if not file.name.endswith(kinds))


def _json(file: Path) -> Tree | None:
    try:
        content = coco.load_json(file.read_bytes())
    except coco.Malformed as fault:
        raise UserError(f"{file} is no JSON ({fault})") from fault
    return next((Tree(name, file, content) for name, (fits, _) in JSON_FORMATS.items() if fits(content)), None)


# ---- folders


def _of_folders(tree: Tree) -> list[VosVideo]:
    """Return the videos of folders of frames and of mask PNGs."""
    root = tree.path
    if tree.format == "folders":
        return [VosVideo(name, frames, _pngs(name, masks, frames)) for name, (frames, masks) in _pairs(root).items()]
    kind: type[ObjectFolders | PaletteFrames] = ObjectFolders
    frames, masks = root / "JPEGImages_24fps", root / "Annotations_6fps"
    if tree.format == "davis":
        frames, masks, kind = _resolution(root / "JPEGImages"), _resolution(root / "Annotations"), PaletteFrames
    names = [path.name for path in folders_in(masks)]
    return [VosVideo(name, frames / name, kind(name, masks / name, frames / name)) for name in names]


def _pairs(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return {video: (its frames, its masks)} of people's own folders."""
    frames, masks = root / "frames", root / "masks"
    if frames.is_dir() and masks.is_dir():
        if images_in(frames):
            return {root.resolve().name: (frames, masks)}
        return {path.name: (_frames_in(frames, path.name), path) for path in folders_in(masks)}
    return {
        path.name: (path / "frames", path / "masks")
        for path in folders_in(root)
        if (path / "frames").is_dir() and (path / "masks").is_dir()
    }


def _frames_in(folder: Path, name: str) -> Path:
    files = (folder / f"{name}{ending}" for ending in VIDEO_EXTENSIONS)
    return next((file for file in files if file.is_file()), folder / name)


def _pngs(name: str, masks: Path, frames: Path) -> ObjectFolders | PaletteFrames:
    return ObjectFolders(name, masks, frames) if folders_in(masks) else PaletteFrames(name, masks, frames, binary=True)


def frame_sources(root: Path) -> dict[str, Path]:
    """Return {video: its file or folder of images} of a folder that holds nothing else, or of one such video."""
    if root.is_file():
        return {root.stem: root}
    root = root / "frames" if (root / "frames").is_dir() else root
    if images_in(root):
        return {root.resolve().name: root}
    files = {file.stem: file for file in sorted(root.iterdir()) if file.suffix.lower() in VIDEO_EXTENSIONS}
    return files | {path.name: path for path in folders_in(root) if images_in(path)}


def _sav_train(root: Path) -> list[VosVideo]:
    videos: dict[str, VosVideo] = {}
    for kind in reversed(KINDS):  # manual ones replace automatic ones
        found: dict[str, Path] = {}
        for path in [root] if root.is_file() else sorted(root.rglob(f"*_{kind}.json")):
            if not path.stem.endswith(f"_{kind}"):
                continue
            name = path.stem.removesuffix(f"_{kind}")
            if (other := found.setdefault(name, path)) != path:
                raise UserError(f"{other} and {path} are of one video; give the folder of one of them")
            folder = path.with_name(name)
            frames = folder if folder.is_dir() else path.with_name(f"{name}.mp4")
            videos[name] = VosVideo(name, frames, SavFile(path))
    return list(videos.values())


def _resolution(path: Path) -> Path:
    return next((path / name for name in RESOLUTIONS if (path / name).is_dir()), path)


def _names(root: Path, split: str, videos: dict) -> list[str]:
    lists = [root / f"{split}.txt", *root.glob(f"ImageSets/*/{split}.txt"), root / "ImageSets" / f"{split}.txt"]
    file = next((path for path in lists if path.is_file()), None)
    if file is None:
        raise SplitError(f"there is no {split}.txt in {root} or its ImageSets")
    try:
        names = file.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise SplitError(f"{file} is not a text in UTF-8 ({error}); write one name of a video in each line") from error
    missing = [name for name in names if name not in videos]
    if missing:
        raise SplitError(f"{file} names {len(missing)} videos without masks, such as {missing[0]}")
    return names
