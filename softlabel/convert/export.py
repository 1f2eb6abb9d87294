"""Export a store to files for other tools: Parquet with plain columns, or NumPy arrays."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from softlabel.convert.export_npz import write_npz
from softlabel.convert.export_parquet import write_hf
from softlabel.convert.rewrite import open_whole
from softlabel.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """Result of `export_store`; `files_written` is 0 if the export was complete already."""

    path: str
    total_rows: int
    files_written: int
    bytes: int
    seconds: float


def export_store(
    store: str | Path,
    out: str | Path,
    *,
    to: Literal["hf", "npz"],
    progress: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> ExportSummary:
    """Write a store for pandas, polars, DuckDB and Hugging Face datasets (``hf``), or as NumPy arrays (``npz``).

    ``hf`` is a folder with `data/train-*.parquet`, one file per shard: `key` string, `view` int32, `label` int64 (null
    if unlabelled) and `scaled_logits` list<float32> of C, or `scaled_logits_1`, `scaled_logits_2`, ... if members are
    kept. Encoding ``topk``: `index` list<int32>, `value` list<float32> and `tail` list<float32> (one per declared
    temperature); ``sampled``: `index` and `weight` without unused draws. The store's view columns follow (`view_box`,
    `view_flip`, ...). The schema's metadata has everything else under `softlabel` as JSON; `_softlabel-export.json`,
    which readers of Parquet folders ignore, has the same and whether the export is complete.

    In a store of tokens a row is a document: `scaled_logits`, or `index`, `value` and so on, have one such list for
    each of its labelled positions, and `length`, `positions`, `tokens` list<int> and `mask` list<uint8> follow.

    ``npz`` is one file with arrays of N rows under the same names (`label` -100 if unlabelled, members as a second
    axis) and the JSON as array `softlabel`; it loads with ``allow_pickle=False``. Arrays per token or labelled position
    have the documents one after another; the running sums of `length` and `positions` say where each begins.

    Args:
        store: folder of a finished store.
        out: a folder (``hf``), or a file name that ends in .npz.
        to: ``hf`` or ``npz``.
        progress: show a bar; None: if standard error is a terminal.
        options: JSON values to keep in the export's metadata.

    Raises:
        UsageError: an argument is wrong.
        MismatchError: `out` holds something else.
        StoreError: the store cannot be read, or the disk cannot be written.
    """
    started = time.perf_counter()
    if to not in ("hf", "npz"):
        raise UsageError(f"export: expected --to hf or npz, found {to!r}")
    if "://" in str(out):
        raise UsageError(f"export: expected a local path, found {out}; copy the export there afterwards")
    opened = open_whole(store, of="export", out=out)
    write = write_hf if to == "hf" else write_npz
    written, size = write(opened, Path(out), progress, options)
    return ExportSummary(
        path=str(out), total_rows=len(opened), files_written=written, bytes=size, seconds=time.perf_counter() - started
    )
