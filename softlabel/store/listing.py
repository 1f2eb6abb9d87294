"""What a store lists: the root and every record, read, checked, and compared with the sizes on disk."""

from collections.abc import Sequence

from softlabel.errors import StoreCorruptError, StoreError, StoreNotFoundError
from softlabel.store.folder import Folder
from softlabel.store.manifest import (
    ROOT_LIMIT,
    ROOT_NAME,
    SEGMENT_LIMIT,
    ExtraRef,
    Manifest,
    SegmentRef,
    ShardRecord,
)
from softlabel.store.root import decode_root, decode_segment


def load_manifest(folder: Folder) -> tuple[Manifest, list[ShardRecord]]:
    """The root and all records, by number. Reads once more when a committer replaced the open segment meanwhile."""
    for attempt in (1, 2, 3):
        try:
            raw = folder.read(ROOT_NAME, ROOT_LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreNotFoundError(
                f"{folder}: no store here (no {ROOT_NAME}); check the path, or write one with 'softlabel generate'"
            ) from None
        except PermissionError as error:
            raise StoreError(f"{folder}: cannot be read: {error.strerror}") from None
        manifest = decode_root(raw, str(folder.path(ROOT_NAME)))
        try:
            records = [record for ref in manifest.segments for record in read_segment(folder, ref)]
            break
        except FileNotFoundError as error:
            if attempt == 3 or manifest.complete:
                raise StoreCorruptError(
                    f"{error.filename}: is listed in {ROOT_NAME} and missing; copy the store again from its source"
                ) from None
    _check_records(folder, manifest, records)
    return manifest, sorted(records, key=lambda record: record.number)


def _check_records(folder: Folder, manifest: Manifest, records: list[ShardRecord]) -> None:
    where, run = folder.path(ROOT_NAME), manifest.run
    if len({record.number for record in records}) != len(records):
        raise StoreCorruptError(f"{where}: a shard is listed twice")
    planned = run.shard_count
    suffix = "parquet" if run.format == "parquet" else "h5"
    for record in records:
        if record.number >= planned or not record.file.endswith(suffix):
            raise StoreCorruptError(f"{where}: {record.file} is not one of its {planned} planned {run.format} shards")
    if manifest.complete and len(records) != planned:
        raise StoreCorruptError(f"{where}: says complete, but lists {len(records)} of {planned} shards")
    if (len(records), sum(record.rows for record in records)) != (manifest.totals.shards, manifest.totals.rows):
        raise StoreCorruptError(f"{where}: its totals are not those of its segments")


def check_sizes(folder: Folder, manifest: Manifest, records: Sequence[ShardRecord]) -> None:
    """Every listed file is a plain file of its length. Raises StoreCorruptError."""
    sizes = {**folder.sizes("shards"), **(folder.sizes("extra") if manifest.extra else {})}
    listed: list[ShardRecord | ExtraRef] = [*records, *manifest.extra]
    for record in listed:
        if (found := sizes.get(record.file)) != record.bytes:
            what = "no file" if found is None else "a link, folder or device" if found < 0 else f"{found} bytes"
            raise StoreCorruptError(
                f"{folder.path(record.file)}: expected {record.bytes} bytes, found {what}; "
                f"run 'softlabel repair {folder}' to relabel it"
            )


def read_segment(folder: Folder, ref: SegmentRef) -> list[ShardRecord]:
    """Raises StoreCorruptError; FileNotFoundError when it is gone (a newer root may not need it)."""
    raw = folder.read(ref.file, SEGMENT_LIMIT)
    return list(decode_segment(raw, ref, str(folder.path(ref.file))).shards)
