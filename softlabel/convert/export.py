"""A store as files that other tools read without softlabel: Parquet of plain columns, or NumPy arrays."""

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
    """What a call did; `files_written` is 0 where everything was there already."""

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

    ``hf`` is a folder with `data/train-*.parquet`, one file a shard: `key` string, `view` int32, `label` int64 (null
    when unlabelled) and `scaled_logits` list<float32> of C; where members are kept, `scaled_logits_1`,
    `scaled_logits_2`, ... in their place. Encoding ``topk``: `index` list<int32>, `value` list<float32> and `tail`
    list<float32> (one for each declared temperature); ``sampled``: `index` and `weight`, unused draws left out. What a
    row says of its view follows, as the store has it (`view_box`, `view_flip`, ...). The schema's metadata has all else
    under `softlabel` as JSON; `_softlabel-export.json`, which readers of Parquet folders pass over, has the same and
    says whether the export is whole.

    ``npz`` is one file with the same names as arrays of N rows (`label` -100 when unlabelled, members as a second axis)
    and the JSON as array `softlabel`; it loads with ``allow_pickle=False``.

    Args:
        store: folder of a finished store.
        out: a folder (``hf``), or a file whose name ends in .npz.
        to: ``hf`` or ``npz``.
        progress: show a bar; absent: if standard error is a terminal.
        options: as JSON takes it: what the caller was given, kept with what the export says of itself.

    Raises:
        UsageError: a request that cannot be. MismatchError: `out` holds something else.
        StoreError: the store cannot be read, or the disk does not take the export.
    """
    started = time.perf_counter()
    if to not in ("hf", "npz"):
        raise UsageError(f"export: expected --to hf or npz, found {to!r}")
    if "://" in str(out):
        raise UsageError(f"export: expected a path on this machine, found {out}; copy the export there afterwards")
    opened = open_whole(store, of="export", out=out)
    write = write_hf if to == "hf" else write_npz
    written, size = write(opened, Path(out), progress, options)
    return ExportSummary(
        path=str(out),
        total_rows=len(opened),
        files_written=written,
        bytes=size,
        seconds=time.perf_counter() - started,
    )
