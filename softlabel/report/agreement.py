"""How often the labels agree with the hard labels. Legend: R rows of a block, C classes, V views."""

import numpy as np

from softlabel.report.figures import Absent, Agreement
from softlabel.report.judge import TOP
from softlabel.report.probabilities import LabelReader
from softlabel.report.store_pass import Block
from softlabel.store.encodings import TopK

NO_LABELS = "no sample of the store has a hard label; label data that has them to compare the two"


def explain_drawn(what: str) -> str:
    return f"the store holds classes drawn at random, which do not determine {what}; generate with another --encoding"


class AgreementMeter:
    """Sums over all rows with a hard label; see `Meter`."""

    def __init__(self, reader: LabelReader) -> None:
        self._reader = reader
        classes, views = reader.run.num_classes, reader.run.views.count
        self.labelled = self.in_top5 = 0
        self._rows_C, self._right_C = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
        self._p_label_C = np.zeros(classes)
        self._rows_V, self._right_V = np.zeros(views, np.int64), np.zeros(views, np.int64)

    def add(self, block: Block) -> None:
        if (sums := block.sigmoids) is not None:
            self.labelled += int((block.labels >= 0).any(axis=1).sum())
            self._rows_C += sums.known
            self._right_C += sums.right
            self._p_label_C += sums.p_label
            self._rows_V[block.view] += sums.known.sum()
            self._right_V[block.view] += sums.right.sum()
            return
        labelled_R = block.labels >= 0
        count, classes = int(labelled_R.sum()), len(self._rows_C)
        self.labelled += count
        if (judged := block.judged) is None or not count:
            return
        labels_R = block.labels[labelled_R]
        right_R = judged.top[labelled_R] == labels_R
        self.in_top5 += int(judged.in_top5.sum())
        self._rows_C += np.bincount(labels_R, minlength=classes)
        self._right_C += np.bincount(labels_R[right_R], minlength=classes)
        self._p_label_C += np.bincount(labels_R, judged.p_label[labelled_R], minlength=classes)
        self._rows_V[block.view] += count
        self._right_V[block.view] += int(right_R.sum())

    def result(self) -> Agreement | Absent:
        if not self.labelled:
            return Absent(reason=NO_LABELS)
        if self._reader.is_drawn:
            return Absent(reason=explain_drawn("the most probable one"))
        run, encoding = self._reader.run, self._reader.run.encoding
        # Of fewer named classes the fifth is not known.
        named = encoding.kept(run.num_classes) if isinstance(encoding, TopK) else run.num_classes
        has_top5 = run.activation == "softmax" and run.num_classes > TOP <= named
        return Agreement(
            labelled=self.labelled,
            accuracy=int(self._right_C.sum()) / int(self._rows_C.sum()),
            top5=self.in_top5 / self.labelled if has_top5 else None,
            class_rows=tuple(self._rows_C.tolist()),
            class_accuracy=divide(self._right_C, self._rows_C),
            class_p_label=divide(self._p_label_C, self._rows_C),
            view_accuracy=divide(self._right_V, self._rows_V),
        )


def divide(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, ...]:
    """Means, None where nothing was counted."""
    return tuple(float(one) / count if count else None for one, count in zip(sums, counts.tolist(), strict=True))
