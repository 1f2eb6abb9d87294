"""Convert a store to another file format, encoding or shard size."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from softlabel.common.arguments import check_arguments
from softlabel.convert.answers import StoredAnswers
from softlabel.convert.rewrite import Recode, RewriteSummary, Truth, encode_answers, open_whole, rewrite
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError, UsageError
from softlabel.labels.combine import retemperable
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.columns import Array
from softlabel.store.encodings import Encoding, fitted
from softlabel.store.manifest import Format, Run
from softlabel.store.manifest_read import find_root
from softlabel.store.storage.open import open_folder


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

    Columns are copied bit for bit unless the encoding changes. A finer encoding does not restore what was lost. The
    cost against the teacher is only known for a copy or from a ``float32`` store; otherwise `fidelity` is absent and
    `recorded.derived` has the sources and the cost of this step. The same call resumes an interrupted one.

    Args:
        store: folder of a finished store.
        out: folder of the new one.
        format: ``parquet`` or ``hdf5``; None: the same.
        encoding: an `Encoding`, or the name of one without parameters; None: the same.
        shard_rows: samples per shard; None: the same.
        progress: show a bar; None: if standard error is a terminal.
        options: JSON values to keep in the manifest under `recorded.options`.

    Raises:
        UsageError: nothing would change, or an argument is wrong.
        MismatchError: the encoding cannot be made from this one, or `out` holds another store.
        StoreError: a store cannot be read or written.
    """
    opened = open_whole(store, of="convert", out=out)
    run = opened.run
    if encoding is not None:
        opened.require_labels("encoding")
    try:
        wanted = run.encoding if encoding is None else _fit_encoding(encoding, run, out)
        if run.encoding.labels and not wanted.labels:
            raise ValueError(f"encoding: expected one of labels, found {wanted.name}")
        new = dataclasses.replace(
            run,
            format=run.format if format is None else format,
            encoding=wanted,
            shard_rows=run.shard_rows if shard_rows is None else shard_rows,
            compression=None,  # of new stores; a store of earlier versions becomes smaller
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


def _fit_encoding(encoding: Encoding | str, run: Run, out: str | Path) -> Encoding:
    """Complete the encoding's parameters, with the choices of an unfinished store at `out`, or else of the source."""
    there = find_root(open_folder(out))
    return fitted(encoding, temperature=run.temperature, there=(run if there is None else there.run).encoding)


def convert_recode(samples: Samples, new: Run) -> tuple[Recode | None, Truth]:
    """Return the function that converts answers of a store to those of `new`, and how their cost is known."""
    run = samples.stores[0].run
    if new.encoding == run.encoding:
        return None, "carried"

    def recode(answers: StoredAnswers, meter: FidelityMeter) -> dict[str, Array]:
        return encode_answers(torch.from_numpy(answers.scaled_logits), answers, new, meter)

    return recode, "measured" if run.encoding.exact and samples.measured else "unknown"


def _refuse_impossible(store: str, run: Run, wanted: Encoding) -> None:
    if wanted.from_hidden:
        why = (
            "cannot be re-encoded with another type of its numbers, only as another encoding"
            if run.encoding.from_hidden
            else "stores the input of the teacher's last layer, which a store of logits does not have"
        )
        raise MismatchError(f"{store}: encoding {wanted.name!r} {why}; generate with it")
    if run.encoding.drawn:
        raise MismatchError(
            f"{store}: random draws equal the teacher's softmax only in expectation, so another encoding would be "
            "wrong; generate with that encoding"
        )
    if run.encoding.sparse and not wanted.sparse:
        raise MismatchError(
            f"{store}: {run.encoding.name} has the sum of most classes alone, so that {wanted.name} would "
            "make them up, and be wrong at every other temperature; generate with it"
        )
    if others := [t for t in wanted.declared or () if t != run.temperature]:
        listed = ", ".join(f"{t:g}" for t in others)
        if run.encoding.sparse:
            why = "only the sum of its tail is known"
        elif not run.kept and not retemperable(run.combine.rule, len(run.members)):
            why = "it is a mean of probabilities, which exists at one temperature"
        else:
            return
        raise MismatchError(
            f"{store}: {why}: temperatures: expected only {run.temperature:g}, found {listed}; declare only "
            f"{run.temperature:g}"
        )
