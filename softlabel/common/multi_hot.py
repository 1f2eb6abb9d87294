"""Hard labels of samples that may have several classes at once: for each class 1, 0, or -1 where it is not known.

N samples, C classes.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

UNKNOWN = -1
# The column of a store that holds them.
MULTI_HOT = "multi_hot"

# int64 (N,) or int8 (N, C).
Labels: TypeAlias = NDArray[np.integer[Any]]


def is_labelled(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Which samples have a hard label, bool (N,): of class numbers (N,), or of multi-hot labels (N, C)."""
    known = labels >= 0
    found: NDArray[np.bool_] = known if labels.ndim == 1 else np.any(known, axis=1)
    return found


def one_label(labels: Labels, row: int) -> "int | NDArray[np.int8]":
    """The label of one sample as a `Sample` has it: a class number, or int8 (C,)."""
    return int(labels[row]) if labels.ndim == 1 else labels[row].astype(np.int8)


def to_multi_hot(labels: NDArray[Any], num_classes: int) -> NDArray[np.int8]:
    """Hard labels for independent outputs, int8 (N, C).

    Args:
        labels: multi-hot (N, C), which stay as they are; or class numbers (N,), negative for none: the class is 1 and
            every other one 0. Of one output the number itself is the label, 0 or 1.
        num_classes: C.
    """
    if labels.ndim == 2:
        return labels.astype(np.int8, copy=False)
    if num_classes == 1:
        return np.where(labels >= 0, labels, UNKNOWN).astype(np.int8)[:, None]
    hot_NC: NDArray[np.int8] = (labels[:, None] == np.arange(num_classes)).astype(np.int8)
    hot_NC[labels < 0] = UNKNOWN
    return hot_NC


def stack_labels(labels: Sequence[Any], width: int | None) -> Labels:
    """The hard labels of several samples, int64 (N,), or int8 (N, C) where they are multi-hot over `width` classes."""
    if width is None:
        return np.array(labels, dtype=np.int64)
    unknown = np.full(width, UNKNOWN, np.int8)  # for a sample whose source has no labels at all
    rows = [unknown if isinstance(label, int) else label for label in labels]
    return np.array(rows, dtype=np.int8).reshape(len(rows), width)
