"""Hard labels as a student learns them, class numbers or multi-hot, and whether data and store agree on them.

N samples, C classes.
"""

import numpy as np
from numpy.typing import NDArray

from softlabel.common.activation import Activation
from softlabel.common.multi_hot import MULTI_HOT, Labels, to_multi_hot
from softlabel.dataset import Source
from softlabel.store.manifest import Run
from softlabel.store.reader import Store


def read_hard_labels(store: Store, rows_B: NDArray[np.int64]) -> Labels:
    """The hard labels of rows of a store, as `StoredRows.hard_labels` has them."""
    if store.run.activation == "softmax":
        return store.labels[rows_B]
    return store.take(rows_B, [MULTI_HOT] if store.run.dataset.has_labels else []).hard_labels


def find_contradictions(ours: Labels, theirs: Labels) -> NDArray[np.bool_]:
    """Which samples have two hard labels that are known and differ, bool (N,); labels of one kind on both sides."""
    differ: NDArray[np.bool_] = (ours >= 0) & (theirs >= 0) & (ours != theirs)
    return differ if differ.ndim == 1 else np.any(differ, axis=1)


def choose_activation(source: Source, run: Run | None) -> Activation:
    """Of the outputs that the labels are about."""
    if run is not None:
        return run.activation
    return "softmax" if source.label_width is None else "sigmoid"


def convert_labels(labels_N: Labels, source: Source, run: Run | None) -> Labels:
    """int64 (N,), or, where a store or the labels themselves are about independent outputs, int8 (N, C)."""
    if run is not None and run.activation == "sigmoid":
        return to_multi_hot(labels_N, run.num_classes)
    return labels_N.astype(np.int64 if source.label_width is None else np.int8)
