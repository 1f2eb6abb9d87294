"""Hard labels that are likely wrong, by confident learning (Northcutt et al. 2021, arXiv:1911.00068).

Which classes a row may be counted in follows from thresholds that are known after the pass alone. Most rows follow from
two numbers then: the most probable class is the suggestion if it reaches its threshold, and no class is one if none can
reach the lowest threshold. The other rows are read again, and then all rows whose most probable class is not their
label, of which as many are listed as the counts estimate.

Legend: N judged rows, R rows of a block, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softlabel.report.agreement import NO_LABELS, explain_drawn
from softlabel.report.examples import ExampleReader
from softlabel.report.figures import Absent, Noise
from softlabel.report.judge import Judge
from softlabel.report.probabilities import LabelReader
from softlabel.report.store_pass import Block
from softlabel.store.reader import Store

I64 = NDArray[np.int64]
PAIRS, EXAMPLES = 50, 400
_MOST_KEPT = 1 << 22  # numbers of rows that may be listed
_ROUNDING = 1e-5  # by which probabilities of a row may add up to more than 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranking:
    """All candidates of `Noise`, the most likely wrong one first: rows of the store int64 (N,), margins float32 (N,),
    suggested classes int64 (N,)."""

    rows: I64
    margins: NDArray[np.float32]
    suggestions: I64


class NoiseMeter:
    """Four numbers of every labelled row of view 0; see `Meter`."""

    def __init__(self, store: Store, reader: LabelReader) -> None:
        self._store, self._reader = store, reader
        self._parts: list[tuple[NDArray[np.generic], ...]] = []
        self.labelled = 0
        self.ranking: Ranking | None = None  # after `result`

    def add(self, block: Block) -> None:
        if block.view:
            return
        self.labelled += int((block.labels >= 0).sum())
        if (judged := block.judged) is not None:
            chosen_R = np.flatnonzero(block.labels >= 0)
            labels_R = block.labels[chosen_R].astype(np.int32)
            numbers = (judged.top[chosen_R], judged.p_top[chosen_R], judged.p_label[chosen_R])
            self._parts.append((block.first + chosen_R, labels_R, *numbers))

    def result(self, examples: ExampleReader) -> Noise | Absent:
        if not self.labelled:
            return Absent(reason=NO_LABELS)
        if self._reader.run.activation == "sigmoid":
            return Absent(
                reason="confident learning compares the one hard label of a sample with the other classes, and here a "
                "sample may have several; see the agreement of each class"
            )
        if self._reader.is_drawn:
            return Absent(reason=explain_drawn("the probability of a label"))
        columns = zip(*self._parts, strict=True)
        rows_N, labels_N, top_N, p_top_N, p_label_N = (np.concatenate(column) for column in columns)
        self._parts.clear()
        classes = self._reader.run.num_classes
        labelled_C = np.bincount(labels_N, minlength=classes)
        with np.errstate(invalid="ignore"):
            threshold_C = np.bincount(labels_N, p_label_N, minlength=classes) / labelled_C  # NaN without rows
        counted_N = np.where(p_top_N >= threshold_C[top_N], top_N, -1)
        second_N = np.minimum(p_top_N, 1 - p_top_N + _ROUNDING)
        open_N = np.flatnonzero((counted_N < 0) & (second_N >= np.nanmin(threshold_C)))
        for at, p_RC in self._read_again(rows_N, open_N):
            counted_N[at] = _choose_class(p_RC, threshold_C)
        known_N = counted_N >= 0
        pairs, counts = np.unique(labels_N[known_N].astype(np.int64) * classes + counted_N[known_N], return_counts=True)
        given, suggested = np.divmod(pairs, classes)
        # Where the label is the most probable class no other one is more probable than it.
        doubtful_N = np.flatnonzero(top_N != labels_N)
        quotas = _Quotas(given, suggested, counts, labelled_C)
        for at, p_RC in self._read_again(rows_N, doubtful_N):
            quotas.add(at, labels_N[at], p_RC)
        wrong_N, suggestion_N = quotas.result()
        order = np.lexsort((rows_N[wrong_N], p_label_N[wrong_N]))
        wrong_N, suggestion_N = wrong_N[order], suggestion_N[order]
        margin_N = p_label_N[wrong_N] - p_top_N[wrong_N]
        self.ranking = Ranking(rows=rows_N[wrong_N], margins=margin_N, suggestions=suggestion_N)
        listed, counts = np.unique(labels_N[wrong_N].astype(np.int64) * classes + suggestion_N, return_counts=True)
        frequent = np.lexsort((listed, -counts))[:PAIRS]
        return Noise(
            share=quotas.share,
            candidates=len(wrong_N),
            judged=len(labels_N),
            thresholds=tuple(None if np.isnan(one) else float(one) for one in threshold_C),
            pairs=tuple(
                (*divmod(int(pair), classes), int(count))
                for pair, count in zip(listed[frequent], counts[frequent], strict=True)
            ),
            examples=examples.read(
                rows_N[wrong_N[:EXAMPLES]].tolist(),
                scores=margin_N[:EXAMPLES].tolist(),
                suggestions=suggestion_N[:EXAMPLES].tolist(),
            ),
        )

    def _read_again(self, rows_N: I64, open_N: I64) -> Iterator[tuple[I64, NDArray[np.float32]]]:
        """Yield (places in `rows_N`, their probabilities (R, C)) of some rows, in the order of the store."""
        judge, first = Judge(self._reader), 0
        wanted = rows_N[open_N]
        for record in self._store.shards:
            low, high = np.searchsorted(wanted, [first, first + record.rows])
            first += record.rows
            if low == high:
                continue
            start = int(wanted[low])
            for rows in self._store.stream(self._reader.columns, start=start, stop=int(wanted[high - 1]) + 1):
                low, high = np.searchsorted(wanted, [start, start + len(rows)])
                picked = wanted[low:high] - start
                columns = {name: rows.columns[name][picked] for name in self._reader.columns}
                done = low
                for p_RC in judge.probabilities(columns, len(picked)):
                    yield open_N[done : done + len(p_RC)], p_RC
                    done += len(p_RC)
                start += len(rows)


class _Quotas:
    """How many rows of each label are listed for each other class, and the rows that are.

    Args:
        given, suggested: label and class of each pair that rows were counted in, ascending, int64 (P,).
        counts: of the pairs, int64 (P,).
        labelled_C: rows of each label.
    """

    def __init__(self, given: I64, suggested: I64, counts: I64, labelled_C: I64) -> None:
        self._classes = len(labelled_C)
        counted_C = np.bincount(given, counts, minlength=self._classes)
        estimated = counts * labelled_C[given] / counted_C[given]
        off, used_C = given != suggested, counted_C > 0
        self.share = float(estimated[off].sum() / labelled_C[used_C].sum()) if used_C.any() else 0.0
        quota = np.rint(estimated[off]).astype(np.int64)
        self._pairs = (given * self._classes + suggested)[off][quota > 0]
        self._quota = quota[quota > 0]
        self._found: list[tuple[I64, NDArray[np.float32], I64]] = []  # pair, p_class - p_label, place of the row
        self._size = 0

    def add(self, at_R: I64, labels_R: NDArray[np.integer], p_RC: NDArray[np.float32]) -> None:
        """Take rows: their places, labels and probabilities."""
        if not len(self._pairs):
            return
        excess_RC = p_RC - p_RC[np.arange(len(at_R)), labels_R][:, None]
        rows, others = np.nonzero(excess_RC > 0)
        numbers = labels_R[rows].astype(np.int64) * self._classes + others
        places = np.minimum(np.searchsorted(self._pairs, numbers), len(self._pairs) - 1)
        kept = self._pairs[places] == numbers
        self._found.append((places[kept], excess_RC[rows, others][kept], at_R[rows[kept]]))
        self._size += int(kept.sum())
        if self._size > _MOST_KEPT:
            self._found = [self._choose()]
            self._size = len(self._found[0][0])

    def _choose(self) -> tuple[I64, NDArray[np.float32], I64]:
        """Return of each pair the rows of largest excess, as many as its quota."""
        pairs, excess, places = (np.concatenate(one) for one in zip(*self._found, strict=True))
        order = np.lexsort((places, -excess, pairs))
        pairs, excess, places = pairs[order], excess[order], places[order]
        rank = np.arange(len(pairs)) - np.searchsorted(pairs, pairs)
        kept = rank < self._quota[pairs]
        return pairs[kept], excess[kept], places[kept]

    def result(self) -> tuple[I64, I64]:
        """Return places of the listed rows, ascending, and of each the class that it is most likely of."""
        if not self._found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        pairs, excess, places = self._choose()
        order = np.lexsort((pairs, -excess, places))
        listed, first = np.unique(places[order], return_index=True)
        return listed, self._pairs[pairs[order][first]] % self._classes


def _choose_class(p_RC: NDArray[np.float32], threshold_C: NDArray[np.float64]) -> I64:
    """The most probable of the classes that reach their threshold; -1 where none does."""
    reaching_RC = p_RC >= threshold_C
    best_R = np.where(reaching_RC, p_RC, -1.0).argmax(axis=1)
    return np.where(reaching_RC.any(axis=1), best_R, -1)
