"""Rows of a store in standard types, and their metadata.

Legend: B rows (of documents: labelled positions), M members, W numbers of a column.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from softlabel.convert.answers import NUMBERS
from softlabel.store.columns import Array
from softlabel.store.features import EMBEDDING, FeatureName
from softlabel.store.manifest import Run
from softlabel.store.reader import Store
from softlabel.store.stored_rows import StoredRows
from softlabel.store.strict_json import to_json


def describe(store: Store) -> dict[str, Any]:
    """Return the metadata of an export."""
    run = store.run
    return {
        "format": "softlabel-export",
        "store_id": store.manifest.store_id,
        "temperature": run.temperature,
        **({} if run.activation == "softmax" else {"activation": run.activation}),
        **({} if run.tokens is None else {"tokens": to_json(run.tokens)}),
        "combine": to_json(run.combine),
        "encoding": to_json(run.encoding),
        "num_classes": run.num_classes,
        "class_names": to_json(run.class_names),
        "members": to_json(run.members),
        "views": to_json(run.views),
        **({} if run.features is None else {"features": to_json(run.features)}),
        "fidelity": to_json(store.manifest.totals.fidelity),
    }


def plain(rows: StoredRows) -> dict[str, Array]:
    """Return name -> int32 or float32 (B, M, W), with M = 1 if members are combined, of the columns that were read."""
    run = rows.run
    found: dict[str, Array] = {name: _widen(rows, name) for name in _list_features(run) if name in rows.columns}
    if not any(column.name in rows.columns for column in run.label_columns):
        return found
    return found | _plain_labels(rows)


def _widen(rows: StoredRows, name: FeatureName) -> Array:
    values = rows.embedding if name == EMBEDDING else rows.attention
    return values.reshape(len(rows), rows.run.members_stored, -1)


def _list_features(run: Run) -> tuple[FeatureName, ...]:
    return () if run.features is None else run.features.names


def _plain_labels(rows: StoredRows) -> dict[str, Array]:
    run = rows.run
    if not run.encoding.sparse:
        scaled = rows.scaled_logits.reshape(-1, run.members_stored, run.num_classes)
        shifts = scaled.max(axis=-1, keepdims=True) if run.activation == "softmax" else np.float32(0)
        return {"scaled_logits": scaled - shifts}
    return {
        one.name: rows.columns[one.name]
        .astype(np.int32 if one.name == "index" else np.float32)
        .reshape(-1, run.members_stored, one.width // run.members_stored)
        for one in run.label_columns
        if one.name in rows.columns
    }


def widths_of(run: Run) -> dict[str, int]:
    """Return name -> W of the arrays of `plain`."""
    encoding, found = run.encoding, dict[str, int]()
    if encoding.sparse:
        found = {column.name: column.width for column in encoding.columns(num_classes=run.num_classes)}
    elif encoding.labels:
        found = {"scaled_logits": run.num_classes}
    for name in _list_features(run):
        one = run.embedding if name == EMBEDDING else run.attention
        assert one is not None
        found[name] = one.width
    return found


def needs_of(run: Run, name: str) -> list[str]:
    """Return the columns that an array of `plain` is made of."""
    if name == "scaled_logits":
        return [column.name for column in run.label_columns]
    return next((list(run.names_of(feature)) for feature in _list_features(run) if feature == name), [name])


def batches(
    store: Store, start: int = 0, stop: int | None = None, *, needs: list[str] | None = None
) -> Iterator[StoredRows]:
    """Yield rows `start` to `stop` in batches whose `plain` arrays are of bounded size, at least one row; `needs` are
    the columns."""
    held = sum(widths_of(store.run).values()) * store.run.members_stored
    limit = max(1, NUMBERS // held)
    for rows in store.stream(needs, start=start, stop=stop):
        answers = rows.spans.offsets.get("position", np.arange(len(rows) + 1))
        first = 0
        while first < len(rows):
            last = int(np.searchsorted(answers, answers[first] + limit, side="right")) - 1
            last = min(max(last, first + 1), len(rows))
            yield rows if last - first == len(rows) else rows.slice(first, last)
            first = last


def bar_of(total: int, progress: bool | None) -> "tqdm[Any]":
    """Return a progress bar; `progress` None shows it if standard error is a terminal."""
    disable = None if progress is None else not progress
    return tqdm(total=total, unit="row", unit_scale=True, desc="export", disable=disable, leave=False)
