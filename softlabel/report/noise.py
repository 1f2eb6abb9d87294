"""Hard labels that are likely wrong, by confident learning (Northcutt et al. 2021, arXiv:1911.00068).

Which classes a row may be counted in follows from thresholds that are known after the pass alone. Most rows follow from
two numbers then: the most probable class is the suggestion if it reaches its threshold, and no class is one if none can
reach the lowest threshold. The other rows are read again.

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
        suggestion_N = np.where(p_top_N >= threshold_C[top_N], top_N, -1)
        margin_N = p_label_N - p_top_N  # right where the label is not the most probable class
        second_N = np.minimum(p_top_N, 1 - p_top_N + _ROUNDING)
        open_N = np.flatnonzero((suggestion_N < 0) & (second_N >= np.nanmin(threshold_C)))
        for at, p_RC in self._read_again(rows_N, open_N):
            suggestion_N[at] = _suggest(p_RC, threshold_C)
            margin_N[at] = _find_margins(p_RC, labels_N[at])
        counted_N = suggestion_N >= 0
        numbers = labels_N[counted_N].astype(np.int64) * classes + suggestion_N[counted_N]
        pairs, counts = np.unique(numbers, return_counts=True)
        given, suggested = np.divmod(pairs, classes)
        wrong_N = np.flatnonzero(counted_N & (suggestion_N != labels_N))
        ranked = wrong_N[np.lexsort((rows_N[wrong_N], margin_N[wrong_N]))]
        self.ranking = Ranking(rows=rows_N[ranked], margins=margin_N[ranked], suggestions=suggestion_N[ranked])
        shown = ranked[:EXAMPLES]
        off = given != suggested
        largest = np.lexsort((suggested[off], given[off], -counts[off]))[:PAIRS]
        return Noise(
            share=_estimate_share(given, suggested, counts, labelled_C),
            candidates=len(wrong_N),
            judged=len(labels_N),
            thresholds=tuple(None if np.isnan(one) else float(one) for one in threshold_C),
            pairs=tuple(
                (int(label), int(other), int(count))
                for label, other, count in zip(
                    given[off][largest], suggested[off][largest], counts[off][largest], strict=True
                )
            ),
            examples=examples.read(
                rows_N[shown].tolist(), scores=margin_N[shown].tolist(), suggestions=suggestion_N[shown].tolist()
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


def _suggest(p_RC: NDArray[np.float32], threshold_C: NDArray[np.float64]) -> I64:
    """The most probable of the classes that reach their threshold; -1 where none does."""
    reaching_RC = p_RC >= threshold_C
    best_R = np.where(reaching_RC, p_RC, -1.0).argmax(axis=1)
    return np.where(reaching_RC.any(axis=1), best_R, -1)


def _find_margins(p_RC: NDArray[np.float32], labels_R: NDArray[np.integer]) -> NDArray[np.float32]:
    rows_R = np.arange(len(labels_R))
    p_label_R = p_RC[rows_R, labels_R]
    others_RC = p_RC.copy()
    others_RC[rows_R, labels_R] = -1.0
    found: NDArray[np.float32] = p_label_R - np.maximum(others_RC.max(axis=1), 0.0)  # 0: there is one class alone
    return found


def _estimate_share(given: I64, suggested: I64, counts: I64, labelled_C: I64) -> float:
    """The part off the diagonal of the joint: of each label's rows the share that was counted elsewhere."""
    counted_C = np.bincount(given, counts, minlength=len(labelled_C))
    wrong_C = np.bincount(given[given != suggested], counts[given != suggested], minlength=len(labelled_C))
    used_C = counted_C > 0
    if not used_C.any():
        return 0.0
    return float((labelled_C[used_C] * wrong_C[used_C] / counted_C[used_C]).sum() / labelled_C[used_C].sum())
