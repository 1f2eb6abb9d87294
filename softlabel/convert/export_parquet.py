"""A store as a folder of Parquet files with plain columns.

Legend: B rows of a batch, W numbers of a column in a row.
"""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from softlabel.convert.plain_columns import bar_of, batches, describe, plain, widths_of
from softlabel.errors import MismatchError, StoreError
from softlabel.store.columns import Array
from softlabel.store.formats.base import IGNORE
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.storage.base import TEMPORARY, sync, writing
from softlabel.store.stored_rows import StoredRows

# What is exported here, with which options, and whether all of it. Readers of Parquet folders pass over the underscore.
ABOUT = "_softlabel-export.json"
_EARLIER = "softlabel-export.json"  # as it was called once


def write_hf(store: Store, out: Path, progress: bool | None, options: Mapping[str, Any] | None) -> tuple[int, int]:
    about = describe(store)
    data = out / "data"
    state = _progress_of(out, about)
    if state != "complete":
        open_store(store.url, verify="full").close()
    schema = _schema(store).with_metadata({"softlabel": json.dumps(about)})
    records = store.shards
    written = size = row = 0
    with writing(out), bar_of(len(store), progress) as bar:
        if not state:
            out.mkdir(parents=True, exist_ok=True)
            _put(out / ABOUT, _about_bytes(about, options, complete=False))
        data.mkdir(exist_ok=True)
        for number, record in enumerate(records):
            path = data / f"train-{number:05d}-of-{len(records):05d}.parquet"
            if not path.exists():
                temporary = data / f"{TEMPORARY}{uuid.uuid4().hex}"
                try:
                    with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer:
                        for rows in batches(store, row, row + record.rows):
                            writer.write_table(_table(rows, schema))
                            bar.update(len(rows))
                    sync(temporary)
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
                written += 1
            row += record.rows
            size += path.stat().st_size
        if state != "complete":
            sync(data)
            for left in data.glob(f"{TEMPORARY}*"):
                left.unlink()
            _put(out / ABOUT, _about_bytes(about, options, complete=True))
            (out / _EARLIER).unlink(missing_ok=True)
    return written, size


def _progress_of(out: Path, about: dict[str, Any]) -> Literal["", "begun", "complete"]:
    """How far an export of this store into this folder is."""
    path = out / (_EARLIER if (out / _EARLIER).exists() else ABOUT)
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.pop("checksum", None) not in (None, _checksum(found)):
            raise ValueError("its bytes are not those that its checksum is of")
    except (FileNotFoundError, NotADirectoryError):
        if out.exists() and (not out.is_dir() or any(not one.name.startswith(TEMPORARY) for one in out.iterdir())):
            raise MismatchError(
                f"{out}: expected a new or empty folder, found something else there; choose another"
            ) from None
        return ""
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}; remove the folder and export again") from None
    whole = isinstance(found, dict) and found.pop("complete", None) is True
    if not isinstance(found, dict) or {**found, "options": None} != {**json.loads(json.dumps(about)), "options": None}:
        raise MismatchError(
            f"{out}: expected an export of store {about['store_id']}, found another; choose another folder"
        )
    return "complete" if whole else "begun"


def _schema(store: Store) -> Any:
    run = store.run
    fields = [("key", pa.string()), ("view", pa.int32()), ("label", pa.int64())]
    for name in widths_of(run.encoding, run.num_classes):
        kind = pa.list_(pa.int32() if name == "index" else pa.float32())
        fields += [(one, kind) for one in _names(name, run.members_stored if run.kept else 0)]
    for column in run.view_columns:
        one = pa.from_numpy_dtype(column.numpy)
        fields.append((column.name, one if column.width == 1 else pa.list_(one)))
    return pa.schema(fields)


def _names(name: str, kept: int) -> list[str]:
    """A column for each kept member, numbered as `softlabel inspect` does."""
    return [f"{name}_{member}" for member in range(1, kept + 1)] if kept else [name]


def _table(rows: StoredRows, schema: Any) -> Any:
    assert rows.key_data is not None
    labels = rows.labels
    columns: dict[str, Any] = {
        "key": rows.key_data.get().arrow().cast(pa.string()),
        "view": pa.array(rows.views, pa.int32()),
        "label": pa.array(labels, pa.int64(), mask=labels == IGNORE),
    }
    arrays = plain(rows)
    used = arrays["weight"] > 0 if "weight" in arrays else None  # an unused draw has weight 0
    kept = rows.run.members_stored if rows.run.kept else 0
    for name, array in arrays.items():
        for member, column in enumerate(_names(name, kept)):
            columns[column] = _lists(array[:, member], None if used is None else used[:, member])
    for one in rows.run.view_columns:
        values = rows.columns[one.name]
        columns[one.name] = pa.array(values[:, 0]) if one.width == 1 else _lists(values, None)
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _lists(array_BW: Array, used_BW: Array | None) -> Any:
    counts = np.full(len(array_BW), array_BW.shape[1]) if used_BW is None else used_BW.sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = np.ascontiguousarray(array_BW).reshape(-1) if used_BW is None else array_BW[used_BW]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _about_bytes(about: dict[str, Any], options: Mapping[str, Any] | None, *, complete: bool) -> bytes:
    said = {**about, "options": None if options is None else dict(options), "complete": complete}
    return (json.dumps({**said, "checksum": _checksum(said)}, indent=1) + "\n").encode()


def _checksum(said: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
