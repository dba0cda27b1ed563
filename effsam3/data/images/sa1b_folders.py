# SPDX-License-Identifier: Apache-2.0
"""List the images and annotations of SA-1B in any folder tree it is kept in, without opening an image.

Folder trees: a folder of `sa_N.jpg` + `sa_N.json`, also in subfolders, also any photographs without JSON;
`images/{train,val}` + `annotations/{train,val}`; tars as released, also in folders.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from effsam3.data.images.decoding import EXTENSIONS
from effsam3.data.indexing import printable, relative, walk
from effsam3.data.splits import SPLITS, split_of
from effsam3.data.store.format import storable
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


@dataclass
class Listing:
    """What the sources hold, and by reason the names of what cannot be used."""

    groups: list[list[Entry]] = field(default_factory=list)  # one per folder or tar; a key occurs once in all of them
    excluded: dict[str, list[str]] = field(default_factory=dict)
    annotation_problems: dict[str, list[str]] = field(default_factory=dict)
    tars: dict[str, list[str]] = field(default_factory=dict)


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
    sources: list[Path], folder: Path, val_fraction: float, submit: Callable, own: bool = False
) -> Listing:
    """Pair images with their JSON, give each a split, and drop the second of two with the same key.

    `folder` is the parquet's; `submit(function, argument)` returns a future, and is given the tars to scan. With `own`
    a key is the path below its source, and no split is given.
    """
    listing = Listing()
    containers: dict[str, tuple[dict[str, Blob], bool]] = {}  # path: ({name in it: blob}, split by folder?)
    tars: dict[Path, str] = {}  # path: its path below its source
    for source in sources:
        root = source.resolve()
        if root.is_file():
            tars[root] = root.name
            continue
        images, annotations = root / "images", root / "annotations"
        # By more than the name: any photographs may be in a folder called images.
        reorganised = (
            not own
            and images.is_dir()
            and any((part).is_dir() for part in (annotations, *map(images.joinpath, SPLITS)))
        )
        blobs = {}
        for top in (images, annotations) if reorganised else (root,):
            for path, blob in _walk(top, folder, listing, own):
                if path.suffix == ".tar":
                    tars[path] = path.relative_to(top).as_posix()
                elif path.name.endswith(COMPRESSED):
                    listing.tars.setdefault("compressed", []).append(blob.name)
                else:
                    blobs[path.relative_to(top).as_posix()] = blob
        containers[str(root)] = blobs, reorganised
    for path, scan in [(path, submit(scan_tar, path)) for path in sorted(tars)]:
        containers[str(path)] = _tar_blobs(path, scan.result(), folder, listing), False

    seen: dict[str, Entry] = {}
    # Sorted, so that which of two images of one name stays does not depend on the order of the sources.
    for name, (blobs, split_by_folder) in sorted(containers.items()):
        inside = f"{tars[Path(name)]}/" if Path(name) in tars else ""
        naming = partial(_own_name, inside) if own else partial(_sa1b_name, split_by_folder, val_fraction)
        entries = _pair(blobs, naming, listing)
        listing.groups.append([entry for entry in entries if seen.setdefault(entry.key, entry) is entry])
        again = [entry.image.name for entry in entries if seen[entry.key].image != entry.image]
        listing.excluded.setdefault("duplicate", []).extend(again)
    return listing


def _walk(top: Path, folder: Path, listing: Listing, own: bool) -> Iterator[tuple[Path, Blob]]:
    """Yield the files of interest below `top`, in sorted order, through links to folders, without hidden ones.

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
                for member in tar:
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


def _tar_blobs(path: Path, scan: TarScan, folder: Path, listing: Listing) -> dict[str, Blob]:
    file, mtime_ns = relative(path, folder), path.stat().st_mtime_ns
    if scan.problem:
        listing.tars.setdefault(scan.problem, []).append(printable(file))
    if scan.cut:
        listing.excluded.setdefault("truncated", []).append(printable(f"{file}:{scan.cut}"))
    return {
        str(PurePosixPath(name)): Blob(file, str(PurePosixPath(name)), offset, size, mtime_ns)
        for name, offset, size in scan.members
    }


def _sa1b_name(split_by_folder: bool, val_fraction: float, path: PurePosixPath) -> tuple[str, str]:
    """Return the key and the split of an image of SA-1B, whose file stems are unique."""
    by_folder = split_by_folder and path.parts[0] in SPLITS
    return path.stem, path.parts[0] if by_folder else split_of(path.stem, val_fraction)


def _own_name(inside: str, path: PurePosixPath) -> tuple[str, str]:
    """Return the key of a photograph of one's own: its path below the source, through the tar that it is inside."""
    return f"{inside}{path}", ""


def _pair(blobs: dict[str, Blob], naming: Callable, listing: Listing) -> list[Entry]:
    """Pair `a/sa_1.jpg` with `a/sa_1.json`, in sorted order; `naming(path)` returns an image's key and split."""
    paths = sorted(path for path in map(PurePosixPath, blobs) if not path.name.startswith("."))
    annotations = {str(path.with_suffix("")): path for path in paths if path.suffix == ".json"}
    entries = []
    for path in paths:
        if path.suffix.lower() not in EXTENSIONS:
            continue
        json_path = annotations.pop(str(path.with_suffix("")), None)
        if printable(str(path)) != str(path) or not storable(str(path)):  # no parquet or no store can hold it
            listing.excluded.setdefault("undecodable_name", []).append(blobs[str(path)].name)
            continue
        key, split = naming(path)
        annotation = None if json_path is None else blobs[str(json_path)]
        entries.append(Entry(key, split, blobs[str(path)], annotation))
    unpaired = [blobs[str(path)].name for path in annotations.values() if not path.name.endswith(".report.json")]
    listing.annotation_problems.setdefault("without_image", []).extend(unpaired)
    return entries
