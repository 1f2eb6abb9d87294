"""Export a store as one file of NumPy arrays, written piece by piece."""

import json
import os
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from softlabel.convert.export_folder import Written
from softlabel.convert.plain_columns import bar_of, batches, describe, needs_of, plain, widths_of
from softlabel.errors import MismatchError, UsageError
from softlabel.store.columns import Array
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.storage.base import TEMPORARY, sync, writing


def write_npz(store: Store, out: Path, progress: bool | None, options: Mapping[str, Any] | None) -> Written:
    """Write an export. For arguments and errors see `export_store`."""
    if out.suffix != ".npz":
        raise UsageError(f"export: with --to npz, expected a file name that ends in .npz, found {out.name!r}")
    about = describe(store)
    if out.exists():
        _refuse_other_npz(out, about)
        return Written(files=0, bytes=out.stat().st_size)
    open_store(store.url, verify="full").close()
    run, count = store.run, len(store)
    widths = widths_of(run)
    longest = max((len(key) for rows in store.stream(["key"]) for key in rows.keys), default=1)
    temporary = out.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    answers = count if run.tokens is None else store.spans.total("position")
    with writing(out), bar_of(count * len(widths), progress) as bar:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(temporary, "w") as archive:
                _write_array(
                    archive,
                    "softlabel",
                    np.array(json.dumps(about if options is None else {**about, "options": dict(options)})),
                )
                _write_array(archive, "temperature", np.array(run.temperature))
                if run.class_names is not None:
                    _write_array(archive, "class_names", np.array(run.class_names))
                if run.encoding.declared is not None:
                    _write_array(archive, "temperatures", np.array(run.encoding.declared))
                text = np.dtype(f"<U{longest}")
                # Compressed, because NumPy pads strings to one width.
                keys = (np.array(rows.keys, text) for rows in store.stream(["key"]))
                _write_stream(archive, "key", (count,), text, keys, compress=True)
                _write_stream(
                    archive, "view", (count,), np.dtype("<i4"), (rows.views for rows in store.stream(["label"]))
                )
                _write_stream(
                    archive, "label", (count,), np.dtype("<i8"), (rows.labels for rows in store.stream(["label"]))
                )
                for column in run.sample_columns:
                    inner = (column.width,) if column.width > 1 else ()
                    parts = (rows.columns[column.name].reshape(-1, *inner) for rows in store.stream([column.name]))
                    _write_stream(archive, column.name, (store.spans.total(column.per), *inner), column.numpy, parts)
                for name, width in widths.items():
                    shape = (answers, run.members_stored, width) if run.kept else (answers, width)
                    dtype = np.dtype("<i4") if name == "index" else np.dtype("<f4")
                    _write_stream(archive, name, shape, dtype, _iter_column(store, name, bar))
            sync(temporary)
            os.replace(temporary, out)
            sync(out.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return Written(files=1, bytes=out.stat().st_size)


def _iter_column(store: Store, name: str, bar: "tqdm[Any]") -> Iterator[Array]:
    for rows in batches(store, needs=needs_of(store.run, name)):
        yield plain(rows)[name]
        bar.update(len(rows))


def _write_array(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    with archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def _write_stream(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    parts: Iterator[Array],
    *,
    compress: bool = False,
) -> None:
    """Write an array in parts, without holding all of it in memory."""
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
            there = json.loads(str(found["softlabel"]))
            there.pop("options", None)
            same = there == json.loads(json.dumps(about))
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile):
        same = False
    if not same:
        raise MismatchError(
            f"{out}: expected no file or an export of store {about['store_id']}, found another; choose another name"
        )
