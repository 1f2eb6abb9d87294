"""The same labels in another file format, encoding or shard size."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from softlabel.common.arguments import check_arguments
from softlabel.convert.rewrite import Recode, RewriteSummary, Truth, encoded, keep_columns, open_whole, rewrite
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError, UsageError
from softlabel.labels.combine import retemperable
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.columns import Array
from softlabel.store.encodings import Encoding, fitted
from softlabel.store.manifest import Format, Run
from softlabel.store.stored_rows import StoredRows


@check_arguments
def convert_store(
    store: str | Path,
    out: str | Path,
    *,
    format: Format | None = None,
    encoding: Encoding | str | None = None,
    shard_rows: int | None = None,
    progress: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> RewriteSummary:
    """Write the labels of a store in another file format, encoding or shard size.

    Columns are copied bit for bit unless the encoding changes. A finer encoding than the store's is allowed and cannot
    bring back what is lost: what the new store costs against the teacher is only known when it comes from a ``float32``
    store (or is a copy), else its `fidelity` is absent and `recorded.derived` says what it came from and what the step
    cost. The same call again resumes what was interrupted.

    Args:
        store: folder of a finished store.
        out: folder of the new one.
        format: ``parquet`` or ``hdf5``; absent: as it is.
        encoding: an `Encoding`, or the name of one without parameters; absent: as it is.
        shard_rows: samples a shard; absent: as it is.
        progress: show a bar; absent: if standard error is a terminal.
        options: as JSON takes it: what the caller was given, kept in the manifest under `recorded.options`.

    Raises:
        UsageError: nothing would change, or a parameter is out of range. MismatchError: the encoding cannot be made
            from this one, or `out` holds another store.
        StoreError: a store cannot be read or written.
    """
    opened = open_whole(store, of="convert", out=out)
    run = opened.run
    try:
        wanted = run.encoding if encoding is None else fitted(encoding, temperature=run.temperature)
        new = dataclasses.replace(
            run,
            format=run.format if format is None else format,
            encoding=wanted,
            shard_rows=run.shard_rows if shard_rows is None else shard_rows,
        )
    except ValueError as error:
        raise UsageError(f"convert: {error}") from None
    if new.format not in ("parquet", "hdf5"):
        raise UsageError(f"format: expected 'parquet' or 'hdf5', found {format!r}")
    if new == run:
        raise UsageError(
            f"{store}: has this format, encoding and shard size already; give another --format, --encoding or "
            "--shard-rows, or copy the folder"
        )
    samples = Samples([opened])
    if wanted != run.encoding:
        _refuse_impossible(str(store), run, wanted)
    recode, truth = convert_recode(samples, new)
    return rewrite(samples, out, new, recode, command="convert", truth=truth, progress=progress, options=options)


def convert_recode(samples: Samples, new: Run) -> tuple[Recode, Truth]:
    """How rows of a store become those of `new`, which has another format, encoding or shard size."""
    run = samples.stores[0].run
    if new.encoding == run.encoding:
        return keep_columns, "carried"

    def recode(rows: StoredRows, meter: FidelityMeter) -> dict[str, Array]:
        return encoded(torch.from_numpy(rows.scaled_logits), rows, new, meter)

    return recode, "measured" if run.encoding.exact and samples.measured else "unknown"


def _refuse_impossible(store: str, run: Run, wanted: Encoding) -> None:
    if wanted.from_hidden:
        raise MismatchError(
            f"{store}: encoding {wanted.name!r} holds what enters the teacher's last layer, which a store of logits "
            "has not; generate with it"
        )
    if run.encoding.drawn:
        raise MismatchError(
            f"{store}: holds random draws, which are the teacher's softmax on average only; another encoding would "
            "state them as if they were it; generate with that encoding"
        )
    if others := [t for t in wanted.declared or () if t != run.temperature]:
        listed = ", ".join(f"{t:g}" for t in others)
        if run.encoding.sparse:
            why = "of its tail only the sum is known"
        elif not run.kept and not retemperable(run.combine.rule, len(run.members)):
            why = "it is a mean of probabilities, which exists at one temperature"
        else:
            return
        raise MismatchError(
            f"{store}: {why}, so a {wanted.name} store made from it knows temperature {run.temperature:g} alone, found "
            f"{listed}; declare {run.temperature:g} only"
        )
