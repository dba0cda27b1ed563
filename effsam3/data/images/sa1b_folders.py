# SPDX-License-Identifier: Apache-2.0
"""List the images and annotations of SA-1B in any folder tree it is kept in, without opening an image.

Folder trees: a folder of `sa_N.jpg` + `sa_N.json`, also in subfolders, also any photographs without JSON;
`images/{train,val}` + `annotations/{train,val}`; tars as released, also in folders.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from effsam3.data.images.decoding import EXTENSIONS
from effsam3.data.indexing import printable, relative, walk
from effsam3.data.sorted_file import SortedFile
from effsam3.data.splits import SPLITS, split_of
from effsam3.data.store.format import storable
from effsam3.data.workers import in_order
from effsam3.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # first bytes of gzip, bzip2, xz, zstd


class Blob(NamedTuple):
    """A plain file, or a member of a tar."""

    file: str  # posix path relative to the parquet's folder
    member: str  # "" for a plain file
    offset: int  # bytes; 0 for a plain file
    size: int  # bytes
    mtime_ns: int  # of the file

    @property
    def name(self) -> str:
        return printable(f"{self.file}:{self.member}" if self.member else self.file)

    def place(self, what: str) -> dict[str, str | int]:
        """Return the columns of an index that lead to it as an `image` or `annotation`."""
        return {f"{what}_file": self.file, f"{what}_offset": self.offset, f"{what}_bytes": self.size}


class Entry(NamedTuple):
    """An image, its split and its annotations."""

    key: str
    split: str  # "" where the image's content will decide
    image: Blob
    annotation: Blob | None


class TarScan(NamedTuple):
    """The whole files in a tar: (name, offset of the data, bytes)."""

    members: list[tuple[str, int, int]]
    problem: str  # compressed, corrupt, unreadable, truncated (all whole members are listed), or ""
    cut: str  # the member a truncated tar ends in, or ""


class Listing:
    """What the sources hold: entries in order of their keys, and by reason the names of what cannot be used."""

    def __init__(self, entries: SortedFile):
        self._entries = entries
        self.excluded: dict[str, list[str]] = {}
        self.annotation_problems: dict[str, list[str]] = {}
        self.tars: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        for key, (split, image, annotation) in self._entries.items():
            yield Entry(key, split, Blob(*image), annotation and Blob(*annotation))

    def add(self, entry: Entry) -> None:
        """Add an entry; of two images with one key the first stays."""
        earlier = self._entries.get(entry.key)
        if earlier is None:
            self._entries[entry.key] = entry[1:]
        elif Blob(*earlier[1]) != entry.image:
            self.excluded.setdefault("duplicate", []).append(entry.image.name)


def check_sources(sources: list[Path]) -> None:
    """Raise UserError unless every source is a folder or a plain tar."""
    if not sources:
        raise UserError("no source; give folders, or tars as released (sa_000020.tar)")
    for source in sources:
        if not source.exists():
            raise UserError(f"{source} does not exist; give folders, or tars as released (sa_000020.tar)")
        if source.name.endswith(COMPRESSED):
            raise UserError(f"{source} is compressed; decompress it first, only a plain .tar can be read in place")
        if source.is_file() and source.suffix != ".tar":
            raise UserError(f"{source} is neither a folder nor a .tar; give the folder it is in")


def list_sources(
    sources: list[Path],
    folder: Path,
    val_fraction: float,
    submit: Callable,
    workers: int,
    entries: SortedFile,
    own: bool = False,
) -> Listing:
    """Pair images with their JSON, give each a split, and drop the second of two with the same key.

    `folder` is the parquet's; `submit(function, argument)` returns a future, and is given the tars to scan; `entries`
    is empty. With `own` a key is the path below its source, and no split is given.
    """
    listing = Listing(entries)
    tars: dict[Path, str] = {}  # path: its path below its source
    with ExitStack() as stack:
        folders: dict[str, tuple[SortedFile, bool]] = {}  # path: (files in it, split by folder?)
        for root in dict.fromkeys(source.resolve() for source in sources):
            if root.is_file():
                tars[root] = root.name
            else:
                files = stack.enter_context(SortedFile(entries.folder))
                folders[str(root)] = files, _list_folder(root, files, tars, folder, listing, own)
        scans = in_order((submit(scan_tar, Path(name)) for name in sorted(map(str, tars))), ahead=2 * workers)
        # Sorted, so that which of two images of one name stays does not depend on the order of the sources.
        for name in sorted([*folders, *map(str, tars)]):
            stems: Iterable[tuple[str, dict]]
            if name in folders:
                files, split_by_folder = folders[name]
                inside, stems = "", files.items()
            else:
                inside, split_by_folder = f"{tars[Path(name)]}/", False
                stems = _tar_stems(Path(name), next(scans), folder, listing)
            naming = partial(_own_name, inside) if own else partial(_sa1b_name, split_by_folder, val_fraction)
            _pair(stems, naming, listing)
    return listing


def _list_folder(
    root: Path, files: SortedFile, tars: dict[Path, str], folder: Path, listing: Listing, own: bool
) -> bool:
    """Put a folder's images and JSON into `files` and its tars into `tars`; return whether it is split by folder."""
    images, annotations = root / "images", root / "annotations"
    # By more than the name: any photographs may be in a folder called images.
    reorganised = (
        not own and images.is_dir() and any((part).is_dir() for part in (annotations, *map(images.joinpath, SPLITS)))
    )
    for top in (images, annotations) if reorganised else (root,):
        for path, blob in _walk(top, folder, listing, own):
            below = path.relative_to(top)
            if path.suffix == ".tar":
                tars[path] = below.as_posix()
            elif path.name.endswith(COMPRESSED):
                listing.tars.setdefault("compressed", []).append(blob.name)
            else:
                stem = _stem(below)
                files[stem] = (files.get(stem) or {}) | {path.suffix: blob}
    return reorganised


def _stem(path: PurePath) -> str:
    """Return a path without its suffix as a key: in order of these are the paths, folder by folder."""
    return "\0".join(path.with_suffix("").parts)


def _walk(top: Path, folder: Path, listing: Listing, own: bool) -> Iterator[tuple[Path, Blob]]:
    """Yield the files of interest below `top`, through links to folders, without hidden ones.

    In a folder of one's own the others are listed, too: they may be photographs in a format that nobody reads here.
    """

    def unreadable(fault: OSError) -> None:
        listing.excluded.setdefault("unreadable", []).append(printable(os.path.relpath(fault.filename, folder)))

    for _, files in walk([top], unreadable):
        for path in files:
            if path.suffix.lower() in (*EXTENSIONS, ".json", ".tar") or path.name.endswith(COMPRESSED):
                try:
                    status = path.stat()
                except OSError as fault:  # a broken link
                    unreadable(fault)
                    continue
                yield path, Blob(relative(path, folder), "", 0, status.st_size, status.st_mtime_ns)
            elif own and path.suffix != ".parquet":
                listing.excluded.setdefault("other_file", []).append(printable(relative(path, folder)))


def scan_tar(path: Path) -> TarScan:
    """List the whole files in a tar, as far as it can be read; never raises for what is wrong with the tar."""
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # a list of them all; typeshed does not know it
                    # tarfile would only notice when it reads the data, which nobody does here.
                    if member.offset_data + member.size > size:
                        return TarScan(members, "truncated", member.name)
                    # A sparse member is no single stretch of bytes.
                    if member.isreg() and member.sparse is None:
                        members.append((member.name, member.offset_data, member.size))
            except tarfile.ReadError:
                return TarScan(members, "truncated", "")
            file.seek(tar.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)  # a block of zeros ends a tar
            return TarScan(members, "" if whole else "truncated", "")
    except tarfile.ReadError:
        with open(path, "rb") as file:
            return TarScan([], "compressed" if file.read(6).startswith(MAGIC) else "corrupt", "")
    except OSError:
        return TarScan([], "unreadable", "")


def _tar_stems(path: Path, scan: TarScan, folder: Path, listing: Listing) -> list[tuple[str, dict[str, Blob]]]:
    """Return the files in a tar by stem, as `_pair` takes them."""
    file, mtime_ns = relative(path, folder), path.stat().st_mtime_ns
    if scan.problem:
        listing.tars.setdefault(scan.problem, []).append(printable(file))
    if scan.cut:
        listing.excluded.setdefault("truncated", []).append(printable(f"{file}:{scan.cut}"))
    stems: dict[str, dict[str, Blob]] = {}
    for member, offset, size in scan.members:
        inside = PurePosixPath(member)
        stems.setdefault(_stem(inside), {})[inside.suffix] = Blob(file, str(inside), offset, size, mtime_ns)
    return sorted(stems.items())


def _sa1b_name(split_by_folder: bool, val_fraction: float, path: PurePosixPath) -> tuple[str, str]:
    """Return the key and the split of an image of SA-1B, whose file stems are unique."""
    by_folder = split_by_folder and path.parts[0] in SPLITS
    return path.stem, path.parts[0] if by_folder else split_of(path.stem, val_fraction)


def _own_name(inside: str, path: PurePosixPath) -> tuple[str, str]:
    """Return the key of a photograph of one's own: its path below the source, through the tar that it is inside."""
    return f"{inside}{path}", ""


def _pair(stems: Iterable[tuple[str, dict]], naming: Callable, listing: Listing) -> None:
    """Pair `a/sa_1.jpg` with `a/sa_1.json`; `naming(path)` returns an image's key and split.

    Args:
        stems: in order, with the files of each by suffix.
    """
    for stem, files in stems:
        path = PurePosixPath(*stem.split("\0"))
        if path.name.startswith("."):
            continue
        blobs = {suffix: Blob(*blob) for suffix, blob in sorted(files.items())}
        annotation = blobs.pop(".json", None)
        for suffix, image in blobs.items():
            if suffix.lower() not in EXTENSIONS:
                continue
            name = f"{path}{suffix}"
            if printable(name) != name or not storable(name):  # no parquet or no store can hold it
                listing.excluded.setdefault("undecodable_name", []).append(image.name)
            else:
                key, split = naming(PurePosixPath(name))
                listing.add(Entry(key, split, image, annotation))
            annotation = None
        if annotation is not None and not path.name.endswith(".report"):
            listing.annotation_problems.setdefault("without_image", []).append(annotation.name)
