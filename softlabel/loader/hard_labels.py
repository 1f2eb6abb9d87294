"""Hard labels as a student learns them, class numbers or multi-hot, and whether data and store agree on them.

N samples, C classes.
"""

import numpy as np
from numpy.typing import NDArray

from softlabel.common.activation import Activation
from softlabel.common.multi_hot import MULTI_HOT, Labels, to_multi_hot
from softlabel.dataset import Source
from softlabel.errors import MismatchError
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


def check_classes(source: Source, run: Run) -> None:
    """Raises MismatchError where the classes of the data are not those of the store, or are in another order."""
    if not run.encoding.labels:  # of embeddings alone
        return
    names = source.class_names
    if source.has_labels and source.label_width is not None:
        if run.activation == "softmax":
            raise MismatchError(
                f"labels: {source.name} has several classes at once, the store holds a softmax over the classes; use "
                "labels of one class each, or --ignore-labels to train on the soft labels alone"
            )
        if source.label_width != run.num_classes:
            raise MismatchError(
                f"classes: the store has {run.num_classes}, the labels of {source.name} {source.label_width}; use the "
                "labels of this data, or --ignore-labels to train on the soft labels alone"
            )
    if not source.has_labels or names is None or not run.encoding.labels:
        return
    if run.num_classes == 1 and len(names) == 2:
        names = names[1:]  # one output says whether it is the second of two classes
    if len(names) != run.num_classes:
        raise MismatchError(
            f"classes: the store has {run.num_classes}, {source.name} has {len(names)}; use the labels of this data, "
            "or --ignore-labels to train on the soft labels alone"
        )
    if run.class_names is not None and names != run.class_names and set(names) == set(run.class_names):
        place = next(i for i, (one, other) in enumerate(zip(names, run.class_names, strict=True)) if one != other)
        raise MismatchError(
            f"classes: in another order; class {place} is {run.class_names[place]!r} in the store and "
            f"{names[place]!r} in {source.name}; bring them into one order"
        )
