"""Rows that are worth a look, read again with their keys. Legend: R rows, C classes, M members, V views."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softlabel.report.figures import Example
from softlabel.report.probabilities import LabelReader
from softlabel.store.reader import Store
from softlabel.store.sample_rows import sample_rows
from softlabel.store.stored_rows import StoredRows

I64 = NDArray[np.int64]


class RowFinder:
    """Finds the row of a sample in a view, and the sample of a row, from the plan of the shards."""

    def __init__(self, store: Store) -> None:
        self._firsts: list[int] = []  # row number of each shard
        self._by_view: dict[int, list[tuple[int, int]]] = {}  # first sample, number of the shard
        # Of each shard: its view, the positions of its samples in the dataset, and which of them are bad.
        self._shards: list[tuple[int, int, int, I64]] = []
        first = 0
        for record in store.shards:
            plan = store.run.shard(record.number)
            bad = np.array(sorted(row.index for row in record.bad), np.int64)
            self._by_view.setdefault(plan.view, []).append((plan.start, len(self._shards)))
            self._firsts.append(first)
            self._shards.append((plan.view, plan.start, plan.stop, bad))
            first += record.rows
        for starts in self._by_view.values():
            starts.sort()

    def find_sample(self, row: int) -> tuple[int, int]:
        """(Position in the dataset, view) of a row."""
        number = bisect_right(self._firsts, row) - 1
        view, start, _, bad = self._shards[number]
        position = start + row - self._firsts[number]
        for index in bad.tolist():
            position += index <= position
        return position, view

    def find_row(self, sample: int, view: int) -> int | None:
        """The row of a sample in a view; None if it has none."""
        starts = self._by_view.get(view, [])
        place = bisect_right(starts, (sample, len(self._shards))) - 1
        if place < 0:
            return None
        _, start, stop, bad = self._shards[starts[place][1]]
        if sample >= stop or sample in bad:
            return None
        return self._firsts[starts[place][1]] + sample - start - int((bad < sample).sum())


class ExampleReader:
    """Makes examples of rows."""

    def __init__(self, store: Store, reader: LabelReader) -> None:
        self._store, self._reader = store, reader
        self._finder = RowFinder(store)

    def read(
        self, rows: Sequence[int], *, scores: Sequence[float], suggestions: Sequence[int] | None = None
    ) -> tuple[Example, ...]:
        """Examples in the given order.

        Args:
            rows: numbers in the store, each once.
            scores: one a row, kept as `Example.score`.
            suggestions: a class for each row; None: the most probable one.
        """
        if not len(rows):
            return ()
        order = np.argsort(np.asarray(rows, np.int64), kind="stable")
        found = self._take(np.asarray(rows, np.int64)[order])
        p_RMC = self._reader.read_member_probabilities(found.columns, self._reader.judged)
        p_RC = self._reader.combine(p_RMC).numpy()
        chosen_R = p_RC.argmax(axis=1) if suggestions is None else np.asarray(suggestions, np.int64)[order]
        labels_R = self._choose_labels(found, chosen_R)
        members_R = (p_RMC.numpy().argmax(axis=2) == chosen_R[:, None]).sum(axis=1)
        views_R = self._count_views(np.asarray(rows, np.int64)[order], chosen_R)
        keys = found.keys
        made: dict[int, Example] = {}
        for place, at in enumerate(order.tolist()):
            label = int(labels_R[place]) if labels_R[place] >= 0 else None
            made[at] = Example(
                key=keys[place],
                view=int(found.views[place]),
                label=label,
                suggestion=int(chosen_R[place]),
                p_label=None if label is None else float(p_RC[place, label]),
                p_suggestion=float(p_RC[place, chosen_R[place]]),
                score=float(scores[at]),
                members_agreeing=int(members_R[place]) if self._reader.run.kept else None,
                views_agreeing=None if views_R is None else int(views_R[place]),
            )
        return tuple(made[at] for at in range(len(rows)))

    def _take(self, rows: I64) -> StoredRows:
        names = ["key", "label", *(column.name for column in self._store.run.columns)]
        return sample_rows(self._store, rows, names)

    def _choose_labels(self, found: StoredRows, chosen_R: I64) -> I64:
        """Class numbers; of several labels at once the suggestion if it is one, else the first, negative for none."""
        labels = found.hard_labels
        if labels.ndim == 1:
            return np.asarray(labels, np.int64)
        rows_R = np.arange(len(labels))
        first_R = np.where((labels == 1).any(axis=1), (labels == 1).argmax(axis=1), -1)
        return np.where(labels[rows_R, chosen_R] == 1, chosen_R, first_R).astype(np.int64)

    def _count_views(self, rows: I64, chosen_R: I64) -> I64 | None:
        """In how many views the class is the most probable one; None for a single view."""
        if (views := self._store.run.views.count) == 1:
            return None
        wanted: dict[int, int] = {}
        for place, row in enumerate(rows.tolist()):
            sample, _ = self._finder.find_sample(row)
            beside = (self._finder.find_row(sample, view) for view in range(views))
            wanted.update({other: place for other in beside if other is not None})
        others = np.array(sorted(wanted), np.int64)
        found = sample_rows(self._store, others, list(self._reader.columns))
        top = self._reader.read_probabilities(found.columns, self._reader.judged).numpy().argmax(axis=1)
        places = np.array([wanted[other] for other in others.tolist()], np.int64)
        counts: I64 = np.bincount(places[top == chosen_R[places]], minlength=len(rows)).astype(np.int64)
        return counts
