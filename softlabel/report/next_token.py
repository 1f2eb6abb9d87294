"""The teacher against the next tokens of documents. Legend: B documents, P positions, C tokens of the vocabulary."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from softlabel.report.agreement import explain_drawn
from softlabel.report.document_figures import ContextRange, NextToken, NextTokenAgreement
from softlabel.report.document_pass import DocumentBlock
from softlabel.report.figures import Absent
from softlabel.report.probabilities import LabelReader
from softlabel.report.shortlist import Shortlist

I64 = NDArray[np.int64]
LISTED = 50  # tokens
_RANGES = 32  # of contexts and lengths, each twice as long as the one before
_ENOUGH = 20  # times that a token came, so that its mean NLL says something


def number_range(values: I64) -> I64:
    """The number of the range that positive numbers lie in: 1, 2 to 3, 4 to 7, ..."""
    found: I64 = np.floor(np.log2(values)).astype(np.int64)
    return found


def list_ranges() -> list[tuple[int, int]]:
    """(First, last) number of each range."""
    return [(1 << number, (2 << number) - 1) for number in range(_RANGES)]


class NextTokenMeter:
    """Sums over all predicted positions, and the documents with the highest mean NLL; see `DocumentMeter`."""

    def __init__(self, reader: LabelReader, *, documents: int) -> None:
        self._reader, classes = reader, reader.run.num_classes
        self._count_C, self._right_C, self._nats_C = (np.zeros(classes, kind) for kind in (np.int64, np.int64, float))
        self._of_range = np.zeros((3, _RANGES))  # positions, nats, right
        self._named = self._ruled_out = 0
        self.surprising = Shortlist(documents)

    def add(self, block: DocumentBlock) -> None:
        if (judged := block.judged) is None:
            return
        chosen_P = np.flatnonzero(block.predicted)
        next_P, nll_P = block.next[chosen_P], judged.nll[chosen_P]
        right_P = judged.top[chosen_P] == next_P
        classes = len(self._count_C)
        self._count_C += np.bincount(next_P, minlength=classes)
        self._right_C += np.bincount(next_P[right_P], minlength=classes)
        self._nats_C += np.bincount(next_P, nll_P, minlength=classes)
        self._named += int(judged.named[chosen_P].sum())
        self._ruled_out += int(np.isposinf(nll_P).sum())
        range_P = number_range(block.place[chosen_P] + 1)
        for place, weights in enumerate((None, nll_P, right_P)):
            self._of_range[place] += np.bincount(range_P, weights, minlength=_RANGES)
        count_B = np.bincount(block.document[chosen_P], minlength=len(block))
        nats_B = np.bincount(block.document[chosen_P], nll_P, minlength=len(block))
        has_B = np.flatnonzero(count_B)
        self.surprising.add(-nats_B[has_B] / count_B[has_B], block.first + has_B)

    def result(self, name: Callable[[int], str]) -> NextTokenAgreement | Absent:
        """What was found.

        Args:
            name: of a token by its id.
        """
        if self._reader.is_drawn:
            return Absent(reason=explain_drawn("how probable the next token is"))
        if not (predicted := int(self._count_C.sum())):
            return Absent(reason="no position that counts is followed by a token; label longer documents")
        nats = float(self._nats_C.sum())
        least = min(_ENOUGH, int(self._count_C.max()))

        def describe(number: int) -> NextToken:
            count = int(self._count_C[number])
            return NextToken(
                id=number,
                token=name(number),
                count=count,
                nll=float(self._nats_C[number]) / count,
                accuracy=int(self._right_C[number]) / count,
                share=float(self._nats_C[number]) / nats if nats else 0.0,
            )

        there_C = np.flatnonzero(self._count_C >= least)
        mean_C = self._nats_C[there_C] / self._count_C[there_C]
        surprising = there_C[np.lexsort((there_C, -mean_C))][:LISTED]
        costly = np.lexsort((np.arange(len(self._nats_C)), -self._nats_C))[:LISTED]
        nll = nats / predicted
        share_C = self._count_C[self._count_C > 0] / predicted
        return NextTokenAgreement(
            predicted=predicted,
            ruled_out=self._ruled_out,
            nll=nll,
            perplexity=math.exp(nll) if nll < 700 else math.inf,
            frequency_nll=-float((share_C * np.log(share_C)).sum()),
            accuracy=int(self._right_C.sum()) / predicted,
            named=self._named / predicted,
            by_context=tuple(
                ContextRange(first=first, last=last, positions=int(count), nll=nats / count, accuracy=right / count)
                for (first, last), (count, nats, right) in zip(list_ranges(), self._of_range.T.tolist(), strict=True)
                if count
            ),
            surprising=tuple(describe(one) for one in surprising.tolist()),
            least=least,
            costly=tuple(describe(one) for one in costly.tolist() if self._count_C[one]),
        )
