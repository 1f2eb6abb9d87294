"""Export a store as a folder of Parquet files with plain columns.

Legend: B rows of a batch, P labelled positions of documents, W numbers of a column.
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

from softlabel.common.atomic_file import write_atomically
from softlabel.convert.plain_columns import bar_of, batches, describe, plain, widths_of
from softlabel.errors import MismatchError, StoreError
from softlabel.store.columns import Array
from softlabel.store.formats.base import IGNORE
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.storage.base import TEMPORARY, sync, writing
from softlabel.store.stored_rows import StoredRows

# Metadata, options and state of the export. Readers of Parquet folders ignore names with a leading underscore.
ABOUT = "_softlabel-export.json"
_EARLIER = "softlabel-export.json"  # its name in earlier versions


def write_hf(store: Store, out: Path, progress: bool | None, options: Mapping[str, Any] | None) -> tuple[int, int]:
    """Write an export; return (files written, bytes). For arguments and errors see `export_store`."""
    about = describe(store)
    data = out / "data"
    state = _read_progress(out, about)
    if state != "complete":
        open_store(store.url, verify="full").close()
    schema = _make_schema(store).with_metadata({"softlabel": json.dumps(about)})
    records = store.shards
    written = size = row = 0
    with writing(out), bar_of(len(store), progress) as bar:
        if not state:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / ABOUT, _encode_about(about, options, complete=False))
        data.mkdir(exist_ok=True)
        for number, record in enumerate(records):
            path = data / f"train-{number:05d}-of-{len(records):05d}.parquet"
            if not path.exists():
                temporary = data / f"{TEMPORARY}{uuid.uuid4().hex}"
                try:
                    with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer:
                        for rows in batches(store, row, row + record.rows):
                            writer.write_table(_make_table(rows, schema))
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
            write_atomically(out / ABOUT, _encode_about(about, options, complete=True))
            (out / _EARLIER).unlink(missing_ok=True)
    return written, size


def _read_progress(out: Path, about: dict[str, Any]) -> Literal["", "begun", "complete"]:
    """Return the state of an export of this store in this folder."""
    path = out / (_EARLIER if (out / _EARLIER).exists() else ABOUT)
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.pop("checksum", None) not in (None, _compute_checksum(found)):
            raise ValueError("its checksum does not match")
    except (FileNotFoundError, NotADirectoryError):
        if out.exists() and (not out.is_dir() or any(not one.name.startswith(TEMPORARY) for one in out.iterdir())):
            raise MismatchError(
                f"{out}: expected a new or empty folder, found something else; choose another"
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


def _make_schema(store: Store) -> Any:
    run = store.run
    fields = [("key", pa.string()), ("view", pa.int32()), ("label", pa.int64())]
    for name in widths_of(run.encoding, run.num_classes):
        kind = pa.list_(pa.int32() if name == "index" else pa.float32())
        kind = kind if run.tokens is None else pa.list_(kind)
        fields += [(one, kind) for one in _list_names(name, run.members_stored if run.kept else 0)]
    for column in run.sample_columns:
        one = pa.from_numpy_dtype(column.numpy)
        plain_number = column.width == 1 and column.per == "row"
        fields.append((column.name, one if plain_number else pa.list_(one)))
    return pa.schema(fields)


def _list_names(name: str, kept: int) -> list[str]:
    """Return a column name for each kept member, numbered as in `softlabel inspect`."""
    return [f"{name}_{member}" for member in range(1, kept + 1)] if kept else [name]


def _make_table(rows: StoredRows, schema: Any) -> Any:
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
    offsets = rows.spans.offsets
    for name, array in arrays.items():
        for member, column in enumerate(_list_names(name, kept)):
            lists = _make_lists(array[:, member], None if used is None else used[:, member])
            columns[column] = lists if rows.run.tokens is None else _wrap_lists(offsets["position"], lists)
    for one in rows.run.sample_columns:
        values = rows.columns[one.name]
        if one.per == "row":
            columns[one.name] = pa.array(values[:, 0]) if one.width == 1 else _make_lists(values, None)
        else:
            columns[one.name] = _wrap_lists(offsets[one.per], pa.array(values[:, 0]))
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _make_lists(array_BW: Array, used_BW: Array | None) -> Any:
    counts = np.full(len(array_BW), array_BW.shape[1]) if used_BW is None else used_BW.sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = np.ascontiguousarray(array_BW).reshape(-1) if used_BW is None else array_BW[used_BW]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _wrap_lists(offsets_B1: Array, values: Any) -> Any:
    """Return one list of the values of each document."""
    return pa.ListArray.from_arrays(pa.array(offsets_B1.astype(np.int32)), values)


def _encode_about(about: dict[str, Any], options: Mapping[str, Any] | None, *, complete: bool) -> bytes:
    content = {**about, "options": None if options is None else dict(options), "complete": complete}
    return (json.dumps({**content, "checksum": _compute_checksum(content)}, indent=1) + "\n").encode()


def _compute_checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
