"""A store as files that other tools read without softlabel: Parquet of plain columns, or NumPy arrays.

Legend: N rows, B of a batch, C classes, M members, K kept classes or draws, E declared temperatures.
"""

import json
import os
import time
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from softlabel.algebra.rewrite import open_whole
from softlabel.algebra.samples import NUMBERS, split
from softlabel.errors import MismatchError, StoreError, UsageError
from softlabel.store.columns import Array, Encoding
from softlabel.store.folder import TEMPORARY, sync, writing
from softlabel.store.jsonio import to_json
from softlabel.store.reader import Store, StoredRows, open_store
from softlabel.store.shard import IGNORE

ABOUT = "softlabel-export.json"  # in the folder of `hf`; the array `softlabel` of `npz` holds the same
SPARSE = ("topk", "sampled")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What a call did; `files_written` is 0 where everything was there already."""

    path: str
    total_rows: int
    files_written: int
    bytes: int
    seconds: float


def export_store(
    store: str | Path, out: str | Path, *, to: Literal["hf", "npz"], progress: bool | None = None
) -> ExportSummary:
    """Write a store for pandas, polars, DuckDB and Hugging Face datasets (``hf``), or as NumPy arrays (``npz``).

    ``hf`` is a folder with `data/train-*.parquet`, one file a shard: `key` string, `view` int32, `label` int64 (null
    when unlabelled) and `scaled_logits` list<float32> of C; where members are kept, `scaled_logits_1`,
    `scaled_logits_2`, ... in their place. Encoding ``topk``: `index` list<int32>, `value` list<float32> and `tail`
    list<float32> (one for each declared temperature); ``sampled``: `index` and `weight`, unused draws left out. The
    schema's metadata has all else under `softlabel` as JSON.

    ``npz`` is one file with the same names as arrays of N rows (`label` -100 when unlabelled, members as a second axis)
    and the JSON as array `softlabel`; it loads with ``allow_pickle=False``.

    Args:
        store: folder of a finished store.
        out: a folder (``hf``), or a file whose name ends in .npz.
        to: ``hf`` or ``npz``.
        progress: show a bar; absent: if standard error is a terminal.

    Raises:
        UsageError: a request that cannot be. MismatchError: `out` holds something else.
        StoreError: the store cannot be read, or the disk does not take the export.
    """
    started = time.perf_counter()
    if to not in ("hf", "npz"):
        raise UsageError(f"export: expected --to hf or npz, found {to!r}")
    opened = open_whole(store, of="export", out=out)
    write = _write_hf if to == "hf" else _write_npz
    written, size = write(opened, Path(out), progress)
    return ExportSummary(
        path=str(out),
        total_rows=len(opened),
        files_written=written,
        bytes=size,
        seconds=time.perf_counter() - started,
    )


def describe(store: Store) -> dict[str, Any]:
    """What the numbers mean: goes into the schema's metadata and beside the files."""
    run = store.run
    return {
        "format": "softlabel-export",
        "store_id": store.manifest.store_id,
        "temperature": run.temperature,
        "combine": to_json(run.combine),
        "encoding": to_json(run.encoding),
        "num_classes": run.num_classes,
        "class_names": to_json(run.class_names),
        "members": to_json(run.members),
        "views": to_json(run.views),
        "fidelity": to_json(store.manifest.totals.fidelity),
    }


def plain(rows: StoredRows) -> dict[str, Array]:
    """The numbers of rows in types that every tool has: (B, M, W) int32 or float32, M 1 where members are mixed."""
    run = rows.run
    if run.encoding.name not in SPARSE:
        scaled = rows.scaled_logits.reshape(len(rows), run.members_stored, run.num_classes)
        return {"scaled_logits": scaled - scaled.max(axis=-1, keepdims=True)}
    return {
        name: array.astype(np.int32 if name == "index" else np.float32).reshape(len(rows), run.members_stored, -1)
        for name, array in rows.columns.items()
    }


def _widths(encoding: Encoding, num_classes: int) -> dict[str, int]:
    if encoding.name not in SPARSE:
        return {"scaled_logits": num_classes}
    return {column.name: column.width for column in encoding.columns(num_classes=num_classes)}


def _batches(
    store: Store, start: int = 0, stop: int | None = None, *, needs: list[str] | None = None
) -> Iterator[StoredRows]:
    limit = max(1, NUMBERS // (store.run.num_classes * store.run.members_stored))
    for rows in store.stream(needs, start=start, stop=stop):
        yield from split(rows, limit)


# Parquet.


def _write_hf(store: Store, out: Path, progress: bool | None) -> tuple[int, int]:
    about = describe(store)
    data = out / "data"
    state = _open_folder(out, about)
    if not state:
        open_store(store.path, verify="full").close()
    schema = _schema(store).with_metadata({"softlabel": json.dumps(about)})
    records = store.shards
    written = size = row = 0
    with writing(out), _bar(len(store), progress) as bar:
        if not state:
            data.mkdir(parents=True, exist_ok=True)
            _put(out / ABOUT, _about_bytes(about, complete=False))
        for number, record in enumerate(records):
            path = data / f"train-{number:05d}-of-{len(records):05d}.parquet"
            if not path.exists():
                temporary = data / f"{TEMPORARY}{uuid.uuid4().hex}"
                try:
                    with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer:
                        for rows in _batches(store, row, row + record.rows):
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
            _put(out / ABOUT, _about_bytes(about, complete=True))
    return written, size


def _open_folder(out: Path, about: dict[str, Any]) -> Literal["", "begun", "complete"]:
    """How far an export of this store into this folder is."""
    path = out / ABOUT
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise MismatchError(
                f"{out}: expected a new or empty folder, found something else there; choose another"
            ) from None
        return ""
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}; remove the folder and export again") from None
    if not isinstance(found, dict) or {**found, "complete": None} != {
        **json.loads(json.dumps(about)),
        "complete": None,
    }:
        raise MismatchError(
            f"{out}: expected an export of store {about['store_id']}, found another; choose another folder"
        )
    return "complete" if found.get("complete") is True else "begun"


def _schema(store: Store) -> Any:
    run = store.run
    fields = [("key", pa.string()), ("view", pa.int32()), ("label", pa.int64())]
    for name in _widths(run.encoding, run.num_classes):
        kind = pa.list_(pa.int32() if name == "index" else pa.float32())
        fields += [(one, kind) for one in _names(name, run.members_stored if run.kept else 0)]
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
    # An unused draw has weight 0.
    used = arrays["weight"] > 0 if rows.run.encoding.name == "sampled" else None
    kept = rows.run.members_stored if rows.run.kept else 0
    for name, array in arrays.items():
        for member, column in enumerate(_names(name, kept)):
            columns[column] = _lists(array[:, member], None if used is None else used[:, member])
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _lists(array_BW: Array, used_BW: Array | None) -> Any:
    counts = np.full(len(array_BW), array_BW.shape[1]) if used_BW is None else used_BW.sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = np.ascontiguousarray(array_BW).reshape(-1) if used_BW is None else array_BW[used_BW]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _about_bytes(about: dict[str, Any], *, complete: bool) -> bytes:
    return (json.dumps({**about, "complete": complete}, indent=1) + "\n").encode()


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


# NumPy.


def _write_npz(store: Store, out: Path, progress: bool | None) -> tuple[int, int]:
    if out.suffix != ".npz":
        raise UsageError(f"export: with --to npz, expected a file name that ends in .npz, found {out.name!r}")
    about = describe(store)
    if out.exists():
        _refuse_other_npz(out, about)
        return 0, out.stat().st_size
    open_store(store.path, verify="full").close()
    run, count = store.run, len(store)
    widths = _widths(run.encoding, run.num_classes)
    longest = max((len(key) for rows in store.stream(["key"]) for key in rows.keys), default=1)
    temporary = out.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    with writing(out), _bar(count * len(widths), progress) as bar:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(temporary, "w") as archive:
                _add(archive, "softlabel", np.array(json.dumps(about)))
                _add(archive, "temperature", np.array(run.temperature))
                if run.class_names is not None:
                    _add(archive, "class_names", np.array(run.class_names))
                if run.encoding.temperatures:
                    _add(archive, "temperatures", np.array(run.encoding.temperatures))
                text = np.dtype(f"<U{longest}")
                # Padded to one width, as NumPy's text is: only compressed is it small.
                keys = (np.array(rows.keys, text) for rows in store.stream(["key"]))
                _stream(archive, "key", (count,), text, keys, compress=True)
                _stream(archive, "view", (count,), np.dtype("<i4"), (rows.views for rows in store.stream(["label"])))
                _stream(archive, "label", (count,), np.dtype("<i8"), (rows.labels for rows in store.stream(["label"])))
                payload = [column.name for column in run.columns]
                for name, width in widths.items():
                    shape = (count, run.members_stored, width) if run.kept else (count, width)
                    dtype = np.dtype("<i4") if name == "index" else np.dtype("<f4")
                    _stream(archive, name, shape, dtype, _counted(store, payload, name, bar))
            sync(temporary)
            os.replace(temporary, out)
            sync(out.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return 1, out.stat().st_size


def _counted(store: Store, payload: list[str], name: str, bar: "tqdm[Any]") -> Iterator[Array]:
    needs = payload if name == "scaled_logits" else [name]
    for rows in _batches(store, needs=needs):
        yield plain(rows)[name]
        bar.update(len(rows))


def _add(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    with archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _stream(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    parts: Iterator[Array],
    *,
    compress: bool = False,
) -> None:
    """An array that never is in memory as a whole."""
    entry = zipfile.ZipInfo(f"{name}.npy")
    entry.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).data.cast("B") if part.size else b"")


def _refuse_other_npz(out: Path, about: dict[str, Any]) -> None:
    try:
        with np.load(out, allow_pickle=False) as found:
            same = json.loads(str(found["softlabel"])) == json.loads(json.dumps(about))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        same = False
    if not same:
        raise MismatchError(
            f"{out}: expected no file or an export of store {about['store_id']}, found another; choose another name"
        )


def _bar(total: int, progress: bool | None) -> "tqdm[Any]":
    disable = None if progress is None else not progress
    return tqdm(total=total, unit="row", unit_scale=True, desc="export", disable=disable, leave=False)
