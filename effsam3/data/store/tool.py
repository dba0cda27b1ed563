# SPDX-License-Identifier: Apache-2.0
"""The command `effsam3 store`: show, verify and import embedding stores.

effsam3 store show PATH
effsam3 store verify PATH [--index INDEX]
effsam3 store import SOURCE PATH [--channels C --grid G]
"""

from __future__ import annotations

from pathlib import Path

from effsam3.data.store.format import Field, Manifest, flat, list_shards, open_manifest, remedy
from effsam3.errors import UserError

SHOWN = 10  # skipped images and bad records listed by name


def show(root: Path) -> int:
    """Print the manifest, and how many bytes the shards take."""
    manifest = open_manifest(root)
    shards = list_shards(root, manifest)
    stored = sum(shard.records for shard in shards)
    size = sum((root / shard.file).stat().st_size for shard in shards if (root / shard.file).exists())
    state = (
        "finished" if manifest.finished else "unfinished: run `effsam3 embed` again, it writes only what is missing"
    )
    total = "" if manifest.finished or manifest.expected is None else f" of {manifest.expected:,}"
    print(f"{root}  ({state})")
    print(f"records    {manifest.records if manifest.finished else stored:,}{total}")
    print(f"on disk    {_bytes(size)} in {len(shards)} shards, {_bytes(manifest.payload)} per record")
    if manifest.finished:
        print(f"skipped    {len(manifest.skipped)}")
    print("\nfield            type      shape                    bytes")
    for field in manifest.fields:
        shape = " x ".join(map(str, field.shape))
        print(f"{field.name:<16} {field.dtype:<9} {shape:<18} {field.nbytes:>11,}")
    print()
    for name, value in flat(manifest.description).items():
        print(f"{name:<26} {value}")
    _print_statistics(manifest)
    if manifest.skipped:
        print("\nskipped")
        for entry in manifest.skipped[:SHOWN]:
            print(f"  {entry['key']}: {entry['reason']}")
        _print_rest(len(manifest.skipped))
    return 0


def _print_statistics(manifest: Manifest) -> None:
    if not manifest.statistics:
        return
    print("\nstatistic        values        lowest          mean       highest")
    for name, value in manifest.statistics.items():
        values = value if isinstance(value, list) else [value]
        print(
            f"{name:<16} {len(values):>6} {min(values):>13.5g} {sum(values) / len(values):>13.5g} {max(values):>13.5g}"
        )


def _print_rest(count: int) -> None:
    if count > SHOWN:
        print(f"  and {count - SHOWN:,} more")


def _bytes(count: int) -> str:
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    size, unit = float(count), next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.4g} {unit}"


def verify(root: Path) -> int:
    """Print every damaged record and what to do; return 1 if there is one."""
    from tqdm import tqdm

    from effsam3.data.store.reader import verify_store

    manifest = open_manifest(root)
    total = sum(shard.records for shard in list_shards(root, manifest))
    with tqdm(total=total, unit=" records", desc="verify") as bar:
        report = verify_store(root, bar.update)
    print(f"{report.checked:,} of {total:,} records have the right checksum")
    if report.unchecked:
        print(f"{report.unchecked:,} imported records are whole, but have no checksum to compare")
    if not report.bad:
        return 0
    print(f"{len(report.bad):,} records are damaged")
    for record in report.bad[:SHOWN]:
        print(f"  {record.key} in {record.shard.file}: {record.reason}")
    _print_rest(len(report.bad))
    for advice in dict.fromkeys(remedy(record.shard) for record in report.bad):
        print(f"to fix it: {advice}")
    return 1


def verify_images(root: Path, index: Path) -> int:
    """Print the images of an index that are not those whose features are stored; return 1 if there is one."""
    from tqdm import tqdm

    from effsam3.data.images.features import store_keys
    from effsam3.data.images.sa1b import load_index, read_indexed
    from effsam3.data.store.format import untied
    from effsam3.data.store.reader import StoreReader
    from effsam3.data.unreadable import UnreadableImage

    reader = StoreReader(root, allow_unfinished=True)
    rows, tied = load_index(index), reader.manifest.ties_inputs
    keys = store_keys(rows, tied)
    skipped = {entry["key"] for entry in reader.manifest.skipped}
    missing = [key for key in reader.missing(keys) if key not in skipped]
    # Told apart, since they are two mistakes: an image that changed, and one that was never embedded.
    replaced = set(reader.replaced(missing))
    wrong = [f"{name}: replaced since its features were made; embed again" for name in sorted(replaced)]
    wrong += [f"{key}: has no features; embed again" for key in missing if key.rpartition("@")[0] not in replaced]
    for row in tqdm(rows, unit=" images", desc="images"):
        try:
            read_indexed(row, index.parent, "image")
        except UnreadableImage as error:
            wrong.append(str(error))
    if not tied:
        print(untied(root))
    print(f"{len(rows):,} images of {index}: {len(wrong):,} are not those whose features are stored")
    for line in wrong[:SHOWN]:
        print(f"  {line}")
    _print_rest(len(wrong))
    return 1 if wrong else 0


def import_(source: Path, root: Path, channels: int | None, grid: int | None) -> int:
    """Imports upstream's shards and shows the result."""
    from effsam3.data.store.importing import import_upstream

    if (channels is None) != (grid is None):
        raise UserError("--channels and --grid go together; give both, or neither")
    field = None if channels is None or grid is None else Field("features", "float16", (channels, grid, grid))
    import_upstream(source, root, field)
    return show(root)
