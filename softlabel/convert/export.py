"""Export a store to files for other tools: plain columns, NumPy arrays, or what trainers of language models read."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from softlabel.convert.export_npz import write_npz
from softlabel.convert.export_parquet import write_hf
from softlabel.convert.export_tokens import write_axolotl, write_distillkit
from softlabel.convert.rewrite import open_whole
from softlabel.errors import UsageError

_WRITERS = {"hf": write_hf, "npz": write_npz, "distillkit": write_distillkit, "axolotl": write_axolotl}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """Result of `export_store`; `files_written` is 0 if the export was complete already, `left_out` counts the rows
    of the store that the format has no place for."""

    path: str
    total_rows: int
    files_written: int
    bytes: int
    seconds: float
    left_out: int = 0


def export_store(
    store: str | Path,
    out: str | Path,
    *,
    to: Literal["hf", "npz", "distillkit", "axolotl"],
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

    ``distillkit`` and ``axolotl`` take stores of tokens in encoding ``topk`` whose tail is known at temperature 1, and
    write log-probabilities. ``distillkit`` is a folder of Parquet files with `input_ids` list<uint64>, `token_ids`
    list<list<int32>> and `top_values` list<list<float>>, one entry for each labelled position; position t is what the
    teacher says after token t. ``axolotl`` is a folder of JSON lines with `id`, `messages`, `logprobs` and
    `target_token_ids`, one entry for each token but the first, empty where there is no label. axolotl tokenises the
    messages again: documents whose text has other tokens, or of which nothing counts, are left out.

    Args:
        store: folder of a finished store.
        out: a folder, or a file name that ends in .npz (``npz``).
        to: ``hf``, ``npz``, ``distillkit`` or ``axolotl``.
        progress: show a bar; None: if standard error is a terminal.
        options: JSON values to keep in the export's metadata.

    Raises:
        UsageError: an argument is wrong.
        MismatchError: `out` holds something else, or the format cannot hold what the store has.
        StoreError: the store cannot be read, or the disk cannot be written.
    """
    started = time.perf_counter()
    if to not in _WRITERS:
        raise UsageError(f"export: expected --to {', '.join(_WRITERS)}; found {to!r}")
    if "://" in str(out):
        raise UsageError(f"export: expected a local path, found {out}; copy the export there afterwards")
    opened = open_whole(store, of="export", out=out)
    written = _WRITERS[to](opened, Path(out), progress, options)
    return ExportSummary(
        path=str(out),
        total_rows=len(opened),
        files_written=written.files,
        bytes=written.bytes,
        seconds=time.perf_counter() - started,
        left_out=written.left_out,
    )
