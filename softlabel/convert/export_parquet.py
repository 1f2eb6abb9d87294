"""Export a store as a folder of Parquet files with plain columns.

Legend: B rows of a batch, P labelled positions of documents, W numbers of a column.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.convert.export_folder import Written, write_folder
from softlabel.convert.plain_columns import batches, describe, plain, widths_of
from softlabel.store.columns import Array
from softlabel.store.formats.base import IGNORE
from softlabel.store.reader import Store
from softlabel.store.stored_rows import StoredRows


def write_hf(store: Store, out: Path, progress: bool | None, options: Mapping[str, Any] | None) -> Written:
    """Write an export. For arguments and errors see `export_store`."""
    about = describe(store)
    schema = _make_schema(store).with_metadata({"softlabel": json.dumps(about)})

    def write(path: Path, start: int, stop: int, update: Callable[[int], object]) -> int:
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
            for rows in batches(store, start, stop):
                writer.write_table(_make_table(rows, schema))
                update(len(rows))
        return 0

    return write_folder(store, out, write, suffix="parquet", about=about, progress=progress, options=options)


def _make_schema(store: Store) -> Any:
    run = store.run
    fields = [("key", pa.string()), ("view", pa.int32()), ("label", pa.int64())]
    for name in widths_of(run):
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
            mask = used if name in ("index", "weight") else None
            lists = make_lists(array[:, member], None if mask is None else mask[:, member])
            columns[column] = lists if rows.run.tokens is None else wrap_lists(offsets["position"], lists)
    for one in rows.run.sample_columns:
        values = rows.columns[one.name]
        if one.per == "row":
            columns[one.name] = pa.array(values[:, 0]) if one.width == 1 else make_lists(values, None)
        else:
            columns[one.name] = wrap_lists(offsets[one.per], pa.array(values[:, 0]))
    return pa.table([columns[field.name] for field in schema], schema=schema)


def make_lists(array_BW: Array, used_BW: Array | None = None) -> Any:
    """Return one list of the numbers of each row, or of those that are used."""
    counts = np.full(len(array_BW), array_BW.shape[1]) if used_BW is None else used_BW.sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = np.ascontiguousarray(array_BW).reshape(-1) if used_BW is None else array_BW[used_BW]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def wrap_lists(offsets_B1: Array, values: Any) -> Any:
    """Return one list of the values of each document."""
    return pa.ListArray.from_arrays(pa.array(offsets_B1.astype(np.int32)), values)
