"""Read and check the manifest: the root, all records, and the sizes of the listed files."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import xxhash

from softlabel.errors import StoreCorruptError, StoreNotFoundError
from softlabel.store.columns import Array
from softlabel.store.file_refs import SEGMENT_LIMIT, ExtraRef, SegmentRef
from softlabel.store.manifest import ROOT_LIMIT, ROOT_NAME, Manifest, ShardRecord
from softlabel.store.manifest_file import decode_root, decode_segment
from softlabel.store.storage.base import Folder
from softlabel.store.token_rows import TOKENIZER

SEGMENT_SHARDS = 256  # records after which a segment is sealed
SEGMENT_BYTES = 1 << 20  # or bytes, when many bad rows make records long
_FLOATS = {"F32": "<f4", "F16": "<f2"}  # types of safetensors that numpy has


def load_root(folder: Folder) -> Manifest:
    """Read the root, without the records of shards.

    Raises:
        StoreNotFoundError: there is no store.
        StoreCorruptError: the root is damaged.
        StoreError: it has another format version.
    """
    try:
        raw = folder.read(ROOT_NAME, ROOT_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFoundError(
            f"{folder}: no store here (no {ROOT_NAME}); check the path, or create one with 'softlabel generate'"
        ) from None
    return decode_root(raw, folder.where(ROOT_NAME))


def find_root(folder: Folder) -> Manifest | None:
    """Read the root as `load_root`; None: there is no store."""
    try:
        return load_root(folder)
    except StoreNotFoundError:
        return None


def load_manifest(folder: Folder) -> tuple[Manifest, list[ShardRecord]]:
    """Read the root and all records, sorted by number; retries if a committer replaces the open segment meanwhile.

    Raises:
        StoreNotFoundError, StoreCorruptError, StoreError: as `load_root`, or a segment is damaged or missing.
    """
    for attempt in (1, 2, 3):
        manifest = load_root(folder)
        try:
            records = [record for ref in manifest.segments for record in read_segment(folder, ref)]
            break
        except FileNotFoundError as error:
            if attempt == 3 or manifest.complete:
                raise StoreCorruptError(
                    f"{error.filename}: listed in {ROOT_NAME}, but missing; run 'softlabel repair {folder}'"
                ) from None
    _check_records(folder, manifest, records)
    return manifest, sorted(records, key=lambda record: record.number)


def _check_records(folder: Folder, manifest: Manifest, records: list[ShardRecord]) -> None:
    where, run = folder.where(ROOT_NAME), manifest.run
    if len({record.number for record in records}) != len(records):
        raise StoreCorruptError(f"{where}: a shard is listed twice")
    planned = run.shard_count
    suffix = "parquet" if run.format == "parquet" else "h5"
    for record in records:
        if record.number >= planned or not record.file.endswith(suffix):
            raise StoreCorruptError(f"{where}: {record.file} is not one of the {planned} planned {run.format} shards")
    if manifest.complete and len(records) != planned:
        raise StoreCorruptError(f"{where}: marked complete, but lists {len(records)} of {planned} shards")
    if (len(records), sum(record.rows for record in records)) != (manifest.totals.shards, manifest.totals.rows):
        raise StoreCorruptError(f"{where}: its totals differ from those of its segments")


def check_sizes(folder: Folder, records: Iterable[ShardRecord], extra: Sequence[ExtraRef] = ()) -> None:
    """Check that every listed file is a plain file of its recorded size.

    Raises:
        StoreCorruptError: one is not.
    """
    sizes = {**folder.sizes("shards"), **(folder.sizes("extra") if extra else {})}
    listed: list[ShardRecord | ExtraRef] = [*records, *extra]
    for record in listed:
        if (found := sizes.get(record.file)) != record.bytes:
            what = "no file" if found is None else "a link, folder or device" if found < 0 else f"{found} bytes"
            raise StoreCorruptError(
                f"{folder.where(record.file)}: expected {record.bytes} bytes, found {what}; "
                f"run 'softlabel repair {folder}' to relabel it"
            )


def read_segment(folder: Folder, ref: SegmentRef) -> list[ShardRecord]:
    """Read the records of a segment.

    Raises:
        StoreCorruptError: the segment is damaged.
        FileNotFoundError: it was removed (a newer root may not list it).
    """
    raw = folder.read(ref.file, SEGMENT_LIMIT)
    return list(decode_segment(raw, ref, folder.where(ref.file)).shards)


def read_extra(folder: Folder, manifest: Manifest) -> dict[str, Array]:
    """Read the arrays of the store's safetensors file and check them against its hash and the run.

    Returns:
        float32, by name; half precision is widened, which is exact.

    Raises:
        StoreCorruptError: the file is missing, damaged, or does not match the run.
    """
    run = manifest.run
    where, raw = folder.where(_refer_to_extra(folder, manifest).file), read_extra_file(folder, manifest)
    try:
        arrays = {name: _widen(tensor) for name, tensor in safetensors.deserialize(raw)}  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise StoreCorruptError(f"{where}: invalid safetensors file: {error}") from None
    for one, shape in run.encoding.extra_shapes(run.num_classes).items():
        array = arrays.get(one)
        if array is None or array.shape != shape or not np.isfinite(array).all():
            raise StoreCorruptError(
                f"{where}: expected a finite {one!r} of shape {shape} in float32, float16 or bfloat16"
            )
    return arrays


def read_extra_file(folder: Folder, manifest: Manifest) -> bytes:
    """Read the store's safetensors file as it is and check it against its hash.

    Raises:
        StoreCorruptError: the file is missing or damaged.
    """
    return _read_listed(folder, _refer_to_extra(folder, manifest))


def _refer_to_extra(folder: Folder, manifest: Manifest) -> ExtraRef:
    encoding = manifest.run.encoding
    assert encoding.extra is not None
    ref = find_extra(manifest, encoding.extra)
    if ref is None:
        raise StoreCorruptError(
            f"{folder.where(ROOT_NAME)}: encoding {encoding.name!r}: expected extra/{encoding.extra}, found none"
        )
    return ref


def _widen(tensor: Mapping[str, Any]) -> Array:
    """A tensor of a safetensors file as float32. Raises ValueError for one of another type."""
    data, kind = tensor["data"], tensor["dtype"]
    if kind == "BF16":  # the upper half of a float32's bits; numpy has no such type
        array = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif kind in _FLOATS:
        array = np.frombuffer(data, _FLOATS[kind]).astype(np.float32, copy=False)
    else:
        raise ValueError(f"expected tensors in F32, F16 or BF16, found {kind}")
    return array.reshape(tensor["shape"])


def read_tokenizer(folder: Folder, manifest: Manifest) -> bytes | None:
    """Read the tokenizer.json of a store of tokens and check it against its hash; None if the store has none.

    Raises:
        StoreCorruptError: the file is missing or damaged.
    """
    ref = find_extra(manifest, TOKENIZER)
    return None if ref is None else _read_listed(folder, ref)


def find_extra(manifest: Manifest, name: str) -> ExtraRef | None:
    """Return the file of this name that all shards share; None if there is none."""
    return next((ref for ref in manifest.extra if ref.file.startswith(f"extra/{name}-")), None)


def _read_listed(folder: Folder, ref: ExtraRef) -> bytes:
    where = folder.where(ref.file)
    try:
        raw = folder.read(ref.file, ref.bytes)
    except FileNotFoundError:
        raise StoreCorruptError(f"{where}: is missing") from None
    if (found := xxhash.xxh3_128_hexdigest(raw)) != ref.xxh3:
        raise StoreCorruptError(f"{where}: xxh3 expected {ref.xxh3}, found {found}")
    return raw


def load_for_writing(
    folder: Folder, manifest: Manifest, *, repair: bool = False
) -> tuple[dict[int, ShardRecord], list[ShardRecord], bool]:
    """Read all records for a committer.

    Args:
        folder: the store's folder.
        manifest: its root.
        repair: leave out the records of damaged segments, instead of raising.

    Returns:
        (all records by number, records of the last segment if it is open, whether every segment could be read).

    Raises:
        StoreCorruptError, FileNotFoundError: a segment is damaged or missing.
    """
    records: dict[int, ShardRecord] = {}
    tail: list[ShardRecord] = []
    whole = True
    for ref in manifest.segments:
        try:
            tail = read_segment(folder, ref)
        except (StoreCorruptError, FileNotFoundError):
            if not repair:
                raise
            tail, whole = [], False
        for record in tail:
            if record.number in records:
                raise StoreCorruptError(f"{folder.where(ref.file)}: lists shard {record.number} a second time")
            records[record.number] = record
    last = manifest.segments[-1] if manifest.segments else None
    open_tail = last is not None and last.shards < SEGMENT_SHARDS and last.bytes < SEGMENT_BYTES
    return records, tail if open_tail else [], whole
