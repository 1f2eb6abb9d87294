"""The teachers' answers of stored rows, in pieces of bounded decoded size: one answer a row, or a labelled position.

B rows, P labelled positions, C classes, M members, W elements of a column; R = B * M or P * M.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softlabel.labels.row_seeds import make_row_seeds
from softlabel.store.columns import Array
from softlabel.store.manifest import Run
from softlabel.store.stored_rows import StoredRows

NUMBERS = 1 << 20  # decoded logits held at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredAnswers:
    """Consecutive answers of a store of `run`.

    Attributes:
        run: of the store.
        columns: the encoding's, (B, W) or (P, W).
        extra: what the store's rows share.
        seeds: of random draws, int64 (R,) for the new store's members; None: it draws nothing.
    """

    run: Run
    columns: Mapping[str, Array]
    extra: Mapping[str, Array] | None
    seeds: NDArray[np.int64] | None

    @property
    def scaled_logits(self) -> Array:
        """As `StoredRows.scaled_logits`."""
        run = self.run
        return run.encoding.decode(
            self.columns,
            num_classes=run.num_classes,
            temperature=run.temperature,
            members=run.members_stored,
            kept=run.kept,
            extra=self.extra,
        )


def iter_answers(rows: StoredRows, new: Run) -> Iterator[StoredAnswers]:
    """Yield the answers of rows, with the seeds that a store of `new` draws them from."""
    run, members = rows.run, new.members_stored
    columns = {column.name: rows.columns[column.name] for column in run.label_columns}
    seeds = _make_seeds(rows, new) if new.encoding.drawn else None
    count = len(next(iter(columns.values())))
    limit = max(1, NUMBERS // (run.num_classes * run.members_stored))
    for start in range(0, count, limit):
        part = slice(start, start + limit)
        yield StoredAnswers(
            run=run,
            columns={name: array[part] for name, array in columns.items()},
            extra=rows.extra,
            seeds=None if seeds is None else seeds[start * members : (start + limit) * members],
        )


def _make_seeds(rows: StoredRows, new: Run) -> NDArray[np.int64]:
    """Return the seeds of all answers of rows, which are of one view."""
    assert rows.key_data is not None
    (view,) = np.unique(rows.views).tolist()
    spots = None if new.tokens is None else (rows.positions, rows.places)
    members = range(new.members_stored)
    return make_row_seeds(rows.key_data.get(), view, seed=new.views.seed, members=members, spots=spots)
